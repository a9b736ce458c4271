"""The row of a large model: the most memory that loading it and making text takes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.models import Models, prompt_of
from benchmarks.worker import WorkerError, run_apart
from llama_fast.results import OURS, Goal, Row

TOKENS = 4


def peak(models: Models, form: str, quantize: str | None, gigabytes: float) -> Row:
    """Loads the checkpoint and decodes a few tokens in a process of its own."""
    row = Row(
        name=f"memory {form}",
        what=f"peak resident memory of loading and decoding {TOKENS} tokens, {form} weights",
        unit="GB",
    )
    tokens = prompt_of(models, 16)
    value = None
    try:
        models.say(f"{row.name}: loading")
        value = run_apart(
            _load_and_decode,
            models.checkpoint(),
            quantize,
            tokens,
            threads=models.threads,
        )
        row.samples[OURS] = [value]
    except WorkerError as error:
        if error.kind != "ConfigError":
            raise
        row.missing[OURS] = f"no {form} weights: {error.text}"
    row.goals = [Goal("GB", gigabytes, value, at_most=True)]
    return row


def _load_and_decode(folder: Path, threads: int, quantize: str | None, tokens: list[int]) -> float:
    from benchmarks.peers.ours import Ours
    from llama_fast.memory import resident_peak

    ours = Ours(folder, len(tokens) + TOKENS, quantize)
    ours.prefill(tokens)
    ours.decode(TOKENS)
    return resident_peak() / 1e9
