"""What is timed is what the op defines, and its shares are those of the ceiling that bounds it."""

from __future__ import annotations

import pytest
import torch

from llama_fast import speed
from llama_fast.ceilings import Ceilings
from llama_fast.config import LlamaConfig
from llama_fast.errors import WrongResultError
from llama_fast.registry import OPS, Cost, Implementation, backends
from llama_fast.workloads import Work, workloads

pytest.importorskip("llama_fast._cpu", reason="the C++ kernels are not built")
TINY = LlamaConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=160
)
CEILINGS = Ceilings("cpu", 1, "avx9", read=1e9, copy=2e9, float32=4e9, bfloat16=8e9)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)


def measure(op: str, **more):
    work = Work.prefill(6)
    make = workloads(op, TINY, work)[op]
    return speed.measure(
        op, make, ["cpu", "eager"], shape="tiny", work=work, ceilings=CEILINGS, rounds=2, **more
    )


def test_a_wrong_kernel_has_no_time(monkeypatch):
    right = backends()["cpu"].implementations["rms_norm"]

    def wrong(x, weight, eps):
        return right.launch(x, weight, eps) * 1.05

    monkeypatch.setitem(
        backends()["cpu"].implementations, "rms_norm", Implementation(wrong, right.unsupported)
    )
    OPS["rms_norm"].forget_order()
    try:
        with pytest.raises(WrongResultError, match=r"cpu is 0\.0[45]\d* of its size away"):
            measure("rms_norm")
    finally:
        monkeypatch.undo()
        OPS["rms_norm"].forget_order()
    assert measure("rms_norm")[0].error < 0.01


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("op", ["swiglu", "kv_append", "attention", "linear_cross_entropy"])
def test_shares_are_those_of_the_ceiling(op, warm):
    for found in measure(op, warm=warm):
        assert len(found.samples) == 2 and min(found.samples) > 0
        limit = getattr(CEILINGS, found.ceiling)
        amount = found.bytes if found.ceiling in ("read", "copy") else found.flops
        assert found.share == pytest.approx(amount / limit / found.median)
        assert found.times_eager > 0 and found.record()["median"] == found.median


def test_what_bounds_a_call():
    out = (torch.empty(100, dtype=torch.bfloat16),)  # 200 bytes
    half, op = torch.bfloat16, OPS["linear"]
    assert speed.at_best(op, Cost(400, 100), out, half, CEILINGS) == ("copy", 400 / 2e9)
    assert speed.at_best(op, Cost(4000, 100), out, half, CEILINGS) == ("read", 4000 / 1e9)
    assert speed.at_best(op, Cost(400, 9000), out, half, CEILINGS) == ("bfloat16", 9000 / 8e9)
    assert speed.at_best(op, Cost(400, 9000), out, torch.float32, CEILINGS)[0] == "float32"
    quantized = OPS["linear_quantized"]
    assert speed.at_best(quantized, Cost(400, 9000), out, half, CEILINGS) == ("int8", None)


def test_reasons_name_what_cannot_serve():
    args = workloads("rms_norm", TINY, Work.decode(8))["rms_norm"](0)
    assert speed.why_not(OPS["rms_norm"], args, "cpu") == []
    assert speed.why_not(OPS["rms_norm"], args, "eager") == []
    assert speed.why_not(OPS["rms_norm"], args, "cuda")
