"""Rows of whole models: decode and prefill of one sequence, ours beside the peers.

All baselines run the same checkpoint of random weights, each in its own process, and the logits of
each are compared with those of the ops' eager definitions before it is timed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import isa
from benchmarks.worker import Worker, WorkerError, run_apart
from llama_fast.bench.results import MULTIPLY_ADDS, OURS, READ, Goal, Row
from llama_fast.bench.roofline import multiply_adds, plain_read
from llama_fast.bench.timing import OtherPrograms, interleaved
from llama_fast.cli.options import DEMO
from llama_fast.config import LlamaConfig
from llama_fast.errors import WrongResultError
from llama_fast.utils.files import atomic_file, atomic_folder

HOW_TO_INSTALL = "pip install -c constraints.txt '.[bench,peers]'"
CONTEXT_TOKENS = 16  # what a decoded sequence begins with
TRIAL = 128  # tokens of a prompt that are enough to check a prefill
PAUSE = 0.05  # seconds; OpenMP's threads spin for some milliseconds before they sleep
# What the goals call the part of a yardstick's speed that is reached.
PART_OF = {READ: "of read bandwidth", MULTIPLY_ADDS: "of the bfloat16 multiply-add rate"}


def shape(name: str) -> LlamaConfig:
    """A preset's, or with "demo" that of the small model that ships."""
    if name != "demo":
        return LlamaConfig.preset(name)
    from llama_fast.checkpoint import open_checkpoint

    return open_checkpoint(DEMO).config


def with_layers(shape: str, layers: int) -> str:
    """For the names of rows."""
    return f"{shape} with {layers} layer{'s' * (layers != 1)}"


@dataclass(frozen=True)
class Weights:
    """A form of the weights: how `Llama.from_pretrained` names it, and the peers that have it.

    tolerance  largest error of the logits against the unquantised definition, in units of their
               own root mean square. Sound baselines show 0.03, 0.09 and up to 0.75 at the 1B shape
               (random weights forgive little), unrelated logits 1.4
    """

    quantize: str | None
    peers: tuple[str, ...]
    tolerance: float


WEIGHTS = {
    "bf16": Weights(None, ("transformers", "llama.cpp bf16", "ik_llama bf16"), 0.08),
    "int8": Weights(
        "int8", ("llama.cpp q8_0", "ik_llama q8_0", "OpenVINO q8_0", "CTranslate2 int8"), 0.2
    ),
    "int4": Weights(
        "int4", ("llama.cpp q4_0", "llama.cpp q4_k", "ik_llama q4_0", "OpenVINO q4_0"), 1.0
    ),
}
# The modules that a peer needs, by the first word of its name; llama.cpp quantises the GGUF files.
NEEDS = {
    OURS: (),
    "transformers": ("transformers",),
    "llama.cpp": ("llama_cpp", "gguf"),
    "ik_llama": ("ik_llama_cpp", "llama_cpp", "gguf"),
    "OpenVINO": ("openvino_genai", "llama_cpp", "gguf"),
    "CTranslate2": ("ctranslate2", "transformers"),
}
# Every matrix in the type of its name, which reads the fewest bytes; q4_k as it is published, with
# some matrices in more bits.
PURE = {"q8_0": True, "q4_0": True, "q4_k": False}


@dataclass
class Models:
    """The shape, and what is made of it as it is needed, in a folder that the caller removes."""

    config: LlamaConfig
    folder: Path
    threads: int
    rounds: int
    prompt: int
    steps: int
    say: Callable[[str], None]
    references: dict[tuple, np.ndarray] = field(default_factory=dict)

    def checkpoint(self) -> Path:
        path = self.folder / "weights"
        if not path.exists():
            self._need_room(2 * self.config.n_params)
            self.say(f"writing random weights, {2 * self.config.n_params / 1e9:.2f} GB")
            run_apart(_write_checkpoint, path, self.config, threads=self.threads)
        return path

    def gguf(self, kind: str) -> Path:
        path = self.folder / f"{kind}.gguf"
        if path.exists():
            return path
        source = self.checkpoint() if kind == "bf16" else self.gguf("bf16")
        self._need_room(2 * self.config.n_params)
        self.say(f"writing {path.name}")
        run_apart(_write_gguf, kind, source, path, self.threads, threads=self.threads)
        return path

    def ctranslate2(self) -> Path:
        path = self.folder / "ctranslate2"
        if not path.exists():
            source = self.checkpoint()
            self._need_room(self.config.n_params)
            self.say(f"writing {path.name}")
            run_apart(_write_ctranslate2, source, path, threads=self.threads)
        return path

    def _need_room(self, nbytes: int) -> None:
        if (free := shutil.disk_usage(self.folder).free) < 1.1 * nbytes:
            raise OSError(
                f"{self.folder} has {free / 1e9:.1f} GB free and {1.1 * nbytes / 1e9:.1f} are "
                "needed for weights; give a larger folder with --tmp"
            )

    def reference(self, tokens: list[int], *request: Any) -> np.ndarray:
        """By the ops' eager definitions: the logits after the tokens, (V,) float32, or what else
        of our baseline's methods is asked for."""
        request = request or ("logits_after", tokens, 0)
        key = (request[0], *tokens)
        if key not in self.references:
            arguments = (self.checkpoint(), len(tokens), None, "eager")
            with Worker(_baseline, OURS, *arguments, threads=self.threads) as worker:
                self.references[key] = worker.ask(*request)
        return self.references[key]

    def start(self, name: str, weights: Weights, context: int) -> Worker:
        """A worker with the baseline of that name. Raises WorkerError, OSError."""
        engine, _, kind = name.partition(" ")
        if name == OURS:
            arguments = (self.checkpoint(), context, weights.quantize)
        elif engine == "transformers":
            arguments = (self.checkpoint(),)
        else:
            weights_of = self.ctranslate2() if engine == "CTranslate2" else self.gguf(kind)
            arguments = (weights_of, self.threads, context)
        return Worker(_baseline, engine, *arguments, threads=self.threads)


def _write_checkpoint(path: Path, config: LlamaConfig) -> None:
    from llama_fast.checkpoint import write_random

    write_random(path, config)


def _write_gguf(kind: str, source: Path, path: Path, threads: int) -> None:
    from benchmarks.peers import gguf_file

    with atomic_file(path) as partial:
        if kind == "bf16":
            gguf_file.write_bf16(source, partial)
        else:
            gguf_file.quantize(source, partial, kind, threads, pure=PURE[kind])


def _write_ctranslate2(source: Path, path: Path) -> None:
    from benchmarks.peers import ctranslate2

    with atomic_folder(path) as partial:
        ctranslate2.convert(source, partial)


# Where each engine's baseline is, in benchmarks/peers.
ENGINES = {
    OURS: ("ours", "Ours"),
    "transformers": ("hugging_face", "HuggingFace"),
    "llama.cpp": ("llama_cpp", "LlamaCpp"),
    "ik_llama": ("ik_llama", "IkLlama"),
    "OpenVINO": ("openvino", "OpenVino"),
    "CTranslate2": ("ctranslate2", "CTranslate2"),
}


def _baseline(engine: str, *arguments: Any) -> Any:
    """Made in a process of its own, which alone imports the engine's library."""
    module, name = ENGINES[engine]
    return getattr(import_module(f"benchmarks.peers.{module}"), name)(*arguments)


def missing(name: str) -> str | None:
    """Why a peer cannot take part, or None."""
    engine = name.partition(" ")[0]
    if engine == "llama.cpp" and (why := isa.no_llama_cpp()):
        return why
    if engine in ("ik_llama", "OpenVINO", "CTranslate2") and isa.held_to():
        return f"{engine} is not held to {isa.held_to()}"
    absent = [module for module in NEEDS[engine] if importlib.util.find_spec(module) is None]
    return f"{' and '.join(absent)} not installed: {HOW_TO_INSTALL}" if absent else None


@contextlib.contextmanager
def baselines(models: Models, row: Row, form: str, context: int) -> Iterator[dict[str, Worker]]:
    """A worker for each baseline that can take part; the others go to `row.missing`."""
    weights = WEIGHTS[form]
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in (OURS, *weights.peers):
            if why := missing(name):
                row.missing[name] = why
                continue
            try:
                models.say(f"{row.name}: loading {name}")
                workers[name] = stack.enter_context(models.start(name, weights, context))
            except WorkerError as error:
                # What quantised forms exist is our own model's to say, and a peer may be built for
                # another CPU or system; anything else is a fault.
                if error.kind == "ConfigError" and name == OURS:
                    row.missing[name] = f"no {form} weights: {error.text}"
                elif error.kind in ("EOFError", "ImportError", "OSError") and name != OURS:
                    row.missing[name] = error.text
                else:
                    raise
        yield workers


def check(models: Models, row: Row, form: str, worker: Worker, name: str, tokens, steps) -> None:
    """Raises WrongResultError unless the baseline's logits are those of the eager definition.

    OpenVINO gives log probabilities of given tokens alone, of a whole prompt: as random tokens
    have random logits, their errors are of the same size, and so is their deviation.
    """
    if name.startswith("OpenVINO"):
        request = ("log_probabilities", tokens)
        expected, found = models.reference(tokens, *request), worker.ask(*request)
        size = expected.var()
    else:
        expected = models.reference(tokens)
        found = worker.ask("logits_after", tokens, steps)
        size = np.square(expected).mean()
    error = float(np.sqrt(np.square(found - expected).mean() / size))
    row.notes.append(f"{name}: error of the logits {error:.2g}")
    if not error <= WEIGHTS[form].tolerance:
        raise WrongResultError(
            f"{row.name}: the logits of {name} are {error:.2g} of their size away from the eager "
            f"definition; at most {WEIGHTS[form].tolerance} is sound, so its time means nothing"
        )


def prepare(
    models: Models,
    row: Row,
    form: str,
    workers: dict[str, Worker],
    tokens: list[int],
    tried: int,
    checked: int,
) -> None:
    """Settles and checks each baseline over `tokens`, with so many steps. A peer whose process
    dies, as llama.cpp's does with quantised weights on AMX, takes no part, and the row says so."""
    for name, worker in [*workers.items()]:
        try:
            if name.startswith("llama.cpp"):
                chosen = worker.ask("choose_flash_attention", tokens, tried)
                row.notes.append(f"{name}: flash attention {chosen}")
            check(models, row, form, worker, name, tokens, checked)
        except WorkerError as error:
            if name == OURS or error.kind != "EOFError":
                raise
            row.missing[name] = error.text
            del workers[name]


def time_in_turn(
    models: Models, row: Row, workers: dict[str, Worker], request: tuple, yardstick: tuple = ()
) -> None:
    """Asks the same of all, round by round.

    yardstick  one more to take its turn: its name, what makes a call in a process of its own, and
               the arguments of that
    """
    calls = {name: partial(worker.ask, *request) for name, worker in workers.items()}
    watched = [os.getpid(), *(worker.process for worker in workers.values())]
    with contextlib.ExitStack() as stack:
        if yardstick:
            name, *made = yardstick
            worker = stack.enter_context(Worker(*made, threads=models.threads))
            calls[name] = partial(worker.ask, "__call__")
            watched.append(worker.process)
        with OtherPrograms(watched) as others:
            row.samples = interleaved(calls, models.rounds, PAUSE)
    row.others = others.share


def prompt_of(models: Models, length: int) -> list[int]:
    """The same random ids in every run."""
    return random.Random(0).choices(range(models.config.vocab_size), k=length)


def decode(models: Models, form: str, goals: dict[str, float]) -> Row:
    """Tokens a second of one sequence; a sample is `steps` tokens, going on from the last."""
    steps, rounds = models.steps, models.rounds
    row = Row(
        name=f"decode {form}",
        what=f"decode of one sequence, {form} weights, {CONTEXT_TOKENS} tokens of context and up",
        unit="tok/s",
        work=steps,
    )
    context = CONTEXT_TOKENS + steps * (rounds + 2)
    tokens = prompt_of(models, CONTEXT_TOKENS)
    with baselines(models, row, form, context) as workers:
        prepare(models, row, form, workers, tokens, steps, CONTEXT_TOKENS // 2)
        models.say(f"{row.name}: {rounds} rounds of {steps} tokens")
        yardstick = ()
        if OURS in workers:
            nbytes = round(steps * workers[OURS].ask("bytes_per_token", context / 2))
            yardstick = (READ, plain_read, nbytes)
        time_in_turn(models, row, workers, ("decode", steps), yardstick)
    row.goals = goals_of(row, goals)
    return row


def prefill(models: Models, form: str, goals: dict[str, float]) -> Row:
    """Tokens a second of a whole prompt; a sample is one prompt, from an empty cache."""
    length = models.prompt
    row = Row(
        name=f"prefill {form}",
        what=f"prefill of {length} tokens, {form} weights",
        unit="tok/s",
        work=length,
    )
    tokens = prompt_of(models, length)
    with baselines(models, row, form, length) as workers:
        prepare(models, row, form, workers, tokens[:TRIAL], 0, 0)
        models.say(f"{row.name}: {models.rounds} rounds")
        yardstick = ()
        if MULTIPLY_ADDS in goals:
            yardstick = (MULTIPLY_ADDS, multiply_adds, prefill_flops(models.config, length), True)
        time_in_turn(models, row, workers, ("prefill", tokens), yardstick)
    row.goals = goals_of(row, goals)
    return row


def goals_of(row: Row, goals: dict[str, float]) -> list[Goal]:
    """How many times faster than each peer ours is, and its part of a yardstick's speed."""
    return [
        Goal(PART_OF.get(name, f"× {name}"), needed, row.times(name, OURS))
        for name, needed in goals.items()
    ]


def prefill_flops(config: LlamaConfig, T: int) -> int:
    """Multiply-adds twice: all matrices of the layers, the head for the last token alone, and
    attention to the keys that each token sees."""
    width = config.n_heads * config.head_dim
    layer = config.dim * (2 * width + 2 * config.n_kv_heads * config.head_dim)
    layer += 3 * config.dim * config.hidden_dim
    attention = 4 * width * (T * (T + 1) // 2)
    head = 2 * config.dim * config.vocab_size
    return config.n_layers * (2 * T * layer + attention) + head
