"""Profiles of steps that run here: every call is seen once, and the parts add up to the step."""

from __future__ import annotations

import errno
import json
import mmap
import os
import struct

import pytest
import torch

from llama_fast import ops, use_backend
from llama_fast.bench.profile import calls, counters, steps
from llama_fast.bench.profile.calls import Call, Profile, no_section
from llama_fast.bench.profile.trace import write_trace
from llama_fast.bench.roofline import Roofline
from llama_fast.bench.shapes import Work
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, wrapped_launches
from llama_fast.ops import QuantizedWeight

TINY = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=96, vocab_size=160
)
ROOFLINE = Roofline("cpu", 1, "avx9", read=1e9, copy=2e9, float32=4e9, bfloat16=8e9)
CPU = torch.device("cpu")
# The ops of a layer, with how often each is called; the first norm has no residual.
LAYER = {"add_rms_norm": 2, "linear": 3, "linear swiglu": 1, "attention": 1}


def model(quantize=None, dtype=torch.bfloat16):
    return steps.random_model(TINY, layers=2, dtype=dtype, device="cpu", quantize=quantize)


def counted(step) -> dict[str, int]:
    found: dict[str, int] = {}
    for call in calls.count(step, ROOFLINE):
        found[call.op] = found.get(call.op, 0) + 1
    return found


# --- what is wrapped --------------------------------------------------------------------------


def test_launches_are_wrapped_inside_the_block_alone():
    seen = []

    def wrapper(op, backend, launch):
        def launched(*args):
            seen.append((op.name, backend))
            return launch(*args)

        return launched

    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    with use_backend("eager"):
        before = ops.rms_norm(x, weight)
        with wrapped_launches(wrapper):
            ops.rms_norm(x.detach(), weight)
            y = ops.rms_norm(x, weight)
            y.sum().backward()
        expected = [("rms_norm", "eager")] * 2 + [("rms_norm_backward", "eager")]
        assert seen == expected and y.equal(before)
        ops.rms_norm(x.detach(), weight)
        ops.rms_norm(x, weight)
    assert seen == expected


def test_a_launch_within_another_is_not_counted_twice(monkeypatch):
    inner, outer = OPS["rms_norm"], OPS["add_rms_norm"]

    def eager(x, residual, weight, eps):
        return inner(x + residual, weight, eps), x + residual

    monkeypatch.setattr(outer, "eager", eager)
    outer.forget_order()
    x, weight = torch.randn(3, 8), torch.randn(8)

    def step(section):
        ops.add_rms_norm(x, x, weight)
        ops.rms_norm(x, weight)

    with use_backend("eager"):
        found = [call.op for call in calls.count(step, ROOFLINE)]
        assert len(calls.profile(step, 1, ROOFLINE, CPU).parts[0]) == 2
    assert found == ["add_rms_norm", "rms_norm"]


# --- steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_decoding_step_calls_every_op_of_the_model(quantize):
    step = steps.decode_step(model(quantize), batch=2, context=5)
    form = f" {quantize}" if quantize else ""
    linear = f"linear{form}"
    layer = {f"{op}{form * op.startswith('linear')}": n for op, n in LAYER.items()}
    expected = {op: 2 * count for op, count in (layer | {"kv_append": 1}).items()}
    expected[linear] += 1  # the head
    assert counted(step) == expected | {"rms_norm": 1}


def test_decoding_reads_the_whole_context():
    short, long = (
        [c for c in calls.count(steps.decode_step(model(), 1, n), ROOFLINE) if c.op == "attention"]
        for n in (4, 400)
    )
    assert long[0].bytes > 50 * short[0].bytes


def test_a_replayed_step_is_recorded_before_it_is_timed():
    call = steps.ReplayedStep(model(), batch=2, context=5)
    decoding = call.engine.captured()
    seconds = calls.seconds_of(call, 4, CPU)
    assert len(seconds) == 4 and min(seconds) > 0
    assert decoding.cache.used == 5 + 3 + 4
    assert decoding.warm is (decoding.capturer is not None)
    assert (decoding.replay is not None) is (decoding.capturer is not None)


def test_a_prefill_begins_anew_each_time():
    step = steps.prefill_step(model(), batch=1, tokens=7)
    assert counted(step) == counted(step)


def test_a_training_step_has_gradients_and_an_optimizer():
    found = counted(steps.train_step(model(dtype=torch.float32), batch=2, tokens=6))
    assert found["AdamW"] == 1 and found["linear_cross_entropy"] == 1
    assert found["attention_backward"] == found["swiglu_backward"] == 2
    assert found["linear_backward_x"] == found["linear_backward_weight"] == 8
    assert found["rope"] == 4  # forward, and turned back in the gradient


def test_an_op_is_called_for_each_matrix_of_the_model(monkeypatch):
    monkeypatch.setattr(steps, "SETS", 3)
    config, work = TINY, Work.decode(9)
    step = steps.op_step("linear", config, work, dtype=torch.float32, device="cpu")
    found = calls.count(step, ROOFLINE)
    assert len(found) == 6 * 3 and len({call.shapes for call in found}) == 5
    step = steps.op_step("linear", config, work, dtype=torch.float32, device="cpu", quantize="int4")
    found = calls.count(step, ROOFLINE)
    assert len(found) == 6 * 3
    assert {call.op for call in found} == {"linear int4", "linear swiglu int4"}


GRADIENTS = [
    name
    for name, op in OPS.items()
    if op.cases and op.gradient and not op.gradient_in_forward and name != "rope"
]


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_moves_its_tensors_once(name, monkeypatch):
    """What a backward op costs: every tensor that it reads or writes, of its dense inputs."""
    monkeypatch.setattr(steps, "SETS", 1)
    seen = []

    def wrapper(op, backend, launch):
        def launched(*args):
            results = launch(*args)
            written = (results,) if isinstance(results, torch.Tensor) else results
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            moved = sum(x.nbytes for x in (*tensors, *written) if x.dtype != torch.int64)
            seen.append((op, op.cost(*args), moved))
            return results

        return launched

    work = Work.prefill(5)
    step = steps.op_step(name, TINY, work, dtype=torch.bfloat16, device="cpu", backward=True)
    with wrapped_launches(wrapper), use_backend("eager"):
        step(no_section)
    backward = [row for row in seen if "_backward" in row[0].name]
    assert backward
    for op, cost, moved in backward:
        assert cost.bytes == moved and cost.flops > 0, op.name


# --- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_shape", [False, True])
def test_rows_and_the_rest_add_up_to_the_step(by_shape):
    found = calls.profile(steps.prefill_step(model(), 1, 7), 3, ROOFLINE, CPU)
    rows = found.rows(by_shape)
    assert sum(row.seconds for row in rows) + found.rest == pytest.approx(found.step)
    assert found.rest > 0 and len(found.seconds) == 3
    assert sum(row.calls for row in rows) == len(found.calls)
    assert found.step == sorted(found.seconds)[1]
    assert {row.backend for row in rows} <= {"cpu", "eager"}


def test_a_row_is_judged_by_the_roofline():
    made = [
        Call("a", "cpu", "8×8", bytes=10, flops=3, bound="read", least=0.25),
        Call("b", "cpu", "9×9", bytes=1, flops=1, bound="int8", least=None),
        Call("a", "cpu", "4×4", bytes=20, flops=5, bound="copy", least=0.5),
    ]
    found = Profile(made, [9.0, 5.0, 2.0], [[0, 0, 0], [1.0, 2.0, 0.5], [0, 0, 0]])
    b, a = found.rows()
    assert (a.op, a.calls, a.seconds, a.bytes, a.flops) == ("a", 2, 1.5, 30, 8)
    assert (a.bound, a.share_of_peak) == ("copy, read", 0.5)
    assert (b.share_of_peak, found.rest) == (None, 1.5)
    assert [row.shapes for row in found.rows(by_shape=True)] == ["9×9", "8×8", "4×4"]


def test_a_device_is_timed_by_its_events(monkeypatch):
    """On a GPU, the stamps are events of its stream, read when it has finished."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            log.append("record")
            self.at = len(log)

        def elapsed_time(self, end):
            assert log[-1] == "wait"
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    step = steps.decode_step(model(), batch=1, context=3)
    found = calls.profile(step, 1, ROOFLINE, torch.device("cuda"))
    n = len(found.calls)
    assert found.parts == [[1e-3] * n]
    assert found.step == pytest.approx((2 * n + 1) * 1e-3)


# --- trace ------------------------------------------------------------------------------------


def test_the_trace_names_the_ops(tmp_path):
    step = steps.train_step(model(dtype=torch.float32), batch=1, tokens=6)
    step(no_section)
    file = tmp_path / "trace.json"
    with use_backend("eager"):
        between = write_trace(step, file, CPU)
    names = [event.get("name") for event in json.loads(file.read_text())["traceEvents"]]
    assert names.count("attention [eager]") == names.count("attention_backward [eager]") == 2
    found = {op.name for op in between}
    assert "aten::embedding" in found and all(name.startswith("aten::") for name in found)
    # Those of our eager attention and of the optimizer are not outside.
    assert not found & {"aten::softmax", "aten::sqrt", "aten::addcdiv_"}
    assert "AdamW [torch]" in names and "aten::sqrt" in names


# --- counters ---------------------------------------------------------------------------------


def test_page_faults_of_the_work_are_counted():
    try:
        os.close(counters.open_event(counters.EVENTS["page faults"], 0))
    except OSError as error:
        pytest.skip(f"this needs perf_event_open: {counters.why(error)}")
    size, page, huge_page = 64 * 2**20, 4096, 2 * 2**20
    memory = mmap.mmap(-1, size)  # malloc could give what was touched before
    with counters.Counters() as found:
        memory[::page] = bytes(size // page)
    assert found.counts["page faults"] >= size / huge_page
    assert set(found.counts) | set(found.missing) == set(counters.EVENTS)


def test_instructions_per_cycle_are_of_what_was_counted(monkeypatch):
    """A processor that has every counter: half of the time each, so counts are doubled."""
    asked = {}

    def open_event(event, thread):
        there, here = os.pipe()
        os.write(here, struct.pack("=QQQ", 30 if event.config == 1 else 20, 10, 5))
        os.close(here)
        asked[there] = event
        return there

    monkeypatch.setattr(counters, "open_event", open_event)
    monkeypatch.setattr(counters, "control", lambda descriptor, request: None)
    monkeypatch.setattr(counters, "_threads", lambda: [11, 12])
    with counters.Counters() as found:
        pass
    assert found.counts["cycles"] == 2 * 2 * 20 and not found.missing
    assert found.instructions_per_cycle == 1.5


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EACCES, "kernel.perf_event_paranoid is 4"),
        (errno.EPERM, "--cap-add PERFMON"),
        (errno.ENOENT, "virtual machines often hide"),
        (errno.ENOSYS, "Linux's perf_event_open"),
        (errno.EMFILE, "Too many open files"),
    ],
)
def test_a_counter_that_is_missing_says_why(monkeypatch, tmp_path, number, says):
    (tmp_path / "paranoid").write_text("4\n")
    monkeypatch.setattr(counters, "PARANOID", tmp_path / "paranoid")

    def refuse(event, thread):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(counters, "open_event", refuse)
    with counters.Counters() as found:
        pass
    assert not found.counts and found.instructions_per_cycle is None
    assert says in found.missing["cycles"]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_random_quantised_weights_are_drawn_and_not_rounded(monkeypatch, name):
    def refuse(*_, **__):
        raise AssertionError("rounding an 8B model takes minutes")

    monkeypatch.setattr(QuantizedWeight, "from_rows", refuse)
    monkeypatch.setattr(QuantizedWeight, "from_float", refuse)
    model = steps.random_model(TINY, layers=1, dtype=torch.bfloat16, device="cpu", quantize=name)
    for part, std in (("embed", 0.02), ("layers.0.mlp.gate_up", 0.02)):
        weight = model.get_submodule(part).weight
        assert isinstance(weight, QuantizedWeight)
        found = weight.dequantize()
        assert found.std().item() == pytest.approx(std, rel=0.1)
        assert found.mean().abs().item() < 0.15 * std  # half a step below zero
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert model(tokens).isfinite().all()
