"""Linear layer whose weight is stored as 8-bit or 4-bit integers, with a scale a group.

    y[..., o] = Σ_i x[..., i] · w[o, i]
    w[o, i] = scale · (code - centre)     symmetric: no offsets; centre is 128 for 8 bits, 8 for 4
    w[o, i] = scale · code + offset       otherwise

A group is `group_size` columns of one row of w: it has one scale, and one offset.

Shapes    x (..., C_in) → y (..., C_out). C_pad is C_in rounded up to whole groups, NB the number of
          blocks of 16 rows of w: C_out / 16, rounded up
          codes    uint8 (NB, C_pad/4, 16, 4) for 8 bits, (NB, C_pad/8, 16, 4) for 4
          scales   float16 (NB, C_pad/group_size, 16); offsets the same, or None
Layout    the 16 rows of a block are interleaved, so that a kernel which sums 16 rows at a time
          reads codes and scales in the order in which they lie. Row 16b + r and column i have
              8 bits    codes[b, i // 4, r, i % 4]
              4 bits    codes[b, i // 8, r, i % 4], its low half if i % 8 < 4, else its high half
              scale     scales[b, i // group_size, r]
          The codes of padded columns are the centre (0 with offsets), padded rows have scale 0.
          x is contiguous in C_in, its other dims have any stride; all else is contiguous
Rounding  an x of a half type is rounded to 8 bits first, for each row and group apart:
              s = max |x| / 127 in float32        x_q = x / s, rounded to even; 0 where s is 0
              y = Σ over groups of s · scale · (Σ code · x_q - centre · Σ x_q)
                                            (or s · (scale · Σ code · x_q + offset · Σ x_q))
          so that the sums within a group may be those of integers. All else is in float32, with
          one rounding to x's dtype at the end. A float32 x is not rounded; the weights are then
          those of the formula in float32. A row of x that is not finite gives outputs that are not
          finite.

Gradient, with g the gradient of y; the rounding of x counts as the identity, the weight is frozen:
    dx = g W
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..config.quantization import BITS, GROUP_SIZES, ROWS, packed_shapes
from ..dispatch import Case, Cost, Op
from ..errors import ShapeError
from . import checks
from .inputs import rand, randint, randn
from .rms_norm import accumulate

BLOCK = 1 << 22  # weights that the reference dequantises at a time


def linear_quantized(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    """Multiplies each row of `x` by a transposed weight of 8-bit or 4-bit integers.

    `llama_fast.linear(x, weight)` calls this for a QuantizedWeight, which holds the arguments.

    x           (..., C_in), float32, bfloat16 or float16, contiguous in C_in
    codes       uint8, (C_out/16, C_in/4, 16, 4) for 8 bits, (C_out/16, C_in/8, 16, 4) for 4, with
                C_out rounded up to 16 and C_in to group_size; contiguous
    scales      float16, (C_out/16, C_in/group_size, 16), contiguous
    offsets     as scales; None where the codes are symmetric
    C_out       rows of the weight
    bits        8 or 4
    group_size  32, 64 or 128 columns that share a scale
    Returns y (..., C_out), contiguous, of x's dtype. Raises ShapeError when the arguments do not
    fit.
    """
    return OP(x, codes, scales, offsets, C_out, bits, group_size)


def centre(bits: int) -> int:
    """The code of a symmetric weight that stands for zero."""
    return 1 << (bits - 1)


def decode(
    codes: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """The numbers that codes stand for: floats in, of one dtype, and floats out."""
    if offsets is None:
        return (codes - centre(bits)) * scales
    return codes * scales + offsets


def check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
    op: str = "linear_quantized",
) -> None:
    checks.same_kind(op, "x", x)
    checks.rows(op, "x", x, "(..., C_in)")
    _check_weight(op, x, codes, scales, offsets, (C_out, x.shape[-1]), bits, group_size)


def _check_weight(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    size: tuple[int, int],
    bits: int,
    group_size: int,
) -> None:
    of_codes, of_scales = packed_shapes(*size, bits, group_size)
    given = [("codes", codes, of_codes), ("scales", scales, of_scales)]
    if offsets is not None:
        given.append(("offsets", offsets, of_scales))
    for name, tensor, needed in given:
        if tensor.shape != needed:
            raise ShapeError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; a weight of (C_out, C_in) = {size} "
                f"with bits={bits} and group_size={group_size} needs {needed}"
            )
        dtypes = (torch.uint8,) if name == "codes" else (torch.float16,)
        if name != "codes" and x.dtype is torch.float64:  # the reference is its own oracle there
            dtypes = (torch.float16, torch.float64)
        if tensor.dtype not in dtypes:
            raise ShapeError(f"{op}: {name} is {tensor.dtype}; it must be {dtypes[0]}")
        if tensor.device != x.device:
            raise ShapeError(
                f"{op}: {name} is on {tensor.device} and the tensor to multiply on {x.device}; "
                f"move both to one device with .to({str(x.device)!r})"
            )
        if not tensor.is_contiguous():
            raise ShapeError(
                f"{op}: {name} has strides {tensor.stride()}; it must be contiguous: call "
                ".contiguous() on it once, not in every step"
            )


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weights of some blocks, padding included: (blocks · R, C_pad), where R is the number of
    rows of a block that are given: all 16, or one that was picked out of each."""
    blocks, _, R, _ = codes.shape
    groups = scales.shape[1]
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=3)  # (blocks, runs, R, 2, 4)

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2).reshape(blocks * R, groups, 1).to(dtype)

    w = codes.transpose(1, 2).reshape(blocks * R, groups, group_size).to(dtype)
    w = decode(w, of_rows(scales), None if offsets is None else of_rows(offsets), bits)
    return w.view(blocks * R, groups * group_size)


def dequantized_blocks(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bits: int,
    group_size: int,
    dtype: torch.dtype,
) -> Iterator[torch.Tensor]:
    """The weights in order, BLOCK of them at a time, so that a large head never exists whole."""
    step = max(1, BLOCK // max(1, ROWS * scales.shape[1] * group_size))
    for start in range(0, max(1, len(codes)), step):
        part = slice(start, start + step)
        some = None if offsets is None else offsets[part]
        yield dequantize(codes[part], scales[part], some, bits, group_size, dtype)


def rounded(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """x rounded to 8 bits in each group of its last dim, in float32; its length is unchanged.

    To autograd this is the identity: a derivative of rounding would be zero everywhere.
    """
    C_in = x.shape[-1]
    padded = F.pad(x.detach().float(), (0, -C_in % group_size))
    groups = padded.view(*x.shape[:-1], padded.shape[-1] // group_size, group_size)
    s = groups.abs().amax(-1, keepdim=True) / 127
    x_q = torch.where(s == 0, 0.0, (groups / s).round())
    exact = x.float()
    return exact + ((x_q * s).flatten(-2)[..., :C_in] - exact).detach()


def eager(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    dtype = accumulate(x.dtype)
    x_hat = x if x.dtype is dtype else rounded(x, group_size)
    x_hat = F.pad(x_hat, (0, -x.shape[-1] % group_size))
    # Made beforehand: small results between large temporaries would keep the memory of all of them.
    y = x_hat.new_empty((*x.shape[:-1], C_out))
    start = 0
    for w in dequantized_blocks(codes, scales, offsets, bits, group_size, dtype):
        part = y[..., start : start + len(w)]
        part.copy_(F.linear(x_hat, w[: part.shape[-1]]))
        start += len(w)
    return y.to(x.dtype)


def fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], C_out))


def save(inputs: tuple, output: torch.Tensor) -> tuple:
    x, codes, scales, offsets, _, bits, group_size = inputs
    return (codes, scales, offsets), (x.shape[-1], bits, group_size)


def gradient(saved: tuple, rest: tuple, needed: tuple, grad: torch.Tensor) -> tuple:
    return BACKWARD_X(grad, *saved, *rest), None, None, None, None, None, None


def check_backward_x(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_in: int,
    bits: int,
    group_size: int,
) -> None:
    op = "linear_quantized_backward_x"
    checks.same_kind(op, "grad", grad)
    checks.rows(op, "grad", grad, "(..., C_out)")
    size = (grad.shape[-1], C_in)
    _check_weight(op, grad, codes, scales, offsets, size, bits, group_size)


def backward_x_eager(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_in: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    dtype = accumulate(grad.dtype)
    weights = dequantized_blocks(codes, scales, offsets, bits, group_size, dtype)
    dx, start = grad.new_zeros((*grad.shape[:-1], C_in), dtype=dtype), 0
    for w in weights:
        some = grad[..., start : start + len(w)].to(dtype)
        dx += torch.matmul(some, w[: some.shape[-1], :C_in])
        start += len(w)
    return dx.to(grad.dtype)


def backward_x_fake(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_in: int,
    bits: int,
    group_size: int,
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], C_in))


def cost(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_out: int,
    bits: int,
    group_size: int,
) -> Cost:
    M, C_in = x.shape[:-1].numel(), x.shape[-1]
    weight = codes.nbytes + scales.nbytes + (0 if offsets is None else offsets.nbytes)
    return Cost(bytes=weight + M * (C_in + C_out) * x.element_size(), flops=2 * M * C_out * C_in)


def backward_x_cost(
    grad: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    C_in: int,
    bits: int,
    group_size: int,
) -> Cost:
    M, C_out = grad.shape[:-1].numel(), grad.shape[-1]
    weight = codes.nbytes + scales.nbytes + (0 if offsets is None else offsets.nbytes)
    moved = weight + M * (C_in + C_out) * grad.element_size()
    return Cost(bytes=moved, flops=2 * M * C_out * C_in)


def cases() -> list[Case]:
    def weight(
        g, C_out: int, C_in: int, bits: int, group_size: int, symmetric: bool, device
    ) -> tuple:
        """Random codes, and scales that make y's elements of the order of 1."""
        of_codes, of_scales = packed_shapes(C_out, C_in, bits, group_size)
        fill = centre(bits) if symmetric else 0
        codes = randint(g, 256, *of_codes, dtype=torch.uint8)
        padding = of_scales[1] * group_size - C_in
        if padding:
            per = 32 // bits
            column = torch.arange(of_codes[1] * per, device=codes.device).view(-1, 1, per)
            if bits == 8:
                codes[(column >= C_in).expand(codes.shape)] = fill
            else:
                low, high = (column >= C_in).split(4, dim=-1)
                codes = torch.where(low, codes & 240 | fill, codes)
                codes = torch.where(high, codes & 15 | fill << 4, codes)
        size = 2.0 ** (1 - bits) * max(C_in, 1) ** -0.5
        scales = size * (0.5 + rand(g, *of_scales))
        offsets = None if symmetric else (-scales * centre(bits)).half().to(device)
        return codes.to(device), scales.half().to(device), offsets, C_out, bits, group_size

    def sizes(
        *rows: int,
        C_in: int,
        C_out: int,
        bits: int = 8,
        group_size: int = 64,
        symmetric: bool = True,
        take=lambda x: x,
    ):
        def make(g, dtype, device):
            x = take(randn(g, *rows, C_in, dtype=dtype, device=device))
            return x, *weight(g, C_out, x.shape[-1], bits, group_size, symmetric, device)

        return make

    def outliers(bits: int):
        def make(g, dtype, device):
            args = sizes(3, C_in=1030, C_out=21, bits=bits, group_size=128)(g, dtype, device)
            args[0][:, 7] *= 200
            args[0][1, 64:192] = 0
            return args

        return make

    kinds = [
        Case(
            f"{bits} bits, group of {group_size}, {'symmetric' if symmetric else 'with offsets'}",
            sizes(3, C_in=515, C_out=37, bits=bits, group_size=group_size, symmetric=symmetric),
        )
        for bits in BITS
        for group_size in GROUP_SIZES
        for symmetric in (True, False)
    ]
    rows = [
        Case(
            f"{M} rows, {bits} bits",
            sizes(M, C_in=258, C_out=130, bits=bits, group_size=group_size),
        )
        for M in (0, 1, 2, 5, 16, 17, 40)
        for bits, group_size in ((8, 64), (4, 32))
    ]
    return [
        Case("one product", sizes(1, C_in=1, C_out=1)),
        *kinds,
        *rows,
        Case("a vector", sizes(C_in=96, C_out=40, bits=4, group_size=32)),
        Case("no outputs", sizes(3, C_in=16, C_out=0)),
        Case("no inputs", sizes(3, C_in=0, C_out=8, bits=4)),
        Case("decode, 8 bits", sizes(1, 1, C_in=2048, C_out=256, group_size=128)),
        Case("decode, 4 bits", sizes(1, 1, C_in=2048, C_out=256, bits=4, group_size=32)),
        Case("long rows", sizes(4, C_in=14336, C_out=8, bits=4, group_size=32)),
        Case("outliers, 8 bits", outliers(8)),
        Case("outliers, 4 bits", outliers(4)),
        Case(
            "columns of a wider tensor",
            sizes(6, C_in=300, C_out=24, take=lambda x: x[:, 21:278]),
        ),
        Case(
            "last token of each row",
            sizes(3, 9, C_in=64, C_out=48, bits=4, group_size=32, take=lambda x: x[:, -1:]),
        ),
        Case(
            "heads of a transposed tensor",
            sizes(2, 7, 5, C_in=64, C_out=12, bits=4, take=lambda x: x.transpose(1, 2)),
        ),
    ]


OP = Op(
    name="linear_quantized",
    schema="(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, "
    "int C_out, int bits, int group_size) -> Tensor",
    check=check,
    autocast="lower",
    eager=eager,
    fake=fake,
    save=save,
    gradient=gradient,
    constants=("scales", "offsets"),
    cost=cost,
    cases=cases,
)
BACKWARD_X = Op(
    name="linear_quantized_backward_x",
    schema="(Tensor grad, Tensor codes, Tensor scales, Tensor? offsets, "
    "int C_in, int bits, int group_size) -> Tensor",
    check=check_backward_x,
    eager=backward_x_eager,
    fake=backward_x_fake,
    cost=backward_x_cost,
)
