"""The weight of a linear or an embedding as 8-bit or 4-bit integers, where a Parameter stood.

Its layout is that of `llama_fast.ops.linear_quantized`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ShapeError
from ..registry import interposed, reserve
from .linear_quantized import (
    ROWS,
    centre,
    dequantize,
    dequantized_blocks,
    packed_shapes,
)

# Weights that are rounded at a time: there are several float32 tensors of as many.
ROUNDED = 1 << 18
# (groups (..., group_size), bits, symmetric) → (scales, offsets or None), float16 (...)
Fit = Callable[[Tensor, int, bool], tuple[Tensor, Tensor | None]]


class QuantizedWeight(nn.Module):
    """A (C_out, C_in) matrix of integers, with a float16 scale for each group of a row.

    codes, scales, offsets   buffers, in the layout of `linear_quantized`; offsets is None for a
                             symmetric weight. They keep their dtypes whatever a model is cast to
    shape                    (C_out, C_in), as of the matrix that it stands for
    bits, group_size         8 or 4; 32, 64 or 128

    A new one is empty, as `torch.empty` is: fill it with `set_rows`, from a state dict, or make it
    with `from_float`. It is frozen: no gradient reaches it, and one passes through to x.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(
        self,
        C_out: int,
        C_in: int,
        bits: int,
        group_size: int,
        symmetric: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = (C_out, C_in)
        self.bits, self.group_size = bits, group_size
        codes, scales = packed_shapes(C_out, C_in, bits, group_size)
        offsets = None if symmetric else scales
        kinds = (codes, torch.uint8), (scales, torch.float16), (offsets, torch.float16)
        for name, (shape, dtype) in zip(("codes", "scales", "offsets"), kinds, strict=True):
            made = shape and reserve(torch.empty(shape, dtype=dtype, device=device))
            self.register_buffer(name, made)

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        bits: int,
        group_size: int,
        symmetric: bool = True,
        *,
        fit: Fit | None = None,
    ) -> QuantizedWeight:
        """Rounds `weight` (C_out, C_in), of any float dtype, to the nearest codes, on its device.

        fit  what finds scales and offsets; by default those that take in every number of a group

        Takes some blocks of rows at a time. Raises ShapeError for a weight that is no matrix of
        finite floats in float16's range.
        """
        if weight.ndim != 2 or not weight.is_floating_point():
            raise ShapeError(
                f"QuantizedWeight: weight is {weight.dtype} {tuple(weight.shape)}; it must be a "
                "(C_out, C_in) matrix of floats"
            )
        form = (bits, group_size, symmetric)
        return cls.from_rows(weight.shape, (weight,), *form, fit=fit, device=weight.device)

    @classmethod
    def from_rows(
        cls,
        shape: tuple[int, int],
        rows: Iterable[Tensor],
        bits: int,
        group_size: int,
        symmetric: bool = True,
        *,
        fit: Fit | None = None,
        device: torch.device | str | None = None,
    ) -> QuantizedWeight:
        """As `from_float`, for a matrix of `shape` (C_out, C_in) that comes in parts: `rows` yields
        floats (n, C_in), any number of rows at a time, in their order."""
        made, start = cls(*shape, bits, group_size, symmetric, device), 0
        for part in _whole_blocks(rows):
            for offset, groups in made.row_blocks(part):
                scales, offsets = (fit or enclosing)(groups, bits, symmetric)
                refuse_non_finite(groups, scales, offsets)
                codes = encode(groups, scales, offsets, bits)
                made.set_rows(start + offset, codes, scales, offsets)
            start += len(part)
        if start != shape[0]:
            raise ShapeError(
                f"QuantizedWeight: {start} rows were given for a matrix of {tuple(shape)}; there "
                f"must be {shape[0]}"
            )
        return made

    @property
    def symmetric(self) -> bool:
        return self.offsets is None

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, int, int, int]:
        """What `linear_quantized` takes after x."""
        return (*self._buffers.values(), self.shape[0], self.bits, self.group_size)

    def row_blocks(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(start, rows) of the matrix (C_out, C_in), or of some rows of it, some blocks at a time:
        the rows in float32, cut into groups (n, groups, group_size), of which the last is filled up
        with zeros."""
        step = max(1, ROUNDED // max(1, ROWS * self.shape[1])) * ROWS
        for start in range(0, len(weight), step):
            rows = F.pad(weight[start : start + step].detach().float(), (0, self._padding))
            yield start, rows.view(len(rows), self.scales.shape[1], self.group_size)

    @property
    def _padding(self) -> int:
        return -self.shape[1] % self.group_size

    @torch.no_grad()
    def set_rows(
        self, start: int, codes: Tensor, scales: Tensor, offsets: Tensor | None = None
    ) -> None:
        """Stores rows from `start` on: whole blocks of 16, or all that follow.

        codes            uint8 (n, groups, group_size), as of `row_blocks`
        scales, offsets  float16 (n, groups)
        """
        n, groups, _ = codes.shape
        if start % ROWS or (n % ROWS and start + n != self.shape[0]):
            raise ShapeError(
                f"QuantizedWeight: rows {start} to {start + n} of {self.shape[0]} were given; they "
                f"must be whole blocks of {ROWS}"
            )
        C_in = self.shape[1]
        fill = centre(self.bits) if self.symmetric else 0
        rows = codes.reshape(n, groups * self.group_size)[:, :C_in]
        rows = F.pad(rows, (0, self._padding, 0, -n % ROWS), value=fill)
        count, runs = len(rows) // ROWS, self.codes.shape[1]
        if self.bits == 8:
            packed = rows.view(count, ROWS, runs, 4)
        else:
            low, high = rows.view(count, ROWS, runs, 2, 4).unbind(3)
            packed = low | high << 4
        blocks = slice(start // ROWS, start // ROWS + count)
        self.codes[blocks] = packed.transpose(1, 2)
        for buffer, values in ((self.scales, scales), (self.offsets, offsets)):
            if buffer is not None:
                values = F.pad(values, (0, 0, 0, -n % ROWS))
                buffer[blocks] = values.view(count, ROWS, groups).transpose(1, 2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (C_out, C_in) matrix that the codes stand for."""
        C_out, C_in = self.shape
        made = torch.empty(C_out, C_in, dtype=dtype, device=self.device)
        start = 0
        buffers = self._buffers.values()
        for rows in dequantized_blocks(*buffers, self.bits, self.group_size, torch.float32):
            made[start : start + len(rows)] = rows[: C_out - start, :C_in]
            start += len(rows)
        return made

    def rows(self, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The rows of `indices` (...) int64, as an embedding looks them up: (..., C_in). Only they
        are read. Raises IndexError for an index that is no row, unless calls are being traced."""
        C_out, C_in = self.shape
        if not interposed() and indices.is_cpu and indices.numel():
            low, high = indices.aminmax()
            if low < 0 or high >= C_out:
                raise IndexError(
                    f"rows {int(low)} to {int(high)} were asked for; there are {C_out} from 0 on"
                )
        flat = indices.reshape(-1)
        # A row of each block, so blocks of one row.
        one = (flat // ROWS, slice(None), flat % ROWS)
        parts = [None if b is None else b[one].unsqueeze(2) for b in self._buffers.values()]
        found = dequantize(*parts, self.bits, self.group_size)
        return found[:, :C_in].to(dtype).view(*indices.shape, C_in)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedWeight:
        """A cast of the whole model moves the buffers, and leaves their dtypes."""

        def keep(buffer: Tensor) -> Tensor:
            result = fn(buffer)
            return result if result.dtype == buffer.dtype else buffer.to(result.device)

        return super()._apply(keep, recurse)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "with offsets"
        return f"{self.shape}, bits={self.bits}, group_size={self.group_size}, {kind}"


def _whole_blocks(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows of all parts, in parts of whole blocks of 16; the last one may be odd."""
    rest = None
    for rows in parts:
        if rest is not None:
            rows = torch.cat((rest, rows))
        whole = len(rows) // ROWS * ROWS
        rest = rows[whole:].clone() if whole < len(rows) else None  # a view would keep the rows
        if whole:
            yield rows[:whole]
    if rest is not None:
        yield rest


def enclosing(groups: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Scales and offsets, float16 (...), that take in all numbers of `groups` (..., group_size)."""
    if symmetric:
        low, high = groups.aminmax(dim=-1)
        if bits == 8:
            return (torch.maximum(-low, high) / 127).half(), None
        # The largest number by its size becomes code 0: -8 times a scale of the other sign.
        return (torch.where(-low > high, low, high) / -8).half(), None
    low, high = groups.aminmax(dim=-1)
    return ((high - low) / (2**bits - 1)).half(), low.half()


def encode(groups: Tensor, scales: Tensor, offsets: Tensor | None, bits: int) -> Tensor:
    """The codes, uint8, nearest to `groups` (..., group_size) under scales and offsets (...)."""
    scale = scales.float().unsqueeze(-1)
    if offsets is None:
        low, high, zero = (1 if bits == 8 else 0), 2**bits - 1, float(centre(bits))
    else:
        low, high, zero = 0, 2**bits - 1, 0.0
        groups = groups - offsets.float().unsqueeze(-1)
    codes = torch.where(scale == 0, zero, groups / scale + zero)
    return codes.round_().clamp_(low, high).to(torch.uint8)


def refuse_non_finite(groups: Tensor, scales: Tensor, offsets: Tensor | None) -> None:
    """Raises ShapeError where weights are not finite, or too large for float16 scales."""
    if torch.isfinite(scales).all() and (offsets is None or torch.isfinite(offsets).all()):
        return
    if torch.isfinite(groups).all():
        raise ShapeError(
            f"QuantizedWeight: the weight has numbers up to {groups.abs().max():.3g}, which "
            "float16 scales cannot reach; keep it as it is, or scale it down"
        )
    raise ShapeError("QuantizedWeight: the weight has numbers that are not finite")
