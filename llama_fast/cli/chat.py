"""`llama-fast chat`: a dialog with a model in the terminal, or through a pipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LlamaFastError
from . import chat_commands
from .chat_talk import Talk
from .chat_tools import Tools
from .interrupt import unwind_when_stopped
from .loading import check_adapter, context_of, load_model
from .options import (
    CHAT_DEMO,
    Adapter,
    AsDType,
    Cache,
    Debug,
    Device,
    Model,
    OnBackend,
    Quantize,
    Seed,
    Temperature,
    Threads,
    TopK,
    TopP,
    check_backend,
    device_named,
    example,
    model_folder,
    set_threads,
    using,
)
from .terminal import note, text_or_file

CONTEXT = 8192  # tokens, where the model allows more and nothing else is asked for


@example("llama-fast chat --model DIR --system 'You answer in one sentence.'")
def chat(
    model: Model = None,
    adapter: Adapter = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT|@FILE", help="What the model is told before the dialog."),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.py",
            help="A Python file, whose functions the model may call; each call is shown, and asked "
            "for before it runs.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run calls of tools without asking.")] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="The longest answer."),
    ] = 1024,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            min=64,
            metavar="N",
            help="Context in tokens; when it is full, the oldest turns leave.",
            show_default=f"the model's, at most {CONTEXT:,}",
        ),
    ] = None,
    save_cache: Annotated[
        Path | None,
        typer.Option(
            callback=chat_commands.files_to_write,
            metavar="FILE",
            help="Keep the dialog in FILE and its keys and values in FILE.cache, and go on with "
            "them the next time.",
        ),
    ] = None,
    dtype: AsDType = None,
    quantize: Quantize = None,
    kv_cache: Cache = None,
    device: Device = "auto",
    backend: OnBackend = None,
    threads: Threads = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only the answers, without notes.")
    ] = False,
    debug: Debug = False,
) -> int:
    """Talk with a model.

    Ctrl-C ends an answer, Ctrl-D the chat; /help lists the commands. What you type never becomes a
    control token. From a pipe each line is a message.
    """
    folder = model_folder(model, CHAT_DEMO)
    told = text_or_file(system, "--system") if system else None
    functions = Tools.from_file(tools) if tools else Tools()

    from ..checkpoint import open_checkpoint
    from ..distributed import launched
    from ..generation.chat import Chat
    from ..generation.folder_sampling import folder_sampling
    from ..generation.follow import led
    from ..generation.session import Session
    from ..tokenizer import Tokenizer
    from ..tokenizer.chat_choice import chat_format

    set_threads(threads)
    where = device_named(device)
    if backend:
        check_backend(backend.value, where.type)
    drawn = folder_sampling(folder, temperature=temperature, top_p=top_p, top_k=top_k)
    source = open_checkpoint(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    format = chat_format(folder, tokenizer)
    context = context_of(source, max_seq_len, CONTEXT)
    check_adapter(adapter, source)
    sampling = vars(drawn) | {"seed": seed}
    with (
        launched(where) as (where, mesh),
        using(backend),
    ):
        llama = load_model(
            source,
            adapter=adapter,
            device=where,
            dtype=dtype and dtype.torch,
            quantize=quantize and quantize.value,
            max_seq_len=context,
            mesh=mesh,
        )
        with led(llama) as leads:
            if not leads:
                return 0
            unwind_when_stopped()
            with Session(llama, tokenizer, kv_cache=kv_cache and kv_cache.value) as session:
                dialog = Chat(session, format, system=told, tools=functions.definitions)
                talk = Talk(dialog, functions, sampling, max_new_tokens, yes=yes, quiet=quiet)
                talk.note(f"{folder.name}: {format.describe()}; /help lists the commands")
                if save_cache is not None and save_cache.exists():
                    talk.note(chat_commands.load_dialog(talk, save_cache))
                _converse(talk)
                if save_cache is not None and dialog.turns:
                    talk.note(chat_commands.save_dialog(talk, save_cache))
    return 0


def _converse(talk: Talk) -> None:
    """Reads messages and commands until there are no more."""
    while (line := talk.screen.read()) is not None:
        if not line.strip():
            continue
        try:
            if line.startswith("/") and not line.startswith("//"):
                chat_commands.run(talk, line.rstrip())
            else:
                talk.say(line[1:] if line.startswith("//") else line)
        except EOFError:
            return
        except LlamaFastError as error:
            note(f"llama-fast: {error}")
