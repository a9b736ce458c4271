"""linear: what its sums depend on, values that are no numbers, and where one way ends and the next
begins. `test_ops.py` judges their accuracy."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import llama_fast
from llama_fast import QuantizedWeight, linear
from llama_fast.backends import cpu
from llama_fast.ops.linear import BACKWARD_WEIGHT, BACKWARD_X, OP

from .backends import PRODUCTS as BACKENDS
from .backends import name_of, on
from .oracle import Expected, assert_accurate, expected, fence, of_op, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
CPU = [b for b in BACKENDS if name_of(b).startswith("cpu")]
FEW = 28  # rows, at most; torch's product takes some of these from the kernel for few rows

# The ways of the matrix product of many rows, as (function, from x and weight to its arguments).
PRODUCTS = {
    "linear": (cpu.multiply, OP.eager, lambda x, weight, g: (x, weight)),
    "backward_x": (cpu.multiply_backward_x, BACKWARD_X.eager, lambda x, weight, g: (g, weight)),
    "backward_weight": (
        cpu.multiply_backward_weight,
        BACKWARD_WEIGHT.eager,
        lambda x, weight, g: (g, x),
    ),
}


def operands(M: int, C_in: int, C_out: int, dtype: torch.dtype, seed: int = 0):
    """x (M, C_in), weight (C_out, C_in), and a gradient (M, C_out)."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(M, C_in, generator=g), torch.randn(C_out, C_in, generator=g)
    return x.to(dtype), weight.to(dtype), torch.randn(M, C_out, generator=g).to(dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C_in", "C_out"), [(2048, 37), (515, 130), (1, 7)])
def test_a_few_rows_are_each_as_if_alone(backend, dtype, C_in, C_out):
    with on(backend):
        few = cpu.gemv_rows(dtype)
        x, weight, _ = operands(few, C_in, C_out, dtype)
        alone = torch.cat([linear(row[None], weight) for row in x])
        for M in range(2, few + 1):
            assert same_bits(linear(x[:M], weight), alone[:M]), f"{M} rows"


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", PRODUCTS)
def test_rows_and_columns_of_many_are_each_as_if_alone(backend, dtype, way):
    """A part of the result comes from the same bits whatever is computed beside it."""
    multiply, _, of = PRODUCTS[way]
    x, weight, grad = operands(75, 530, 99, dtype)
    with on(backend):
        whole = multiply(*of(x, weight, grad))
        for rows in (slice(0, 17), slice(3, 4), slice(30, 63)):
            if way != "backward_weight":
                assert same_bits(multiply(*of(x[rows], weight, grad[rows])), whole[rows])
        columns = slice(11, 50)
        if way == "linear":
            assert same_bits(multiply(x, weight[columns]), whole[:, columns])
        elif way == "backward_x":
            assert same_bits(multiply(grad, weight[:, columns]), whole[:, columns])
        else:
            assert same_bits(multiply(grad, x[:, columns]), whole[:, columns])
            assert same_bits(multiply(grad[:, columns], x), whole[columns])


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize(("M", "C_in", "C_out"), [(17, 515, 400), (130, 300, 70), (33, 1100, 5)])
def test_threads_change_no_bit_of_many_rows(backend, dtype, way, M, C_in, C_out, threads):
    multiply, _, of = PRODUCTS[way]
    args = of(*operands(M, C_in, C_out, dtype))
    with on(backend):
        threads(1)
        one = multiply(*args)
        for count in (2, 3, 7):
            threads(count)
            assert same_bits(multiply(*args), one), f"{count} threads"


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit_of_few_rows(backend, dtype, threads):
    x, weight, _ = operands(7, 1030, 4000, dtype)
    with on(backend):
        threads(1)
        one = linear(x, weight)
        for count in (2, 3, 7):
            threads(count)
            assert same_bits(linear(x, weight), one), f"{count} threads"


SHAPES = [
    (1, 1, 1),
    (17, 1, 1),
    (1, 33, 1),
    (2, 3, 40),
    (16, 31, 12),
    (31, 32, 13),
    (32, 33, 11),
    (33, 64, 24),
    (47, 257, 193),  # a row more than a block, an element more than a vector
    (65, 513, 25),  # and than a chunk
    (530, 40, 7),  # more lanes than are packed at a time
    (19, 8200, 40),  # long sums, of each way
    (19, 40, 8200),
    (8200, 40, 19),
]


@functools.lru_cache(maxsize=1)  # every backend asks for it in turn
def expected_product(shape, way, dtype) -> list[Expected]:
    _, eager, of = PRODUCTS[way]
    return expected(lambda *args: (eager(*args),), of(*operands(*shape, dtype)))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_rows_of_odd_sizes(backend, dtype, way, shape):
    multiply, _, of = PRODUCTS[way]
    args = of(*operands(*shape, dtype))
    with on(backend):
        fenced = [fence(a) for a in args]
        before = [buffer.clone() for _, buffer in fenced]
        actual = multiply(*(a for a, _ in fenced))
    assert_accurate((actual,), expected_product(shape, way, dtype), f"{way} {shape}")
    for (_, buffer), old in zip(fenced, before, strict=True):
        assert same_bits(buffer, old)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("bits", [None, 4])
def test_both_walks_of_gemv_sum_in_one_order(backend, dtype, M, bits):
    x, weight, _ = operands(M, 2 * 2048 + 77, 45, dtype)
    if bits:
        weight = QuantizedWeight.from_float(weight, bits, 32)
    with on(backend):
        usual = cpu._cpu.gemv_walk()
        found = []
        for walk in ("tiles", "stream"):
            cpu._cpu.set_gemv_walk(walk)
            assert cpu._cpu.gemv_walk() == walk
            found.append(linear(x, weight))
            cpu._cpu.set_gemv_walk(None)
        assert cpu._cpu.gemv_walk() == usual
    assert same_bits(*found)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", HALF)
def test_strides_of_many_rows(backend, dtype):
    x, weight, _ = operands(2 * 5 * 7, 64, 30, dtype)
    x = x.view(2, 5, 7, 64)
    with on(backend):
        for view in (x.transpose(1, 2), x[:, ::2], x.transpose(0, 2)[..., 3:40]):
            narrow = weight[:, : view.shape[-1]].contiguous()
            assert same_bits(cpu.multiply(view, narrow), cpu.multiply(view.contiguous(), narrow))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 16, FEW, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_row_and_column(backend, dtype, M, value):
    x, weight, _ = operands(M, 75, 45, dtype)
    with on(backend):  # torch's product is not ours to judge
        multiply = cpu.multiply if M > cpu.gemv_rows(dtype) and dtype in HALF else linear
    for at in (0, 37, 74):
        bad_x, bad_weight = x.clone(), weight.clone()
        bad_x[M // 2, at] = value
        bad_weight[20, at] = value
        with on(backend):
            by_row, by_column = multiply(bad_x, weight), multiply(x, bad_weight)
            good = multiply(x, weight)
        assert not torch.isfinite(by_row[M // 2]).any()
        assert not torch.isfinite(by_column[:, 20]).any()
        by_row[M // 2] = good[M // 2]
        by_column[:, 20] = good[:, 20]
        assert same_bits(by_row, good) and same_bits(by_column, good)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", HALF)
def test_large_values_overflow_as_they_should(backend, dtype):
    big = torch.finfo(dtype).max
    x, weight = torch.full((20, 4), big, dtype=dtype), torch.ones(3, 4, dtype=dtype)
    with on(backend):
        assert (cpu.multiply(x, weight) == math.inf).all()
        assert (cpu.multiply(x, -weight) == -math.inf).all()
        half = torch.full_like(weight, 0.25)
        assert (cpu.multiply(x, half) == big).all()


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_way_follows_on_the_other(backend, dtype):
    x, weight, _ = operands(FEW + 2, 200, 60, dtype)
    with on(backend):
        for M in (15, 16, 17, 18, FEW - 1, FEW, FEW + 1, FEW + 2):
            wanted = of_op(OP, (x[:M], weight))
            assert_accurate((linear(x[:M], weight),), wanted, f"{M} rows")


@pytest.mark.parametrize("dtype", DTYPES)
def test_explain_says_whose_product_it_is(dtype):
    x, weight, _ = operands(FEW + 1, 8, 8, dtype)
    own = dtype in HALF and cpu.isa() != "scalar"
    if cpu.isa() == "avx512_bf16" and dtype is torch.bfloat16:
        own = not torch.backends.mkldnn.is_available()
    if dtype is torch.float32 and cpu.isa() != "scalar":
        own = cpu.gemv_rows(dtype) == 28  # that depends on whose CPU it is
    few = 28 if own else 16
    assert llama_fast.explain("linear", x[:few], weight).how == "by GEMV, the kernel for few rows"
    assert "product" in llama_fast.explain("linear", x[: few + 1], weight).how
    said = str(llama_fast.explain("linear", x, weight))
    assert f"cpu: serves this call by {'the' if own else 'torch'}" in said
    with on("cpu-scalar"):
        assert "torch's own matrix product" in llama_fast.explain("linear", x, weight).how


@pytest.mark.parametrize("dtype", HALF)
def test_the_product_that_explain_names_is_the_one_that_runs(dtype, monkeypatch):
    ran = []
    for name in ("multiply", "multiply_backward_x", "multiply_backward_weight"):
        real = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, n=name, f=real: (ran.append(n), f(*a))[1])
    x, weight, grad = operands(FEW + 1, 8, 8, dtype)
    x.requires_grad_()
    weight.requires_grad_()
    own = "C++" in llama_fast.explain("linear", x, weight).how
    linear(x, weight).backward(grad)
    expected = ["multiply", "multiply_backward_weight", "multiply_backward_x"]
    assert sorted(ran) == (expected if own else [])


@pytest.mark.parametrize("M", [1, FEW + 1])
def test_a_weight_of_more_than_two_to_the_31st_elements(M):
    C_in, C_out = 2**16 + 8, 2**15 + 5
    needed = 2 * C_in * C_out + 2**30
    if memory_available() < needed:
        pytest.skip(f"this needs {needed / 1e9:.1f} GB of free memory")
    weight = torch.zeros(C_out, C_in, dtype=torch.bfloat16)
    weight[-3:, 7::512] = 2.0
    x = torch.ones(M, C_in, dtype=torch.bfloat16)
    y = (linear if M <= FEW else cpu.multiply)(x, weight)
    assert (y[:, -3:] == 2.0 * len(range(7, C_in, 512))).all()
    assert not y[:, :-3].any()


def memory_available() -> int:
    """Bytes that this process may still take; 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
    except OSError:
        return 0
    return int(lines["MemAvailable"].split()[0]) * 1024
