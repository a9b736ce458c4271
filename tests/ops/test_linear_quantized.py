"""The layout of quantised weights, their holder, and what is special to multiplying by them."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch

from llama_fast import QuantizedWeight, linear
from llama_fast.backends import cpu
from llama_fast.dispatch import OPS, use_backend
from llama_fast.errors import BackendError, GradientError, ShapeError
from llama_fast.nn import Linear
from llama_fast.ops.linear import BACKWARD_X

from .backends import BACKENDS, EMULATED, PRODUCTS, name_of, on
from .oracle import fence, same_bits

KINDS = list(itertools.product((8, 4), (32, 64, 128), (True, False)))
C_OUT, C_IN = 37, 135  # a block and groups that are not full
LEVELS = (-64, -53, -43, -34, -26, -19, -12, -6, 0, 6, 12, 19, 26, 34, 43, 53)


def random_weight(C_out: int = C_OUT, C_in: int = C_IN) -> torch.Tensor:
    return torch.randn(C_out, C_in, generator=torch.Generator().manual_seed(0)) * C_in**-0.5


@pytest.fixture(params=KINDS, ids=str)
def quantized(request) -> QuantizedWeight:
    return QuantizedWeight.from_float(random_weight(), *request.param)


def by_formula(weight: QuantizedWeight, row: int, column: int) -> float:
    """One element, as the op's page says where it lies."""
    b, r, scales = row // 16, row % 16, weight.scales[row // 16, column // weight.group_size]
    if weight.bits == 8:
        code = int(weight.qdata[b, column // 4, r, column % 4])
    else:
        code = int(weight.qdata[b, column // 8, r, column % 4])
        code = code & 15 if column % 8 < 4 else code >> 4
    if weight.symmetric:
        return (code - 128 if weight.bits == 8 else LEVELS[code]) * float(scales[r])
    return code * float(scales[r]) + float(weight.minima[b, column // weight.group_size, r])


def test_elements_lie_where_the_page_says(quantized):
    found = quantized.dequantize(torch.float64)
    assert found.shape == (C_OUT, C_IN) and found.dtype == torch.float64
    for row, column in itertools.product((0, 1, 15, 16, 36), (0, 3, 4, 5, 8, 127, 128, 134)):
        assert float(found[row, column]) == pytest.approx(by_formula(quantized, row, column), 1e-6)


def test_every_weight_is_within_half_a_step(quantized):
    weight = random_weight()
    scales = quantized.scales.transpose(1, 2).flatten(0, 1)[:C_OUT].float()
    scales = scales.repeat_interleave(quantized.group_size, 1)[:, :C_IN]
    steps = scales.abs()
    error = (quantized.dequantize() - weight).abs()
    if (quantized.bits, quantized.symmetric) == (4, True):  # levels that are not evenly spaced
        of_all = (scales.unsqueeze(-1) * torch.tensor(LEVELS) - weight.unsqueeze(-1)).abs()
        assert (error <= of_all.amin(-1) + 0.4 * steps).all()  # of 5 to 11 steps between levels
        assert error.square().mean() < 1.005 * of_all.amin(-1).square().mean()
        return
    assert (error <= 0.51 * steps).all()
    assert error.square().mean().sqrt() < 0.3 * steps.square().mean().sqrt()  # 0.289 if uniform


def test_padding_is_zero(quantized):
    C_pad = quantized.scales.shape[1] * quantized.group_size
    padded = QuantizedWeight(48, C_pad, quantized.bits, quantized.group_size, quantized.symmetric)
    padded.load_state_dict(quantized.state_dict())
    whole = padded.dequantize()
    assert not whole[C_OUT:].any()
    if quantized.symmetric:
        assert not whole[:, C_IN:].any()


def test_rows_are_those_of_the_whole(quantized):
    indices = torch.tensor([[0, 36], [17, 17]])
    assert torch.equal(quantized.rows(indices), quantized.dequantize()[indices])
    assert quantized.rows(indices, torch.bfloat16).dtype == torch.bfloat16
    assert quantized.rows(indices[:0]).shape == (0, 2, C_IN)
    for wrong in (-1, C_OUT):
        with pytest.raises(IndexError, match="there are 37"):
            quantized.rows(torch.tensor([0, wrong]))


def test_a_row_of_zeros_and_one_of_a_single_value_are_exact(quantized):
    weight = torch.zeros(16, 128)
    weight[1] = 0.5
    made = QuantizedWeight.from_float(
        weight, quantized.bits, quantized.group_size, quantized.symmetric
    ).dequantize()
    assert not made[0].any()
    torch.testing.assert_close(made[1], weight[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("parts", [[37], [1] * 37, [16, 21], [5, 20, 12], [0, 33, 0, 4]], ids=str)
def test_a_matrix_that_comes_in_parts_is_the_same(quantized, parts):
    form = (quantized.bits, quantized.group_size, quantized.symmetric)
    rows = iter(random_weight().split(parts))
    made = QuantizedWeight.from_rows((C_OUT, C_IN), rows, *form)
    for buffer, expected in zip(made.buffers(), quantized.buffers(), strict=True):
        assert torch.equal(buffer, expected)
    with pytest.raises(ShapeError, match=r"32 rows were given.*must be 37"):
        QuantizedWeight.from_rows((C_OUT, C_IN), [random_weight()[:32]], *form)


@pytest.mark.parametrize(("C_out", "C_in"), [(0, 64), (5, 0), (1, 1)])
def test_small_matrices(C_out, C_in):
    for kind in KINDS:
        made = QuantizedWeight.from_float(random_weight(C_out, max(C_in, 1))[:, :C_in], *kind)
        y = linear(torch.ones(2, C_in), made)
        assert y.shape == (2, C_out)
        torch.testing.assert_close(y, made.dequantize().sum(1).expand(2, C_out))


def test_it_stands_where_a_parameter_stood(quantized):
    layer = Linear(C_IN, C_OUT)
    layer.weight = quantized
    x = torch.randn(2, C_IN)
    expected = x @ quantized.dequantize().t()
    torch.testing.assert_close(layer(x), expected)
    assert list(layer.parameters()) == [] and "bits=" in repr(layer)
    assert quantized.nbytes == sum(t.nbytes for t in layer.state_dict().values())

    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight is not layer.weight
        assert torch.equal(other(x), layer(x))
    fresh = Linear(C_IN, C_OUT)
    kind = quantized.bits, quantized.group_size, quantized.symmetric
    fresh.weight = QuantizedWeight(C_OUT, C_IN, *kind)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize(
    "cast", [lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.type(torch.half)]
)
def test_a_cast_leaves_it_as_it_is(quantized, cast):
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    cast(quantized)
    for name, tensor in quantized.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_it_moves_between_devices(quantized):
    quantized.to("meta", torch.bfloat16)
    assert quantized.device.type == "meta"
    assert quantized.scales.dtype == torch.float16
    quantized.to_empty(device="cpu")
    assert quantized.device.type == "cpu" and quantized.qdata.dtype == torch.uint8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_stays_by_itself(backend, bits, dtype, value):
    weight = QuantizedWeight.from_float(random_weight(), bits, 32)
    x = torch.ones(3, C_IN, dtype=dtype)
    x[1, 70] = value
    with on(backend):
        try:
            y = linear(x, weight)
        except BackendError as error:
            pytest.skip(str(error))
    assert torch.isfinite(y[[0, 2]]).all() and not torch.isfinite(y[1]).any()


WEIGHT = QuantizedWeight.from_float(random_weight(32, 64), 8, 32, symmetric=False)
X = torch.ones(2, 64)


def call(x=X, **changed):
    names = ("weight", "scales", "minima", "C_out", "bits", "group_size")
    given = dict(zip(names, WEIGHT.arguments, strict=True))
    return lambda: OPS["linear"](x, *(given | changed).values())


meta = torch.device("meta")
BAD = [
    ("bits", call(bits=5), "bits is 5; it must be 8 or 4"),
    ("group", call(group_size=16), "group_size is 16; it must be 32, 64 or 128"),
    ("values", call(C_out=33), r"weight has shape \(2, 16, 16, 4\).*\(33, 64\).*\(3, 16, 16, 4\)"),
    ("other bits", call(bits=4), r"weight has shape.*bits=4.*needs \(2, 8, 16, 4\)"),
    ("scales", call(group_size=64), r"scales has shape \(2, 2, 16\).*needs \(2, 1, 16\)"),
    ("minima", call(minima=WEIGHT.minima[:1]), r"minima has shape \(1, 2, 16\)"),
    ("signed values", call(weight=WEIGHT.qdata.char()), "weight is torch.int8; it must be .*uint8"),
    ("float32 scales", call(scales=WEIGHT.scales.float()), "scales is torch.float32.*float16"),
    ("device", call(scales=WEIGHT.scales.to(meta)), "scales is on meta"),
    (
        "strides",
        call(weight=WEIGHT.qdata.transpose(2, 3).contiguous().transpose(2, 3)),
        "weight has strides.*contiguous",
    ),
    ("x", call(X[:, :20]), "weight has shape"),
    ("x's dtype", call(X.long()), "x is torch.int64"),
    ("columns", lambda: linear(X[:, :63], WEIGHT), r"x has shape \(2, 63\).*\(32, 64\)"),
    ("a vector", lambda: QuantizedWeight.from_float(X[0], 8, 32), r"\(64,\); it must be a"),
    ("NaN", lambda: QuantizedWeight.from_float(X * math.nan, 8, 32), "not finite"),
    ("huge", lambda: QuantizedWeight.from_float(X * 1e9, 4, 32), r"up to 1e\+09.*float16"),
    ("part of a block", lambda: set_rows(0, 7), "rows 0 to 7 of 32.*whole blocks of 16"),
    ("amid a block", lambda: set_rows(8, 16), "rows 8 to 24 of 32"),
]


def set_rows(start: int, count: int) -> None:
    qdata = torch.zeros(count, 2, 32, dtype=torch.uint8)
    scales = torch.zeros(count, 2, dtype=torch.float16)
    WEIGHT.set_rows(start, qdata, scales, scales)


@pytest.mark.parametrize(("bad", "says"), [pytest.param(*b[1:], id=b[0]) for b in BAD])
def test_bad_input_is_refused_in_words(bad, says):
    with pytest.raises(ShapeError, match=says):
        bad()


def test_a_gradient_of_scales_is_refused():
    scales = WEIGHT.scales.clone().requires_grad_()
    with pytest.raises(GradientError, match="scales requires a gradient"):
        call(scales=scales)()


@pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")
@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_threads_change_no_bit(isa, rows, bits):
    weight = QuantizedWeight.from_float(random_weight(2045, 515), bits, 32, True)
    x = torch.randn(rows, 515, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()
    try:
        with on(f"cpu-{isa}"):
            torch.set_num_threads(1)
            one = linear(x, weight)
            for threads in (2, 3, 7):
                torch.set_num_threads(threads)
                assert torch.equal(linear(x, weight), one), f"{threads} threads"
    finally:
        torch.set_num_threads(before)


# Every instruction set; AMX, which has a product of its own, emulated where this CPU lacks it.
ISAS_OF_THIS_CPU = [f"cpu-{isa}" for isa in cpu.isas()]
ISAS = ISAS_OF_THIS_CPU + [b for b in PRODUCTS if name_of(b) == f"cpu-amx{EMULATED}"]
# Around the tiles of rows of each instruction set, and the rows that are rounded together.
COMPANIES = (2, 4, 5, 6, 7, 12, 13, 16, 17, 24, 25, 31, 32, 33, 65, 100, 511, 512, 513, 600)
COMPANIES_OF_SLOW = (5, 13, 33)


@functools.cache
def alone(kind: tuple, dtype: torch.dtype, isa: str) -> tuple[QuantizedWeight, torch.Tensor, ...]:
    """A weight, rows of x, and their products in instruction set `isa`, each computed by itself."""
    # More blocks than a task of tile registers takes, and several chunks of columns.
    weight = QuantizedWeight.from_float(random_weight(16 * 18 + 5, 1100), *kind)
    x = torch.randn(max(COMPANIES), 1100, generator=torch.Generator().manual_seed(1)).to(dtype)
    with on(f"cpu-{isa}"):
        return weight, x, torch.cat([linear(row[None], weight) for row in x])


@pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")
@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_any_company(backend, kind, dtype):
    """On any number of threads, in every instruction set that has a fused multiply-add: the sums of
    a group are exact, and the groups are added in order."""
    fused = backend != "cpu-scalar"
    weight, x, expected = alone(kind, dtype, cpu.isas()[0] if fused else "scalar")
    companies = COMPANIES if fused and backend in ISAS_OF_THIS_CPU else COMPANIES_OF_SLOW
    threads_in_turn = (1, 2) if KINDS.index(kind) % 2 else (2, 1)
    before = torch.get_num_threads()
    try:
        with on(backend):
            # Each number of rows meets one thread in half of the kinds, and two in the others.
            for rows, threads in zip(companies, itertools.cycle(threads_in_turn), strict=False):
                torch.set_num_threads(threads)
                found = linear(x[:rows], weight)
                assert same_bits(found, expected[:rows]), f"{rows} rows, {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ISAS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_in_any_company(backend, kind, dtype):
    """Right, and of the same bits on any number of threads; the weight has blocks and groups that
    are not full, and more columns than are multiplied at a time."""
    weight = QuantizedWeight.from_float(random_weight(C_OUT, 530), *kind)
    grad = torch.randn(33, C_OUT, generator=torch.Generator().manual_seed(1)).to(dtype)
    form = (*weight.arguments[:3], 530, weight.bits, weight.group_size)
    wanted = grad.double() @ weight.dequantize(torch.float64)
    before = torch.get_num_threads()
    try:
        with on(backend):
            dx = BACKWARD_X(grad, *form)
            size = float(wanted.abs().max())
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(dx.double(), wanted, rtol=unit, atol=4 * unit * size)
            for rows, threads in ((1, 2), (2, 1), (7, 3), (32, 1)):
                torch.set_num_threads(threads)
                found = BACKWARD_X(fence(grad[:rows])[0], *form)
                assert same_bits(found, dx[:rows]), f"{rows} rows, {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not cpu.isas(), reason="this needs llama_fast._cpu")
def test_the_order_of_groups_shows_in_the_bits():
    """Or the test above would pass whatever the order is."""
    w, kind = random_weight(37, 1024), (8, 32, True)
    weight, flipped = (QuantizedWeight.from_float(a, *kind) for a in (w, w.flip(1)))
    assert torch.equal(weight.dequantize(), flipped.dequantize().flip(1))
    x = torch.randn(33, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    with use_backend("cpu", strict=True):
        assert not same_bits(linear(x, weight), linear(x.flip(1), flipped))
