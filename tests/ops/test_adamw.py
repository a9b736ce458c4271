"""adamw: its random bits, the same on every backend, and what threads do not change."""

from __future__ import annotations

import pytest
import torch

from llama_fast.dispatch import OPS
from llama_fast.ops import adamw
from llama_fast.ops.random_bits import splitmix64, to_bfloat16, words

from .backends import BACKENDS, device, name_of, on

SERVES = [b for b in BACKENDS if name_of(b) in ("eager", "cpu-avx2", "cpu-scalar", "triton")]
CPU = torch.device("cpu")


def word(seed: int, stream: int, j: int) -> int:
    """Number by number, as the definition has it."""
    key = splitmix64((seed + stream * 0x9E3779B97F4A7C15) % 2**64)
    x = (j % 2**32) ^ key % 2**32 ^ (j >> 32) * 0x9E3779B9 % 2**32
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = ((x ^ x >> 15) ^ key >> 32) * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_words_are_those_of_the_definition():
    for seed, stream in ((0, 0), (7, 1), (2**63 - 1, 1)):
        assert words(seed, stream, 50, CPU).tolist() == [word(seed, stream, j) for j in range(50)]
    # splitmix64's published first number of the state 0.
    assert splitmix64(0) == 0xE220A8397B1DCDAF


def test_words_are_evenly_spread():
    drawn = words(3, 0, 1 << 16, CPU)
    assert drawn.unique().numel() == drawn.numel()
    for bit in range(32):
        ones = (drawn >> bit & 1).double()
        assert abs(float(ones.mean()) - 0.5) < 0.01
        # Neither that of the next place, nor that of another seed, tells anything of it.
        after, other = ones.roll(1), (words(4, 0, 1 << 16, CPU) >> bit & 1).double()
        for beside in (after, other):
            assert abs(float((ones == beside).double().mean()) - 0.5) < 0.01


def problem(n: int, dtype=torch.bfloat16, eight_bits: bool = False, where: str = "cpu"):
    g = torch.Generator().manual_seed(n)
    param, grad = (torch.randn(n, generator=g).to(dtype) for _ in "pg")
    tensors = [param, grad, torch.zeros(n), torch.zeros(n)]
    if eight_bits:
        tensors[2:] = torch.zeros(n, dtype=torch.int8), torch.zeros(n, dtype=torch.uint8)
        tensors += [torch.zeros(-(-n // 256)) for _ in "mv"]
    return [x.to(where) for x in tensors]


def steps(tensors: list[torch.Tensor], count: int = 3, **options) -> list[torch.Tensor]:
    scales = dict(zip(("exp_avg_scale", "exp_avg_sq_scale"), tensors[4:], strict=False))
    for step in range(1, count + 1):
        adamw(*tensors[:4], step=step, lr=1e-3, seed=step, **scales, **options)
    return [x.cpu() for x in tensors]


@pytest.mark.parametrize("backend", SERVES)
@pytest.mark.parametrize("n", [1, 31, 33, 1000])
def test_a_weight_draws_the_same_bits_everywhere(backend, n):
    """A step of 0 leaves exact numbers to round: ties to nobody, so only the draws decide."""
    g = torch.Generator().manual_seed(1)
    grad = torch.ones(n).bfloat16()
    exact = torch.randn(n, generator=g)
    param = exact.bfloat16()
    # What lies between two numbers of bfloat16, made by the step itself: m / √v is 1 here.
    lr = 2.0**-12
    with on(backend):
        given = [x.to(device(backend)) for x in (param.clone(), grad, *torch.zeros(2, n))]
        options = {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
        adamw(*given, step=1, lr=lr, seed=99, **options)
    assert torch.equal(given[0].cpu(), to_bfloat16(param.float() - lr, 99, 0))


@pytest.mark.parametrize("backend", SERVES)
def test_8_bit_moments_draw_the_same_bits_everywhere(backend):
    with on("eager"):
        wanted = steps(problem(2000, eight_bits=True))
    with on(backend):
        found = steps(problem(2000, eight_bits=True, where=device(backend)))
    for w, f in zip(wanted, found, strict=True):
        if w.dtype is torch.float32:
            torch.testing.assert_close(f, w, rtol=1e-5, atol=0)
        else:  # an ulp of float32 decides a draw now and then
            assert (w != f).float().mean() <= 0.005


@pytest.mark.parametrize("eight_bits", [False, True])
def test_the_bits_do_not_depend_on_threads(eight_bits):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with on("cpu"):
                found.append(steps(problem(70_001, eight_bits=eight_bits)))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_what_it_writes_is_counted():
    """So that autograd refuses a gradient that needs an old value."""
    weight = torch.randn(300, requires_grad=True)
    loss = weight.square().sum()
    tensors = [torch.zeros(300) for _ in range(3)]
    with torch.no_grad():
        adamw(weight, *tensors, step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_it_compiles(where, eight_bits):
    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(problem(600, eight_bits=eight_bits), 1)
        wanted = steps(problem(600, eight_bits=eight_bits), 1)
    assert all(map(torch.equal, found, wanted))
    with where():
        assert all(map(torch.equal, steps(problem(600, eight_bits=eight_bits), 1), wanted))


def test_float16_and_float64_are_left_to_others():
    tensors = [x.double() for x in problem(300, torch.float32)]
    numbers = (1, 0.1, 0.9, 0.99, 1e-8, 0.0)
    assert "float64 is not one of" in OPS["adamw"].explain(*tensors, *numbers).reasons["cpu"][0]
