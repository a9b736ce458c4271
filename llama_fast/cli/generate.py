"""`llama-fast generate`: text from a model, as it is made, and what it took."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import LogitsError, ProcessError, PromptError
from ..utils.environment import processes_started
from .loading import check_adapter, load_model
from .options import (
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
from .terminal import note, note_pairs, show_prompt, size, text_or_stdin

if TYPE_CHECKING:
    from ..model import Llama


@example('llama-fast generate "The capital of France is" --model DIR --temperature 0')
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The text to continue.", show_default="standard input, if it is a pipe"
        ),
    ] = None,
    model: Model = None,
    adapter: Adapter = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Stop after N tokens.")
    ] = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
    ] = None,
    dtype: AsDType = None,
    quantize: Quantize = None,
    kv_cache: Cache = None,
    device: Device = "auto",
    backend: OnBackend = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Context in tokens, prompt and answer.",
            show_default="the model's own",
        ),
    ] = None,
    threads: Threads = None,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Only the text, without the figures at the end.",
        ),
    ] = False,
    debug: Debug = False,
) -> int:
    """Continue a text.

    The text goes to standard output as it is made, on a terminal after the prompt, dimmed; then
    time to the first token, speed, memory and the backends that served go to standard error.
    """
    if prompt is None and processes_started() > 1:
        raise PromptError(
            f"torchrun has started {processes_started()} processes, which have one standard input: "
            'give the text as an argument: generate "Once upon a time"'
        )
    text = text_or_stdin(prompt, "llama-fast generate")
    if not text:
        raise PromptError("the prompt is empty; give some text to continue")
    folder = model_folder(model)

    from ..checkpoint import open_checkpoint
    from ..distributed import Processes, launched
    from ..generation.folder_sampling import folder_sampling
    from ..generation.generate import check_prompts, encode_prompts, stream
    from ..tokenizer import Tokenizer

    # Everything that can be wrong with the request is found before the weights are read.
    set_threads(threads)
    where = device_named(device)
    if backend:
        check_backend(backend.value, where.type)
    drawn = folder_sampling(folder, temperature=temperature, top_p=top_p, top_k=top_k)
    source = open_checkpoint(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = encode_prompts(tokenizer, text)
    config = source.config.shortened(max_seq_len)
    check_prompts(config, tokenizer, prompts)
    check_adapter(adapter, source)
    # No more of the rotary tables than this text can need: those of 131,072 tokens take 34 MB.
    needed = min(config.max_seq_len, len(prompts[0]) + max_new_tokens)

    form = kv_cache and kv_cache.value

    with launched(where) as (where, mesh):
        main = Processes().main  # of several processes it alone speaks
        start = time.perf_counter()
        llama = load_model(
            source,
            adapter=adapter,
            device=where,
            dtype=dtype and dtype.torch,
            quantize=quantize and quantize.value,
            max_seq_len=needed,
            mesh=mesh,
        )
        loaded = time.perf_counter() - start

        ended = None
        times = [time.perf_counter()]
        with using(backend):
            chunks = stream(
                llama,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                seed=seed,
                stop=stop or (),
                kv_cache=form,
                **vars(drawn),
            )
            try:
                if main:
                    show_prompt(text)
                for chunk in chunks:
                    times.append(time.perf_counter())
                    if main:
                        sys.stdout.write(chunk.text)
                        sys.stdout.flush()
                    ended = chunk.finish_reason
            except KeyboardInterrupt:
                if main:
                    print(flush=True)
                    note(f"llama-fast: interrupted after {len(times) - 1} tokens")
                return 130
            except (LogitsError, ProcessError):
                if main:
                    print(flush=True)  # the error stands on a line of its own
                raise
            if main:
                print(flush=True)
            if not quiet:
                _summary(llama, prompts[0], form, times, loaded, ended)
    return 0


def _summary(
    llama: Llama,
    prompt: list[int],
    kv_cache: str | None,
    times: list[float],
    loaded: float,
    ended: str | None,
) -> None:
    from ..bench import roofline
    from ..distributed import Processes
    from ..distributed.tensor_parallel import share_of
    from ..model.quantized import quantization_of
    from . import measure

    peak = measure.peak_memory(llama.device)  # before the peak rates take memory of their own
    served = measure.who_served(llama, prompt, kv_cache)
    new = len(times) - 1
    dtype = str(llama.dtype).removeprefix("torch.")
    if quantization := quantization_of(llama):
        dtype = f"{quantization}, computing in {dtype}"
    weights = size(measure.weight_bytes(llama))
    lines = [
        ("weights", f"{weights} in {dtype}, loaded in {loaded:.2f} s"),
        ("first token", f"{times[1] - times[0]:.3f} s after a prompt of {len(prompt)} tokens"),
    ]
    decode = f"{new} new tokens" + (" (the limit)" if ended == "length" else "")
    if new > 1:
        rate = (new - 1) / (times[-1] - times[1])
        decode += f", {rate:.1f} tokens/s"
        bytes_read = measure.bytes_per_token(llama, len(prompt) + new / 2, kv_cache)
        bandwidth = roofline.read_bandwidth(llama.device)
        if bandwidth is not None:
            decode += (
                f", {rate * bytes_read / bandwidth:.0%} of the memory bandwidth "
                f"({size(rate * bytes_read)}/s of {size(bandwidth)}/s)"
            )
    lines += [
        ("decode", decode),
        ("peak memory", peak),
        ("backends", served),
    ]
    if share := share_of(llama):
        lines.insert(0, ("ranks", f"{share.ranks}; the figures are of the first"))
    if Processes().main:  # all ranks have computed the line of the backends together
        note("")
        note_pairs(lines)
