"""What quantising has changed: each weight, each layer's outputs, and the model's predictions.

Beside it what a KV cache in 8 bits changes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, Progress
from ..model import Llama
from ..nn import Embedding, Linear
from ..nn.kv_cache import KVCache
from ..ops import QuantizedWeight
from ..utils.compare import relative_rms
from .folder import check_tokens, layers

ROWS = 1024  # of a weight that are compared at a time
TOKENS = 128  # whose logits exist at a time


@dataclass(frozen=True)
class WeightError:
    """Root mean squares of what has changed over those of what was there.

    weights  of the matrix itself
    outputs  of what it makes of the float model's own inputs on the text
    """

    name: str
    bits: int
    group_size: int
    symmetric: bool
    weights: float
    outputs: float


@dataclass
class Predictions:
    """What a changed model makes of the text that the float one has read.

    perplexity  exp of the mean loss in nats
    divergence  mean over the tokens of KL(float ‖ changed) in nats; divergence_largest: the worst
    top1_agreement  share of the tokens for which both have the same likeliest one
    """

    perplexity: float = math.nan
    divergence: float = 0.0
    divergence_largest: float = 0.0
    top1_agreement: float = 0.0


@dataclass
class Report:
    """A quantised model beside the float one on the same text.

    tokens      that were predicted
    perplexity  of the float model
    quantized   the model of quantised weights
    kv_cache    the float model with a KV cache in 8 bits
    both        the model of quantised weights with a KV cache in 8 bits
    weights     of each quantised matrix, in the model's order
    layers      after each layer, the error of the hidden states over their size: what all layers so
                far have added up to
    """

    tokens: int = 0
    perplexity: float = math.nan
    quantized: Predictions = field(default_factory=Predictions)
    kv_cache: Predictions = field(default_factory=Predictions)
    both: Predictions = field(default_factory=Predictions)
    weights: list[WeightError] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


@dataclass
class _Reader:
    """One of the models on its way through the layers: update and residual stream (B,T,C)."""

    quantized: bool
    cached: bool
    update: Tensor | None = None
    x: Tensor | None = None


@torch.no_grad()
def compare(
    checkpoint: Checkpoint, quantized: Llama, tokens: Tensor, *, progress: Progress | None = None
) -> Report:
    """Runs the float model of `checkpoint` and `quantized` side by side on tokens (B,T) int64, T at
    least 2, both without a KV cache and with one in 8 bits, a layer at a time: of the float model
    and of the cache no more is in memory.

    Raises ConfigError for tokens that the model cannot take, and what `Checkpoint.tensors` raises.
    """
    check_tokens(checkpoint, tokens)
    B, T = tokens.shape
    report = Report()
    cos, sin = quantized.rope(T)
    exact = _Reader(quantized=False, cached=False)
    ours = _Reader(quantized=True, cached=False)
    readers = {
        "quantized": ours,
        "kv_cache": _Reader(quantized=False, cached=True),
        "both": _Reader(quantized=True, cached=True),
    }
    heads = {"n_kv_heads": checkpoint.config.n_kv_heads, "head_dim": checkpoint.config.head_dim}
    cache = KVCache(B, T, n_layers=1, **heads, device=quantized.device, dtype=torch.int8)
    for part, module in layers(checkpoint, progress):
        other = quantized.get_submodule(part)
        if part == "embed":
            _observe(report, part, module, other, tokens)
            for reader in (exact, *readers.values()):
                made = other(tokens).to(quantized.dtype) if reader.quantized else module(tokens)
                reader.x = made
        elif part.startswith("layers."):
            hooks = [
                linear.register_forward_pre_hook(_Observer(report, f"{part}.{name}", other, name))
                for name, linear in module.named_modules()
                if isinstance(linear, Linear)
            ]
            exact.update, exact.x = module(exact.update, exact.x, cos, sin, None)
            for hook in hooks:
                hook.remove()
            for reader in readers.values():
                layer_cache = None
                if reader.cached:
                    cache.reset()
                    lengths = cache.advance(T)
                    layer_cache = (*cache.layer(0), lengths)
                layer = other if reader.quantized else module
                reader.update, reader.x = layer(reader.update, reader.x, cos, sin, layer_cache)
            total = exact.update.float() + exact.x.float()
            report.layers.append(relative_rms(ours.update.float() + ours.x.float(), total))
        elif part == "norm":
            for reader in (exact, *readers.values()):
                norm = other if reader.quantized else module
                reader.x = norm(reader.update, reader.x)[0]
        else:
            if other.weight is not quantized.embed.weight:
                _observe(report, part, module, other, exact.x.flatten(0, 1)[:TOKENS])
            heads = {True: other, False: module}
            found = {name: (heads[r.quantized], r.x) for name, r in readers.items()}
            _compare_logits(report, module, exact.x, found, tokens)
    return report


class _Observer:
    """A forward pre-hook of a float linear, which gives its inputs to the quantised one too."""

    def __init__(self, report: Report, name: str, layer: nn.Module, within: str) -> None:
        self.report, self.name, self.other = report, name, layer.get_submodule(within)

    def __call__(self, module: Linear, args: tuple[Tensor]) -> None:
        _observe(self.report, self.name, module, self.other, args[0])


def _observe(
    report: Report,
    name: str,
    module: Linear | Embedding,
    other: Linear | Embedding,
    inputs: Tensor,
) -> None:
    weight = other.weight
    if not isinstance(weight, QuantizedWeight):
        return
    change = size = 0.0
    for start in range(0, weight.shape[0], ROWS):
        exact = module.weight[start : start + ROWS].float()
        rows = torch.arange(start, start + len(exact), device=exact.device)
        change += float((weight.rows(rows) - exact).square().sum())
        size += float(exact.square().sum())
    # Not the call, which would observe itself, and not what a GateUp goes on with.
    forward = (Linear if isinstance(module, Linear) else Embedding).forward
    exact = forward(module, inputs).float()
    report.weights.append(
        WeightError(
            name=f"{name}.weight",
            bits=weight.bits,
            group_size=weight.group_size,
            symmetric=weight.symmetric,
            weights=math.sqrt(change / size) if size else 0.0,
            outputs=relative_rms(forward(other, inputs), exact),
        )
    )


def _compare_logits(
    report: Report,
    head: Linear,
    x: Tensor,
    readers: dict[str, tuple[Linear, Tensor]],
    tokens: Tensor,
) -> None:
    """Perplexities and divergences from the final hidden states (B,T,C) of the float model and of
    the others, by their names in the report, each with its head; the last token of each row has
    none to be judged by."""
    targets = tokens[:, 1:].flatten()
    report.tokens = len(targets)
    loss, losses = 0.0, dict.fromkeys(readers, 0.0)
    for start in range(0, len(targets), TOKENS):
        some = slice(start, start + TOKENS)
        exact = head(_predicting(x)[some]).float().log_softmax(-1)
        target = targets[some, None]
        loss -= float(exact.gather(1, target).sum()) / len(targets)
        for name, (its_head, its_x) in readers.items():
            found = its_head(_predicting(its_x)[some]).float().log_softmax(-1)
            losses[name] -= float(found.gather(1, target).sum()) / len(targets)
            kl = (exact.exp() * (exact - found)).sum(-1)
            predictions = getattr(report, name)
            predictions.divergence += float(kl.sum()) / len(targets)
            predictions.divergence_largest = max(predictions.divergence_largest, float(kl.max()))
            same = int((exact.argmax(-1) == found.argmax(-1)).sum())
            predictions.top1_agreement += same / len(targets)
    report.perplexity = math.exp(loss)
    for name, its_loss in losses.items():
        getattr(report, name).perplexity = math.exp(its_loss)


def _predicting(x: Tensor) -> Tensor:
    """(B,T,C) → (B·(T-1),C), without the last token of each row."""
    return x[:, :-1].flatten(0, 1)
