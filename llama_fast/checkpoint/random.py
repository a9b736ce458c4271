"""Checkpoints of random weights in a given shape, for tests and measurements without a download."""

from __future__ import annotations

import base64
import itertools
import math
import string
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ..config import LlamaConfig
from ..config.checks import STORED_DTYPES, check_dtype
from ..errors import CheckpointError
from ..tokenizer.special_tokens import N_SPECIALS
from ..utils.files import check_new_folder
from .names import state_shapes
from .read import Format, Progress
from .special_tokens import special_token_ids
from .write import stream_hf, stream_meta, tokenizer_files

BLOCK = 2**22  # numbers drawn from one generator


def initial_std(config: LlamaConfig, name: str) -> float | None:
    """The width of the normal distribution that one of our weights starts from, None for a norm,
    which starts at one. The projections that add to the residual stream start narrower, by the
    square root of how many there are, so that the stream keeps its size (as in GPT-2)."""
    if name.endswith("norm.weight"):
        return None
    adds_to_residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
    return 0.02 / math.sqrt(2 * config.n_layers) if adds_to_residual else 0.02


def write_random(
    folder: str | Path,
    config: LlamaConfig,
    *,
    format: Format = "hf",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer_file: str | Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a new folder of random weights; one tensor at a time is in memory.

    The same seed gives the same weights, in either format. `tokenizer_file` is copied; without one
    a made-up tokenizer.model of the model's size is written, so that text goes in and comes out.

    Raises CheckpointError for a folder that exists or cannot be written (nothing is left behind),
    and for a vocabulary too small for the bytes and the special tokens; TokenizerError for a file
    that is no tokenizer of this size.
    """
    if format not in ("hf", "meta"):
        raise CheckpointError(f"the format to write is {format!r}; it must be 'hf' or 'meta'")
    check_dtype(dtype, STORED_DTYPES)
    check_new_folder(folder)
    files = tokenizer_files(tokenizer_file, config)
    dtypes = dict.fromkeys(state_shapes(config), dtype)
    tensors = _tensors(config, dtype, seed, progress)
    with tempfile.TemporaryDirectory() as scratch:
        if not files:
            files = [Path(scratch) / "tokenizer.model"]
            files[0].write_bytes(_made_up_ranks(config.vocab_size - N_SPECIALS))
        if format == "meta":
            stream_meta(folder, config, dtypes, tensors, copies=files)
        else:
            special = special_token_ids(config, files)
            stream_hf(folder, config, dtypes, tensors, special=special, copies=files)


def _tensors(
    config: LlamaConfig, dtype: torch.dtype, seed: int, progress: Progress | None
) -> Iterator[tuple[str, Tensor]]:
    shapes = state_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    done, seeds = 0, itertools.count(seed * 1_000_003)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for name, shape in shapes.items():
            std = initial_std(config, name)
            tensor = torch.ones(shape, dtype=dtype, device="cpu")
            if std is not None:
                # A generator for each block: the numbers do not depend on the number of threads.
                blocks = tensor.view(-1).split(BLOCK)
                for _ in pool.map(_fill, blocks, itertools.repeat(std), seeds):
                    pass
            yield name, tensor
            done += tensor.nbytes
            if progress is not None:
                progress(done, total, name)


def _fill(block: Tensor, std: float, seed: int) -> None:
    # torch's CPU generator takes 32 bits of a seed.
    block.normal_(0, std, generator=torch.Generator().manual_seed(seed % 2**32))


def _made_up_ranks(count: int) -> bytes:
    """`count` lines of Meta's tokenizer.model: the 256 bytes, then every short word of letters."""
    if count < 256:
        raise CheckpointError(
            f"a vocabulary of {count + N_SPECIALS} has no room for the 256 bytes and the "
            f"{N_SPECIALS} special tokens; give a larger vocab_size, or a tokenizer file"
        )
    words = (
        "".join(word).encode()
        for length in itertools.count(2)
        for word in itertools.product(string.ascii_lowercase, repeat=length)
    )
    tokens = itertools.chain((bytes([byte]) for byte in range(256)), words)
    ranked = enumerate(itertools.islice(tokens, count))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranked)
