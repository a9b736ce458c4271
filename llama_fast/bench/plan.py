"""What a model over ranks takes of each of them, without the hardware: memory, exchanges, and the
least time of a step.

Bytes are counted as the model has them, and are exact. Times are estimates: every byte at the rate
that the chip's maker publishes, one thing after another, and no arithmetic, which decoding few rows
hides behind the reading of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checkpoint import quantized_bytes
from ..config import LlamaConfig
from ..config.quantization import Quantization
from ..config.share import Share
from ..errors import ConfigError
from ..generation.candidates import candidates_of, exchanged_bytes
from ..generation.engine import prefill_chunk
from ..generation.sampling import Sampling
from .profile.limits import LIMITS

# Seconds that an exchange of a few bytes takes between GPUs of one machine: an assumption.
EXCHANGE = 10e-6
# Bytes of a device that are PyTorch's own: an assumption.
RESERVED = 1e9


@dataclass(frozen=True)
class Machine:
    """memory     bytes of a device
    bandwidth  bytes a second to and from it
    link       bytes a second that a device sends to the others of its machine
    """

    product: str
    memory: float
    bandwidth: float
    link: float


def _machine(arch: str, memory: float, link: float) -> Machine:
    return Machine(LIMITS[arch].product, memory, LIMITS[arch].bandwidth, link)


# Links as the makers publish them, one way: NVLink, Infinity Fabric, PCI Express 4.0 × 16.
MACHINES = {
    "a100": _machine("sm_80", 80e9, 300e9),
    "h100": _machine("sm_90", 80e9, 450e9),
    "h200": Machine("H200 SXM", 141e9, 4800e9, 450e9),
    "b200": _machine("sm_100", 180e9, 900e9),
    "mi300x": _machine("gfx942", 192e9, 448e9),
    "rtx4090": _machine("sm_89", 24e9, 32e9),
}


@dataclass(frozen=True)
class Plan:
    """Of the rank that has most, the first, in a step that decodes a token a row.

    weights   bytes held
    tables    bytes held of the rotary tables
    cache     bytes held, with every row at its full length
    activations  the most bytes of all other tensors in a prefill, and so in a step, at one time:
              those of a chunk of the prompts, however long they are
    read      bytes read in a step
    sums, summed  exchanges that add up, and the bytes that a rank gives to all of them
    gathered  bytes that a rank gives to the draw of tokens, with the default sampling: candidates
    """

    ranks: int
    weights: int
    tables: int
    cache: int
    activations: int
    read: int
    sums: int
    summed: int
    gathered: int

    @property
    def exchanges(self) -> int:
        return self.sums + 1 if self.ranks > 1 else 0

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, in rings: a sum goes around twice, what is gathered once."""
        others = self.ranks - 1
        return 2 * others / self.ranks * self.summed + others * self.gathered

    @property
    def held(self) -> int:
        """Bytes, with everything at its most."""
        return self.weights + self.tables + self.cache + self.activations

    def fits(self, machine: Machine) -> bool:
        return self.held + RESERVED <= machine.memory

    def seconds(self, machine: Machine) -> float:
        """The least time of a step."""
        reading = self.read / machine.bandwidth
        return reading + self.sent / machine.link + self.exchanges * EXCHANGE


def plan(
    config: LlamaConfig,
    ranks: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Quantization | None = None,
    context: int | None = None,
    batch: int = 1,
    cache_dtype: torch.dtype | None = None,
) -> Plan:
    """Returns what `ranks` ranks take for `batch` rows of `context` tokens (None: the model's own
    context). Raises ConfigError where the model cannot be cut so, or has a shorter context."""
    if batch < 1:
        raise ConfigError(f"batch is {batch}; it must be 1 or more")
    share = Share(config.shortened(context), 0, ranks)
    part = share.part
    if quantization is None:
        weights = part.n_params * dtype.itemsize
        embedding = part.vocab_size * part.dim * dtype.itemsize
        of_rows = dtype.itemsize  # bytes of an element that is looked up
    else:
        weights = quantized_bytes(part, quantization, dtype)
        form = quantization.embedding
        sizes = {} if form is None else form.buffers((part.vocab_size, part.dim))
        embedding = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in sizes.values())
        embedding = embedding or part.vocab_size * part.dim * dtype.itemsize
        of_rows = dtype.itemsize if form is None else torch.float32.itemsize
    context = share.whole.max_seq_len
    cache = batch * context * part.kv_bytes_per_token(cache_dtype or dtype)
    several = ranks > 1
    row = batch * part.dim
    return Plan(
        ranks=ranks,
        weights=weights,
        tables=context * part.head_dim * torch.float32.itemsize,
        cache=cache,
        activations=activations(share, batch, dtype),
        read=weights - (0 if part.tied else embedding) + cache,
        sums=several * (2 * part.n_layers + 1),
        summed=several * row * (2 * part.n_layers * dtype.itemsize + of_rows),
        gathered=several
        * batch
        * exchanged_bytes(candidates_of(Sampling()), share.rows_each, dtype),
    )


def activations(share: Share, batch: int, dtype: torch.dtype) -> int:
    """Returns the bytes that a rank's tensors take at most in a prefill of `batch` rows with this
    package's kernels, weights, tables and the cache left out. The scratch of kernels is not among
    them: a few MB for each thread of a CPU."""
    part, context = share.part, share.whole.max_seq_len
    tokens = batch * min(context, prefill_chunk(batch))
    # Of a token: the layer before's update and sum are held by who called the layer. Attention adds
    # its input, q, k and v, q rotated, and the result; the MLP its input, the sum, gate and up with
    # their product, and the result. A sum over ranks is one more.
    heads = (3 * part.n_heads + 2 * part.n_kv_heads) * part.head_dim
    of_token = 7 * part.dim + max(heads, 3 * part.hidden_dim)
    # Logits of each row's last token, in this dtype and in float32; over ranks, gathered and whole.
    logits = batch * share.ranks * share.rows_each * (3 * dtype.itemsize + 2 * 4)
    prompts = batch * context * torch.int64.itemsize
    return tokens * of_token * dtype.itemsize + logits + prompts
