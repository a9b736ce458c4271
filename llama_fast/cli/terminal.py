"""What the commands write: tables, sizes, and a bar while weights stream."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import LlamaFastError, PromptError
from .interrupt import unwind_when_stopped

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# As llama_fast.checkpoint.Progress, which is not imported here because it would import torch.
Progress = Callable[[int, int, str], None]


BYTE_ORDER_MARK = "\ufeff"
WIDTH = 160  # of what is no terminal
LONGEST_PROMPT = 1000  # characters that are shown of one
LINE_SECONDS, LINE_SHARE = 2.0, 0.05  # at least, between two lines of progress


def note(text: str) -> None:
    """Writes a line about the work, apart from its result."""
    print(broken_for_stderr(text), file=sys.stderr, flush=True)


def broken_for_stderr(text: str, indent: str = "") -> str:
    """Returns the text with its lines broken between words where stderr is a terminal."""
    try:
        width = os.get_terminal_size(sys.stderr.fileno()).columns if sys.stderr.isatty() else 0
    except (OSError, ValueError):
        width = 0
    if not width:
        return text
    return "\n".join(
        textwrap.fill(
            line,
            max(width, 2 * len(indent)),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )


def note_pairs(pairs: list[tuple[str, str]]) -> None:
    """Writes a note for each (name, value), the values below each other; on a terminal a long value
    goes on below itself."""
    indent = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        text = broken_for_stderr(f"{name:<{indent}}{value}", " " * indent)
        print(text, file=sys.stderr, flush=True)


def size(nbytes: float) -> str:
    """Returns for example 1.24 GB: decimal units, three digits."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB" if nbytes < 999.5 else f"{nbytes:,.0f} GB"


def table(*header: str, numbers: bool = False, texts: int = 1) -> Table:
    """Returns an empty table. With `numbers` all columns but the first `texts` are aligned right.
    Where the terminal is narrow, only the first is broken."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=any(header))
    for index, name in enumerate(header):
        justify = "right" if numbers and index >= texts else "left"
        made.add_column(name, justify=justify, no_wrap=numbers and index > 0, overflow="fold")
    return made


def _stdout() -> Console:
    """Returns a console for stdout: wide and without colour where that is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH
    return Console(width=width, highlight=False, markup=False, emoji=False)


def show_prompt(text: str) -> None:
    """Shows what is continued, dimmed, where stdout is a terminal: of a long one the end."""
    if not sys.stdout.isatty():
        return
    from rich.text import Text

    if len(text) > LONGEST_PROMPT:
        text = f"… {text[-LONGEST_PROMPT:]}"
    _stdout().print(Text(text, style="dim"), end="", soft_wrap=True)


def columns() -> int:
    """Returns the width of what `show` writes to."""
    return _stdout().width


def show(*things: object) -> None:
    """Prints texts and tables to stdout."""
    console = _stdout()
    whole_lines = not sys.stdout.isatty()
    with console.capture() if whole_lines else contextlib.nullcontext() as captured:
        for thing in things:
            console.print(thing, soft_wrap=whole_lines and isinstance(thing, str))
    if captured is not None:  # without the blanks that fill up the lines of a table
        print("\n".join(line.rstrip() for line in captured.get().split("\n")), end="")


@contextlib.contextmanager
def growing(rows: Table) -> Iterator[Table]:
    """Shows a table while rows are added to it; where stdout is no terminal, when it is whole."""
    from rich.live import Live

    unwind_when_stopped()
    if not sys.stdout.isatty():
        yield rows
        if rows.row_count:
            show(rows)
        return
    with Live(rows, console=_stdout(), vertical_overflow="visible"):
        yield rows


@contextlib.contextmanager
def weights_bar(doing: str, *, lines: bool = False) -> Iterator[Progress | None]:
    """Shows a bar of bytes on stderr, gone when done. Where stderr is no terminal, nothing, or with
    `lines` now and then how far it is."""
    unwind_when_stopped()
    if not sys.stderr.isatty():
        yield _progress_lines(doing) if lines else None
        return
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total, name: bar.update(task, completed=done, total=total)


def _progress_lines(doing: str) -> Progress:
    """Returns what writes a plain line at its first call, and wherever LINE_SECONDS have passed
    since the last line, and a LINE_SHARE of the whole."""
    shown, due = -math.inf, every(LINE_SECONDS, at_once=True)

    def advance(done: int, total: int, name: str) -> None:
        nonlocal shown
        if done >= shown + LINE_SHARE * total and due():
            shown = done
            note(f"{doing}: {done / total:.0%} of {size(total)}")

    return advance


def every(seconds: float, *, at_once: bool = False) -> Callable[[], bool]:
    """Returns what says whether so many seconds have passed since it last said yes; first since
    now, or `at_once`."""
    last = -math.inf if at_once else time.monotonic()

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now < last + seconds:
            return False
        last = now
        return True

    return due


def text_or_stdin(text: str | None, usage: str) -> str:
    """Returns the text given, or else all of standard input without the line end that closes it; a
    byte order mark is no part of it.

    Raises PromptError where there is neither: on a terminal nothing is waited for.
    """
    if text is not None:
        return text.removeprefix(BYTE_ORDER_MARK)
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise PromptError(f'no text was given; give it as an argument: {usage} "Once upon a time", '
                          f"or through a pipe: echo Once upon a time | {usage}")  # fmt: skip
    data = sys.stdin.buffer.read()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"standard input is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from None
    return text.removeprefix(BYTE_ORDER_MARK).removesuffix("\n").removesuffix("\r")


def text_or_file(text: str, option: str) -> str:
    """Returns the text, or what is in the file that "@FILE" names. Raises LlamaFastError."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LlamaFastError(f"{option} {text}: the file cannot be read ({error})") from error
