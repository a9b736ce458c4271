"""What `llama-fast finetune` says before it trains and after, and what its metrics.json holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.memory import resident_peak
from .finetune_run import Run
from .options import DEMO
from .terminal import note, note_pairs, size

if TYPE_CHECKING:
    from ..model import Llama
    from ..training import Adapter, History, TrainConfig
    from ..training.dpo import DPO


def plan(
    llama: Llama,
    adapter: Adapter | None,
    rows: Any,
    config: TrainConfig,
    steps: int,
    block: int,
    objective: DPO | None = None,
    processes: int = 1,
) -> list[tuple[str, str]]:
    count = llama.config.n_params
    if adapter is None:
        trained = f"all {count:,} weights"
    else:
        new = len(adapter.config.rows.get("embed_tokens", ()))
        parts = [
            *["a LoRA"] * bool(adapter.config.targets),
            *[f"{new:,} new tokens' rows"] * (new > 0),
        ]
        share = adapter.n_parameters / count
        trained = f"{' and '.join(parts)} of {adapter.n_parameters:,} parameters, "
        trained += f"{share:.2%} of the model's"
    rate = f"{config.learning_rate:g}"
    if config.embedding_learning_rate is not None:
        rate += f" (of embedding and head {config.embedding_learning_rate:g})"
    passes = config.rows_of(len(rows)) / len(rows)
    at_once = config.micro_batch_size or config.batch_size
    of = [] if objective is None else [("objective", f"DPO, beta {objective.beta:g}")]
    if processes > 1:
        from ..distributed import is_fully_sharded

        and_of = " and of the weights (fully sharded)" if is_fully_sharded(llama) else ""
        of.append(("processes", f"{processes}, each with its part of every step{and_of}"))
    return [
        *of,
        ("trains", f"{trained}, in {str(llama.dtype).removeprefix('torch.')} on {llama.device}"),
        ("steps", f"{steps:,} of up to {config.batch_size * block:,} tokens "
                  f"({at_once * block:,} at a time): {passes:.3g} passes"),
        ("learning rate", f"{rate} after a warm-up, then a cosine"),
    ]  # fmt: skip


def figures(
    llama: Llama, history: History, config: TrainConfig, adapter: Adapter | None
) -> dict[str, Any]:
    last = history.train[-max(1, len(history.train) // 10) :]
    seconds = sum(history.seconds)
    return {
        "parameters_trained": llama.config.n_params if adapter is None else adapter.n_parameters,
        "steps": len(history.train),
        "epochs": history.train[-1]["epoch"],
        "tokens": history.tokens,
        "tokens_trained": history.kept,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(history.tokens / max(seconds, 1e-9), 1),
        "loss_first": history.train[0]["loss"],
        **{
            f"{name}_last_tenth": sum(r[name] for r in last) / len(last)
            for name in ("loss", "reward_margin", "accuracy")
            if name in last[0]
        },
        "held_out": history.held_out,
        "peak_bytes": resident_peak(),
        "config": dataclasses.asdict(config),
    }


def summary(
    run: Run, llama: Llama, history: History, metrics: dict[str, Any], seconds: float, full: bool
) -> None:
    from ..training.evaluation import measures_text
    from .measure import peak_memory

    shipped = Path(run.asked["MODEL"]) == DEMO.resolve()
    model = "" if shipped else f" --model {run.asked['MODEL']}"
    how = f" --model {run.result}" if full else f"{model} --adapter {run.result}"
    lines = [
        ("loss", f"{metrics['loss_first']:.3f} at first, {metrics['loss_last_tenth']:.3f} at last"),
        ("trained on", f"{history.kept:,} of {history.tokens:,} tokens in {seconds:.1f} s, "
                       f"{metrics['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", peak_memory(llama.device)),
        ("written", f"{run.result} ({size(_bytes(run.result))})"),
        ("try it", f'llama-fast generate{how} "…"'),
    ]  # fmt: skip
    if history.held_out:
        before, after = (measures_text(history.held_out[n]) for n in (0, -1))
        lines[1:1] = [("held out", f"{before}, at first"), ("", f"{after}, at last")]
    if "accuracy_last_tenth" in metrics:
        last = {n: metrics[f"{n}_last_tenth"] for n in ("reward_margin", "accuracy")}
        lines.insert(1, ("preferences", f"{measures_text(last)}, at last"))
    note("")
    note_pairs(lines)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
