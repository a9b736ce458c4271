"""Files and folders that appear complete or not at all: written beside, then renamed.

One rule for everything that the package writes:

- What is named is made, and no folder above it. One that is missing is an error: more often than a
  wish it is a slip, or a disk that is not mounted, and gigabytes would go to another one.
- A file that is there is replaced in one step and keeps its permissions; a link stays, and the file
  that it leads to is replaced. A folder that holds something is never replaced.
- Where writing fails, what was there is there still, and nothing half-written.
- The commands ask for all of this before any work, by the callbacks of `cli/options.py`.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LlamaFastError

Raised = type[LlamaFastError]
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def given_path(path: object, needed: str, error: Raised = LlamaFastError) -> Path:
    """Returns a caller's path as one. Raises `error` for what names no file and no folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        raise error(f"the path is {path!r}; give {needed}")
    return Path(path)


def why(error: BaseException | None) -> str:
    """Returns why the system or a library could not write, without the path."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [repr(error)])[0]


def check_file(target: str | Path, option: str = "", error: Raised = LlamaFastError) -> Path:
    """Returns the file that is going to be written: `target`, or where that link leads to.

    option: of the command line, for the text of the error. Raises `error` where there is something
    other than a file that may be replaced, and where its folder is missing or takes no files.
    """
    given = given_path(target, "the name of a file", error)
    found = _led_to(given)
    cannot = f"{_named(given, option)} cannot be written: "
    if found.is_dir():
        raise error(f"{cannot}this is a folder; give the name of a file")
    if _is_open_here(given):
        raise error(f"{cannot}this is what a program has open; give the name of a file")
    if found.exists() and not found.is_file():
        raise error(f"{cannot}this is a device; give the name of a file")
    if found.exists() and not os.access(found, os.W_OK):
        raise error(f"{cannot}the file there may only be read; change that, or give another file")
    _check_takes(found.parent, cannot, "file", error)
    return found.absolute()


def check_new_folder(target: str | Path, option: str = "", error: Raised = LlamaFastError) -> Path:
    """Returns the folder that is going to be made: `target`, or where that link leads to.

    option: of the command line, for the text of the error. Raises `error` where there is something
    other than an empty folder, and where the folder above is missing or takes nothing new.
    """
    given = given_path(target, "a new folder", error)
    found = _led_to(given)
    if found.exists() and not (found.is_dir() and not any(found.iterdir())):
        kind = "a folder that is not empty" if found.is_dir() else "a file"
        raise error(f"{_named(given, option)} is {kind}; give a new folder, or remove it first")
    _check_takes(found.parent, f"{_named(given, option)} cannot be written: ", "folder", error)
    return found.absolute()


def check_folder(folder: str | Path, option: str = "", error: Raised = LlamaFastError) -> Path:
    """Returns the folder that files are going to be added to, which may be there already.

    option: of the command line, for the text of the error. Raises `error` where there is something
    else, or nothing can be written, and where it is missing and so is the folder above.
    """
    given = given_path(folder, "a folder", error)
    cannot = f"{_named(given, option)} cannot be written: "
    if given.exists() and not given.is_dir():
        raise error(f"{cannot}this is a file; give a folder")
    _check_takes(given if given.is_dir() else given.parent, cannot, "folder", error)
    return given


def make_folder(folder: str | Path, error: Raised = LlamaFastError) -> Path:
    """Returns a folder that files are added to; it is made where it is missing. Raises `error` as
    `check_folder` does."""
    given = check_folder(folder, error=error)
    try:
        given.mkdir(exist_ok=True)
    except OSError as cause:
        raise error(f"{given} cannot be written: {why(cause)}; give another folder") from cause
    return given


def _named(given: Path, option: str) -> str:
    return f"{option} {given}" if option else f"{given}"


def _led_to(given: Path) -> Path:
    return Path(os.path.realpath(given)) if given.is_symlink() else given


def _is_open_here(given: Path) -> bool:
    """Whether it is a link such as /dev/stdout: it leads to a file, but that is written to
    already."""
    places = (given.parent, Path(os.readlink(given)).parent) if given.is_symlink() else ()
    return any(os.path.realpath(place).startswith("/proc/") for place in places)


def _check_takes(folder: Path, cannot: str, kind: str, error: Raised) -> None:
    """By a file that is made and removed: `os.access` says yes of /proc, and of all to root."""
    if not folder.is_dir():
        if folder.exists():
            raise error(f"{cannot}{folder} is a file and no folder; give another {kind}")
        raise error(f"{cannot}the folder {folder} does not exist; make it, or give another {kind}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as cause:
        reason = f"nothing new can be written to {folder} ({why(cause)})"
        raise error(f"{cannot}{reason}; give another {kind}") from None


def _beside(target: Path) -> Path:
    """A new name in the target's own folder, so that the rename stays within one filesystem; of a
    long name only the beginning, since names are limited."""
    return target.parent / f".{target.name[:40]}.{secrets.token_hex(4)}.partial"


def _sync(path: Path) -> None:
    """Force a file to the disk: some filesystems report that they are full only now."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _reported(
    target: str | Path,
    partial: Path,
    kind: str,
    error: Raised,
    fails_with: tuple[type[Exception], ...],
) -> Iterator[None]:
    """Turns what the system says of writing into `error`; of other files it stays as it is."""
    kept = kind == "file" and os.path.exists(target)
    try:
        yield
    except (OSError, *fails_with) as cause:
        named = getattr(cause, "filename", None)
        if named is not None and not str(named).startswith(str(partial)):
            raise
        room = "make room, or " if getattr(cause, "errno", None) in _FULL else ""
        left = "The file that was there is unchanged" if kept else "Nothing was left behind"
        raise error(
            f"{target} cannot be written: {why(cause)}; {room}give another {kind}. {left}"
        ) from cause


@contextmanager
def atomic_file(
    target: str | Path,
    error: Raised = LlamaFastError,
    *,
    fails_with: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """Yield a path to write to; on success it replaces `target`, on any exception it is removed.

    An existing target is replaced in one step. Raises `error` as `check_file` does, and where
    writing fails: by an OSError, or by what a library makes of one (`fails_with`).
    """
    found = check_file(target, error=error)
    partial = _beside(found)
    with _reported(target, partial, "file", error, fails_with):
        try:
            yield partial
            _sync(partial)
            if found.exists():
                shutil.copymode(found, partial)
            os.replace(partial, found)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(target: str | Path, error: Raised = LlamaFastError) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `target`, on any exception it goes.

    Raises `error` as `check_new_folder` does, and where writing fails.
    """
    found = check_new_folder(target, error=error)
    partial = _beside(found)
    with _reported(target, partial, "folder", error, ()):
        partial.mkdir()
        try:
            yield partial
            for path in partial.rglob("*"):
                if path.is_file():
                    _sync(path)
            if found.is_dir():
                shutil.copymode(found, partial)
                found.rmdir()
            os.rename(partial, found)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
