"""Whether a module of transformers computes what a forward of this package computes.

It is asked by trying, not by a version number: the forward of the module's class and ours are both
run on the same small stand-in, which has the attributes that the known forwards use and no other.
A forward that needs something else, or gives another result, is left alone with that reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from . import forwards

H, K, D, C, T, V = 4, 2, 8, 12, 5, 11  # dims of the stand-ins


def difference(module: nn.Module, ours: Callable[..., Any]) -> str | None:
    """Why `ours` must not replace the module's forward, or None when it may."""
    own = inspect.unwrap(type(module).forward)
    make = STAND_INS[ours]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad(), _plain():
            stand_in, args, kwargs = make(module, generator)
            expected = own(stand_in, *args, **kwargs)
    except Exception as error:  # whatever an unknown forward raises is the reason
        return (
            f"the forward of {type(module).__name__} is not one that is known: on a stand-in it "
            f"raises {type(error).__name__}: {error}"
        )
    other = f"{type(module).__name__} computes something else than {ours.__name__} does"
    try:
        with torch.set_grad_enabled(ours is forwards.causal_lm_loss), _plain():
            given = ours(stand_in, *args, **kwargs)
    except AttributeError:  # it would go to the module's own forward, which a stand-in has not
        return other
    expected, given = _result(expected), _result(given)
    same = expected.shape == given.shape and torch.allclose(expected, given, 1e-4, 1e-5)
    return None if same else other


@contextmanager
def _plain() -> Iterator[None]:
    """On the CPU and in float32, though the model may be in the making on another default device,
    or under autocast."""
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        yield


def _result(output: Any) -> Tensor:
    if isinstance(output, tuple):
        return output[0]
    return output if isinstance(output, Tensor) else output.loss.detach()


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _linear(generator: torch.Generator, C_in: int, C_out: int) -> Callable[[Tensor], Tensor]:
    weight = _randn(generator, C_out, C_in) * C_in**-0.5
    return lambda x: nn.functional.linear(x, weight)


def _of_rms_norm(module: nn.Module, g: torch.Generator) -> tuple:
    eps = module.variance_epsilon
    stand_in = SimpleNamespace(weight=_randn(g, C), variance_epsilon=eps)
    # Small values, so that a forgotten eps shows.
    return stand_in, (_randn(g, T, C) * eps**0.5,), {}


def _of_swiglu(module: nn.Module, g: torch.Generator) -> tuple:
    stand_in = SimpleNamespace(
        gate_proj=_linear(g, C, 20),
        up_proj=_linear(g, C, 20),
        down_proj=_linear(g, 20, C),
        act_fn=module.act_fn,
    )
    return stand_in, (3 * _randn(g, T, C),), {}


def _of_attention(module: nn.Module, g: torch.Generator) -> tuple:
    config = SimpleNamespace(_attn_implementation="sdpa", sliding_window=None)
    stand_in = SimpleNamespace(
        config=config,
        training=False,
        layer_idx=0,
        head_dim=D,
        num_key_value_groups=H // K,
        scaling=0.3,
        attention_dropout=0.0,
        is_causal=True,
        sliding_window=None,
        q_proj=_linear(g, C, H * D),
        k_proj=_linear(g, C, K * D),
        v_proj=_linear(g, C, K * D),
        o_proj=_linear(g, H * D, C),
    )
    for name in ("q_norm", "k_norm"):
        if hasattr(module, name):
            weight = _randn(g, D)
            setattr(stand_in, name, lambda x, w=weight: nn.functional.rms_norm(x, (D,), w, 1e-6))
    angles = _randn(g, 1, T, D // 2).repeat(1, 1, 2)
    return (
        stand_in,
        (),
        {
            "hidden_states": _randn(g, 2, T, C),
            "position_embeddings": (angles.cos(), angles.sin()),
            "attention_mask": None,
        },
    )


def _of_layer(module: nn.Module, g: torch.Generator) -> tuple:
    norm = nn.RMSNorm(C, eps=1e-6, device="meta")
    norm.weight = nn.Parameter(_randn(g, C))
    norm.variance_epsilon = norm.eps
    mix, mlp = _linear(g, C, C), _linear(g, C, C)
    stand_in = SimpleNamespace(
        input_layernorm=lambda x: x * 2,
        self_attn=lambda hidden_states, **kwargs: (mix(hidden_states), None),
        mlp=mlp,
        post_attention_layernorm=norm,
    )
    return stand_in, (), {"hidden_states": _randn(g, 2, T, C)}


def _of_causal_lm(module: nn.Module, g: torch.Generator) -> tuple:
    hidden, labels = _randn(g, 2, T, C), torch.randint(V, (2, T), generator=g, device="cpu")
    head = nn.Linear(C, V, bias=False, device="meta").to_empty(device="cpu")
    head.weight = nn.Parameter(_randn(g, V, C), requires_grad=False)
    labels[0, 2] = -100
    stand_in = SimpleNamespace(
        model=lambda **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden),
        lm_head=head,
        loss_function=forwards.ForCausalLMLoss,
        config=SimpleNamespace(vocab_size=V),
        training=True,
    )
    return stand_in, (), {"labels": labels}


STAND_INS = {
    forwards.rms_norm: _of_rms_norm,
    forwards.swiglu: _of_swiglu,
    forwards.rope_attention: _of_attention,
    forwards.fused_attention: _of_attention,
    forwards.rope_fused_attention: _of_attention,
    forwards.add_rms_norm_layer: _of_layer,
    forwards.causal_lm_loss: _of_causal_lm,
}
