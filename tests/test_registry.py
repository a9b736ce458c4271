"""What an op remembers of calls changes no answer."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import llama_fast
from llama_fast import attention, explain, rms_norm, use_backend
from llama_fast.dispatch import BACKENDS, Implementation, backends, choice, register_backend
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


@pytest.fixture
def refusing(monkeypatch):
    """A backend that takes few rows, as kernels of quantised weights do, and how often it was
    asked."""
    asked: list[int] = []

    def unsupported(x, weight, eps):
        asked.append(len(x))
        return [f"x has {len(x)} rows; at most 4"] if len(x) > 4 else []

    before = backends()["cuda"]
    row = Implementation(RMS_NORM.eager, unsupported)
    rows = {"rms_norm": row}
    register_backend(
        dataclasses.replace(before, unavailable=[], refuses=None, implementations=rows)
    )
    monkeypatch.setattr(choice, "_warned", set())
    yield asked
    register_backend(before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_fallback_is_chosen_once_for_a_signature(refusing, mode):
    weight = torch.ones(8)
    x = torch.randn(40, 8)
    with mode(), use_backend("cuda"), pytest.warns(FallbackWarning, match="x has 40 rows"):
        found = [rms_norm(x, weight) for _ in range(130)]
    assert refusing == [40]
    assert all(torch.equal(y, rms_norm(x, weight)) for y in found)
    with mode(), use_backend("cuda"):
        rms_norm(x[:4], weight)  # few rows are its own still
    assert refusing == [40, 4]


def test_a_fallback_is_warned_of_once_for_all_lengths(refusing):
    weight = torch.ones(8)
    with warnings.catch_warnings(record=True) as caught, use_backend("cuda"):
        warnings.simplefilter("always")
        for rows in (40, 41, 17, 40, 1040):
            rms_norm(torch.ones(rows, 8), weight)
            rms_norm(torch.ones(rows, 8, requires_grad=True), weight)  # the dispatcher's way
    assert [str(one.message) for one in caught if "rows" in str(one.message)] == [
        "rms_norm runs on the cpu backend, because cuda cannot serve this call: x has 40 rows; at "
        "most 4"
    ]


def test_a_fallback_for_another_reason_is_warned_of(monkeypatch):
    monkeypatch.setattr(choice, "_warned", set())
    ATTENTION.forget_order()
    for dtype, says in [(torch.float32, "D is 12"), (torch.float64, "float64 is not one of")]:
        q = torch.ones(1, 2, 1, 12, dtype=dtype)  # a head dim that the kernels have not
        with pytest.warns(FallbackWarning, match=says):
            attention(q, q, q)


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
