"""AdamW: against torch's, in 8 bits, in bfloat16, resumed, and stepping in the backward pass."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

from llama_fast.errors import ConfigError, GradientError, ShapeError
from llama_fast.ops import adamw
from llama_fast.training.optim import AdamW, step_in_backward

OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mlp(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """Of matrices of several blocks, and of vectors of less than one."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.SiLU(), torch.nn.Linear(40, 24))
    for i, param in enumerate(model.parameters()):
        param.data = randn(*param.shape, seed=i, dtype=dtype) * 0.2
    return model


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    """To learn a fixed linear map, from noisy examples."""
    dtype = next(model.parameters()).dtype
    x = randn(32, 24, seed=100 + step, dtype=dtype)
    wanted = x.float() @ randn(24, 24, seed=7) + 0.1 * randn(32, 24, seed=1000 + step)
    return F.mse_loss(model(x).float(), wanted)


def train(model, optimizer, steps: range) -> float:
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def weights(model) -> torch.Tensor:
    return torch.cat([param.detach().double().flatten() for param in model.parameters()])


def test_it_is_torchs():
    ours, theirs = mlp(), mlp(torch.float64)
    exact = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    train(ours, AdamW(ours.parameters(), **OPTIONS), range(30))
    train_in_float64(theirs, exact, range(30))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=2e-5)


def train_in_float64(model, optimizer, steps: range) -> None:
    for step in steps:
        x = randn(32, 24, seed=100 + step).double()
        wanted = x @ randn(24, 24, seed=7).double() + 0.1 * randn(32, 24, seed=1000 + step)
        F.mse_loss(model(x), wanted).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_groups_have_options_of_their_own():
    ours, theirs = mlp(), mlp()
    for model, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.5},
            {"params": vectors, "lr": 1e-2, "weight_decay": 0.0, "eps": 1e-3},
        ]
        optimizer = kind(groups, lr=2e-3)
        train(model, optimizer, range(5))
        optimizer.param_groups[0]["lr"] = 1e-4
        train(model, optimizer, range(5, 10))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-4, atol=1e-6)


def test_gradients_are_scaled_where_they_are_read():
    one, other = mlp(), mlp()
    scaled, plain = AdamW(one.parameters(), **OPTIONS), AdamW(other.parameters(), **OPTIONS)
    for step in range(3):
        (loss_of(one, step) * 64).backward()
        scaled.step(grad_scale=1 / 64)
        scaled.zero_grad()
        assert plain.step(lambda step=step: backward(loss_of(other, step))).item() > 0
        plain.zero_grad()
    assert torch.equal(weights(one), weights(other))  # a power of two rounds nothing


def backward(loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    return loss


# --- bfloat16 -----------------------------------------------------------------------------------


def one_step(value: float, update: float, seed: int | None, count: int = 40_000) -> torch.Tensor:
    """bfloat16 weights of `value` after a step that takes away `update`."""
    param = torch.full((count,), value, dtype=torch.bfloat16)
    m, v = torch.zeros(count), torch.zeros(count)
    options = {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
    adamw(param, torch.ones_like(param), m, v, step=1, lr=update, seed=seed, **options)
    return param.double()


@pytest.mark.parametrize("value", [0.02, -1.0, 3.0])
@pytest.mark.parametrize("share", [0.03, 0.3, 0.81])
def test_stochastic_rounding_is_unbiased(value, share):
    step = torch.tensor(value, dtype=torch.bfloat16)
    unit = abs(float(step)) * 2.0**-8
    found = torch.stack([one_step(value, share * unit, seed) for seed in range(5)])
    exact = float(step) - float(torch.tensor(share * unit, dtype=torch.float32))
    assert found.unique().numel() == 2
    spread = float(found.std()) / found.numel() ** 0.5
    assert abs(float(found.mean()) - exact) <= 4 * spread + 2.0**-16 * unit


def test_tiny_updates_move_a_weight_that_rounding_to_the_nearest_leaves():
    param = {
        name: torch.full((20_000,), 0.02, dtype=torch.bfloat16) for name in ("seed", "nearest")
    }
    start = float(param["seed"][0])
    for name, weight in param.items():
        optimizer = AdamW([weight], lr=1e-5, weight_decay=0.0, stochastic_rounding=name == "seed")
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
    assert (param["nearest"] == start).all()
    assert abs(float(param["seed"].double().mean()) - (start - 20e-5)) <= 2e-6


def test_draws_differ_by_step_place_and_seed():
    def after(steps: int, place: int, seed: int) -> torch.Tensor:
        params = [torch.ones(999, dtype=torch.bfloat16) for _ in range(2)]
        optimizer = AdamW(params, lr=1e-3, weight_decay=0.0, seed=seed)
        for _ in range(steps):
            before = params[place].clone()
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        return params[place] == before

    first = after(1, 0, 0)
    assert torch.equal(first, after(1, 0, 0)) and 0.5 < first.float().mean() < 0.99
    for other in (after(2, 0, 0), after(1, 1, 0), after(1, 0, 1)):
        # As often equal as two draws that know nothing of each other.
        alike = (first == other).float().mean()
        p, q = first.float().mean(), other.float().mean()
        assert abs(alike - (p * q + (1 - p) * (1 - q))) < 0.06


def test_bfloat16_weights_learn_as_float32_ones_do():
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = mlp(dtype)
        losses[dtype] = train(model, AdamW(model.parameters(), lr=1e-2), range(150))
    assert losses[torch.bfloat16] <= 1.1 * losses[torch.float32]


# --- 8 bits -------------------------------------------------------------------------------------


def test_8_bit_moments_are_near_float32_ones():
    found = {}
    for moments in ("float32", "int8"):
        model = mlp()
        optimizer = AdamW(model.parameters(), lr=1e-2, moments=moments)
        found[moments] = train(model, optimizer, range(200)), weights(model)
        kinds = {p.numel(): optimizer.state[p]["exp_avg"].dtype for p in model.parameters()}
    assert kinds == {960: torch.int8, 40: torch.float32, 24: torch.float32}
    moved = (found["float32"][1] - weights(mlp())).norm()
    assert (found["int8"][1] - found["float32"][1]).norm() <= 0.1 * moved
    assert abs(found["int8"][0] - found["float32"][0]) <= 0.05 * found["float32"][0]


def test_8_bit_moments_keep_their_mean():
    """With beta2 = 0.999 a step moves v by less than half the distance of two of its values."""
    param, steps = torch.zeros(4096), 300
    moments = {"float32": (torch.zeros(4096), torch.zeros(4096))}
    moments["int8"] = (torch.zeros(4096, dtype=torch.int8), torch.zeros(4096, dtype=torch.uint8))
    scales = {"exp_avg_scale": torch.zeros(16), "exp_avg_sq_scale": torch.zeros(16)}
    for step in range(1, steps + 1):
        grad = randn(4096, seed=step) * (1.0 if step < 100 else 0.1)  # v is to fall again
        for name, (m, v) in moments.items():
            given = scales if name == "int8" else {}
            adamw(param, grad, m, v, step=step, lr=0.0, seed=step, **given)
    m, v = moments["int8"]
    scale = scales["exp_avg_sq_scale"].repeat_interleave(256)
    found = (v / 255.0).pow(4) * scale
    assert abs(float((found.sqrt() / moments["float32"][1].sqrt()).mean()) - 1) <= 0.01
    assert (v > 0).all()


def test_gradients_that_are_not_finite_make_weights_that_are_not():
    for value in (float("nan"), float("inf")):
        param = torch.ones(600)
        optimizer = AdamW([param], moments="int8")
        for _ in range(2):
            param.grad = torch.ones(600)
            param.grad[300] = value
            optimizer.step()
        assert not param[300].isfinite() and param[:256].isfinite().all()


# --- resumed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_a_resumed_training_has_the_same_bits(dtype, moments):
    whole = mlp(dtype)
    optimizer = AdamW(whole.parameters(), moments=moments, seed=5, **OPTIONS)
    train(whole, optimizer, range(4))
    buffer = io.BytesIO()
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(whole, optimizer, range(4, 9))

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again = mlp(dtype)
    again.load_state_dict(saved["model"])
    resumed = AdamW(again.parameters(), lr=1.0)  # all options are those of the state
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(4, 9))
    assert torch.equal(weights(whole), weights(again))
    for one, other in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == other[name] if name == "step" else torch.equal(value, other[name])


def test_a_loaded_state_is_a_copy():
    model = mlp()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    other = AdamW(model.parameters())
    other.load_state_dict(state)
    before = state["state"][0]["exp_avg"].clone()
    train(model, other, range(2, 4))
    assert torch.equal(state["state"][0]["exp_avg"], before)


# --- in the backward pass -----------------------------------------------------------------------


def test_stepping_in_the_backward_pass_is_stepping_after_it():
    one, other = mlp(torch.bfloat16), mlp(torch.bfloat16)
    optimizer = AdamW(one.parameters(), moments="int8", **OPTIONS)
    train(one, optimizer, range(4))
    stepping = AdamW(other.parameters(), moments="int8", **OPTIONS)
    with step_in_backward(other, stepping):
        for step in range(3):
            loss_of(other, step).backward()
            assert all(param.grad is None for param in other.parameters())
            stepping.step()  # finds nothing to do
    loss_of(other, 3).backward()  # its hooks are gone
    assert all(param.grad is not None for param in other.parameters())
    stepping.step()
    assert torch.equal(weights(one), weights(other))


def test_a_shared_weight_steps_once():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    )
    model[1].weight = model[0].weight
    optimizer = AdamW(model.parameters())
    handle = step_in_backward(model, optimizer)
    model(randn(3, 8)).sum().backward()
    assert optimizer.state[model[0].weight]["step"] == 1
    handle.remove()


def test_what_excludes_it_is_refused():
    model = mlp()
    optimizer = AdamW(model.parameters())
    with pytest.raises(ConfigError, match="accumulation is 4; it must be 1"):
        step_in_backward(model, optimizer, accumulation=4)
    with pytest.raises(ConfigError, match=r"grad_clip is 1\.0; it must be None"):
        step_in_backward(model, optimizer, grad_clip=1.0)
    with pytest.raises(
        ConfigError, match=r"0\.bias, 2\.weight, 2\.bias require a gradient and are not"
    ):
        step_in_backward(model, AdamW([model[0].weight]))
    assert not model[0].weight._post_accumulate_grad_hooks


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"moments": "int4"}, "moments is 'int4'; it must be one of"),
        ({"lr": -1.0}, "lr is -1.0; it must be a number from 0 on"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"eps": -1e-8}, "eps is -1e-08"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(ConfigError, match=said):
        AdamW(mlp().parameters(), **options)
    with pytest.raises(ConfigError, match=said):
        AdamW([{"params": list(mlp().parameters()), **options}])


def given(**changed):
    a, b, c, d = (torch.zeros(300) for _ in range(4))
    tensors = {"param": a, "grad": b, "exp_avg": c, "exp_avg_sq": d}
    return {**tensors, "step": 1, "lr": 0.1, **changed}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"param": torch.zeros(300).half()}, "param is torch.float16; it must be torch.float32 or"),
        ({"grad": torch.zeros(299)}, r"grad is torch.float32 \(299,\) .* must be .* \(300,\)"),
        ({"grad": torch.zeros(300).half()}, "grad is torch.float16"),
        ({"exp_avg": torch.zeros(300).bfloat16()}, "exp_avg is torch.bfloat16 .* torch.float32"),
        ({"exp_avg_scale": torch.zeros(2)}, "go together; one is missing"),
        ({"exp_avg_sq": torch.zeros(300, 2)[:, 0]}, r"exp_avg_sq has strides \(2,\)"),
        ({"step": 0}, "step is 0; the first step is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": float("inf")}, "lr is inf"),
    ],
)
def test_arguments_that_do_not_fit(changed, said):
    with pytest.raises(ShapeError, match=said):
        adamw(**given(**changed))


def test_a_gradient_through_a_step_is_refused():
    with pytest.raises(GradientError, match="adamw has no gradient, but param requires one"):
        adamw(**given(param=torch.zeros(300, requires_grad=True)))
