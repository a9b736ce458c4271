"""One self-contained HTML page of a trace: pictures of its steps, in English and Chinese.

`page.html` holds the page's style, words and drawing; here its data are made. Numbers that are
drawn travel as float16. Pictures are bounded: of long prompts they show the last tokens.
"""

from __future__ import annotations

import base64
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LlamaFastError
from ..utils.files import atomic_file
from .compare import Comparison
from .trace import Prediction, Trace

MAPS = 300_000  # fields of all heat maps: scores, and as many weights
QUERIES = 150_000  # elements of the queries before the rotation, and as many after it
DIMS = 64  # of the residual stream, and hidden units
DATA = "/*DATA*/"


def page(trace: Trace, comparison: Comparison | None = None, other: str = "") -> str:
    """Returns the page.

    comparison, other  of another trace with this one, and what that one is, in words

    Raises LlamaFastError for a trace that kept no layer, or no attention in one.
    """
    text = json.dumps(_data(trace, comparison, other), ensure_ascii=False, allow_nan=False)
    template = (files(__package__) / "page.html").read_text(encoding="utf-8")
    # A piece of text may spell the end of the script.
    return template.replace(DATA, text.replace("<", "\\u003c"))


def write(
    path: str | Path, trace: Trace, comparison: Comparison | None = None, other: str = ""
) -> None:
    """Writes the page as a file that opens from disk."""
    text = page(trace, comparison, other)
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _data(trace: Trace, comparison: Comparison | None, other: str) -> dict[str, Any]:
    missing = [i for i in trace.layers if f"layers.{i}.attention.scores" not in trace]
    if not trace.layers or not trace.heads or missing:
        raise LlamaFastError(
            "a page shows the attention of layers, and the trace has none of "
            f"{'layer ' + str(missing[0]) if missing else 'any layer or head'}; trace at least one "
            "layer and head, of a model whose attention is this package's or torch's SDPA"
        )
    tokens = trace.tokens[0].tolist()
    maps = len(trace.layers) * len(trace.heads)
    shown = max(1, min(len(tokens), math.isqrt(MAPS // maps)))
    D = trace.steps[f"layers.{trace.layers[0]}.attention.q"].shape[-1]
    drawn = max(1, min(len(trace.heads), QUERIES // (len(trace.layers) * shown * D)))
    heads = list(trace.heads[:drawn])
    embedding = trace["embedding"]
    hidden = trace.steps[f"layers.{trace.layers[0]}.mlp.hidden"]
    return {
        "model": _model(trace, D),
        "tokens": [[id_, trace.pieces and trace.pieces[i]] for i, id_ in enumerate(tokens)],
        "shown": shown,
        "dims": min(DIMS, embedding.shape[-1]),
        "units": min(DIMS, hidden.shape[-1]),
        "heads": list(trace.heads),
        "q_heads": heads,
        "next": _predictions(trace.next_tokens(10)),
        "lens": [_predictions(row) for row in trace.by_layer(5)],
        "embedding": _packed(embedding[0, -shown:, :DIMS]),
        "layers": [_layer(trace, index, shown, heads) for index in trace.layers],
        "ops": _ops(trace),
        "steps": trace.rows(),
        "comparison": comparison and _comparison(comparison, other),
    }


def _model(trace: Trace, D: int) -> dict[str, Any]:
    at = f"layers.{trace.layers[0]}.attention"
    embedding = trace.steps["layers.0.input"]
    return {
        "layers": len(trace.lens) - 1,
        "heads": trace.steps[f"{at}.q_rotated"].shape[2],
        "kv_heads": trace.steps[f"{at}.values"].shape[2],
        "head_dim": D,
        "dim": embedding.shape[-1],
        "dtype": str(embedding.dtype).removeprefix("torch."),
        "ms": round(trace.seconds * 1e3, 2),
    }


def _layer(trace: Trace, index: int, shown: int, heads: list[int]) -> dict[str, Any]:
    at = f"layers.{index}"
    hidden = trace[f"{at}.mlp.hidden"][0, -shown:].float()
    units = hidden.abs().amax(0).topk(min(DIMS, hidden.shape[-1])).indices.sort().values
    gate = F.silu(trace[f"{at}.mlp.gate"][0, -shown:].float())
    return {
        "index": index,
        "input": _packed(trace[f"{at}.input"][0, -shown:, :DIMS]),
        "norm": _packed(trace[f"{at}.attention.norm"][0, -shown:, :DIMS]),
        "q": _packed(trace[f"{at}.attention.q"][0, -shown:, heads]),
        "q_rotated": _packed(trace[f"{at}.attention.q_rotated"][0, -shown:, heads]),
        "scores": _packed(trace[f"{at}.attention.scores"][0, :, -shown:, -shown:]),
        "weights": _packed(trace[f"{at}.attention.weights"][0, :, -shown:, -shown:]),
        "error": trace.attention_error(index),
        "gate": _packed(gate[:, units]),
        "hidden": _packed(hidden[:, units]),
    }


def _packed(x: Tensor) -> str:
    """Returns base64 of the numbers as little-endian float16, cut to its range."""
    largest = torch.finfo(torch.float16).max
    x = x.detach().float().nan_to_num(0.0).clamp(-largest, largest)
    return base64.b64encode(x.half().cpu().contiguous().numpy().tobytes()).decode()


def _predictions(found: list[Prediction]) -> list[list]:
    return [[p.id, p.piece, p.probability] for p in found]


def _ops(trace: Trace) -> list[list]:
    """(op, backend, calls, µs, bytes) by op and backend, the slowest first."""
    rows: dict[tuple[str, str], list] = {}
    for call in trace.calls:
        row = rows.setdefault((call.op, call.backend), [call.op, call.backend, 0, 0.0, None])
        row[2] += 1
        row[3] += call.seconds * 1e6
        if call.bytes is not None:
            row[4] = (row[4] or 0) + call.bytes
    return sorted(rows.values(), key=lambda row: -row[3])


def _comparison(comparison: Comparison, other: str) -> dict[str, Any]:
    first = comparison.first
    steps = [[s.name, _finite(s.relative), _finite(s.grown)] for s in comparison.layers]
    return {
        "other": other,
        "first": first and [first.name, _finite(first.relative)],
        "steps": steps,
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
