"""The captured decode step: what serves it on the CPU; and for a GPU's, a recorder stands for CUDA
graphs and replays as they do, the device's operations alone on the memory that they were recorded
with."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_fast import _cpu
from llama_fast.backends import cuda
from llama_fast.backends.cpu_step import CpuRecorder
from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import Quantization
from llama_fast.dispatch import OPS, use_backend
from llama_fast.errors import FallbackWarning, KernelError, PromptError
from llama_fast.generation.captured_step import CudaGraphs
from llama_fast.generation.engine import Engine
from llama_fast.model import Llama
from llama_fast.ops import rms_norm
from llama_fast.ops.quantized_weight import round_weight

from .cuda_host import host

B, SLOTS = 3, 40


class Recorder(TorchDispatchMode):
    """Records every operation with its arguments and results. A replay does them again and puts the
    results where they were; what Python did around them is not repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def tensors(result) -> list[Tensor]:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [x for x in results if isinstance(x, Tensor)]


class RecordedGraphs:
    """Captures by running, and undoes what the device did: a capture runs nothing."""

    def __init__(self, cache) -> None:
        self.cache = cache
        self.captures = self.warm_ups = 0

    def warm_up(self, step: Callable[[], Tensor]) -> Tensor:
        self.warm_ups += 1
        return step()

    def capture(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.captures += 1
        memory = [self.cache.lengths, *self.cache.tensors()]
        kept = [x.clone() for x in memory]
        recorder = Recorder()
        with recorder:
            result = step()
        for x, before in zip(memory, kept, strict=True):
            x.copy_(before)
        return recorder.replay, result


@pytest.fixture(scope="module")
def model() -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=50,
        max_seq_len=64,
    )  # fmt: skip
    return Llama(config, device="cpu").eval()


def prefilled(model: Llama, kv_cache: str | None = None):
    cache = model.new_cache(B, SLOTS, kv_cache)
    for x in cache.tensors():  # what no row holds is never read
        x.fill_(float("nan") if x.is_floating_point() else 127)
    cache.reset([0, 3, 1])
    tokens = torch.randint(50, (B, 7), generator=torch.Generator().manual_seed(1))
    model(tokens, cache=cache, last_only=True)
    return cache


def run(
    model: Llama, steps: int, captured: bool, restart: bool = False, kv_cache: str | None = None
):
    cache = prefilled(model, kv_cache)
    graphs = RecordedGraphs(cache)
    engine = Engine(model, cache, capture=lambda cache: graphs if captured else None)
    tokens, found = torch.tensor([1, 2, 3]), []
    for i in range(steps):
        logits = engine.step(tokens)
        found.append(logits.clone())
        tokens = logits.argmax(-1)
        if restart and i == 4:
            cache.restart(1)
    return torch.stack(found), cache, graphs


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("restart", [False, True])
def test_replayed_steps_are_the_steps(model, restart, kv_cache):
    expected, plain, _ = run(model, 20, False, restart, kv_cache)
    found, cache, graphs = run(model, 20, True, restart, kv_cache)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    assert (graphs.warm_ups, graphs.captures) == (1, 1)  # whatever the lengths
    assert cache._lengths == plain._lengths == cache.lengths.tolist()


def test_the_end_of_the_cache_is_refused_before_a_replay(model):
    _, cache, graphs = run(model, SLOTS - 7, captured=True)
    engine = Engine(model, cache, capture=lambda cache: graphs)
    with pytest.raises(PromptError, match="the cache holds 40 tokens"):
        engine.step(torch.tensor([1, 2, 3]))
    assert cache.lengths.tolist() == cache._lengths


@pytest.mark.parametrize("kind", [RuntimeError, KernelError])  # of torch's and of ours
def test_a_step_that_cannot_be_captured_is_run(model, kind):
    class Failing(RecordedGraphs):
        def capture(self, step):
            super().capture(step)
            raise kind("operation not permitted when stream is capturing")

    expected, plain, _ = run(model, 5, captured=False)
    cache = prefilled(model)
    engine = Engine(model, cache, capture=Failing)
    tokens, found = torch.tensor([1, 2, 3]), []
    for i in range(5):
        if i == 1:
            with pytest.warns(FallbackWarning, match=r"not permitted.*llama-fast doctor"):
                logits = engine.step(tokens)
        else:
            logits = engine.step(tokens)
        found.append(logits.clone())
        tokens = logits.argmax(-1)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == plain.lengths.tolist()


def with_heads_of_64(model: Llama, device: str) -> Llama:
    """Such as the CUDA kernels serve, in bfloat16."""
    torch.manual_seed(0)
    config = replace(model.config, head_dim=64)
    return Llama(config, device=device, dtype=torch.bfloat16).eval()


@pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_replays_of_cuda_kernels_are_the_steps(model, kv_cache):
    """All of a step's kernels, here on the host, and no definition among them."""
    made = with_heads_of_64(model, "cpu")
    with use_backend("eager"):
        eager, _, _ = run(made, 1, captured=False, kv_cache=kv_cache)
    with host.use_host(), use_backend("cuda", strict=True):
        expected, plain, _ = run(made, 6, captured=False, restart=True, kv_cache=kv_cache)
        found, cache, graphs = run(made, 6, captured=True, restart=True, kv_cache=kv_cache)
    assert torch.equal(found, expected) and (graphs.warm_ups, graphs.captures) == (1, 1)
    assert cache._lengths == plain._lengths == cache.lengths.tolist()
    torch.testing.assert_close(expected[0], eager[0], rtol=0.02, atol=0.02)


@pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_replays_of_cuda_kernels_with_several_tokens_are_the_steps(model, kv_cache):
    made = with_heads_of_64(model, "cpu")
    drafts = torch.randint(50, (4, B, 3), generator=torch.Generator().manual_seed(2))

    def run(captured: bool) -> Tensor:
        cache = prefilled(made, kv_cache)
        capture = RecordedGraphs if captured else run_as_it_is
        engine, found = Engine(made, cache, capture=capture), []
        for tokens in drafts:
            found.append(engine.step(tokens).clone())
            engine.truncate([n - 1 for n in engine.lengths])
        assert (engine.captured(3).replay is not None) is captured
        return torch.stack(found)

    with host.use_host(), use_backend("cuda", strict=True):
        assert torch.equal(run(True), run(False))


class Seen(TorchDispatchMode):
    """Notes the names of what torch computes."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


class DeepRecorder(Recorder):
    """Notes what torch computes inside of the ops too."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._opname)
        if function.namespace != "llama_fast":
            return super().__torch_dispatch__(function, types, args, kwargs)
        op = OPS[function._opname]
        with Seen(self.names):
            result = op.run(*op.complete(args))
        self.operations.append((function, args, {}, result))
        return result


class FakeCuda:
    """torch.cuda for tensors on the CPU: a graph records what is computed, and puts back what that
    has written to `memory`, since a capture runs nothing."""

    def __init__(self, monkeypatch, memory: list[Tensor]) -> None:
        self.memory = memory
        self.modes: list[str] = []
        self.computed: list[str] = []
        self.capturing = False
        self.devices, self.streams = [torch.device("cuda", 0)], ["default"]
        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": self.stream,
            "device": self.device,
            "CUDAGraph": SimpleNamespace,
            "graph": self.graph,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(cuda, "_capturing", lambda device: self.capturing)

    @contextmanager
    def device(self, device):
        self.devices.append(device)
        try:
            yield
        finally:
            self.devices.pop()

    @contextmanager
    def stream(self, stream):
        """As torch's, it makes the device that it found current so again, in use or not."""
        assert self.devices[1:], "this makes a context on the first GPU"
        before, self.streams = self.streams, [*self.streams, stream]
        try:
            yield
        finally:
            self.streams = before

    @contextmanager
    def graph(self, graph, stream, capture_error_mode="global"):
        """As torch's, it leaves its stream where the capture could be ended."""
        assert self.devices[1:]
        self.streams.append(stream)
        self.modes.append(capture_error_mode)
        kept = [x.clone() for x in self.memory]
        recorder = DeepRecorder(self.computed)
        self.capturing = True
        try:
            with recorder:
                yield
        finally:
            self.capturing = False
            for x, before in zip(self.memory, kept, strict=True):
                x.copy_(before)
        graph.replay = recorder.replay
        self.streams.pop()


@pytest.mark.skipif(bool(host.why_not()), reason=host.why_not() or "it runs")
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_a_captured_step_fills_no_memory(model, kv_cache, monkeypatch):
    """The counts of the blocks that share a row's keys are zero before and after each call. A step
    has its own: two steps may be replayed on two streams at once."""
    made = with_heads_of_64(model, "cpu")
    monkeypatch.setattr(host.module(), "kv_splits", lambda *sizes: 2)
    with host.use_host(), use_backend("cuda", strict=True):
        cache = prefilled(made, kv_cache)
        fake = FakeCuda(monkeypatch, [cache.lengths, *cache.tensors()])
        graphs = CudaGraphs(torch.device("cpu"))
        expected, _, _ = run(made, 6, captured=False, kv_cache=kv_cache)
        engine = Engine(made, cache, capture=lambda cache: graphs)
        tokens, found = torch.tensor([1, 2, 3]), []
        for _ in range(6):
            logits = engine.step(tokens)
            found.append(logits.clone())
            tokens = logits.argmax(-1)
    assert torch.equal(torch.stack(found), expected)
    assert fake.computed.count("attention") == made.config.n_layers
    assert not {"zeros", "new_zeros", "zeros_like", "zero_", "fill_", "full"} & set(fake.computed)
    (counts,) = graphs._memory.values()
    assert not counts.any()
    assert all(counts is not others for others in cuda._arrived_by_stream.values())


def test_counts_of_a_graph_that_somebody_else_captures_are_its_own(monkeypatch):
    monkeypatch.setattr(cuda, "_capturing", lambda device: True)
    place, device = (0, 7, False), torch.device("cpu")
    assert cuda._arrived(place, 3, device) is not cuda._arrived(place, 3, device)
    monkeypatch.setattr(cuda, "_capturing", lambda device: False)
    assert cuda._arrived(place, 3, device) is cuda._arrived(place, 3, device)


def test_whether_a_stream_captures_is_asked_on_its_own_device(monkeypatch):
    """torch asks of the current device, and would make a context on it."""
    current = [0]

    @contextmanager
    def on(device):
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    assert cuda._capturing(torch.device("cuda", 1)) and current == [0]


def test_other_threads_do_not_break_a_capture(monkeypatch):
    """In CUDA's global mode an allocation of another thread would."""
    fake = FakeCuda(monkeypatch, [])
    replay, result = CudaGraphs(torch.device("cpu")).capture(lambda: torch.ones(3))
    assert fake.modes == ["thread_local"]
    result.zero_()
    replay()
    assert result.tolist() == [1, 1, 1]


def test_after_a_capture_that_fails_the_stream_and_the_device_are_what_they_were(monkeypatch):
    fake = FakeCuda(monkeypatch, [])

    def step() -> Tensor:
        raise KernelError("operation not permitted when stream is capturing")

    with pytest.raises(KernelError):
        CudaGraphs(torch.device("cpu")).capture(step)
    assert fake.streams == ["default"] and len(fake.devices) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this needs a GPU")
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_cuda_graphs_give_the_same_tokens(model, kv_cache):
    on_gpu = with_heads_of_64(model, "cuda")

    def tokens_of(captured: bool) -> Tensor:
        cache = on_gpu.new_cache(B, SLOTS, kv_cache)
        engine = Engine(on_gpu, cache, capture=None if captured else run_as_it_is)
        tokens, found = torch.tensor([1, 2, 3], device="cuda"), []
        for _ in range(30):
            tokens = engine.step(tokens).argmax(-1)
            found.append(tokens)
        assert (engine.captured().replay is not None) is captured
        return torch.stack(found)

    assert torch.equal(tokens_of(True), tokens_of(False))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this needs a GPU")
def test_cuda_graphs_of_steps_fill_no_memory(model):
    on_gpu = with_heads_of_64(model, "cuda")
    engine = Engine(on_gpu, on_gpu.new_cache(1, 600))  # keys for several blocks
    with use_backend("cuda", strict=True):
        for _ in range(3):
            engine.step(torch.tensor([1], device="cuda"))
    replay = engine.captured().replay
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    names = [event.name.lower() for event in profile.events()]
    assert any("attention_decode" in name for name in names)
    assert not [name for name in names if "fill" in name or "memset" in name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this needs a GPU")
def test_cuda_graphs_are_captured_while_another_thread_allocates():
    x, kept = torch.ones(3, device="cuda"), []

    def allocate() -> None:
        for _ in range(50):  # each is a cudaMalloc, since the others are kept
            kept.append(torch.empty(24 * 2**20, dtype=torch.uint8, device="cuda"))
            time.sleep(0.01)

    thread = threading.Thread(target=allocate)
    thread.start()
    captured = 0
    while thread.is_alive() or not captured:
        graphs = CudaGraphs(x.device)
        graphs.warm_up(lambda: x * 2)
        replay, result = graphs.capture(lambda: (x * 2).sin().cos())
        replay()
        torch.testing.assert_close(result, (x * 2).sin().cos())
        captured += 1
    thread.join()


GPU_1 = """
import sys, torch
from llama_fast import Llama, use_backend
from llama_fast.config import LlamaConfig
from llama_fast.generation.engine import Engine

config = LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=96,
                     vocab_size=50, max_seq_len=640)
model = Llama(config, device="cuda:1", dtype=torch.bfloat16).eval()
engine = Engine(model, model.new_cache(1, 600))
with use_backend("cuda"):
    for _ in range(4):
        engine.step(torch.tensor([1], device="cuda:1"))
torch.cuda.synchronize("cuda:1")
print(torch._C._cuda_hasPrimaryContext(0), torch.cuda.current_device())
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this needs two GPUs")
def test_cuda_graphs_on_one_gpu_make_no_context_on_another():
    done = subprocess.run([sys.executable, "-c", GPU_1], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "0"], done.stderr[-2000:]


def half(model: Llama, quantize: str | None) -> Llama:
    """A bfloat16 copy, quantised or not."""
    made = Llama(model.config, device="cpu", dtype=torch.bfloat16).eval()
    made.load_state_dict(model.state_dict())
    if quantize is not None:
        settings = Quantization.of(quantize)
        for name, weight in dict(made.named_parameters()).items():
            if (form := settings.of_weight(name)) is not None:
                made.set_weight(name, round_weight(weight.detach(), form))
    return made


def run_as_it_is(cache) -> None:
    """No capturer."""


def run_on_cpu(model: Llama, steps: int, captured: bool, kv_cache: str | None = None):
    cache = prefilled(model, kv_cache)
    engine = Engine(model, cache, capture=None if captured else run_as_it_is)
    tokens, found = torch.tensor([1, 2, 3]), []
    for i in range(steps):
        logits = engine.step(tokens)
        found.append(logits.clone())
        tokens = logits.argmax(-1)
        if i == 4:
            cache.restart(1)
    assert (engine.captured().replay is not None) is captured
    return torch.stack(found), cache, engine.captured()


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_replays_on_the_cpu_are_the_steps_bit_for_bit(model, quantize, kv_cache):
    model = half(model, quantize)
    expected, plain, _ = run_on_cpu(model, 12, captured=False, kv_cache=kv_cache)
    found, cache, step = run_on_cpu(model, 12, captured=True, kv_cache=kv_cache)
    assert found.isfinite().all() and torch.equal(found, expected)
    assert cache._lengths == plain._lengths == cache.lengths.tolist() == plain.lengths.tolist()
    # Python between the kernels of two layers would be steps of its own. Rows of an embedding of
    # 4 bits take some steps more.
    assert len(step.capturer._steps) < (24 if quantize == "int4" else 16)


def test_a_replay_on_the_cpu_takes_what_eager_computes(model):
    """float32 products of many rows are torch's, and so is attention of heads of 12."""
    config = replace(model.config, head_dim=12, n_heads=5, n_kv_heads=1)
    torch.manual_seed(0)
    odd = Llama(config, device="cpu").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        expected, _, _ = run_on_cpu(odd, 8, captured=False)
        found, _, step = run_on_cpu(odd, 8, captured=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert any(isinstance(part, partial) for part in step.capturer._steps)


def test_a_step_on_the_cpu_that_asks_for_a_value_is_refused():
    recorder = CpuRecorder(_cpu.Tape)
    x = torch.tensor([3.0, -1.0])
    recorder.warm_up(lambda: x * 2 if x.max() > 2 else x)
    with pytest.raises(RuntimeError, match=r"_local_scalar_dense.* depends on a tensor's values"):
        recorder.capture(lambda: x)
    recorder = CpuRecorder(_cpu.Tape)
    recorder.warm_up(lambda: x[x > 0])
    with pytest.raises(RuntimeError, match="index"):
        recorder.capture(lambda: x)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "read", ["item", "tolist", "numpy", "data_ptr", "untyped_storage", "__array__"]
)
def test_a_step_that_takes_a_tensor_out_of_torchs_hands_is_refused(read, inference):
    recorder = CpuRecorder(_cpu.Tape)
    x = torch.tensor([3.0])

    def step():
        getattr(x, read)()
        return x * 2

    with torch.inference_mode(inference):
        recorder.warm_up(step)
        with pytest.raises(RuntimeError, match="depends on a tensor's values"):
            recorder.capture(step)


def test_what_only_sometimes_is_a_view_is_told_apart_by_its_memory():
    """In inference mode `to`, `contiguous` and their like reach a recorder whole."""
    for inference in (False, True):
        with torch.inference_mode(inference):
            x = torch.randn(4, 6)
            weight = torch.ones(6)
            step = partial(made_of_views, x, weight)
            recorder = CpuRecorder(_cpu.Tape)
            recorder.warm_up(step)
            replay, result = recorder.capture(step)
            x.copy_(torch.randn(4, 6))
            replay()
            assert torch.equal(result, step())


def made_of_views(x: Tensor, weight: Tensor) -> Tensor:
    same = x.to(torch.float32).contiguous().reshape(4, 6)
    other = same.to(torch.bfloat16).float().t().contiguous().flatten().unflatten(0, (4, 6))
    y = rms_norm(other, weight)
    return (y.chunk(2, -1)[1] + same[:, :3].clone().reshape(-1)[:3]).float()


def test_a_replay_keeps_the_memory_that_it_reads():
    x, weight = torch.randn(3, 64), torch.nn.Parameter(torch.randn(64))
    recorder = CpuRecorder(_cpu.Tape)
    with torch.no_grad():
        expected = recorder.warm_up(lambda: rms_norm(x, weight)).clone()
    replay, result = recorder.capture(lambda: x)
    held = weight.untyped_storage()._cdata
    weight.data = torch.zeros(64)
    assert any(x._cdata == held for _, memory in recorder._kept for x in memory)
    replay()
    assert torch.equal(result, expected)


def test_a_tape_belongs_to_its_thread():
    """Kernels that another thread launches meanwhile are not recorded."""
    x, weight = torch.randn(3, 64), torch.randn(64)
    tape, other = _cpu.Tape(), []
    tape.record()
    try:
        thread = threading.Thread(target=lambda: other.append(rms_norm(x, weight)))
        thread.start()
        thread.join()
        assert len(tape) == 0
        y = rms_norm(x, weight)
        assert len(tape) == 1
    finally:
        tape.stop()
    expected = y.clone()
    y.zero_()
    tape.run()
    assert torch.equal(y, expected) and torch.equal(other[0], expected)
