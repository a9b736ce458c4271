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
from .profile.limits import LIMITS

# Seconds that an exchange of a few bytes takes between GPUs of one machine: an assumption.
EXCHANGE = 10e-6
# Bytes of a device that neither weights nor the cache can have: PyTorch, activations.
RESERVED = 2e9


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
    cache     bytes held, with every row at its full length
    read      bytes read in a step
    sums, summed  exchanges that add up, and the bytes that a rank gives to all of them
    gathered  bytes that a rank gives to the gathering of logits
    """

    ranks: int
    weights: int
    cache: int
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

    def fits(self, machine: Machine) -> bool:
        return self.weights + self.cache + RESERVED <= machine.memory

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
    cache = batch * share.whole.max_seq_len * part.kv_bytes_per_token(cache_dtype or dtype)
    several = ranks > 1
    row = batch * part.dim
    return Plan(
        ranks=ranks,
        weights=weights,
        cache=cache,
        read=weights - (0 if part.tied else embedding) + cache,
        sums=several * (2 * part.n_layers + 1),
        summed=several * row * (2 * part.n_layers * dtype.itemsize + of_rows),
        gathered=several * batch * share.rows_each * dtype.itemsize,
    )
