"""The steps that are profiled: of a whole model, or of one op at a model's sizes.

Weights without a checkpoint are random: a few million numbers again and again, which take as long
to compute with as any others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import initial_std
from ...config import LlamaConfig
from ...config.quantization import NAMED, Quantization, WeightFormat
from ...dispatch import OPS, Cost, Op
from ...errors import ConfigError
from ...generation.engine import Engine
from ...model import Llama
from ...nn.kv_cache import KVCache
from ...ops import QuantizedWeight
from ...ops.quantized_layout import centre, levels
from ...training.config import TrainConfig
from ...training.weights import make_optimizer
from ..shapes import Work, problem_shapes
from .calls import Section, Step

MODEL_STEPS = ("decode", "prefill", "train")
# Steps that a cache has room for: a decoding step adds a token.
STEPS = 1024
# Bytes of arguments that an op's calls take in turn, so that they come from memory, and how many
# calls of one kind a step has at most.
BYTES, SETS = 256 * 2**20, 16
RANDOM = 2**22


def random_model(
    config: LlamaConfig,
    *,
    layers: int,
    dtype: torch.dtype,
    device: str | torch.device,
    quantize: str | None = None,
) -> Llama:
    """Returns a model of that shape with `layers` of its layers and random weights; quantised
    values are drawn as such, since rounding floats would take minutes. On the meta device it has
    shapes alone."""
    config = dataclasses.replace(config, n_layers=layers)
    model = Llama(config, device="meta", dtype=dtype)
    settings = None if quantize is None else Quantization.of(quantize)
    for name, parameter in list(model.named_parameters()):
        form = settings and settings.of_weight(name)
        std = initial_std(config, name)
        if torch.device(device).type == "meta":
            weight = QuantizedWeight.empty(parameter.shape, form) if form else parameter
        elif form:
            weight = random_quantized(form, parameter.shape, std, device)
        else:
            weight = torch.empty(parameter.shape, dtype=dtype, device=device)
            fill(weight, std) if std is not None else weight.fill_(1)
        model.set_weight(name, weight)
    model.tie()
    model.rope.to_empty(device=device)
    return model.eval()


def random_quantized(
    form: WeightFormat, shape: tuple[int, int], std: float, device: str | torch.device
) -> QuantizedWeight:
    """Returns a weight all of whose values are as likely, with a scale that gives it that standard
    deviation."""
    weight = QuantizedWeight.empty(shape, form).to_empty(device=device)
    fill(weight.qdata)
    of_values = torch.arange(2.0**form.bits, dtype=torch.float32, device="cpu") - centre(form.bits)
    if form.symmetric:
        of_values = levels(of_values, form.bits)
    weight.scales.fill_(std / of_values.std(correction=0).item())
    if weight.minima is not None:
        weight.minima.fill_(-std * 3**0.5)
    return weight


def fill(x: Tensor, std: float = 1.0) -> None:
    """Fills x with the same few million random numbers again and again: normal ones, or any bytes
    where x is uint8."""
    numbers = torch.empty(min(RANDOM, max(1, x.numel())), dtype=x.dtype, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    if x.dtype is torch.uint8:
        numbers.random_(256, generator=generator)
    else:
        numbers.normal_(0, std, generator=generator)
    numbers = numbers.to(x.device)
    flat = x.view(-1)
    for start in range(0, x.numel(), RANDOM):
        part = flat[start : start + RANDOM]
        part.copy_(numbers[: len(part)])


def opened_model(
    folder: Path, *, dtype: torch.dtype | None, device: str, quantize: str | None, tokens: int
) -> Llama:
    """A checkpoint's model, with a context for `tokens` and the steps after them."""
    from ...checkpoint import open_checkpoint

    opened = open_checkpoint(folder)
    context = min(opened.config.max_seq_len, tokens + STEPS)
    return Llama.from_pretrained(
        opened, device=device, dtype=dtype, quantize=quantize, max_seq_len=context
    )


def decode_step(model: Llama, batch: int, context: int) -> Step:
    """Appends a token to each of `batch` sequences of `context` tokens; later steps see the
    earlier ones' tokens too."""
    cache = _cache(model, batch, context)
    tokens = _tokens(model, batch, 1)

    def step(section: Section) -> None:
        with torch.no_grad():
            model(tokens, cache=cache, last_only=True)

    return step


class ReplayedStep:
    """The same as `generate` does it: recorded, then replayed without Python between launches. The
    first two calls record."""

    def __init__(self, model: Llama, batch: int, context: int) -> None:
        self.tokens = _tokens(model, batch, 1)[:, 0]
        self.engine = Engine(model, _cache(model, batch, context))

    def __call__(self) -> None:
        self.engine.step(self.tokens)


def _cache(model: Llama, batch: int, context: int) -> KVCache:
    """With `context` random tokens in each row, and room for steps."""
    cache = model.new_cache(batch, min(context + STEPS, model.config.max_seq_len))
    if context:
        cache.advance(context)
        for index in range(model.config.n_layers):
            keys, values, *_ = cache.layer(index)
            keys.normal_()
            values.normal_()
    return cache


def prefill_step(model: Llama, batch: int, tokens: int) -> Step:
    """Reads prompts of `tokens` tokens into an empty cache."""
    cache = model.new_cache(batch, tokens)
    given = _tokens(model, batch, tokens)

    def step(section: Section) -> None:
        cache.reset()
        with torch.no_grad():
            model(given, cache=cache, last_only=True)

    return step


def train_step(model: Llama, batch: int, tokens: int) -> Step:
    """Loss, gradients and AdamW as `llama_fast.training` does them."""
    model.train()
    given = _tokens(model, batch, tokens)
    targets = given.roll(-1, dims=1)
    trained = [(name, w) for name, w in model.named_parameters() if w.requires_grad]
    optimizer = make_optimizer(trained, TrainConfig(steps=1))
    weights = [w for _, w in trained]
    # Reads weights, gradients and both moments, writes all but the gradients.
    elements = sum(w.numel() for w in weights)
    update = Cost(bytes=7 * sum(w.nbytes for w in weights), flops=12 * elements)

    def step(section: Section) -> None:
        model.loss(given, targets).backward()
        with section("AdamW", update):
            optimizer.step()
        optimizer.zero_grad()

    return step


def _tokens(model: Llama, batch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(
        model.config.vocab_size, (batch, count), generator=generator, device="cpu"
    )
    return drawn.to(model.device)


def op_step(
    name: str,
    config: LlamaConfig,
    work: Work,
    *,
    dtype: torch.dtype,
    device: str,
    quantize: str | None = None,
    backward: bool = False,
) -> Step:
    """Calls an op once with the arguments of each of its problems: for linear, one for each matrix
    of the model. As many calls with other arguments as make the data come from memory.

    quantize  of an op of quantised weights or caches, these forms; those of floats when None
    backward  its gradient too
    Raises ConfigError for an op that has none.
    """
    op = OPS[name]
    if backward and op.gradient is None:
        raise ConfigError(
            f"{name} has no gradient; leave --backward out"
            + (f", or take {op.grad_alternative}" if op.grad_alternative else "")
        )
    calls: list[Callable[[], None]] = []
    made = problem_shapes(name, config, work, dtype=dtype, device=device, gradient=backward)
    for label, make in made.items():
        if quantize == next((word for word in label.split() if word in NAMED), None):
            first = make(0)
            if backward and not op.has_gradient(*first):
                continue
            count = max(1, min(SETS, BYTES // max(1, op.cost(*first).bytes)))
            if device == "meta":
                count = 1
            sets = [first, *(make(seed) for seed in range(1, count))]
            calls += [_call(op, args, backward) for args in sets]
    if not calls:
        raise ConfigError(f"{name} has no form {quantize}; it has {', '.join(made)}")

    def step(section: Section) -> None:
        for call in calls:
            call()

    return step


def _call(op: Op, args: tuple, backward: bool) -> Callable[[], None]:
    if not backward:

        def call() -> None:
            with torch.no_grad():
                op(*args)

        return call
    wanted = differentiable(op, args)

    def call_both() -> None:
        results = op(*args)
        results = (results,) if isinstance(results, Tensor) else results
        results = [x for x in results if x.requires_grad]
        torch.autograd.grad(results, wanted, [torch.ones_like(x) for x in results])

    return call_both


def differentiable(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """The arguments that may have a gradient, which are told to record one."""
    names = [argument.name for argument in op.arguments.schema]
    return [
        x.requires_grad_()
        for name, x in zip(names, args, strict=True)
        if isinstance(x, Tensor) and x.is_floating_point() and name not in op.constants
    ]
