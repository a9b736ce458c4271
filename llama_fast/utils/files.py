"""Files and folders that appear complete or not at all: written beside, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LlamaFastError


def given_path(path: object, needed: str, error: type[LlamaFastError] = LlamaFastError) -> Path:
    """Returns a caller's path as one. Raises `error` for what names no file and no folder."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise error(f"the path is {path!r}; give {needed}")
    return Path(path)


def _beside(target: Path) -> Path:
    """A new name in the target's own folder, so that the rename stays within one filesystem."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"


def _sync(path: Path) -> None:
    """Force a file to the disk: some filesystems report that they are full only now."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yield a path to write to; on success it replaces `target`, on any exception it is removed.

    An existing target is replaced in one step. Raises LlamaFastError if it is a folder.
    """
    target = given_path(target, "the name of a file").absolute()
    if target.is_dir():
        raise LlamaFastError(f"{target} is a folder; give the name of a file")
    partial = _beside(target)
    try:
        yield partial
        _sync(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `target`, on any exception it goes.

    Raises LlamaFastError if `target` exists, unless it is an empty folder.
    """
    refuse_existing(target)
    target = Path(target).absolute()
    partial = _beside(target)
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                _sync(path)
        if target.is_dir():
            target.rmdir()
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(target: str | Path) -> None:
    """Raise LlamaFastError if there is something at `target` other than an empty folder."""
    target = given_path(target, "a new folder")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        kind = "a folder that is not empty" if target.is_dir() else "a file"
        raise LlamaFastError(f"{target} is {kind}; give a new folder, or remove it first")
