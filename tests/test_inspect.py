"""`llama_fast.trace`: the steps are of the kernels that run, and the definition's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

import llama_fast
from llama_fast import Llama, Tokenizer
from llama_fast.cli.options import DEMO
from llama_fast.dispatch import OPS, observed, wrapped_launches
from llama_fast.errors import LlamaFastError, PromptError
from llama_fast.inspect.trace import _piece
from llama_fast.utils.compare import relative_rms

PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
MODES = {
    "grad": nullcontext, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(DEMO)


def demo(**more) -> Llama:
    return Llama.from_pretrained(DEMO, device="cpu", **more)


@pytest.fixture(scope="module")
def model() -> Llama:
    return demo(dtype=torch.float32)


def definition(model: Llama, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The steps in float64, in plain torch, from the model's weights."""
    c = model.config
    H, K, D = c.n_heads, c.n_kv_heads, c.head_dim
    T = tokens.shape[1]
    weight = {name: x.detach().double() for name, x in model.state_dict().items()}
    cos, sin = (x.double()[:, None] for x in model.rope(T))
    steps = {}

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight[name]

    def rotate(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    x = steps["embedding"] = weight["embed.weight"][tokens]
    for i in range(c.n_layers):
        of = f"layers.{i}."
        steps[of + "input"] = x
        h = steps[of + "attention.norm"] = norm(x, of + "attention_norm.weight")
        qkv = (h @ weight[of + "attention.qkv.weight"].T).unflatten(-1, (-1, D))
        q, k, v = qkv.split((H, K, K), -2)
        steps |= {of + "attention.q": q, of + "attention.k": k, of + "attention.v": v}
        q, k = rotate(q), rotate(k)
        steps |= {of + "attention.q_rotated": q, of + "attention.keys": k}
        steps[of + "attention.values"] = v
        k, v = (x.repeat_interleave(H // K, 2) for x in (k, v))
        scores = steps[of + "attention.scores"] = torch.einsum("bthd,bshd->bhts", q, k) / D**0.5
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        masked = steps[of + "attention.masked_scores"] = scores.masked_fill(~mask, -torch.inf)
        weights = steps[of + "attention.weights"] = masked.softmax(-1)
        o = steps[of + "attention.heads"] = torch.einsum("bhts,bshd->bthd", weights, v)
        out = steps[of + "attention.output"] = (
            o.flatten(-2) @ weight[of + "attention.output.weight"].T
        )
        x = steps[of + "mlp.input"] = x + out
        h = steps[of + "mlp.norm"] = norm(x, of + "mlp_norm.weight")
        gate, up = (h @ weight[of + "mlp.gate_up.weight"].T).chunk(2, -1)
        steps |= {of + "mlp.gate": gate, of + "mlp.up": up}
        hidden = steps[of + "mlp.hidden"] = torch.nn.functional.silu(gate) * up
        out = steps[of + "mlp.output"] = hidden @ weight[of + "mlp.down.weight"].T
        x = x + out
    steps["residual"] = x
    steps["norm"] = norm(x, "norm.weight")
    steps["logits"] = steps["norm"] @ weight["head.weight"].T
    return steps


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    hidden = expected.isneginf()
    assert torch.equal(found.isneginf(), hidden)
    assert relative_rms(found.masked_fill(hidden, 0), expected.masked_fill(hidden, 0)) < tolerance


@pytest.mark.parametrize("mode", MODES)
def test_every_step_is_that_of_the_definition(model, tokenizer, mode):
    with MODES[mode]():
        trace = llama_fast.trace(model, PROMPT, tokenizer)
    expected = definition(model, trace.tokens)
    assert list(trace) == list(expected)  # nothing missing, nothing more, in the same order
    for name, step in trace.steps.items():
        tensor = trace[name]
        assert not tensor.requires_grad
        assert step.shape == tuple(tensor.shape) and step.dtype == tensor.dtype
        assert len(step.letters) == tensor.ndim
        same(tensor, expected[name], 2e-5)
    assert trace.next_tokens(1)[0].piece == "42"
    assert trace.pieces[0] == "<|begin_of_text|>" and "".join(trace.pieces[1:]) == PROMPT


def test_pieces_that_are_no_whole_character(model, tokenizer):
    pieces = llama_fast.trace(model, "\u2028", tokenizer, layers=[]).pieces
    assert "".join(pieces[1:]) == r"\xe2\x80\xa8"


def test_a_piece_that_ends_within_a_character(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "id_to_bytes", ("a 你好".encode()[:-1],))
    assert _piece(tokenizer, 0) == r"a 你\xe5\xa5"


def test_shapes_are_in_the_letters_of_the_legend(model, tokenizer):
    trace = llama_fast.trace(model, PROMPT, tokenizer, layers=1, heads=2)
    c, T = model.config, trace.tokens.shape[1]
    sizes = {"B": 1, "T": T, "S": T, "C": c.dim, "H": c.n_heads, "K": c.n_kv_heads,
             "D": c.head_dim, "F": c.hidden_dim, "V": c.vocab_size}  # fmt: skip
    for name, step in trace.steps.items():
        asked_heads = {"H": 1} if step.letters == "BHTS" else {}
        assert step.shape == tuple((sizes | asked_heads)[letter] for letter in step.letters), name


@contextmanager
def launches() -> Iterator[list[tuple[str, str]]]:
    """Inside the block, the label and the backend of every launch are added to the list."""
    seen = []

    def spy(op, backend, launch):
        def launched(*args):
            seen.append((op.label(*args), backend))
            return launch(*args)

        return launched

    with wrapped_launches(spy):
        yield seen


@pytest.mark.parametrize("mode", MODES)
def test_the_pass_is_the_one_that_runs_without_it(model, tokenizer, mode):
    """The logits have the same bits, and the ops are called with the same backends."""
    with MODES[mode]():
        trace = llama_fast.trace(model, PROMPT, tokenizer)
        with launches() as seen:
            logits = model(trace.tokens)
        assert torch.equal(trace["logits"], logits)
    called = [(call.op, call.backend) for call in trace.calls if call.backend != "torch"]
    assert called == seen
    assert all(call.seconds > 0 for call in trace.calls)
    assert sum(call.seconds for call in trace.calls) <= trace.seconds
    assert trace.steps["layers.0.mlp.output"].call.bytes == OPS["linear"].cost(
        trace["layers.0.mlp.hidden"], model.layers[0].mlp.down.weight
    ).bytes  # fmt: skip


@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.parametrize("kv_cache", [None, "int8"])
def test_with_a_cache_and_with_quantised_weights(tokenizer, quantize, kv_cache):
    model = demo(quantize=quantize)
    ids = tokenizer.encode(PROMPT, bos=True)
    cache, plain = (model.new_cache(1, 64, kv_cache) for _ in range(2))
    llama_fast.trace(model, ids[:10], cache=cache)
    model(torch.tensor([ids[:10]]), cache=plain)
    trace = llama_fast.trace(model, ids[10:], cache=cache)
    logits = model(torch.tensor([ids[10:]]), cache=plain)
    assert torch.equal(trace["logits"], logits)
    assert cache.host_lengths == [len(ids)]
    T, S = len(ids) - 10, len(ids)
    assert trace["layers.3.attention.scores"].shape == (1, 3, T, S)
    seen = ~trace["layers.3.attention.masked_scores"].isneginf()
    assert torch.equal(seen[0, 0].sum(-1), torch.arange(11, S + 1))
    for layer in range(4):
        assert trace.attention_error(layer) < 0.01
    kept = trace["layers.0.attention.keys"].clone()
    cache.reset()
    model(torch.tensor([ids[:12]]), cache=cache)  # writes where the keys lay
    assert torch.equal(trace["layers.0.attention.keys"], kept)


def test_rows_of_different_lengths(model, tokenizer):
    """Padding on the left: its positions see nothing."""
    ids = tokenizer.encode("Once upon a time", bos=True)
    alone = llama_fast.trace(model, ids)
    cache = model.new_cache(2, 64)
    cache.reset([0, 3])
    rows = torch.tensor([[*ids, 5, 6, 7], [0, 0, 0, *ids]])
    trace = llama_fast.trace(model, rows, cache=cache)
    weights = trace["layers.0.attention.weights"]
    assert torch.all(weights[1, :, :3] == 0) and torch.isfinite(weights).all()
    same(trace["logits"][1, 3:], alone["logits"][0], 1e-5)
    assert trace.attention_error(2) < 1e-5


def test_layers_and_heads(model, tokenizer):
    whole = llama_fast.trace(model, PROMPT, tokenizer)
    part = llama_fast.trace(model, PROMPT, tokenizer, layers=[-1, 1], heads=[2, 0])
    assert part.layers == (1, 3) and part.heads == (0, 2)
    assert {name for name in part if name.startswith("layers.0")} == {"layers.0.input"}
    scores = "layers.1.attention.scores"
    assert torch.equal(part[scores], whole[scores][:, [0, 2]])
    assert part.attention_error(1) < 1e-5
    with pytest.raises(LlamaFastError, match=r"layers has 4, and the model has layers 0 to 3"):
        llama_fast.trace(model, [1], layers=[4])
    with pytest.raises(LlamaFastError, match="heads has -4"):
        llama_fast.trace(model, [1], heads=-4)
    with pytest.raises(
        LlamaFastError, match=r"no step 'layers.0.attention.score'.*layers \[1, 3\]"
    ):
        part["layers.0.attention.score"]


def test_a_wrong_kernel_shows(model, tokenizer):
    """The weighted sums of a kernel that forgets a key are far from those of its own scores."""

    def forgetful(op, backend, launch):
        def launched(q, k, v, *rest):
            v = v.clone()
            v[:, 3] = 0
            return launch(q, k, v, *rest)

        return launched if op.name == "attention" else launch

    assert llama_fast.trace(model, PROMPT, tokenizer).attention_error(0) < 1e-5
    attention = OPS["attention"]
    rows = llama_fast.dispatch.backends()["cpu"].implementations
    own = rows["attention"]
    try:
        rows["attention"] = own._replace(launch=forgetful(attention, "cpu", own.launch), plan=None)
        attention.forget_order()
        with llama_fast.use_backend("cpu", strict=True):
            assert llama_fast.trace(model, PROMPT, tokenizer).attention_error(0) > 0.01
    finally:
        rows["attention"] = own
        attention.forget_order()


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_after_an_exception(tokenizer, failure):
    model = demo()
    before = model(torch.tensor([[1, 2, 3]]))

    def fail(*_):
        assert hooks(model) > 1
        raise failure

    handle = model.layers[2].mlp.down.register_forward_hook(fail)
    with pytest.raises(failure):
        llama_fast.trace(model, PROMPT, tokenizer)
    handle.remove()
    assert hooks(model) == 0 and not observed()
    assert torch.equal(model(torch.tensor([[1, 2, 3]])), before)
    trace = llama_fast.trace(model, [1, 2, 3])
    assert torch.equal(trace["logits"], before)


def test_another_thread_is_not_seen(model, tokenizer):
    """A model that another thread runs meanwhile neither enters the trace nor ends its steps."""
    expected = llama_fast.trace(model, PROMPT, tokenizer)
    stop = threading.Event()

    def run():
        while not stop.is_set():
            model(torch.tensor([[4, 5]]))

    other = threading.Thread(target=run)
    other.start()
    try:
        for _ in range(5):
            trace = llama_fast.trace(model, PROMPT, tokenizer)
            assert str(trace.compare(expected)).endswith("bit for bit.")
            assert len(trace.calls) == len(expected.calls)
    finally:
        stop.set()
        other.join()


def test_traces_in_two_threads(model, tokenizer):
    expected = llama_fast.trace(model, PROMPT, tokenizer)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(llama_fast.trace(model, PROMPT, tokenizer)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and not observed()
    assert all(trace.compare(expected).first_bits is None for trace in found)


def test_changed_weights_are_seen_and_old_traces_keep_theirs(tokenizer):
    model = demo()
    before = llama_fast.trace(model, PROMPT, tokenizer)
    gate = before["layers.1.mlp.gate"].clone()
    likely = before.by_layer(1)
    with torch.no_grad():
        model.layers[1].mlp.gate_up.weight.mul_(2)
        model.norm.weight.mul_(-1)
    assert torch.equal(before["layers.1.mlp.gate"], gate) and before.by_layer(1) == likely
    after = llama_fast.trace(model, PROMPT, tokenizer)
    assert torch.equal(after["layers.1.mlp.gate"], 2 * gate)


def test_the_lens_ends_in_the_model(model, tokenizer):
    trace = llama_fast.trace(model, PROMPT, tokenizer, layers=[])
    by_layer = trace.by_layer(3)
    assert len(by_layer) == model.config.n_layers + 1
    assert [p.id for p in by_layer[-1]] == [p.id for p in trace.next_tokens(3)]
    with torch.no_grad():
        first = model.head(model.norm(trace["embedding"]))[0, -1]
    assert by_layer[0][0].id == first.argmax()
    assert abs(by_layer[0][0].probability - first.softmax(-1).max()) < 1e-5


@pytest.mark.parametrize("part", ["attention.output", "mlp.down", "mlp_norm"])
def test_compare_finds_the_layer_that_differs(tokenizer, part):
    model, other = demo(), demo()
    with torch.no_grad():
        other.layers[2].get_submodule(part).weight.mul_(1.25)
    comparison = llama_fast.trace(model, PROMPT, tokenizer).compare(
        llama_fast.trace(other, PROMPT, tokenizer)
    )
    step = {
        "attention.output": "attention.output",
        "mlp.down": "mlp.output",
        "mlp_norm": "mlp.norm",
    }
    assert comparison.first.name == comparison.first_bits.name == f"layers.2.{step[part]}"
    assert abs(comparison.first.relative - 0.25) < 0.01
    assert f"They part at layers.2.{step[part]}" in str(comparison)
    assert [s.relative > 0 for s in comparison.layers] == [False, False, False, True, True]


def test_compare_two_backends_and_two_formats(tokenizer):
    model = demo()
    ours = llama_fast.trace(model, PROMPT, tokenizer)
    assert ours.compare(ours).summary == "They are the same, bit for bit."
    with llama_fast.use_backend("eager"):
        eager = llama_fast.trace(model, PROMPT, tokenizer)
    assert {call.backend for call in eager.calls} == {"eager", "torch"}
    assert ours.compare(eager).first is None
    int4 = llama_fast.trace(demo(quantize="int4"), PROMPT, tokenizer)
    assert ours.compare(int4).first.name == "embedding"
    with pytest.raises(PromptError, match="different tokens"):
        ours.compare(llama_fast.trace(model, [1, 2]))


def test_the_table(model, tokenizer):
    lines = llama_fast.trace(model, PROMPT, tokenizer, layers=0).table().splitlines()
    assert lines[0].split() == [
        "step", "shape", "dtype", "op", "backend", "µs", "kB", "moved", "rms"
    ]  # fmt: skip
    (row,) = (line for line in lines if line.startswith("layers.0.attention.heads "))
    assert row.split()[1:6] == ["(B,T,H,D)", "1×18×3×64", "float32", "attention", "cpu"]
    (row,) = (line for line in lines if line.startswith("layers.0.attention.scores "))
    assert "recomputed" in row


def test_refusals(model):
    with pytest.raises(PromptError, match="no tokenizer"):
        llama_fast.trace(model, "text")
    for wrong in ([], [1.5], torch.zeros(1, 2, 3, dtype=torch.int64)):
        with pytest.raises(PromptError, match="they must be some ids"):
            llama_fast.trace(model, wrong)
    with pytest.raises(PromptError, match="from 3 to 2304, and the model has 0 to 2303"):
        llama_fast.trace(model, [2304, 3])
    with pytest.raises(LlamaFastError, match="a Linear cannot be traced"):
        llama_fast.trace(torch.nn.Linear(2, 2), [1])


def test_a_compiled_model(tokenizer):
    model = demo()
    expected = llama_fast.trace(model, PROMPT, tokenizer)
    compiled = torch.compile(model, backend="eager")
    assert llama_fast.trace(compiled, PROMPT, tokenizer).compare(expected).first_bits is None
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    assert llama_fast.trace(model, PROMPT, tokenizer).compare(expected).first_bits is None
    model.compile(backend="eager")
    assert llama_fast.trace(model, PROMPT, tokenizer).compare(expected).first_bits is None
