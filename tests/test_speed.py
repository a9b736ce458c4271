"""What is timed is what the op defines, and its shares are of the peak rate that bounds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_fast.bench import baselines
from llama_fast.bench import measure as speed
from llama_fast.bench.memory import extra_memory
from llama_fast.bench.roofline import Roofline
from llama_fast.bench.shapes import NAMES, Work, problem_shapes
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, Cost, Implementation, backends
from llama_fast.errors import BackendError, WrongResultError
from llama_fast.utils.memory import resident_peak

pytest.importorskip("llama_fast._cpu", reason="the C++ kernels are not built")
TINY = LlamaConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=160
)
ROOFLINE = Roofline("cpu", 1, "avx9", read=1e9, copy=2e9, float32=4e9, bfloat16=8e9)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(speed, "SAMPLE", 1e-4)


def measure(op: str, names=("cpu", "eager"), work=None, **more):
    work = work or Work.prefill(6)
    make = problem_shapes(op, TINY, work, gradient=work.name == "training")[op]
    return speed.measure(
        op, make, names, shape="tiny", work=work, roofline=ROOFLINE, rounds=2, **more
    )


@pytest.fixture
def replace(monkeypatch):
    """Puts a function of the launcher in the place of a CPU launcher."""

    def put(op: str, change) -> None:
        right = backends()["cpu"].implementations[op]
        monkeypatch.setitem(
            backends()["cpu"].implementations,
            op,
            Implementation(change(right.launch), right.unsupported),
        )
        OPS[op].forget_order()

    yield put
    monkeypatch.undo()
    OPS["rms_norm"].forget_order()


def test_a_wrong_kernel_has_no_time(replace):
    replace("rms_norm", lambda right: lambda *args: right(*args) * 1.05)
    with pytest.raises(WrongResultError, match=r"by cpu is 0\.0[45]\d* of its size away"):
        measure("rms_norm")
    failed: dict[str, Exception] = {}
    row = measure("rms_norm", failed=failed)
    assert isinstance(failed["cpu"], WrongResultError) and set(row.samples) == {"eager"}


def test_a_right_kernel_has_its_error():
    assert 0 < measure("rms_norm").errors["cpu"] < 0.01


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("op", ["swiglu", "kv_append", "attention", "linear_cross_entropy"])
def test_shares_are_those_of_the_peak(op, warm):
    row = measure(op, warm=warm)
    for name, samples in row.samples.items():
        assert len(samples) == 2 and min(samples) > 0
        limit = getattr(ROOFLINE, row.bound)
        amount = row.bytes if row.bound in ("read", "copy") else row.flops
        assert row.share(name) == pytest.approx(amount / limit / row.seconds(name))
        assert row.times("eager", name) > 0
    assert row.times("eager", "eager") == 1.0 and row.times("eager", "nobody") is None


@pytest.mark.parametrize("op", [name for name in NAMES if OPS[name].gradient is not None])
def test_gradients_are_timed_and_right(op):
    """All float inputs, in every baseline that has them here; linear by its first matrix."""
    work = Work.training(6)
    made = problem_shapes(op, TINY, work, gradient=True)
    problem, make = next(iter(made.items()))
    args, which = make(0), speed.passes(OPS[op])[-1]
    names = [
        name
        for name in ("eager", *baselines.peers(OPS[op]))
        if name != baselines.COMPILED and not baselines.why_not(name, OPS[op], args, gradient=True)
    ]
    row = speed.measure(
        problem, make, names, shape="tiny", work=work, roofline=ROOFLINE, which=which, rounds=2
    )
    assert set(row.samples) == set(names) and row.call["pass"] == which
    assert max(row.errors.values()) < speed.TOLERANCE[torch.bfloat16]


def test_a_wrong_gradient_is_refused(monkeypatch):
    swiglu = OPS["swiglu"]
    right = swiglu.gradient
    monkeypatch.setattr(swiglu, "gradient", lambda *args: tuple(1.1 * g for g in right(*args)))
    with pytest.raises(WrongResultError, match=r"swiglu \(backward\) by eager is 0\.1"):
        measure("swiglu", ["eager"], Work.training(6), which=speed.BACKWARD)


def test_a_backend_without_a_gradient_is_missing():
    """What serves the forward pass may have no kernel for the other one."""
    row = measure("attention", ["cpu", "eager"], Work.training(6), which=speed.BACKWARD)
    assert set(row.samples) | set(row.missing) == {"cpu", "eager"} and "eager" in row.samples


def test_a_backward_pass_is_credited_with_what_its_ops_do():
    x, weight = torch.randn(8, 32).bfloat16(), torch.randn(32).bfloat16()
    found = speed.cost(OPS["rms_norm"], (x, weight, 1e-5), speed.BACKWARD)
    assert found == OPS["rms_norm_backward"].cost(x, x, weight, 1e-5)
    w, y = torch.randn(16, 32).bfloat16(), torch.randn(8, 16).bfloat16()
    found = speed.cost(OPS["linear"], (x, w), speed.BACKWARD)
    assert found.flops == 2 * 2 * 8 * 16 * 32  # dx and dw
    assert found.bytes == 2 * (x.nbytes + w.nbytes + y.nbytes)
    assert speed.cost(OPS["linear"], (x, w), speed.FORWARD) == OPS["linear"].cost(x, w)


def test_the_thorough_run_knows_host_and_memory():
    row = measure("linear_cross_entropy", thorough=True, work=Work.prefill(600))
    assert 1e-7 < min(row.host.values()) and max(row.host.values()) < 0.1
    if extra_memory(lambda: None) is None:
        pytest.skip("this system does not say what memory a process gains")
    assert set(row.memory) == {"cpu", "eager"}


def test_memory_of_a_call_is_seen():
    if extra_memory(lambda: None) is None:
        pytest.skip("this system does not say what memory a process gains")
    nbytes = 64 * 2**20
    found = extra_memory(lambda: torch.ones(nbytes, dtype=torch.uint8))
    assert 0.95 * nbytes <= found < 1.5 * nbytes  # the kernel counts pages in batches
    assert resident_peak() > nbytes


def test_what_bounds_a_call():
    out = (torch.empty(100, dtype=torch.bfloat16),)  # 200 bytes
    half, args = torch.bfloat16, (torch.empty(1, 8), torch.empty(8, 8))
    assert speed.at_best(args, Cost(400, 100), out, half, ROOFLINE) == ("copy", 400 / 2e9)
    assert speed.at_best(args, Cost(4000, 100), out, half, ROOFLINE) == ("read", 4000 / 1e9)
    assert speed.at_best(args, Cost(400, 9000), out, half, ROOFLINE) == ("bfloat16", 9000 / 8e9)
    assert speed.at_best(args, Cost(400, 9000), out, torch.float32, ROOFLINE)[0] == "float32"
    quantized = torch.empty(1, 16, 16, 4, dtype=torch.uint8)
    assert speed.at_best((args[0], quantized), Cost(400, 9000), out, half, ROOFLINE) == (
        "int8",
        None,
    )


def test_reasons_name_what_cannot_serve():
    op, args = OPS["rms_norm"], problem_shapes("rms_norm", TINY, Work.decode(8))["rms_norm"](0)
    assert baselines.why_not("cpu", op, args) == []
    assert baselines.why_not("eager", op, args) == []
    assert baselines.why_not("torch", op, args) == []
    assert baselines.why_not("cuda", op, args)
    assert baselines.why_not("torch", OPS["swiglu"], args) == [
        "torch has no swiglu in one function"
    ]
    (why,) = baselines.why_not("flash-attn", OPS["attention"], args)
    assert "not installed" in why or "needs a GPU" in why
    kv = problem_shapes("kv_append", TINY, Work.decode(8))["kv_append"](0)
    assert baselines.why_not("cpu", OPS["kv_append"], kv, gradient=True) == [
        "kv_append has no gradient"
    ]
    with pytest.raises(BackendError, match="no baseline is named 'cublas'; there are cpu, "):
        baselines.why_not("cublas", op, args)


def test_sdpa_is_asked_for_what_it_means_as_we_do():
    """Its causal mask is aligned at the first key: a prompt after others is not the same there."""
    op, work = OPS["attention"], Work("prefill", 1, 3, 9)
    args = problem_shapes("attention", TINY, work)["attention"](0)
    (why,) = baselines.why_not("torch", op, args)
    assert "aligned at the first key" in why


@pytest.mark.parametrize("op", ["rms_norm", "attention"])
def test_what_torch_has_agrees(op):
    for work in (Work.decode(9), Work.prefill(6)):
        row = measure(op, ["torch", "eager"], work)
        assert set(row.samples) == {"torch", "eager"}


LIGER = """
import torch
import llama_fast.ops
from llama_fast.bench import baselines
from llama_fast.bench import oracle as reference
from llama_fast.dispatch import OPS
from llama_fast.bench.shapes import NAMES, Work, problem_shapes
from tests.test_speed import TINY

for name in ("rope", "linear_cross_entropy"):
    op = OPS[name]
    args = problem_shapes(name, TINY, Work.prefill(6), dtype=torch.float32)[name](0)
    found = reference.outputs(op, baselines.call("liger-kernel", op)(*args))
    expected = reference.outputs(op, op.eager(*args))
    print(name, reference.distance(found, expected))
"""


def test_liger_is_asked_for_the_same():
    """Its kernels in Triton's interpreter: the arguments are handed over as it takes them. Those
    that call a method of a number (its norms, swiglu) run on a GPU alone."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: '.[peers]'")
    done = subprocess.run(
        [sys.executable, "-c", LIGER],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors = dict(line.split() for line in done.stdout.splitlines())
    assert set(errors) == {"rope", "linear_cross_entropy"}
    assert max(map(float, errors.values())) < 1e-5
