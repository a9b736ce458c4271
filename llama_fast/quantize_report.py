"""What quantising has changed: each weight, each layer's outputs, and the model's guesses."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, Progress
from .model import Llama
from .nn import Embedding, Linear
from .numerics import relative_rms
from .ops import QuantizedWeight
from .quantize_folder import check_tokens, layers

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
class Report:
    """A quantised model beside the float one on the same text.

    tokens      that were guessed
    perplexity, perplexity_quantized   exp of the mean loss in nats
    divergence  mean over the tokens of KL(float ‖ quantised) in nats; divergence_largest: the worst
    same_guess  share of the tokens for which both think the same likeliest
    weights     of each quantised matrix, in the model's order
    layers      after each layer, the error of the hidden states over their size: what all layers so
                far have added up to
    """

    tokens: int = 0
    perplexity: float = math.nan
    perplexity_quantized: float = math.nan
    divergence: float = 0.0
    divergence_largest: float = 0.0
    same_guess: float = 0.0
    weights: list[WeightError] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def compare(
    checkpoint: Checkpoint, quantized: Llama, tokens: Tensor, *, progress: Progress | None = None
) -> Report:
    """Runs the float model of `checkpoint` and `quantized` side by side on tokens (B,T) int64, T at
    least 2, a layer at a time: of the float model no more is in memory.

    Raises ConfigError for tokens that the model cannot take, and what `Checkpoint.tensors` raises.
    """
    check_tokens(checkpoint, tokens)
    T = tokens.shape[1]
    report = Report()
    cos, sin = quantized.rope(T)
    ours = theirs = (None, None)  # update and residual stream of the quantised and the float model
    for part, module in layers(checkpoint, progress):
        other = quantized.get_submodule(part)
        if part == "embed":
            _observe(report, part, module, other, tokens)
            theirs = None, module(tokens)
            ours = None, other(tokens).to(quantized.dtype)
        elif part.startswith("layers."):
            hooks = [
                linear.register_forward_pre_hook(_Observer(report, f"{part}.{name}", other, name))
                for name, linear in module.named_modules()
                if isinstance(linear, Linear)
            ]
            theirs = module(*theirs, cos, sin, None)
            for hook in hooks:
                hook.remove()
            ours = other(*ours, cos, sin, None)
            exact = theirs[0].float() + theirs[1].float()
            report.layers.append(relative_rms(ours[0].float() + ours[1].float(), exact))
        elif part == "norm":
            theirs, ours = module(*theirs)[0], other(*ours)[0]
        else:
            if other.weight is not quantized.embed.weight:
                _observe(report, part, module, other, theirs.flatten(0, 1)[:TOKENS])
            _guesses(report, module, other, theirs, ours, tokens)
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


def _guesses(
    report: Report, head: Linear, other: Linear, theirs: Tensor, ours: Tensor, tokens: Tensor
) -> None:
    """Perplexities and divergence from the final hidden states (B,T,C); the last token of each row
    has none to be judged by."""
    targets = tokens[:, 1:].flatten()
    theirs, ours = theirs[:, :-1].flatten(0, 1), ours[:, :-1].flatten(0, 1)
    loss = loss_quantized = divergence = same = 0.0
    for start in range(0, len(targets), TOKENS):
        some = slice(start, start + TOKENS)
        exact = head(theirs[some]).float().log_softmax(-1)
        found = other(ours[some]).float().log_softmax(-1)
        target = targets[some, None]
        loss -= float(exact.gather(1, target).sum())
        loss_quantized -= float(found.gather(1, target).sum())
        kl = (exact.exp() * (exact - found)).sum(-1)
        divergence += float(kl.sum())
        report.divergence_largest = max(report.divergence_largest, float(kl.max()))
        same += int((exact.argmax(-1) == found.argmax(-1)).sum())
    report.tokens = len(targets)
    report.perplexity = math.exp(loss / len(targets))
    report.perplexity_quantized = math.exp(loss_quantized / len(targets))
    report.divergence = divergence / len(targets)
    report.same_guess = same / len(targets)
