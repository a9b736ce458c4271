"""The weight of a linear or an embedding as 8-bit or 4-bit integers, where a Parameter stood.

Its layout is that of `llama_fast.ops.quantized_layout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.quantization import ROWS, WeightFormat, packed_shapes
from ..dispatch import needs_dispatcher, reserve
from ..errors import ShapeError
from ..utils.normal_tensors import normal_tensors
from .quantized_layout import centre, dequantize, dequantized_blocks
from .rounding import AT_ONCE_ON_GPU, Fit, best_fit, enclosing, encode, refuse_non_finite

# Weights that are rounded at a time on a CPU: there are several float32 tensors of as many.
ROUNDED = 1 << 18


class QuantizedWeight(nn.Module):
    """A (C_out, C_in) matrix of integers, with a float16 scale for each group of a row.

    qdata, scales, minima   buffers, in the layout of `quantized_layout`; minima is None for a
                            symmetric weight. They keep their dtypes whatever a model is cast to
    shape                   (C_out, C_in), as of the matrix that it stands for
    bits, group_size        8 or 4; 32, 64 or 128

    A new one is empty, as `torch.empty` is: fill it with `set_rows`, from a state dict, or make it
    with `from_float`. It is frozen: no gradient reaches it, and one passes through to x.
    """

    qdata: Tensor
    scales: Tensor
    minima: Tensor | None

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
        qdata, scales = packed_shapes(C_out, C_in, bits, group_size)
        minima = None if symmetric else scales
        kinds = (qdata, torch.uint8), (scales, torch.float16), (minima, torch.float16)
        for name, (shape, dtype) in zip(("qdata", "scales", "minima"), kinds, strict=True):
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
        """Rounds `weight` (C_out, C_in), of any float dtype, to nearest quantised values, on its
        device.

        fit  what finds scales and minima; by default those that take in every number of a group

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
    @normal_tensors()
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
                scales, minima = (fit or enclosing)(groups, bits, symmetric)
                refuse_non_finite(groups, scales, minima)
                qdata = encode(groups, scales, minima, bits)
                made.set_rows(start + offset, qdata, scales, minima)
            start += len(part)
        if start != shape[0]:
            raise ShapeError(
                f"QuantizedWeight: {start} rows were given for a matrix of {tuple(shape)}; there "
                f"must be {shape[0]}"
            )
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], form: WeightFormat) -> QuantizedWeight:
        """One of `shape` on the meta device: without contents."""
        return cls(*shape, form.bits, form.group_size, form.symmetric, "meta")

    @classmethod
    def holding(
        cls, shape: tuple[int, int], form: WeightFormat, buffers: Mapping[str, Tensor]
    ) -> QuantizedWeight:
        """One of `shape` that takes these buffers as they are."""
        made = cls.empty(shape, form)
        made.load_state_dict(buffers, assign=True)
        return made

    @property
    def symmetric(self) -> bool:
        return self.minima is None

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | None, int, int, int]:
        """What the op `linear` takes after x."""
        return (*self._buffers.values(), self.shape[0], self.bits, self.group_size)

    def row_blocks(self, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(start, rows) of the matrix (C_out, C_in), or of some rows of it, some blocks at a time:
        the rows in float32, cut into groups (n, groups, group_size), of which the last is filled up
        with zeros."""
        most = ROUNDED if weight.device.type == "cpu" else AT_ONCE_ON_GPU
        step = max(1, most // max(1, ROWS * self.shape[1])) * ROWS
        for start in range(0, len(weight), step):
            rows = F.pad(weight[start : start + step].detach().float(), (0, self._padding))
            yield start, rows.view(len(rows), self.scales.shape[1], self.group_size)

    @property
    def _padding(self) -> int:
        return -self.shape[1] % self.group_size

    @torch.no_grad()
    def set_rows(
        self, start: int, qdata: Tensor, scales: Tensor, minima: Tensor | None = None
    ) -> None:
        """Stores rows from `start` on: whole blocks of 16, or all that follow.

        qdata           uint8 (n, groups, group_size), as of `row_blocks`
        scales, minima  float16 (n, groups)
        """
        n, groups, _ = qdata.shape
        if start % ROWS or (n % ROWS and start + n != self.shape[0]):
            raise ShapeError(
                f"QuantizedWeight: rows {start} to {start + n} of {self.shape[0]} were given; they "
                f"must be whole blocks of {ROWS}"
            )
        C_in = self.shape[1]
        fill = centre(self.bits) if self.symmetric else 0
        rows = qdata.reshape(n, groups * self.group_size)[:, :C_in]
        rows = F.pad(rows, (0, self._padding, 0, -n % ROWS), value=fill)
        count, runs = len(rows) // ROWS, self.qdata.shape[1]
        if self.bits == 8:
            packed = rows.view(count, ROWS, runs, 4)
        else:
            low, high = rows.view(count, ROWS, runs, 2, 4).unbind(3)
            packed = low | high << 4
        blocks = slice(start // ROWS, start // ROWS + count)
        self.qdata[blocks] = packed.transpose(1, 2)
        for buffer, values in ((self.scales, scales), (self.minima, minima)):
            if buffer is not None:
                values = F.pad(values, (0, 0, 0, -n % ROWS))
                buffer[blocks] = values.view(count, ROWS, groups).transpose(1, 2)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (C_out, C_in) matrix that the quantised values stand for."""
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
        if not needs_dispatcher() and indices.is_cpu and indices.numel():
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
        kind = "symmetric" if self.symmetric else "with minima"
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


def round_weight(weight: Tensor, form: WeightFormat) -> QuantizedWeight:
    """`weight` (C_out, C_in), of any float dtype, rounded to the nearest quantised values, on its
    device.

    Scales of four symmetric bits are searched for (see `search_scales`), others take in the largest
    number of a group. Raises ShapeError for a weight that cannot be stored so.
    """
    return QuantizedWeight.from_float(
        weight, form.bits, form.group_size, form.symmetric, fit=best_fit
    )


def round_rows(
    shape: tuple[int, int],
    rows: Iterable[Tensor],
    form: WeightFormat | None,
    device: torch.device | str | None = None,
) -> Tensor | QuantizedWeight:
    """As `round_weight`, for a matrix of `shape` (C_out, C_in) whose rows come some at a time. A
    weight that has no form, of any number of dims, is put together as it is, in its rows' dtype."""
    if form is None:
        return _together(shape, rows)
    of_form = (form.bits, form.group_size, form.symmetric)
    return QuantizedWeight.from_rows(shape, rows, *of_form, fit=best_fit, device=device)


def _together(shape: tuple[int, ...], rows: Iterable[Tensor]) -> Tensor:
    """The tensor of `shape` whose rows come some at a time: it and some rows are all there is."""
    whole, start = None, 0
    for part in rows:
        if part.shape == tuple(shape):
            return part
        if whole is None:
            whole = reserve(torch.empty(shape, dtype=part.dtype, device=part.device))
        whole[start : start + len(part)] = part
        start += len(part)
    if start != shape[0]:
        raise ShapeError(
            f"{start} rows were given for a tensor of {tuple(shape)}; there must be {shape[0]}"
        )
    return whole
