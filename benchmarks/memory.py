"""The rows of memory: what loading a model and making text takes, and what a long prompt adds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from benchmarks.models import Models, prompt_of
from benchmarks.worker import WorkerError, run_apart
from llama_fast.bench.results import OURS, Goal, Row
from llama_fast.config import LlamaConfig

TOKENS = 4


def peak(models: Models, shape: str, form: str, quantize: str | None, gigabytes: float) -> Row:
    """Loads the checkpoint and decodes a few tokens in a process of its own."""
    what = f"peak resident memory of loading and decoding {TOKENS} tokens, {shape}, {form} weights"
    row = Row(name=f"memory {shape} {form}", what=what, unit="GB")
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


def _load_and_decode(folder: Path, quantize: str | None, tokens: list[int]) -> float:
    from benchmarks.peers.ours import Ours
    from llama_fast.utils.memory import resident_peak

    ours = Ours(folder, len(tokens) + TOKENS, quantize)
    ours.prefill(tokens)
    ours.decode(TOKENS)
    return resident_peak() / 1e9


def prompt(config: LlamaConfig, tokens: int, threads: int, gigabytes: float) -> Row:
    """What prefilling a long prompt holds beside weights and cache. All layers take turns in the
    same memory, so one is enough to see it."""
    what = f"memory of prefilling {tokens} tokens beside weights and cache, one layer of the shape"
    row = Row(name="memory prompt", what=what, unit="GB")
    value = run_apart(_prefill, config, tokens, threads=threads)
    row.samples[OURS] = [value]
    row.goals = [Goal("GB", gigabytes, value, at_most=True)]
    return row


@torch.no_grad()
def _prefill(config: LlamaConfig, tokens: int) -> float:
    from llama_fast.bench.memory import extra_memory
    from llama_fast.generation.engine import Engine
    from llama_fast.model import Llama

    one_layer = dataclasses.replace(config, n_layers=1, vocab_size=256, max_seq_len=tokens)
    model = Llama(one_layer).to(torch.bfloat16)
    engine = Engine(model, model.new_cache(1, tokens))
    ids = torch.zeros(1, tokens, dtype=torch.int64)

    def run() -> None:
        engine.reset()
        engine.prefill(ids)

    run()  # the cache's pages are there now, and what is set up once
    extra = extra_memory(run)
    if extra is None:
        raise OSError("this system does not say how much memory a process holds")
    return extra / 1e9
