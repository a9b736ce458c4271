"""What a part is told, what it says, and the kernels that it runs: the same on a GPU and in the
rehearsal without one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_fast.backends import cuda
from llama_fast.bench.results import Row
from llama_fast.bench.roofline import Roofline
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import ORDER

KERNELS = tuple(name for name in ORDER["cuda"] if name != "eager")  # ours, which run on GPUs


@dataclass(frozen=True)
class Sizes:
    """Of what is measured.

    rows      N of the memory-bound ops and of the loss
    few_rows  N at which the host's time is compared with the kernels'
    most_rows N at which starting and ending are no part of a memory-bound op's time
    prompts   lengths of causal attention, of `at_once` tokens in all
    caches    (B,S) of attention that decodes a token
    batches   rows of the products of decoding; matrices: of the model's, by `bench.shapes`
    context   tokens before a model's decoded one; layers: of that model
    rounds    samples of each baseline, on a GPU times speed.ROUNDS_ON_GPU
    """

    shape: str
    config: LlamaConfig
    rows: int
    few_rows: int
    most_rows: int
    prompts: tuple[int, ...]
    at_once: int
    caches: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    matrices: tuple[str, ...]
    context: int
    layers: int
    rounds: int


LARGE = Sizes(
    shape="8b",
    config=LlamaConfig.preset("8b"),
    rows=8192,
    few_rows=2048,
    most_rows=32768,
    prompts=(2048, 4096, 8192, 16384),
    at_once=16384,
    caches=((1, 8192), (1, 32768), (1, 131072), (16, 8192)),
    batches=(1, 16),
    matrices=("gate_up", "down"),
    context=1024,
    layers=32,
    rounds=5,
)
TINY = Sizes(
    shape="tiny",
    config=LlamaConfig(
        dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=96, vocab_size=160
    ),
    rows=8,
    few_rows=4,
    most_rows=16,
    prompts=(8, 16, 32),
    at_once=32,
    caches=((1, 300),),
    batches=(1,),
    matrices=("gate_up",),
    context=8,
    layers=1,
    rounds=1,
)


@dataclass
class Setting:
    """Of one part's process.

    device   "cuda", or "cpu" for the rehearsal
    lines    where it writes what it finds, a line of JSON each, so that what was measured before it
             fails or is stopped is kept
    folder   where all that is to be kept goes
    without  baselines that are left out, and why: they ended a process of this part before
    done     rows that such a process has measured
    """

    device: str
    lines: Path
    folder: Path
    roofline: Roofline
    without: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def sizes(self) -> Sizes:
        return LARGE if self.gpu else TINY

    def write(self, **line: Any) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def write_row(self, row: Row) -> None:
        self.write(row=row.record())

    def say(self, what: str, *texts: str) -> None:
        """A result in words, in place of an earlier one of that name."""
        self.write_row(Row(what, what, "", notes=list(texts)))

    def save(self, path: Path, part: str) -> None:
        """For `load`, in the part's process."""
        found = {**dataclasses.asdict(self), "part": part}
        path.write_text(json.dumps(found, default=str), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> tuple[Setting, str]:
        """The setting, and the part that it is for."""
        found = json.loads(path.read_text(encoding="utf-8"))
        part = found.pop("part")
        paths = {name: Path(found.pop(name)) for name in ("lines", "folder")}
        found["roofline"] = Roofline(**found["roofline"])
        return cls(**found, **paths), part


@contextmanager
def constant(name: str) -> Iterator[None]:
    """Inside the block, a constant of llama_fast.backends.cuda is True, which asks for another way
    of a kernel; without a name nothing is."""
    before = getattr(cuda, name) if name else None
    if name:
        setattr(cuda, name, True)
    try:
        yield
    finally:
        if name:
            setattr(cuda, name, before)


@contextmanager
def kernels(setting: Setting) -> Iterator[None]:
    """Inside the block, our kernels run on tensors of the setting's device."""
    if setting.gpu:
        yield
        return
    from tests.cuda_host import host
    from tests.triton_interpreter import be_quick, behave_as_a_gpu

    behave_as_a_gpu()
    be_quick()
    if host.why_not():  # the CUDA backend says itself that it cannot be used
        yield
        return
    with host.use_host():
        yield
