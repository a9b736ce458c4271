"""Standard output and error that take any text, whatever their encoding, and also when closed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Inside of the block, characters that a stream's encoding cannot hold are written as "?", and
    what goes to a closed stream is dropped."""
    with contextlib.ExitStack() as stack:
        for number, name in ((1, "stdout"), (2, "stderr")):
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                if stream is None:
                    _occupy(number)
                stack.callback(setattr, sys, name, stream)
                null = open(os.devnull, "w", encoding="utf-8")
                setattr(sys, name, stack.enter_context(null))
            # Whoever asked for another way, by PYTHONIOENCODING, keeps it.
            elif getattr(stream, "errors", None) in ("strict", "surrogateescape"):
                before = stream.errors
                stream.reconfigure(errors="replace")
                stack.callback(_set_errors, stream, before)
        yield


def abandon_stdout() -> None:
    """Drops what is left in stdout's buffer, which nobody takes: Python would complain of it at its
    end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _occupy(number: int) -> None:
    """A file that is opened later must not take the number of a closed stream: libraries of C would
    print into it."""
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != number:
            os.dup2(null, number)
            os.close(null)


def _set_errors(stream: object, errors: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile, or nobody takes it
        stream.reconfigure(errors=errors)
