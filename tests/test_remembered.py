"""A captured decode step is replayed only while the model is what it was: whatever is changed
between two tokens, the text goes on as that of the changed model, run step by step."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from llama_fast import nn as layers
from llama_fast import ops
from llama_fast.backends import cpu, cpu_step
from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import Quantization
from llama_fast.dispatch import record_decisions, use_backend, wrapped_launches
from llama_fast.errors import FallbackWarning
from llama_fast.generation import snapshot
from llama_fast.generation.engine import Engine
from llama_fast.generation.snapshot import Snapshot
from llama_fast.model import Llama
from llama_fast.nn.kv_cache import KVCache
from llama_fast.ops import QuantizedWeight
from llama_fast.ops.quantized_weight import round_weight

STEPS, CHANGED = 10, 5
CONFIG = LlamaConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=64, vocab_size=50,
    max_seq_len=64,
)  # fmt: skip
FORMS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def make(form: str = "bfloat16") -> Llama:
    """The same numbers every time."""
    dtype, quantize = FORMS[form]
    torch.manual_seed(0)
    model = Llama(CONFIG, device="cpu", dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3)
    if quantize is not None:
        settings = Quantization.of(quantize)
        for name, weight in dict(model.named_parameters()).items():
            if (rounded := settings.of_weight(name)) is not None:
                model.set_weight(name, round_weight(weight.detach(), rounded))
    return model


Run = Callable[[Llama, KVCache], Callable[[Tensor], Tensor]]


def as_it_is(model: Llama, cache: KVCache) -> Callable[[Tensor], Tensor]:
    return lambda tokens: model(tokens[:, None], cache=cache, last_only=True)[:, -1]


def captured(model: Llama, cache: KVCache) -> Callable[[Tensor], Tensor]:
    return Engine(model, cache).step


def decode(
    model: Llama,
    run: Run,
    change: Callable[[Llama], object] = lambda model: None,
    kv_cache: str | None = None,
) -> tuple[Tensor, list[int]]:
    """Logits (STEPS, 2, V) of greedy decoding, with `change` before step CHANGED; and lengths."""
    cache = model.new_cache(2, 40, kv_cache)
    cache.reset([0, 2])
    model(torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9]]), cache=cache, last_only=True)
    step, tokens, found = run(model, cache), torch.tensor([2, 6]), []
    for i in range(STEPS):
        if i == CHANGED:
            change(model)
        logits = step(tokens)
        found.append(logits.clone())
        tokens = logits.argmax(-1)
    return torch.stack(found), cache.lengths.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_replays_are_the_steps_in_every_mode(form, kv_cache, mode):
    expected, lengths = decode(make(form), as_it_is, kv_cache=kv_cache)
    made = []

    def noted(model, cache):
        made.append(Engine(model, cache))
        return made[0].step

    with MODES[mode]():
        found, same = decode(make(form), noted, kv_cache=kv_cache)
    assert torch.equal(found, expected) and same == lengths
    assert made[0].captured().replay is not None and expected.isfinite().all()
    # They are not those of a step that repeats itself.
    assert not torch.equal(expected[-1], expected[-2])


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_text_may_go_on_in_another_mode(form):
    expected, _ = decode(make(form), as_it_is)
    model = make(form)
    cache = model.new_cache(2, 40)
    cache.reset([0, 2])
    model(torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9]]), cache=cache, last_only=True)
    engine, tokens = Engine(model, cache), torch.tensor([2, 6])
    for i in range(STEPS):
        with list(MODES.values())[i % 3]():
            logits = engine.step(tokens)
            assert torch.equal(logits, expected[i])
            tokens = logits.argmax(-1)
    assert engine.captured().replay is not None


def each(model: Llama, kind: type[nn.Module]):
    return (x for x in model.modules() if isinstance(x, kind))


def other_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.7


def other_rows(model):
    """The same tensor begins elsewhere in the same memory."""
    embed = model.embed.weight
    whole = torch.cat([embed.detach(), embed.detach()[:1]])
    embed.data = whole[1:]


def resized(model):
    """What FSDP does: the memory goes, and comes back elsewhere."""
    for parameter in model.parameters():
        kept, storage = parameter.data.clone(), parameter.untyped_storage()
        bytes_ = storage.nbytes()
        storage.resize_(0)
        storage.resize_(bytes_)
        parameter.data.copy_(kept * 0.9)


def assigned(model):
    state = {name: x * 0.8 for name, x in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def loaded(model):
    model.load_state_dict({name: x * 0.8 for name, x in model.state_dict().items()})


def there_and_back(model):
    model.half().bfloat16()


def new_parameter(model):
    down = model.layers[0].mlp.down
    down.weight = nn.Parameter(down.weight.detach() * -1)


def in_place(model):
    with torch.no_grad():
        model.layers[1].mlp.down.weight.mul_(-1)


def quantized(model):
    for block in model.layers:
        block.mlp.down.weight = QuantizedWeight.from_float(block.mlp.down.weight.detach(), 4, 32)


def plain_attribute(model):
    down = model.layers[0].mlp.down
    weight = down.weight.detach() * 2
    del down.weight
    down.weight = weight


def eps(model):
    for norm in each(model, layers.RMSNorm):
        norm.eps = 3.0


def tensor_eps(model):
    for norm in each(model, layers.RMSNorm):
        norm.eps = torch.tensor(3.0)


def tables(model):
    model.rope.cos, model.rope.sin = model.rope.sin, model.rope.cos


def without_a_layer(model):
    del model.layers[0]


def swapped_layers(model):
    model.layers[0], model.layers[1] = model.layers[1], model.layers[0]


def other_module(model):
    model.layers[1].mlp = copy.deepcopy(model.layers[0].mlp)


class Doubled(layers.MLP):
    def forward(self, x):
        return super().forward(x) * 2


def other_class(model):
    model.layers[0].mlp.__class__ = Doubled


def own_forward(model):
    mlp = model.layers[0].mlp
    mlp.forward = lambda x: layers.MLP.forward(mlp, x) * 2


def own_method(model):
    hidden = model._hidden
    model._hidden = lambda *args: hidden(*args) * 2


def hook(model):
    model.layers[1].register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))


def pre_hook(model):
    model.head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


def parametrized(model):
    nn.utils.parametrize.register_parametrization(model.layers[0].mlp.down, "weight", Halved())


CHANGES = [
    other_data, other_rows, resized, assigned, loaded, there_and_back, new_parameter, in_place,
    quantized, plain_attribute, eps, tensor_eps, tables, without_a_layer, swapped_layers,
    other_module, other_class, own_forward, own_method, hook, pre_hook, parametrized,
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_model_goes_on_as_itself(change, mode):
    check_change(change, mode=mode)


@functools.cache
def expected_of(change, form, kv_cache):
    return decode(make(form), as_it_is, change, kv_cache)


def unchanged(model):
    pass


def check_change(change, mode="no_grad", form="bfloat16", kv_cache=None, run=captured):
    expected, lengths = expected_of(change, form, kv_cache)
    model = make(form)
    with MODES[mode](), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # a value may be asked for
        found, found_lengths = decode(model, run, outside(change), kv_cache)
    assert torch.equal(found, expected) and found_lengths == lengths
    if change is not there_and_back:  # it makes a difference
        assert not torch.equal(expected, expected_of(unchanged, form, kv_cache)[0])


def outside(change):
    """Made as a user makes it, who is in no inference mode while he changes a model."""

    @functools.wraps(change)
    def wrapped(model):
        with torch.inference_mode(False), torch.enable_grad():
            change(model)

    return wrapped


@pytest.mark.parametrize(
    "change",
    # Memory given back and taken anew may be the same by chance.
    [unchanged, *(f for f in CHANGES if f not in (resized, there_and_back))],
    ids=lambda f: f.__name__,
)
def test_python_and_cpp_see_the_same_changes(change, monkeypatch):
    model = make()
    cache = model.new_cache(1, 4)
    in_cpp = Snapshot(model, cache)
    monkeypatch.setattr(snapshot, "_cpu", None)
    in_python = Snapshot(model, cache)
    assert in_cpp.holds(model, cache) and in_python.holds(model, cache)
    change(model)
    # What lies in the same memory is read there.
    holds = change in (unchanged, loaded, in_place)
    assert in_cpp.holds(model, cache) == in_python.holds(model, cache) == holds


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [other_data, eps, own_forward, without_a_layer])
def test_a_changed_model_goes_on_as_itself_in_every_form(form, kv_cache, change):
    check_change(change, form=form, kv_cache=kv_cache)


@pytest.mark.parametrize("part", ["qdata", "scales"])
def test_parts_of_a_quantized_weight_are_watched(part):
    def change(model):
        weight = model.layers[1].mlp.down.weight
        setattr(weight, part, getattr(weight, part).flip(0).clone())

    check_change(change, form="int4")


def doubled(function):
    def doubling(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return doubling


PATCHES = {
    "a forward": (layers.MLP, "forward", doubled(layers.MLP.forward)),
    "a wrapper that looks like it": (
        layers.GateUp,
        "forward",
        functools.wraps(layers.GateUp.forward)(doubled(layers.GateUp.forward)),
    ),
    "a class without one": (layers.GateUp, "__call__", doubled(nn.Module.__call__)),
    "an op": (ops, "linear", doubled(ops.linear)),
}


@pytest.mark.parametrize("patch", PATCHES)
def test_a_patched_class_or_function_is_what_runs(patch, monkeypatch):
    owner, name, value = PATCHES[patch]

    def change(model):
        monkeypatch.setattr(owner, name, value)

    def run(run):
        found, _ = decode(make(), run, change)
        monkeypatch.undo()
        return found

    assert torch.equal(run(captured), run(as_it_is))


def count(monkeypatch, owner, name) -> list:
    calls, function = [], getattr(owner, name)

    def counting(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (layers.Attention, "forward"),
        (layers.MLP, "__call__"),
        (nn.Module, "__call__"),
        (KVCache, "layer"),
        (ops, "attention"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_what_was_replaced_before_runs_in_every_step(owner, name, monkeypatch):
    def calls_of(run) -> int:
        calls = count(monkeypatch, owner, name)
        decode(make(), run)
        monkeypatch.undo()
        return len(calls)

    assert calls_of(captured) == calls_of(as_it_is) > 0


@pytest.mark.parametrize("read", ["item", "tolist", "numpy"])
def test_a_forward_that_branches_on_a_value_does_so_in_every_step(read):
    def change(model):
        mlp = model.layers[0].mlp

        def forward(x):
            if float(getattr(x[0, 0, 0].float(), read)()) > 0:
                return layers.MLP.forward(mlp, x)
            return -x

        mlp.forward = forward

    def run(run):
        model = make()
        change(model)
        return decode(model, run)[0]

    assert torch.equal(run(captured), run(as_it_is))
    check_change(change)


def test_a_compiled_model_or_layer_is_no_plain_one():
    """What a compiler has made launches kernels that no recorder sees."""
    for compiled in (lambda m: m.compile(), lambda m: m.layers[1].compile()):
        model = make()
        compiled(model)
        assert not Snapshot(model, model.new_cache(1, 4)).plain
    model = make()
    model.layers[0] = torch.compile(model.layers[0])
    assert not Snapshot(model, model.new_cache(1, 4)).plain
    assert Snapshot(make(), make().new_cache(1, 4)).plain


class Weight(Tensor):
    """A subclass may be something else than its memory."""


@pytest.mark.parametrize(
    "weight",
    [lambda x: x.as_subclass(Weight), torch._neg_view, lambda x: x.to_sparse()],
    ids=["subclass", "negative view", "sparse"],
)
def test_a_model_of_other_tensors_is_no_plain_one(weight):
    model = make("float32")
    other = weight(model.norm.weight.detach())
    del model.norm.weight
    model.norm.weight = other
    assert not Snapshot(model, model.new_cache(1, 4)).plain


class Seeing(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        return function(*args, **(kwargs or {}))


def test_what_looks_at_calls_sees_those_of_every_step():
    """And the captured step is taken up again after it."""
    model = make()
    cache = model.new_cache(2, 40)
    engine, tokens = Engine(model, cache), torch.tensor([2, 6])
    step = engine.step

    def looked(make_context, result) -> list:
        seen = []
        for _ in range(2):
            with make_context() as context:
                step(tokens)
            seen.append(result(context))
        return seen

    step(tokens)
    step(tokens)
    replay = engine.captured().replay
    assert replay is not None
    flops = looked(lambda: FlopCounterMode(display=False), lambda mode: mode.get_total_flops())
    config = model.config
    one_more_key = 4 * len(tokens) * config.n_layers * config.n_heads * config.head_dim
    assert 0 < flops[0] == flops[1] - one_more_key
    decisions = looked(record_decisions, len)
    assert decisions[0] == decisions[1] > 10
    with Seeing():
        step(tokens)  # its ops make their plans, which torch's functions are called for
    calls = looked(Seeing, lambda mode: mode.seen)
    assert calls[0] == calls[1] > 10
    step(tokens)
    assert engine.captured().replay is replay
    launched = []

    def wrapper(op, backend, launch):
        return lambda *args: (launched.append(op.name), launch(*args))[1]

    counts = looked(lambda: wrapped_launches(wrapper), lambda _: len(launched))
    assert counts[1] == 2 * counts[0] > 10
    with torch.device("cpu"):
        step(tokens)
        step(tokens)
        assert engine.captured().replay is not None


def test_autocast_and_other_backends_have_their_own_steps():
    def run(run):
        model = make("float32")
        cache = model.new_cache(2, 40, "int8")
        step, tokens, found = run(model, cache), torch.tensor([2, 6]), []
        for i in range(12):
            with torch.autocast("cpu", torch.bfloat16, enabled=i in (4, 5)):
                if i in (7, 8):
                    with use_backend("eager"):
                        found.append(step(tokens).clone())
                else:
                    found.append(step(tokens).clone())
        return torch.stack(found)

    assert torch.equal(run(captured), run(as_it_is))


@pytest.mark.skipif(len(cpu.isas()) < 2, reason="this CPU has one instruction set")
def test_another_instruction_set_has_its_own_step():
    """Which product serves 17 rows depends on it."""
    model = make()

    def run(run):
        cache = model.new_cache(17, 40)
        step, tokens, found = run(model, cache), torch.arange(17), []
        for i in range(9):
            with cpu.use_isa("scalar" if i in (3, 4, 8) else cpu.isas()[0]):
                found.append(step(tokens).clone())
        return torch.stack(found)

    assert torch.equal(run(captured), run(as_it_is))


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_exception_takes_a_step_back(at, monkeypatch):
    """Ctrl-C in the middle of a step that is recorded, or replayed."""
    model = make()
    expected, lengths = decode(make(), as_it_is)

    def interrupted(model, cache):
        step, calls = captured(model, cache), []

        def once(tokens):
            calls.append(1)
            if len(calls) == at + 1:
                before = cache.lengths.tolist()
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(cpu_step, "_tensors", fail)
                    step(tokens)
                assert cache.lengths.tolist() == cache._lengths == before
            return step(tokens)

        def fail(*args):
            raise KeyboardInterrupt

        return once

    found, same = decode(model, interrupted)
    assert torch.equal(found, expected) and same == lengths


def test_a_method_that_another_library_gives_torchs_modules_changes_nothing(monkeypatch):
    """transformers adds `smart_apply`; no step calls it."""
    monkeypatch.setattr(nn.Module, "smart_apply", lambda self: None, raising=False)
    model = make()
    assert Snapshot(model, model.new_cache(1, 8)).plain
