"""linear_cross_entropy by rows: only labelled ones are multiplied, each may keep its loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama_fast import QuantizedWeight, linear_cross_entropy
from llama_fast.errors import ShapeError
from llama_fast.ops import cross_entropy, logits

from .backends import BACKENDS, device, name_of, on

LOGITS_OF = cross_entropy.LINEAR.eager
DX_OF = cross_entropy.BACKWARD_X.eager
SERVES = [b for b in BACKENDS if name_of(b) in ("eager", "cpu-avx2", "cpu-scalar", "triton")]


def problem(*rows: int, C: int = 24, V: int = 50, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(len(rows))
    x = torch.randn(*rows, C, generator=g).to(dtype)
    weight = (torch.randn(V, C, generator=g) * C**-0.5).to(dtype)
    return x, weight, torch.randint(V, rows, generator=g)


def masked(targets: torch.Tensor, share: float) -> torch.Tensor:
    ignored = torch.rand(targets.shape, generator=torch.Generator().manual_seed(5)) < share
    return targets.masked_fill(ignored, -100)


# --- which rows are multiplied ------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_without_a_label_are_not_multiplied(monkeypatch, share, reduction):
    monkeypatch.setattr(logits, "ROWS", 8)
    monkeypatch.setattr(logits, "LOGITS", 1)
    x, weight, targets = problem(37)
    targets = masked(targets, share)
    kept = targets != -100
    multiplied = {"logits": 0, "dx": 0}

    def counting(name, product):
        def multiply(rows, *others):
            multiplied[name] += len(rows)
            return product(rows, *others)

        return multiply

    args = (x, weight, targets, -100, True, True, reduction)
    launches = {"linear": counting("logits", LOGITS_OF)}
    launches["linear_backward_x"] = counting("dx", DX_OF)
    loss, dx, dw = cross_entropy.chunked(*args, **launches)
    assert multiplied == {"logits": int(kept.sum()), "dx": int(kept.sum())}
    # The gradients' bits are those of the labelled rows by themselves.
    alone = (x[kept], weight, targets[kept], -100, True, True, reduction)
    wanted = cross_entropy.chunked(*alone, linear=LOGITS_OF, linear_backward_x=DX_OF)
    torch.testing.assert_close(loss, wanted[0], rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(dx[kept], wanted[1]) and not dx[~kept].any()
    assert torch.equal(dw, wanted[2])


def test_what_an_ignored_row_holds_does_not_matter():
    x, weight, targets = problem(40)
    targets[::3] = -100
    x[::3] = float("nan")
    weight.requires_grad_()
    x.requires_grad_()
    with on("cpu"):
        linear_cross_entropy(x, weight, targets).backward()
    assert not x.grad[::3].any() and x.grad.isfinite().all() and weight.grad.isfinite().all()


# --- a loss for each row ------------------------------------------------------------------------


def losses_of(x, weight, targets, ignore_index=-100):
    found = F.cross_entropy(
        F.linear(x, weight).flatten(0, -2),
        targets.flatten(),
        ignore_index=ignore_index,
        reduction="none",
    )
    return found.view(targets.shape)


def with_gradients(function, x, weight, targets, grad, **options):
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = function(x, weight, targets, **options)
    return (losses.detach(), *torch.autograd.grad(losses, (x, weight), grad.to(losses)))


@pytest.mark.parametrize("backend", SERVES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_each_row_has_its_loss_and_its_gradient(backend, share):
    x, weight, targets = problem(3, 7)
    targets = masked(targets, share)
    grad = torch.randn(3, 7, generator=torch.Generator().manual_seed(2))
    wanted = with_gradients(losses_of, x.double(), weight.double(), targets, grad)
    with on(backend):
        given = (a.to(device(backend)) for a in (x, weight, targets))
        found = with_gradients(linear_cross_entropy, *given, grad, reduction="none")
    assert found[0].shape == targets.shape and found[0].dtype is torch.float32
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f.double().cpu(), w, rtol=2e-6, atol=2e-6)
    ignored = targets == -100
    assert not found[0].cpu()[ignored].any() and not found[1].cpu()[ignored].any()


@pytest.mark.parametrize("backend", SERVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_over_sequences_are_those_of_the_sum(backend, dtype):
    x, weight, targets = (a.to(device(backend)) for a in problem(4, 6, dtype=dtype))
    targets = masked(targets.cpu(), 0.3).to(targets)
    with on(backend), torch.no_grad():
        of_sequence = linear_cross_entropy(x, weight, targets, reduction="none").sum(1)
        one_by_one = [
            linear_cross_entropy(*row, reduction="sum")
            for row in zip(x, [weight] * 4, targets, strict=True)
        ]
    tolerance = 1e-6 if dtype is torch.float32 else 1e-3  # torch's products differ by rows
    torch.testing.assert_close(of_sequence, torch.stack(one_by_one), rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_quantised_head(backend, bits):
    x, w, targets = problem(5, 6, C=70)
    targets = masked(targets, 0.4)
    weight = QuantizedWeight.from_float(w, bits, 32)
    grad = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    exact = weight.dequantize(torch.float64)
    losses, dx, _ = with_gradients(losses_of, x.double(), exact, targets, grad)
    x.requires_grad_()
    with on(backend):
        found = linear_cross_entropy(x, weight, targets, reduction="none")
        found.backward(grad)
    torch.testing.assert_close(found.detach().double(), losses, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(x.grad.double(), dx, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("backend", SERVES)
def test_the_gradient_of_an_ignored_row_is_not_read(backend):
    x, weight, targets = (a.to(device(backend)) for a in problem(9))
    targets[::2] = -100
    grad = torch.ones(9, device=x.device).index_fill(0, torch.tensor([0, 2], device=x.device), -1)
    poisoned = grad.clone()
    poisoned[0], poisoned[2] = float("nan"), float("inf")
    with on(backend):
        found = [
            with_gradients(linear_cross_entropy, x, weight, targets, g, reduction="none")
            for g in (grad, poisoned)
        ]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient_the_losses_are_the_same(where):
    x, weight, targets = problem(3, 5)
    with_graph = linear_cross_entropy(x.requires_grad_(), weight, targets, reduction="none")
    with where():
        alone = linear_cross_entropy(x, weight, targets, reduction="none")
    assert with_graph.requires_grad and not alone.requires_grad
    assert torch.equal(with_graph, alone)


def test_two_passes_through_one_graph():
    x, weight, targets = problem(8)
    x.requires_grad_()
    losses = linear_cross_entropy(x, weight, targets, reduction="none")
    first = torch.autograd.grad(losses, x, torch.ones(8), retain_graph=True)[0]
    second = torch.autograd.grad(losses, x, torch.full((8,), 2.0))[0]
    torch.testing.assert_close(second, 2 * first, rtol=1e-6, atol=1e-7)


def test_it_compiles_in_one_graph():
    x, weight, targets = problem(4, 5)
    targets = masked(targets, 0.3)

    def weighted(x, weight):
        losses = linear_cross_entropy(x, weight, targets, reduction="none")
        return -F.logsigmoid(losses.sum(1)).sum()

    torch._dynamo.reset()
    found = []
    for function in (weighted, torch.compile(weighted, fullgraph=True, backend="aot_eager")):
        a, b = x.detach().requires_grad_(), weight.detach().requires_grad_()
        found.append(torch.autograd.grad(function(a, b), (a, b)))
    assert all(map(torch.equal, *found))


def test_large_gradients_of_float16_rows():
    """What a loss scale is for: the rows' gradients are applied before anything is rounded."""
    x, weight, targets = problem(16, dtype=torch.float16)
    x, weight = x * 4, weight
    grad = torch.full((16,), 2048.0)
    wanted = with_gradients(losses_of, x.double(), weight.double(), targets, grad)
    found = with_gradients(linear_cross_entropy, x, weight, targets, grad, reduction="none")
    for f, w in zip(found[1:], wanted[1:], strict=True):
        assert (f.double() - w).norm() <= 2e-3 * w.norm()


def test_gradients_in_the_forward_pass_are_refused():
    x, weight, targets = problem(4)
    with pytest.raises(ShapeError, match="need_x or need_weight is True with the reduction 'none'"):
        cross_entropy.OP(x, weight, targets, -100, True, False, "none")


@pytest.mark.parametrize(
    ("reduction", "weights", "said"),
    [
        ("mean", torch.ones(4), "row_weights are given with the reduction 'mean'"),
        ("sum", torch.ones(3), r"row_weights has shape \(3,\); it must be .* = \(4,\)"),
        ("sum", torch.ones(4).double(), "row_weights is torch.float64 .* must be torch.float32"),
    ],
)
def test_row_weights_that_do_not_fit_are_refused(reduction, weights, said):
    x, weight, targets = problem(4)
    with pytest.raises(ShapeError, match=said):
        cross_entropy.OP(x, weight, targets, -100, True, False, reduction, weights)
