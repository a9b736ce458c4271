"""linear_cross_entropy, of float and of quantised weights: which rows count, bad targets, blocks of
rows, gradients, memory."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F

from llama_fast import QuantizedWeight, linear, linear_cross_entropy
from llama_fast.backends import triton
from llama_fast.errors import ShapeError
from llama_fast.ops import cross_entropy, logits

from .backends import BACKENDS, device, name_of, on
from .oracle import assert_accurate, expected

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["eager", "cpu"])
def backend(request):
    with on(request.param):
        yield request.param


def problem(N: int, C: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=g).to(dtype)
    weight = (torch.randn(V, C, generator=g) * C**-0.5).to(dtype)
    return x, weight, torch.randint(V, (N,), generator=g)


def with_gradients(function, x, weight, targets, scale: float = 1.0, **options):
    """(loss, dx, dw) of scale · loss."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(x, weight, targets, **options)
    return (loss.detach(), *torch.autograd.grad(loss * scale, (x, weight)))


def materialised(x, weight, targets, ignore_index=-100):
    return F.cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index)


def exact(x, weight, targets, scale: float = 1.0, **options):
    return with_gradients(materialised, x.double(), weight.double(), targets, scale, **options)


def small_blocks(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(logits, "ROWS", rows)
    monkeypatch.setattr(logits, "LOGITS", 1)


@pytest.mark.parametrize("ignore_index", [-100, 0, 31, 10**6])
def test_ignored_rows_do_not_count(backend, ignore_index):
    x, weight, targets = problem(40, 24, 50)
    targets[torch.arange(0, 40, 3)] = ignore_index
    actual = with_gradients(linear_cross_entropy, x, weight, targets, ignore_index=ignore_index)
    expected = exact(x, weight, targets, ignore_index=ignore_index)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)
    ignored = targets == ignore_index
    assert not actual[1][ignored].any() and actual[1][~ignored].any(-1).all()
    x[ignored] = 1e3  # what it is does not matter
    again = with_gradients(linear_cross_entropy, x, weight, targets, ignore_index=ignore_index)
    torch.testing.assert_close(again[0], actual[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(again[2], actual[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_kept_row_the_loss_is_nan_and_the_gradients_zero(backend, dtype):
    x, weight, targets = problem(9, 8, 20, dtype)
    loss, dx, dw = with_gradients(linear_cross_entropy, x, weight, torch.full_like(targets, -100))
    assert math.isnan(loss) and not dx.any() and not dw.any()
    assert torch.isnan(F.cross_entropy(F.linear(x, weight).float(), targets * 0 - 100))


@pytest.mark.parametrize("target", [-1, -101, 20, 2**40, -(2**63)])
def test_a_target_out_of_range_is_refused_by_its_place(backend, target):
    x, weight, targets = problem(12, 8, 20)
    targets = targets.view(3, 4)
    targets[1, 2] = target
    said = rf"targets\[1, 2\] is {target}; it must be in \[0, 20\).*ignore_index = -100"
    with pytest.raises(ShapeError, match=said):
        linear_cross_entropy(x.view(3, 4, 8), weight, targets)


@pytest.mark.parametrize("target", [0, 19])
def test_the_first_and_the_last_class(backend, target):
    x, weight, targets = problem(5, 8, 20)
    actual = linear_cross_entropy(x, weight, torch.full_like(targets, target))
    expected = materialised(x.double(), weight.double(), torch.full_like(targets, target))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 7, 8, 9, 16, 17, 63, 64, 65])
def test_block_boundaries(monkeypatch, dtype, N):
    small_blocks(monkeypatch, 8)
    x, weight, targets = problem(N, 40, 90, dtype)
    targets[N // 2] = -100 if N > 1 else targets[0]

    def eager(x, weight, targets):
        return cross_entropy.eager(x, weight, targets, -100, False, False)[0]

    with on("cpu"):
        actual = with_gradients(linear_cross_entropy, x, weight, targets)
    wanted = expected(lambda *args: with_gradients(eager, *args), (x, weight, targets))
    assert_accurate(actual, wanted, f"{N} rows")


def test_every_row_is_in_one_block(monkeypatch):
    """A row's share of dx is its own: rows lost or counted twice would show."""
    x, weight, targets = problem(77, 16, 30)
    whole = with_gradients(linear_cross_entropy, x, weight, targets)
    for rows in (1, 2, 5, 76, 77, 78):
        small_blocks(monkeypatch, rows)
        parts = with_gradients(linear_cross_entropy, x, weight, targets)
        for w, p in zip(whole, parts, strict=True):
            torch.testing.assert_close(p, w, rtol=1e-5, atol=1e-7)


def test_gradients_are_exact():
    """Against float64, in float32: what is left is rounding. The two passes of one graph, the
    gradient from above and unneeded gradients included."""
    x, weight, targets = problem(300, 64, 500)
    loss, dx, dw = exact(x, weight, targets, scale=3.0)
    actual = with_gradients(linear_cross_entropy, x, weight, targets, scale=3.0)
    for a, e in zip(actual, (loss, dx, dw), strict=True):
        assert (a.double() - e).abs().max() <= 2e-6 * e.abs().max()

    for need_x, need_weight in ((True, False), (False, True)):
        a = x.detach().requires_grad_(need_x)
        b = weight.detach().requires_grad_(need_weight)
        (linear_cross_entropy(a, b, targets) * 3).backward()
        assert (a.grad is not None, b.grad is not None) == (need_x, need_weight)
        torch.testing.assert_close(a.grad if need_x else b.grad, actual[1 if need_x else 2])

    a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
    total = linear_cross_entropy(a, b, targets) * 3
    total.backward(retain_graph=True)
    total.backward()
    torch.testing.assert_close(a.grad, 2 * actual[1])
    torch.testing.assert_close(b.grad, 2 * actual[2])


@pytest.mark.parametrize(
    "backend", [b for b in BACKENDS if name_of(b) in ("eager", "cpu-avx2", "triton")]
)
@pytest.mark.parametrize("offset", [0, 100, 3000])
def test_the_gradient_of_each_row_is_as_exact_as_its_logits(backend, offset):
    """The logits here are exact, far from 0, and the target of every other row is its likeliest. An
    error of lse, at most half a unit in its last place, would be one of all weights of the row."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randint(-64, 65, (300, 8), generator=g) / 16.0
    weight[:, 0] = offset
    x = torch.ones(16, 8)
    x[:, 1:] = torch.randint(-2, 3, (16, 7), generator=g) / 2.0
    targets = torch.randint(300, (16,), generator=g)
    targets[::2] = (x @ weight.t()).argmax(-1)[::2]
    args = (x, weight, targets)
    with on(backend):
        found = with_gradients(linear_cross_entropy, *(a.to(device(backend)) for a in args))
    loss, dx, dw = exact(*args)
    assert abs(found[0] - loss) <= 1e-6 * (1 + loss)
    eps = torch.finfo(torch.float32).eps / len(x)  # of a row's share in the mean
    assert ((found[1].cpu() - dx).abs() <= 12 * eps * weight.abs().amax(0).clamp(min=1)).all()
    assert ((found[2].cpu() - dw).abs() <= eps * len(x) * x.abs().amax(0)).all()


MEASURE = """
import json, sys
import torch
from llama_fast import QuantizedWeight, linear_cross_entropy, use_backend

N, V = int(sys.argv[2]), 32768
C = 64 if int(sys.argv[3]) else 16
dtype, bits, backend = getattr(torch, sys.argv[1]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def step(N):
    x = torch.randn(N, C).to(dtype).requires_grad_()
    weight = torch.randn(V, C).to(dtype).requires_grad_()
    results = x.nbytes + weight.nbytes  # of dx and dw, which the forward pass makes
    if bits:
        weight = QuantizedWeight.from_float(weight, bits, 64)
        results = x.nbytes
    targets = torch.randint(V, (N,))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak so far is forgotten
    before = status("VmRSS")
    with use_backend(backend, strict=True):
        loss = linear_cross_entropy(x, weight, targets)
    forward = status("VmHWM") - before - results
    loss.backward()
    return {"forward": forward, "both": status("VmHWM") - before - results,
            "logits": N * V * x.element_size(), "finite": bool(x.grad.isfinite().all())}

step(8)  # what the libraries keep for themselves is there already
print(json.dumps(step(N)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="this reads the peak of memory in /proc")
@pytest.mark.parametrize(
    ("dtype", "N", "bits", "backend", "share"),
    [
        ("float32", 16384, 0, "cpu", 0.05),
        ("bfloat16", 32768, 0, "cpu", 0.05),
        # dx is float32 until the gradient of the loss is known.
        ("float16", 32768, 0, "cpu", 0.05),
        # The same memory whatever N, in which parts of the weight are dequantised too.
        ("float32", 8192, 8, "cpu", 0.15),
        ("bfloat16", 16384, 4, "cpu", 0.25),
        ("float32", 8192, 8, "eager", 0.35),
    ],
)
def test_the_logits_are_never_held(dtype, N, bits, backend, share):
    """Beyond results the peak of memory is a small share of the logits, forward and backward."""
    args = [sys.executable, "-c", MEASURE, dtype, str(N), str(bits), backend]
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["finite"]
    assert found["forward"] <= share * found["logits"], found
    assert found["both"] <= share * found["logits"], found


def test_dx_is_let_go_before_dw_is_rounded():
    """Of float16 each is there twice while it is rounded, so not both at a time."""
    gradients = [torch.ones(3), torch.ones(2), torch.empty(0)]
    first, second = map(weakref.ref, gradients[:2])
    scaled = cross_entropy._scaled(gradients, torch.tensor(2.0))
    assert next(scaled).tolist() == [2.0] * 3 and first() is not None
    assert next(scaled).tolist() == [2.0] * 2 and first() is None and second() is not None
    assert next(scaled).numel() == 0 and second() is None and not list(scaled)


def test_a_sum_is_the_mean_of_the_kept_rows_times_their_number(backend):
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(15).view(3, 5)
    targets[1, 2:] = -100
    mean = with_gradients(linear_cross_entropy, x, weight, targets)
    total = with_gradients(linear_cross_entropy, x, weight, targets, reduction="sum")
    for m, t in zip(mean, total, strict=True):
        torch.testing.assert_close(t, 12 * m, rtol=1e-5, atol=1e-6)


def test_another_reduction_is_refused():
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with pytest.raises(ShapeError, match="reduction is 'max'; it must be 'mean', 'sum' or 'none'"):
        linear_cross_entropy(x, weight, torch.zeros(2, dtype=torch.int64), reduction="max")


# --- quantised weights ------------------------------------------------------------------------

KINDS = list(itertools.product((8, 4), (True, False)))


def by_dequantised_weight(x, weight, targets, scale: float = 1.0, **options):
    """(loss, dx) of scale · loss in float64."""
    x = x.detach().double().requires_grad_()
    loss = F.cross_entropy(x @ weight.dequantize(torch.float64).t(), targets, **options)
    return loss.detach(), torch.autograd.grad(loss * scale, x)[0]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_quantised_weight(monkeypatch, backend, kind, reduction):
    """Exact but for rounding: float32 activations are not rounded to 8 bits."""
    small_blocks(monkeypatch, 8)
    x, w, targets = problem(37, 70, 90)
    targets[::5] = -100
    weight = QuantizedWeight.from_float(w, kind[0], 32, kind[1])
    loss, dx = by_dequantised_weight(x, weight, targets, scale=3.0, reduction=reduction)
    x.requires_grad_()
    found = linear_cross_entropy(x, weight, targets, reduction=reduction)
    (found * 3).backward(retain_graph=True)
    assert abs(found.double() - loss) <= 1e-6 * loss.abs()
    assert (x.grad.double() - dx).abs().max() <= 2e-6 * dx.abs().max()
    assert not x.grad[::5].any()
    (found * 3).backward()  # a second pass makes dx anew
    torch.testing.assert_close(x.grad.double(), 2 * dx, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantised_weight_with_rounded_activations(backend, dtype):
    """Half types: as the model's own head and torch's cross entropy of it have it."""
    x, w, targets = problem(50, 96, 120)
    weight = QuantizedWeight.from_float(w, 4, 32)
    a, b = (x.to(dtype).requires_grad_() for _ in range(2))
    found = linear_cross_entropy(a, weight, targets)
    with on("eager"):
        whole = F.cross_entropy(linear(b, weight).float(), targets)
        whole.backward()
    found.backward()
    assert abs(found - whole) <= 1e-3 * whole
    difference = (a.grad.float() - b.grad.float()).square().mean().sqrt()
    assert difference <= 1e-2 * b.grad.float().square().mean().sqrt()


def test_a_quantised_weight_refuses_what_a_float_one_does(backend):
    x, w, targets = problem(12, 32, 20)
    weight = QuantizedWeight.from_float(w, 8, 32)
    with pytest.raises(ShapeError, match=r"targets\[3\] is 20; it must be in \[0, 20\)"):
        linear_cross_entropy(x, weight, targets.index_fill(0, torch.tensor(3), 20))
    with pytest.raises(ShapeError, match=r"x has shape \(12, 31\) and weight \(20, 32\)"):
        linear_cross_entropy(x[:, :31], weight, targets)
    with pytest.raises(ShapeError, match=r"targets has shape \(11,\).*\(12,\)"):
        linear_cross_entropy(x, weight, targets[1:])
    loss = linear_cross_entropy(x.requires_grad_(), weight, torch.full_like(targets, -100))
    loss.backward()
    assert math.isnan(loss.detach()) and not x.grad.any()


LOSS_SCALES = [1.0, 8192.0, 65536.0]


def learnt(N: int, C: int, V: int, sure: float, quantized: bool):
    """x, weight and targets in float16 whose loss is about V · exp(-sure) in every row."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(V, C, generator=g) * C**-0.5
    targets = torch.randint(V, (N,), generator=g)
    x = (weight[targets] * sure / weight[targets].square().sum(-1, keepdim=True)).half()
    return x, QuantizedWeight.from_float(weight, 8, 32) if quantized else weight.half(), targets


@pytest.mark.parametrize("scale", LOSS_SCALES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("sure", [6.0, 14.0])
@pytest.mark.parametrize("where", ["eager", "cpu", "triton"])
def test_a_loss_scale_keeps_what_is_small(where, scale, reduction, quantized, sure):
    """What comes from the loss's gradient is applied before dx and dw are rounded to float16: no
    number vanishes that float16 has."""
    if where == "triton" and not (triton.INTERPRETED or torch.cuda.is_available()):
        pytest.skip("this needs a GPU, or Triton's interpreter")
    x, weight, targets = learnt(64, 96, 300, sure, quantized)
    given = [x.requires_grad_()] if quantized else [x.requires_grad_(), weight.requires_grad_()]
    with on(where):
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction)
        ours = torch.autograd.grad(loss * scale, given)
        with torch.no_grad():
            logits = linear(x, weight).double().requires_grad_()
    loss = F.cross_entropy(logits, targets, reduction=reduction)
    (d_logits,) = torch.autograd.grad(loss * scale, logits)
    w = (weight.dequantize() if quantized else weight).detach().double()
    for our, truth in zip(ours, (d_logits @ w, d_logits.t() @ x.detach().double()), strict=False):
        assert our.dtype is torch.float16
        if truth.abs().max() > 65504:
            continue  # float16 has no such number
        lost = (our == 0) & (truth.abs() > 1e-7)
        # Where terms cancel, their rounding may give zero.
        assert lost.float().mean() < 1e-3, f"{lost.float().mean():.1%} vanished"
        quantum = 2.0**-24
        assert (our - truth).norm() <= 2**-9 * truth.norm() + quantum * our.numel() ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_under_a_scaler_compile(dtype):
    x, weight, targets = problem(20, 16, 40, dtype)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eagerly = with_gradients(linear_cross_entropy, x, weight, targets, scale=8192.0)
    for a, b in zip(
        with_gradients(compiled, x, weight, targets, scale=8192.0), eagerly, strict=True
    ):
        assert torch.equal(a, b)
