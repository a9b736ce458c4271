"""`trace`: one forward pass of a model, with the tensors of its steps under the names of the paper.

Legend of dims: B batch, T query tokens, S key tokens, H query heads, K KV heads, D head dim,
C model dim, F hidden dim, V vocabulary.

    embedding                       (B,T,C)   a row of the table for each token
    layers.I.input                  (B,T,C)   the residual stream, of every layer
    layers.I.attention.norm         (B,T,C)
    layers.I.attention.q, k, v      (B,T,H,D), (B,T,K,D): before the rotation
    layers.I.attention.q_rotated    (B,T,H,D)
    layers.I.attention.keys, values (B,S,K,D): rotated, all that is attended to
    layers.I.attention.scores       (B,H,T,S) q·kᵀ/√D
    layers.I.attention.masked_scores (B,H,T,S) -inf where a query does not see a key
    layers.I.attention.weights      (B,H,T,S) their softmax
    layers.I.attention.heads        (B,T,H,D) the weighted sums of the values
    layers.I.attention.output       (B,T,C)
    layers.I.mlp.input, mlp.norm    (B,T,C)   the residual stream, and its norm
    layers.I.mlp.gate, up           (B,T,F)
    layers.I.mlp.hidden             (B,T,F)   silu(gate) · up
    layers.I.mlp.output             (B,T,C)
    residual, norm                  (B,T,C)   after the last layer
    logits                          (B,T,V)   float32
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import LlamaFastError, PromptError
from ..generation.arguments import encode_prompts
from ..ops.attention import softmax_weights
from ..tokenizer import Tokenizer
from ..utils.compare import relative_rms
from ..utils.text import aligned
from .compare import Comparison, compare
from .parts import Part, Parts, parts_of
from .watch import Attended, Call, Pass, Step, watch

if TYPE_CHECKING:
    from ..nn import KVCache

_IN_A_LAYER = (
    "input", "attention.norm", "attention.q", "attention.k", "attention.v", "attention.q_rotated",
    "attention.keys", "attention.values", "attention.scores", "attention.masked_scores",
    "attention.weights", "attention.heads", "attention.output", "mlp.input", "mlp.norm",
    "mlp.gate", "mlp.up", "mlp.hidden", "mlp.output",
)  # fmt: skip


class Prediction(NamedTuple):
    """A token that may come next."""

    id: int
    piece: str | None
    probability: float


@dataclass(eq=False, repr=False)
class Trace:
    """One forward pass.

    `trace["layers.0.attention.scores"]` is a tensor, `trace.table()` the steps in words,
    `trace.compare(other)` where another pass departs from this one.

    tokens   (B,T) int64
    pieces   the text of each token of the first row; None where no tokenizer was given
    layers   those of which all steps are kept
    heads    the query heads whose scores can be asked for
    steps    by name, in their order
    calls    what was called, in its order: ops, and modules that called torch's
    seconds  of the whole pass, watched
    lens     (layers + 1, B, V) float32: the logits of the last position, were the residual stream
             before each layer the last one; at the end, those of the model
    """

    tokens: Tensor
    pieces: list[str] | None
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    steps: dict[str, Step]
    calls: list[Call]
    seconds: float
    lens: Tensor
    _tokenizer: Any

    def __getitem__(self, name: str) -> Tensor:
        """Scores, and what follows from them, are recomputed at each call, from q and k as the
        kernel had them, in float32. Raises LlamaFastError for a name that is no step of it."""
        if name not in self.steps:
            near = difflib.get_close_matches(name, self.steps, 3, 0.3)
            raise LlamaFastError(
                f"the trace has no step {name!r}; it kept layers {list(self.layers)}. Near it: "
                f"{', '.join(near) or 'nothing'}"
            )
        return self.steps[name].tensor()

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.tokens.shape))
        return f"<Trace of {shape} tokens: {len(self)} steps of layers {list(self.layers)}>"

    def __contains__(self, name: str) -> bool:
        return name in self.steps

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def attention_error(self, layer: int) -> float:
        """How far the kernel's weighted sums are from those of the recomputed scores: the root mean
        square of the difference over that of the sums, of the heads asked for."""
        name = f"layers.{layer}.attention"
        weights, values = self[f"{name}.weights"], self[f"{name}.values"]
        repeats = self.steps[f"{name}.heads"].shape[2] // values.shape[2]
        values = values[:, :, [head // repeats for head in self.heads]]  # (B,S,heads,D)
        sums = torch.einsum("bhts,bshd->bthd", weights, values.to(weights.dtype))
        return relative_rms(self[f"{name}.heads"][:, :, list(self.heads)], sums)

    def next_tokens(self, k: int = 10, *, row: int = 0) -> list[Prediction]:
        """The k likeliest tokens after the last one."""
        return self._likeliest(self["logits"][row, -1], k)

    def by_layer(self, k: int = 5, *, row: int = 0) -> list[list[Prediction]]:
        """What the residual stream before each layer predicts, and at last the model: the "logit
        lens". The last norm and the head are applied to it at the last position."""
        return [self._likeliest(logits[row], k) for logits in self.lens]

    def _likeliest(self, logits: Tensor, k: int) -> list[Prediction]:
        found = logits.double().softmax(-1).topk(min(k, logits.shape[-1]))
        return [
            Prediction(id_, _piece(self._tokenizer, id_), p)
            for id_, p in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    def rows(self) -> list[tuple]:
        """The steps as (name, shape in letters, shape, dtype, op, backend, µs, bytes that the op
        had to move at least, root mean square). A call that made several steps has its time and
        bytes at the first of them; what is not known is None."""
        rows = []
        shown: set[int] = set()
        for step in self.steps.values():
            call = step.call
            timed = call if call is not None and id(call) not in shown else None
            shown.add(id(call))
            x = step.tensor()
            rms = x.masked_fill(x.isneginf(), 0).double().square().mean().sqrt().item()
            rows.append(
                (
                    step.name,
                    f"({','.join(step.letters)})",
                    "×".join(map(str, step.shape)),
                    str(step.dtype).removeprefix("torch."),
                    call and call.op,
                    call.backend if call else ("recomputed" if step.recomputed else "torch"),
                    timed and timed.seconds * 1e6,
                    timed and timed.bytes,
                    rms,
                )
            )
        return rows

    def table(self) -> str:
        """The steps: name, shape, dtype, what made each, its time, and the bytes it had to move."""
        rows = [("step", "shape", "", "dtype", "op", "backend", "µs", "kB moved", "rms")]
        for *names, op, backend, us, moved, rms in self.rows():
            cells = (
                "" if us is None else f"{us:.1f}",
                "" if moved is None else f"{moved / 1e3:.1f}",
            )
            rows.append((*names, op or "", backend, *cells, f"{rms:.3g}"))
        return "\n".join(aligned(rows, str.rjust))

    def compare(self, other: Trace, tolerance: float | None = None) -> Comparison:
        """Says where another pass over the same tokens departs from this one.

        tolerance  relative difference that counts as none; by default what rounding explains: 4
                   units of a coarser dtype of 16 bits, 64 of float32, whose sums differ by more

        Raises PromptError for other tokens.
        """
        if not torch.equal(self.tokens.cpu(), other.tokens.cpu()):
            raise PromptError(
                "two traces are compared step by step, and these are of different tokens; trace "
                "the same ones"
            )
        return compare(self.steps.values(), other.steps, tolerance)


def trace(
    model: nn.Module,
    tokens_or_text: str | Sequence[int] | Tensor,
    tokenizer: Any = None,
    *,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    cache: KVCache | Any = None,
) -> Trace:
    """Runs one forward pass with the model's ordinary kernels and keeps its steps.

    model           a `Llama`, its weights in any form; or a causal language model of transformers
                    with Llama's layers, patched or not
    tokens_or_text  ids, (T,) or (B,T); or a text, which the tokenizer encodes with a begin token
    tokenizer       this package's, or transformers'; needed for a text, and otherwise for words
    layers, heads   of which the steps and the scores are kept; None: all. Of the other layers the
                    residual stream is kept
    cache           as the model takes it: the tokens are appended, and attend to what it holds

    Works in every gradient mode; what is kept has no gradient. Nothing stays on the model.
    Raises LlamaFastError for a model whose parts are not known, for layers or heads that it does
    not have, and PromptError for tokens that are none.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    parts = parts_of(model)
    kept = _chosen("layers", layers, parts.layers)
    kept_heads = _chosen("heads", heads, parts.heads[0])
    tokens = _tokens(tokens_or_text, tokenizer, parts.norm.weight.device, model.config.vocab_size)
    seen = watch(model, parts, tokens, cache, frozenset(kept))
    if parts.own:
        for index in kept:
            _gate_and_up(seen, parts, index)
    for index, attended in seen.attended.items():
        _scores(seen, f"layers.{index}.attention", attended, kept_heads)
    names = ["embedding"]
    names += [f"layers.{i}.{name}" for i in range(parts.layers) for name in _IN_A_LAYER]
    names += ["residual", "norm", "logits"]
    return Trace(
        tokens=tokens,
        pieces=None if tokenizer is None else [_piece(tokenizer, i) for i in tokens[0].tolist()],
        layers=kept,
        heads=kept_heads,
        steps={name: seen.steps[name] for name in names if name in seen.steps},
        calls=seen.calls,
        seconds=seen.seconds,
        lens=_lens(seen, parts),
        _tokenizer=tokenizer,
    )


@torch.no_grad()
def _gate_and_up(seen: Pass, parts: Parts, index: int) -> None:
    """The fused projection gives silu(gate) · up alone, so both are made once more without it."""
    (module,) = (m for m, part in parts.modules if part == Part("gate_up", index))
    made = ops.linear(seen.steps[f"layers.{index}.mlp.norm"].tensor(), module.weight)
    for name, half in zip(("gate", "up"), made.chunk(2, dim=-1), strict=True):
        seen.keep(f"layers.{index}.mlp.{name}", "BTF", half, None, recomputed=True)


@torch.no_grad()
def _lens(seen: Pass, parts: Parts) -> Tensor:
    """The logits of each layer's residual stream at the last position, (layers + 1, B, V)."""
    names = [*(f"layers.{i}.input" for i in range(parts.layers)), "residual"]
    last = torch.stack([seen.steps[name].tensor()[:, -1] for name in names])  # (layers + 1, B, C)
    return parts.head(parts.norm(last)).float()


def _scores(seen: Pass, name: str, attended: Attended, heads: tuple[int, ...]) -> None:
    def scores() -> Tensor:
        q, k = attended.q, attended.keys
        wide = torch.promote_types(q.dtype, torch.float32)
        repeats = q.shape[2] // k.shape[2]
        q, k = q[:, :, list(heads)].to(wide), k[:, :, [h // repeats for h in heads]].to(wide)
        return torch.einsum("bthd,bshd->bhts", q, k) * attended.scale

    def masked_scores() -> Tensor:
        return scores().masked_fill(~attended.seen, float("-inf"))

    def weights() -> Tensor:
        return softmax_weights(scores(), attended.seen)

    B, T = attended.q.shape[:2]
    shape = (B, len(heads), T, attended.keys.shape[1])
    dtype = torch.promote_types(attended.q.dtype, torch.float32)
    for make in (scores, masked_scores, weights):
        full = f"{name}.{make.__name__}"
        seen.steps[full] = Step(full, "BHTS", shape, dtype, None, torch.no_grad()(make), True)


def _chosen(what: str, asked: int | Iterable[int] | None, count: int) -> tuple[int, ...]:
    """Layers or heads in rising order; negative ones are counted from the end."""
    if asked is None:
        return tuple(range(count))
    numbers = [asked] if isinstance(asked, int) else list(asked)
    for number in numbers:
        if not isinstance(number, int) or not -count <= number < count:
            raise LlamaFastError(
                f"{what} has {number!r}, and the model has {what} 0 to {count - 1}; give some of "
                "these, or None for all"
            )
    return tuple(sorted({number % count for number in numbers}))


def _tokens(given: Any, tokenizer: Any, device: torch.device, vocab_size: int) -> Tensor:
    if isinstance(given, str):
        if tokenizer is None:
            raise PromptError("a text was given and no tokenizer; pass its tokenizer, or token ids")
        if isinstance(tokenizer, Tokenizer):
            given = encode_prompts(tokenizer, given)[0]
        else:
            given = tokenizer(given)["input_ids"]
    tokens = torch.as_tensor(given, device=device)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or not tokens.numel() or tokens.dtype != torch.int64:
        raise PromptError(
            f"the tokens are {tokens.dtype} {tuple(tokens.shape)}; they must be some ids, (T,) or "
            "(B,T) int64"
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise PromptError(
            f"the tokens go from {tokens.min()} to {tokens.max()}, and the model has 0 to "
            f"{vocab_size - 1}; give ids of its own tokenizer"
        )
    return tokens


def _piece(tokenizer: Any, id_: int) -> str | None:
    """The token's text, with the bytes of no whole character as \\xe5; None without a tokenizer, or
    where it has none for it."""
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, Tokenizer):
        return tokenizer.decode([id_])
    if not 0 <= id_ < tokenizer.vocab_size:
        return None
    return tokenizer.id_to_bytes[id_].decode(errors="backslashreplace")
