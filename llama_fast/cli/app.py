"""The command line as a whole: its subcommands and what they share."""

from __future__ import annotations

from collections.abc import Callable
from inspect import getdoc
from typing import Annotated, Any

import typer

from .. import __version__
from . import vocab
from .bench import bench
from .chat import chat
from .convert import convert
from .doctor import doctor
from .explain import explain
from .finetune import finetune
from .generate import generate
from .info import info
from .init import init
from .inspect import inspect
from .options import Debug
from .profile import profile
from .quantize import quantize
from .report import report
from .serve import serve
from .tokenize import tokenize

COMMANDS = (
    generate, chat, serve, finetune, info, tokenize, convert, quantize, init, doctor, explain,
    bench, profile, report, inspect,
)  # fmt: skip

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: llama-fast generate "Once upon a time"',
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"llama-fast {__version__}")
        raise typer.Exit


@app.callback()
def llama_fast(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
    debug: Debug = False,
) -> None:
    """Llama 3 text models on fast kernels, on a machine with or without a GPU."""


def _help(command: Callable) -> str:
    """Returns the docstring with its lines joined: the terminal's width breaks them anew."""
    paragraphs = getdoc(command).split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for _command in COMMANDS:
    app.command(help=_help(_command), epilog=_command.example)(_command)

# Commands of commands, by their names: modules with COMMANDS, HELP and EXAMPLE.
GROUPS = {"vocab": vocab}
for _name, _group in GROUPS.items():
    _of_group = typer.Typer(help=_group.HELP, epilog=_group.EXAMPLE, rich_markup_mode="rich")
    for _command in _group.COMMANDS:
        _of_group.command(help=_help(_command), epilog=_command.example)(_command)
    app.add_typer(_of_group, name=_name)


def command() -> Any:
    """Returns the whole command line as a click command."""
    return typer.main.get_command(app)
