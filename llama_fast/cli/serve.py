"""`llama-fast serve`: OpenAI's interface over a model."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LlamaFastError
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
    Threads,
    check_backend,
    device_named,
    example,
    model_folder,
    set_threads,
    using,
)
from .terminal import note, size, text_or_file

if TYPE_CHECKING:
    from ..serve.requests import Served

CONTEXT = 4096  # tokens of a row, where the model allows more and nothing else is asked for


@example("llama-fast serve --model DIR --api-key @key.txt --kv-cache int8")
def serve(
    model: Model = None,
    adapter: Adapter = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Where to listen; 0.0.0.0 is every network.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="The port; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY|@FILE",
            help="What clients must bring; on the command line other users of the machine see it.",
            show_default="none",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What clients call the model.", show_default="its folder's name"
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=256, metavar="N", help="Answers that are made at once.")
    ] = 16,
    queue: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Answers that may wait; more are refused with 503."),
    ] = 64,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            min=64,
            metavar="N",
            help="Context of each answer in tokens, prompt included.",
            show_default=f"the model's, at most {CONTEXT:,}",
        ),
    ] = None,
    reuse: Annotated[
        bool,
        typer.Option(
            help="Go on from the tokens of an earlier answer that a prompt begins with, as the "
            "next turn of a dialog does."
        ),
    ] = True,
    dtype: AsDType = None,
    quantize: Quantize = None,
    kv_cache: Cache = None,
    device: Device = "auto",
    backend: OnBackend = None,
    threads: Threads = None,
    debug: Debug = False,
) -> int:
    """Serve a model over HTTP, as OpenAI's clients expect it.

    /v1/chat/completions with tools and streams, /v1/completions, /v1/models, /health and /metrics.
    Ctrl-C ends it when the answers that have begun are whole; a second Ctrl-C ends it at once.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise LlamaFastError(
            f"serve needs {error.name}, which is not installed: pip install 'llama_fast[serve]'"
        ) from None
    key = text_or_file(api_key, "--api-key").strip() if api_key is not None else None
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise LlamaFastError(
            "--api-key must be a word of printable ASCII characters; it is sent in a header"
        )
    folder = model_folder(model, CHAT_DEMO)

    from ..checkpoint import open_checkpoint
    from ..distributed import Processes, launched
    from ..generation.folder_sampling import folder_sampling
    from ..generation.follow import led
    from ..serve.requests import Served
    from ..serve.server import is_loopback, run
    from ..tokenizer import Tokenizer
    from ..tokenizer.chat_choice import chat_format

    set_threads(threads)
    where = device_named(device)
    if backend:
        check_backend(backend.value, where.type)
    source = open_checkpoint(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    format = chat_format(folder, tokenizer)
    context = context_of(source, max_seq_len, CONTEXT)
    drawn = folder_sampling(folder)
    check_adapter(adapter, source)

    with (
        launched(where) as (where, mesh),
        # For ranks that follow; the batch asks in a thread of its own.
        using(backend),
    ):
        if Processes().main:
            unwind_when_stopped()
        llama = load_model(
            source,
            adapter=adapter,
            device=where,
            dtype=dtype and dtype.torch,
            quantize=quantize and quantize.value,
            max_seq_len=context,
            mesh=mesh,
        )
        served = Served(
            name=name or folder.resolve().name,
            model=llama,
            tokenizer=tokenizer,
            format=format,
            max_seq_len=context,
            most_choices=max_batch,
            kv_cache=kv_cache and kv_cache.value,
            sampling=drawn,
        )

        def ready(address: str) -> None:
            note(
                f"{served.name}: {format.describe()}; {max_batch} answers at once of {context:,} "
                f"tokens, for which keys and values take up to {size(held(served))}"
            )
            note(f"listening on {address}; Ctrl-C ends it")
            if key is None and not is_loopback(host):
                note(
                    "Anybody who reaches this address can use it: give --api-key to ask for a key."
                )

        with led(llama) as leads:
            if not leads:
                return 0
            try:
                run(
                    served,
                    rows=max_batch,
                    queue=queue,
                    host=host,
                    port=port,
                    key=key,
                    backend=backend and backend.value,
                    reuse=reuse,
                    ready=ready,
                )
            except KeyboardInterrupt:  # the answers are finished; it was asked to end
                pass
            except SystemExit as end:
                if end.code != 128 + signal.SIGTERM:  # Uvicorn, which has said what is wrong
                    raise LlamaFastError(
                        f"the server cannot listen on {host}, port {port}; give another --port "
                        "(0: a free one), or a --host of this machine"
                    ) from None
            note("stopped")
    return 0


def held(served: Served) -> int:
    """Returns the bytes of the keys and values of all rows; over ranks, those of this one."""
    from ..distributed.tensor_parallel import share_of
    from ..nn.kv_cache import cache_dtype

    llama = served.model
    share = share_of(llama)
    each = (share.part if share else llama.config).kv_bytes_per_token(
        cache_dtype(served.kv_cache, llama.dtype)
    )
    return each * served.max_seq_len * served.most_choices
