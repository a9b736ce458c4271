"""The command `llama-fast`: one file a subcommand, and here how every one of them ends.

torch is imported inside the commands only, so that help and usage errors come at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from ..utils.environment import processes_started
from .interrupt import INTERRUPTED, leave_at_once
from .streams import abandon_stdout, forgiving

FAILED, WRONG_USAGE, BROKEN_PIPE = 1, 2, 141
# Commands that processes of one launch run together; of the others each would run a whole one.
OF_SEVERAL_PROCESSES = ("generate", "chat", "serve", "finetune")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 1 for an error, 2 for wrong usage, 130
    after Ctrl-C, 141 when the reader of its output has gone. An error is one line on stderr, and
    with --debug Python's traceback too."""
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(signal.SIGINT, leave_at_once)
    with forgiving():
        return _end(list(arguments) or ["--help"])


def _end(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        abandon_stdout()
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        _say(_one_line(error, debug))
        if isinstance(error, OSError):
            abandon_stdout()
        return FAILED


def _run(arguments: list[str]) -> int:
    import typer

    from ..errors import ProcessError
    from .app import command
    from .usage import usage_line

    if processes_started() > 1 and arguments[0] not in OF_SEVERAL_PROCESSES:
        several = ", ".join(OF_SEVERAL_PROCESSES)
        raise ProcessError(
            f"torchrun has started {processes_started()} processes, and {arguments[0]} is a "
            f"command of one: start it without torchrun ({several} take several)"
        )
    usage_error = typer.BadParameter.__mro__[2]  # ClickException, of click or of typer's own copy
    try:
        with command().make_context("llama-fast", arguments) as context:
            return context.command.invoke(context) or 0
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        _say(usage_line(error))
        return WRONG_USAGE


def _one_line(error: Exception, debug: bool) -> str:
    from ..errors import LlamaFastError

    text = " ".join(str(error).split())
    if isinstance(error, LlamaFastError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "not enough memory; give a smaller --max-seq-len or --dtype bfloat16"
    hint = "" if debug else "; --debug shows where"
    return f"unexpected {type(error).__name__}: {text}{hint}"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"note: {' '.join(str(message).split())}")


def _say(text: str) -> None:
    from .terminal import note

    with contextlib.suppress(BrokenPipeError):
        note(f"llama-fast: {text}")
