"""`llama-fast info`: what a model is, and the memory that it needs."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError, ConfigError
from .options import Debug, KvCache, Named, example, model_folder
from .sizes import sized
from .terminal import show, size, table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..config import LlamaConfig
    from ..config.quantization import Quantization

# What a model's folder consists of, whatever else lies in it.
MODEL_FILES = (
    "params.json", "consolidated.*.pth",
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "chat_template*", "quantization_report.json",
)  # fmt: skip
CONTEXTS = (2048, 8192, 32768, 131072)


@example("llama-fast info 8b")
def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR|SIZE",
            help="Folder of a model, or the name of a published one: 1b, 8b-3.1, 70b …",
            show_default="the small model that ships",
        ),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Show what each of N ranks takes (torchrun)."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --ranks: whether they fit, and the least time of a token, by the published "
            "figures of a100, h100, h200, b200, mi300x or rtx4090.",
        ),
    ] = None,
    quantize: Annotated[
        Named | None, typer.Option(help="With --ranks: the form of the weights.")
    ] = None,
    kv_cache: Annotated[
        KvCache | None, typer.Option("--kv-cache", help="With --ranks: the form of the cache.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="With --ranks: tokens of a row, such as 8192 or 128k.",
            show_default="the model's own",
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(min=1, metavar="N", help="With --ranks: rows at a time.")
    ] = 1,
    debug: Debug = False,
) -> None:
    """Show a model's configuration, parameters, files, and the memory it needs.

    With --ranks also what a model over several devices takes of each, whether it fits, what they
    exchange and how fast it can be at most: an estimate from published figures.
    """
    asked = device or quantize or kv_cache or context or batch != 1
    if ranks is None and asked:
        raise ConfigError(
            "--device, --quantize, --kv-cache, --context and --batch say for what --ranks N is to "
            "be shown; give --ranks 1 for one device"
        )
    quantization, dtype = None, None
    if model is not None and not Path(model).exists():
        try:
            config = sized(model)
        except ConfigError as error:
            raise CheckpointError(f"{model} is no folder, and {error}") from None
        show(f"Llama 3, size {model}", _config(config))
    else:
        from ..checkpoint import open_checkpoint

        source = open_checkpoint(model_folder(model and Path(model)))
        config, dtype = source.config, source.dtype
        if source.format == "quantized":
            quantization = source.quantization
            show(f"{source.folder} (quantised)", _config(config, source.dtype, quantization))
        else:
            kind = "Meta" if source.format == "meta" else "Hugging Face"
            show(f"{source.folder} ({kind}'s format)", _config(config, source.dtype))
        show("Files", _files(source.folder))
    if ranks is not None:
        form = quantize.value if quantize else quantization
        _show_ranks(config, ranks, device, dtype, form, kv_cache is not None, context, batch)
        return
    show(
        "Memory for one sequence: weights and KV cache, by tokens of context",
        _memory(config, quantization),
    )
    show("Memory of the KV cache alone", _caches(config))
    show(_activations(config))


def _activations(config: LlamaConfig) -> str:
    import torch

    from ..bench.plan import plan

    found = plan(config, 1, dtype=torch.bfloat16)
    return (
        f"A prompt is computed in chunks: whatever its length, all else that is computed takes "
        f"{size(found.activations)} at most in bfloat16, and rotary tables for the whole context "
        f"take {size(found.tables)}. A process holds about 0.3 GB more for PyTorch and the program."
    )


def _show_ranks(
    config: LlamaConfig,
    ranks: int,
    device: str | None,
    dtype: torch.dtype | None,
    quantize: str | Quantization | None,
    int8_cache: bool,
    context: str | None,
    batch: int,
) -> None:
    import torch

    from ..bench.plan import EXCHANGE, MACHINES, RESERVED, plan
    from ..config.quantization import Quantization
    from .units import duration

    if device is not None and device not in MACHINES:
        raise ConfigError(f"--device is {device!r}; it must be one of {', '.join(MACHINES)}")
    dtype = dtype or torch.bfloat16
    quantization = None if quantize is None else Quantization.of(quantize)
    tokens = _tokens(context) or config.max_seq_len
    found = plan(
        config,
        ranks,
        dtype=dtype,
        quantization=quantization,
        context=tokens,
        batch=batch,
        cache_dtype=torch.int8 if int8_cache else None,
    )
    kind = str(quantization or dtype).removeprefix("torch.")
    rows = table("", "")
    rows.add_row("weights", f"{size(found.weights)} in {kind}")
    rows.add_row("KV cache", f"{size(found.cache)}, rows: {batch}, tokens of each: {tokens:,}")
    rows.add_row(
        "activations",
        f"{size(found.activations)} at most, however long a prompt is, and rotary tables of "
        f"{size(found.tables)}",
    )
    if ranks > 1:
        rows.add_row(
            "exchanges of a step",
            f"{found.sums} sums of {size(found.summed)} in all, and candidates of "
            f"{size(found.gathered)}; a rank sends {size(found.sent)}",
        )
    if device is None:
        show(f"Each of {ranks} ranks, at most", rows)
        return
    machine = MACHINES[device]
    verdict = "fits" if found.fits(machine) else "does not fit"
    rows.add_row(
        "memory",
        f"{verdict}: {size(found.held)}, and {size(RESERVED)} for PyTorch, of "
        f"{size(machine.memory)}",
    )
    seconds = found.seconds(machine)
    rows.add_row(
        "least time of a step",
        f"{duration(seconds)} with full caches: {1 / seconds:,.0f} tokens/s a row, "
        f"{batch / seconds:,.0f} in all",
    )
    show(f"Each of {ranks} ranks, at most", rows)
    show(
        f"Times are an estimate, for bytes alone: {machine.product} with "
        f"{machine.bandwidth / 1e9:,.0f} GB/s of memory and {machine.link / 1e9:,.0f} GB/s to the "
        f"others, as published, and {duration(EXCHANGE)} for each exchange, which is assumed."
    )


def _tokens(text: str | None) -> int | None:
    """Returns the number that "8192" or "128k" (of 1024) says. Raises ConfigError."""
    if text is None:
        return None
    digits, thousands = text.lower().removesuffix("k"), text.lower().endswith("k")
    if not digits.isdecimal() or not int(digits):
        raise ConfigError(f"--context is {text!r}; write a number of tokens, such as 8192 or 128k")
    return int(digits) * (1024 if thousands else 1)


def _config(
    config: LlamaConfig,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
) -> Table:
    scaling = config.rope_scaling
    rope = f"base {config.rope_theta:g}"
    if scaling is not None:
        rope += f", stretched {scaling.factor:g} times from {scaling.original_max_seq_len:,} tokens"
    stored = f", stored in {str(dtype).removeprefix('torch.')}" if dtype else ""
    if quantization:
        stored = f", stored as {quantization}; norms and activations in {dtype}".replace(
            "torch.", ""
        )
    head = "the embedding itself" if config.tied else "a matrix of its own"
    rows = table("", "")
    for name, value in (
        ("parameters", f"{config.n_params:,}{stored}"),
        ("layers", f"{config.n_layers}"),
        ("model dim", f"{config.dim:,} (C), feed-forward {config.hidden_dim:,} (F)"),
        (
            "heads",
            f"{config.n_heads} query (H), {config.n_kv_heads} key and value (K), "
            f"{config.head_dim} wide (D)",
        ),
        ("vocabulary", f"{config.vocab_size:,} tokens (V), head: {head}"),
        ("context", f"{config.max_seq_len:,} tokens"),
        ("RoPE", rope),
        ("norm epsilon", f"{config.norm_eps:g}"),
    ):
        rows.add_row(name, value)
    return rows


def _files(folder: Path) -> Table:
    rows = table("", "", numbers=True)
    for path in sorted(path for path in folder.iterdir() if _of_model(path)):
        rows.add_row(path.name, size(path.stat().st_size))
    return rows


def _of_model(path: Path) -> bool:
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in MODEL_FILES)


def _contexts(config: LlamaConfig) -> list[int]:
    return [n for n in CONTEXTS if n < config.max_seq_len] + [config.max_seq_len]


def _caches(config: LlamaConfig) -> Table:
    import torch

    contexts = _contexts(config)
    rows = table("stored as", "a token", *(f"{n:,}" for n in contexts), numbers=True)
    for name, dtype in (
        ("float32", torch.float32),
        ("bfloat16, float16", torch.bfloat16),
        ("int8 (--kv-cache int8)", torch.int8),
    ):
        token = config.kv_bytes_per_token(dtype)
        rows.add_row(name, size(token), *(size(n * token) for n in contexts))
    return rows


def _memory(config: LlamaConfig, quantization: Quantization | None) -> Table:
    import torch

    from ..checkpoint import quantized_bytes
    from ..config.quantization import NAMED

    contexts = _contexts(config)
    rows = table("weights", "size", *(f"{n:,}" for n in contexts), numbers=True)
    kinds = [
        ("float32", torch.float32, config.n_params * 4),
        ("bfloat16, float16", torch.bfloat16, config.n_params * 2),
    ]
    for name, settings in NAMED.items():
        kinds.append((name, torch.bfloat16, quantized_bytes(config, settings)))
    if quantization is not None and quantization not in NAMED.values():
        kinds.append(("as stored", torch.bfloat16, quantized_bytes(config, quantization)))
    for name, dtype, weights in kinds:
        cache = config.kv_bytes_per_token(dtype)
        rows.add_row(name, size(weights), *(size(weights + n * cache) for n in contexts))
    return rows
