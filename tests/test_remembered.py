"""A captured decode step is replayed only while the model is what it was: whatever is changed between
two tokens, the text goes on as that of the changed model, run step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llama_fast.config import LlamaConfig
from llama_fast.config.quantization import Quantization
from llama_fast.generation.decode import DecodeStep
from llama_fast.model import Llama
from llama_fast.nn.kv_cache import KVCache
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


def replays(step: DecodeStep) -> int:
    """Counts them from now on: `count()` → how many there were."""
    counted = []
    inner = step._captured_step

    def captured_step():
        counted.append(step.replay is not None)
        return inner()

    step._captured_step = captured_step
    return lambda: sum(counted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_replays_are_the_steps_in_every_mode(form, kv_cache, mode):
    expected, lengths = decode(make(form), as_it_is, kv_cache=kv_cache)
    made = []

    def captured(model, cache):
        made.append(DecodeStep(model, cache))
        return made[0]

    with MODES[mode]():
        found, same = decode(make(form), captured, kv_cache=kv_cache)
    assert torch.equal(found, expected) and same == lengths
    assert made[0].replay is not None and expected.isfinite().all()
    # They are not those of a step that repeats itself.
    assert not torch.equal(expected[-1], expected[-2])


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_text_may_go_on_in_another_mode(form):
    expected, _ = decode(make(form), as_it_is)
    model = make(form)
    cache = model.new_cache(2, 40)
    cache.reset([0, 2])
    model(torch.tensor([[3, 1, 4, 1], [0, 0, 5, 9]]), cache=cache, last_only=True)
    step, tokens = DecodeStep(model, cache), torch.tensor([2, 6])
    for i in range(STEPS):
        with list(MODES.values())[i % 3]():
            logits = step(tokens)
            assert torch.equal(logits, expected[i])
            tokens = logits.argmax(-1)
    assert step.replay is not None
