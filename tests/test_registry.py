"""What an op remembers of calls changes no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llama_fast
from llama_fast import attention, explain, rms_norm, use_backend
from llama_fast.dispatch import BACKENDS, choice
from llama_fast.dispatch import op as op_module
from llama_fast.errors import FallbackWarning, ShapeError
from llama_fast.ops.attention import OP as ATTENTION
from llama_fast.ops.rms_norm import OP as RMS_NORM


@pytest.fixture(autouse=True)
def nothing_known():
    RMS_NORM.forget_order()
    ATTENTION.forget_order()
    yield
    RMS_NORM.forget_order()
    ATTENTION.forget_order()


def test_a_call_is_checked_again_when_it_differs():
    x, weight = torch.ones(3, 8), torch.ones(8)
    rms_norm(x, weight)
    rms_norm(x, weight)
    for bad in (weight[:7], weight.half(), weight.to("meta")):
        for _ in range(2):
            with pytest.raises(ShapeError):
                rms_norm(x, bad)


@pytest.mark.parametrize("bad", [[1.0, 2.0], np.ones(8), None, 3], ids=repr)
def test_what_is_no_tensor_is_named(bad):
    weight = torch.ones(8)
    for given, name in (((bad, weight), "x"), ((weight, bad), "weight")):
        with pytest.raises(TypeError, match=f"rms_norm: {name} is a .*torch.Tensor"):
            rms_norm(*given)
        with pytest.raises(TypeError, match=f"rms_norm: {name} is a .*torch.Tensor"):
            explain("rms_norm", *given, 1e-5)


def test_a_view_of_a_known_shape_is_read_by_its_own_strides():
    whole, weight = torch.randn(6, 8), torch.ones(8)
    expected = rms_norm(whole, weight)
    assert torch.equal(rms_norm(whole[:3], weight), expected[:3])
    assert torch.equal(rms_norm(whole[::2], weight), expected[::2])


def test_a_request_is_heeded_after_the_call_is_known(monkeypatch):
    ran = []
    eager = RMS_NORM.eager
    monkeypatch.setattr(RMS_NORM, "eager", lambda *args: (ran.append(1), eager(*args))[1])
    x, weight = torch.ones(3, 8), torch.ones(8)
    rms_norm(x, weight)
    assert not ran
    for _ in range(2):
        with use_backend("eager"):
            rms_norm(x, weight)
    assert len(ran) == 2
    rms_norm(x, weight)
    assert len(ran) == 2


def test_a_gradient_is_recorded_after_the_call_is_known():
    x, weight = torch.ones(3, 8), torch.ones(8)
    rms_norm(x, weight)
    assert rms_norm(x.requires_grad_(), weight).requires_grad


def test_the_memory_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(op_module, "MAX_PLANS", 3)
    for rows in range(1, 9):
        rms_norm(torch.ones(rows, 8), torch.ones(8))
        assert 1 <= len(RMS_NORM._plans) <= 3


def test_a_fallback_is_not_remembered(monkeypatch):
    q = torch.ones(1, 2, 1, 12)  # a head dim that the kernels have not
    for _ in range(2):
        monkeypatch.setattr(choice, "_warned", set())
        with pytest.warns(FallbackWarning, match="D is 12"):
            attention(q, q, q)
    assert not ATTENTION._plans


def test_explain_has_every_backend_and_why_the_others_do_not_serve():
    decision = explain("rms_norm", torch.ones(3, 64), torch.ones(64), 1e-5)
    assert set(decision.reasons) == set(BACKENDS)
    assert decision.reasons[decision.chosen] == decision.reasons["eager"] == []
    for name in ("cuda", "triton"):
        assert decision.reasons[name] == ["it serves tensors on cuda; these are on cpu"]
        assert f"  {name}: it serves tensors on cuda; these are on cpu" in str(decision)


def test_dir_shows_the_public_names_and_no_others():
    shown = dir(llama_fast)
    assert {"Llama", "Tokenizer", "generate", "explain", "patch", "Patch", "rms_norm"} <= set(shown)
    assert not {"Any", "sys", "import_module", "ModuleType", "annotations"} & set(shown)
    assert [name for name in shown if name.startswith("_")] == ["__version__"]
    assert set(llama_fast.__all__) <= set(shown)
    assert all(hasattr(llama_fast, name) for name in shown if name not in ("patch", "Patch"))
