"""Whole models: decode, prefill, loading and a training step, ours beside transformers.

    pytest benchmarks/test_models.py --layers 0 --benchmark-json out.json      # all layers

Random weights of a model's shape, of which the quick run takes two layers; all baselines run the
same checkpoint in one process, in turn. Each one's logits (of a training step the loss and a
gradient that all layers had a part in) are compared with the eager definition's in float64 first.
`python -m benchmarks.cpu` measures whole models beside llama.cpp, too, each in its own process.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_fast
from benchmarks.conftest import MEASURED, SHAPES, chosen, play, rivals
from benchmarks.models import CONTEXT_TOKENS, WEIGHTS, missing, prefill_flops, with_layers
from benchmarks.models import shape as shape_of
from llama_fast.bench.memory import extra_memory
from llama_fast.bench.oracle import EXACT_BYTES
from llama_fast.bench.results import OURS, Row
from llama_fast.bench.roofline import Roofline
from llama_fast.bench.timing import OtherPrograms, interleaved, interleaved_on_gpu
from llama_fast.checkpoint import write_random
from llama_fast.cli.measure import bytes_per_token
from llama_fast.dispatch import use_backend
from llama_fast.errors import WrongResultError
from llama_fast.model import Llama
from llama_fast.utils.compare import relative_rms

LONG, ROUNDS_OF_LONG = ("load", "training step"), 3  # seconds each
STEPS = 4  # tokens of a sample of decode
EAGER, PATCHED, HUGGING_FACE = "eager", f"{OURS}.patch of transformers", "transformers"
INT8, INT4 = f"{OURS} int8", f"{OURS} int4"
BASELINES = {
    "decode": (OURS, INT8, INT4, EAGER, HUGGING_FACE, PATCHED),
    "prefill": (OURS, INT8, INT4, EAGER, HUGGING_FACE, PATCHED),
    "load": (OURS, HUGGING_FACE),
    "training step": (OURS, HUGGING_FACE, PATCHED),
}
# Of the gradient's own size: bfloat16's rounding through the layers and back. Unrelated ones: 1.4.
GRADIENT_TOLERANCE = 0.3


@dataclass(frozen=True)
class Case:
    work: str
    shape: str
    baseline: str

    @property
    def group(self) -> str:
        return f"{self.work}, {self.shape}, whole model"

    def __str__(self) -> str:
        return "-".join((*self.work.split(), self.shape, *self.baseline.replace(".", " ").split()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = chosen(metafunc.config, "--shapes", "1b", SHAPES)
    cases = [
        Case(work, shape, baseline)
        for shape in shapes
        for work, names in BASELINES.items()
        for baseline in names
    ]
    metafunc.parametrize("case", cases, ids=str)


class Ours:
    """Our model in some form of weights, by the usual backends or by one."""

    def __init__(
        self, folder: Path, device: str, quantize: str | None, backend: str | None
    ) -> None:
        self.model = Llama.from_pretrained(folder, device=device, quantize=quantize)
        self.backend = backend

    def run(self, call: Callable[[], Any]) -> Any:
        if self.backend is None:
            return call()
        with use_backend(self.backend, strict=True):
            return call()

    def prefill(self, tokens: Tensor) -> Tensor:
        self.cache = self.model.new_cache(1, tokens.shape[1] + STEPS)
        with torch.no_grad():
            out = self.run(lambda: self.model(tokens, cache=self.cache, last_only=True))
        return out[0, -1]

    def step(self, token: Tensor) -> Tensor:
        with torch.no_grad():
            out = self.run(lambda: self.model(token[None, None], cache=self.cache, last_only=True))
        return out[0, -1]

    def training(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of guessing each next token, and the gradient of the first norm."""
        loss = self.run(lambda: self.model.loss(tokens[:, :-1], tokens[:, 1:]))
        return loss.detach(), _gradient(self.model, loss, "layers.0.attention_norm.weight")


class HuggingFace:
    def __init__(self, folder: Path, device: str, patched: bool) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = model.to(device).eval()
        if patched:
            llama_fast.patch(self.model, strict=True)

    @torch.no_grad()
    def prefill(self, tokens: Tensor) -> Tensor:
        self.out = self.model(tokens, use_cache=True, logits_to_keep=1)
        return self.out.logits[0, -1]

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        past = self.out.past_key_values
        self.out = self.model(token[None, None], past_key_values=past, use_cache=True)
        return self.out.logits[0, -1]

    def training(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        loss = self.model(tokens, labels=tokens, use_cache=False).loss
        return loss.detach(), _gradient(self.model, loss, "model.layers.0.input_layernorm.weight")


def _gradient(model: torch.nn.Module, loss: Tensor, name: str) -> Tensor:
    loss.backward()
    found = model.get_parameter(name).grad.clone()
    model.zero_grad(set_to_none=True)
    return found


def form_of(name: str) -> str:
    """Of the weights that a baseline has, as `benchmarks.models` names it."""
    return {INT8: "int8", INT4: "int4"}.get(name, "bf16")


class Setting:
    """A checkpoint of one shape, the models made of it so far, and what is expected of them."""

    def __init__(self, shape: str, folder: Path, request: pytest.FixtureRequest) -> None:
        option = request.config.getoption
        config = shape_of(shape)
        self.config = dataclasses.replace(config, n_layers=option("--layers") or config.n_layers)
        self.device, self.length, self.folder = option("--device"), option("--tokens"), folder
        write_random(folder, self.config)
        numbers = random.Random(0).choices(range(self.config.vocab_size), k=self.length)
        self.tokens = torch.tensor([numbers], device=self.device)
        self.models: dict[str, Ours | HuggingFace] = {}
        self.expected: dict[str, Any] = {}

    def make(self, name: str) -> Ours | HuggingFace:
        if name in (HUGGING_FACE, PATCHED):
            return HuggingFace(self.folder, self.device, name == PATCHED)
        backend = EAGER if name == EAGER else None
        return Ours(self.folder, self.device, WEIGHTS[form_of(name)].quantize, backend)

    def model(self, name: str) -> Ours | HuggingFace:
        if name not in self.models:
            self.models[name] = self.make(name)
        return self.models[name]

    def given(self, work: str) -> Tensor:
        """The tokens that it starts from, (1,T)."""
        most = {"decode": CONTEXT_TOKENS, "training step": max(2, self.length // 2)}
        return self.tokens[:, : most.get(work)]

    def call(self, work: str, name: str) -> Callable[[], Any]:
        if work == "load":
            return lambda: self.make(name)
        model = self.model(name)
        if work == "decode":
            return _Decode(model, self.given(work))
        run = model.prefill if work == "prefill" else model.training
        return lambda: run(self.given(work))

    def reference(self, work: str) -> Any:
        """By the eager definitions in float64, in float32 where that is too large."""
        if work not in self.expected:
            small = 8 * self.config.n_params <= EXACT_BYTES
            exact = Ours(self.folder, self.device, None, EAGER)
            exact.model.to(torch.float64 if small else torch.float32)
            run = exact.training if work == "training step" else exact.prefill
            self.expected[work] = run(self.given(work))
        return self.expected[work]

    def check(self, work: str, name: str) -> float | None:
        """How far the baseline is from the reference. Raises WrongResultError."""
        if work == "load":
            return None
        model, expected = self.model(name), self.reference(work)
        if work == "training step":
            loss, gradient = model.training(self.given(work))
            tolerance = GRADIENT_TOLERANCE
            off = abs(loss.double() - expected[0]) / expected[0]
            error = max(relative_rms(gradient, expected[1]), off.item())
        else:
            found = model.prefill(self.given(work))
            tolerance = WEIGHTS[form_of(name)].tolerance
            error = relative_rms(found, expected)
        if not error <= tolerance:
            raise WrongResultError(
                f"{work} by {name} is {error:.2g} of its size away from the eager definition in "
                f"float64; at most {tolerance} is sound, so its time means nothing"
            )
        return error

    def row(self, work: str, shape: str, roofline: Roofline) -> Row:
        c = self.config
        length = self.given(work).shape[1]
        samples = {"decode": STEPS, "load": 2 * c.n_params / 1e9}.get(work, length)
        what = f"{work}, {with_layers(shape, c.n_layers)}"
        if work in ("prefill", "training step"):
            what += f", {length} tokens"
        row = Row(what, what, "GB/s" if work == "load" else "tok/s", samples)
        if work == "decode":
            row.bytes = int(STEPS * bytes_per_token(self.model(OURS).model, CONTEXT_TOKENS))
            row.bound = "read"
            row.at_best = row.bytes / roofline.read if roofline.read else None
        elif work != "load":
            row.flops = prefill_flops(c, length)
            if work == "training step":  # the head for every token; two products more for each
                head = 2 * (length - 1) * c.dim * c.vocab_size
                row.flops = 3 * (row.flops + head)
            row.bound = "bfloat16"
            row.at_best = row.flops / roofline.bfloat16 if roofline.bfloat16 else None
        return row


class _Decode:
    """STEPS tokens, each the likeliest, after a context that is run outside of the time."""

    def __init__(self, model: Ours | HuggingFace, context: Tensor) -> None:
        self.model, self.context = model, context

    def prepare(self) -> None:
        self.logits = self.model.prefill(self.context)

    def __call__(self) -> None:
        logits = self.logits
        for _ in range(STEPS):
            logits = self.model.step(logits.argmax())


@dataclass
class Measured:
    row: Row
    refused: dict[str, str]
    failed: dict[str, Exception]


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str, pytest.FixtureRequest], Setting]]:
    """One at a time: the models of a shape leave the memory before the next one's are made."""
    made: dict[str, Setting] = {}

    def of(shape: str, request: pytest.FixtureRequest) -> Setting:
        if shape not in made:
            made.clear()
            made[shape] = Setting(shape, tmp_path_factory.mktemp(shape) / "weights", request)
        return made[shape]

    yield of


_measured: dict[str, Measured] = {}


def measured(case: Case, setting: Setting, request, limits: Roofline) -> Measured:
    """The group's, which its first test makes."""
    if case.group in _measured:
        return _measured[case.group]
    work, rounds = case.work, request.config.getoption("--rounds")
    if work in LONG:
        rounds = min(rounds, ROUNDS_OF_LONG)
    refused, failed, calls = {}, {}, {}
    row = setting.row(work, case.shape, limits)
    for name in rivals(request):
        if HUGGING_FACE in name and (why := missing(HUGGING_FACE)):
            refused[name] = why
            continue
        try:
            if (error := setting.check(work, name)) is not None:
                row.errors[name] = error
            calls[name] = setting.call(work, name)
        except Exception as error:
            failed[name] = error
    if setting.device == "cpu":
        with OtherPrograms([os.getpid()]) as others:
            row.samples = interleaved(calls, rounds, warm_up=False)  # all ran in the check
        row.others = others.share
    else:
        row.samples, host = interleaved_on_gpu(calls, rounds)
        row.host = {name: sorted(values)[len(values) // 2] for name, values in host.items()}
    for name, call in calls.items():
        if hasattr(call, "prepare"):
            call.prepare()
        if (extra := extra_memory(call, setting.device)) is not None:
            row.memory[name] = extra
    _measured[case.group] = Measured(row, refused, failed)
    return _measured[case.group]


@MEASURED
def test_model(benchmark, case, settings, limits, request) -> None:
    setting = settings(case.shape, request)
    found = measured(case, setting, request, limits)
    if case.baseline in found.failed:
        raise found.failed[case.baseline]
    if why := found.refused.get(case.baseline):
        pytest.skip(why)
    play(benchmark, found.row, case.baseline, case.group)
