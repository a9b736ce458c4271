"""What tests/test_tensor_parallel.py runs over several ranks, once: to begin them takes the most
time.

torchrun --nproc-per-node N -m tests.ranks FOLDER
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llama_fast import checkpoint
from llama_fast.checkpoint.stored import PthFile, SafetensorsFile
from llama_fast.config import LlamaConfig
from llama_fast.distributed import Ranks
from llama_fast.errors import LlamaFastError, ProcessError, ShapeError
from llama_fast.generation.candidates import Drawer
from llama_fast.generation.engine import Engine
from llama_fast.generation.follow import acquire, led
from llama_fast.generation.generate import Rows, generate
from llama_fast.generation.sampling import Sampling
from llama_fast.generation.session import Session
from llama_fast.model import Llama
from llama_fast.serve.batch import Batch
from llama_fast.serve.job import Job
from llama_fast.tokenizer import Tokenizer

from . import sharded_ops

# Of 8 heads and 2 KV heads: two ranks have one each, and of four, two share one. The vocabulary
# cannot be cut into equal parts.
CONFIG = LlamaConfig(
    dim=256, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=32, hidden_dim=768, vocab_size=2304 - 8,
    max_seq_len=256, vocab_padding=3,
)  # fmt: skip
# Of 4 KV heads three ranks have 2, 1 and 1, and of 7 blocks of the hidden dim 3, 2 and 2.
UNEVEN = dataclasses.replace(CONFIG, n_kv_heads=4, hidden_dim=896)
FOLDERS = ("hf", "meta", "tied", "int8", "int4")
# A folder, and how it is loaded.
CASES: dict[str, tuple[str, dict]] = {
    **{name: (name, {"dtype": torch.float32}) for name in FOLDERS},
    "bfloat16": ("hf", {"dtype": torch.bfloat16}),
    "rounded to int4": ("hf", {"dtype": torch.float32, "quantize": "int4"}),
    "int8 cache": ("hf", {"dtype": torch.float32}),
    "uneven": ("uneven", {"dtype": torch.float32}),
    "uneven int4": ("uneven int4", {"dtype": torch.float32}),
}
CASES_OF = {
    size: [case for case in CASES if case.startswith("uneven") == (size == 3)] for size in (2, 3, 4)
}
# Left to `make test-all`: two ranks show how these are read, the other cases the shared KV head.
THOROUGH = [(4, case) for case in ("meta", "tied", "int8", "rounded to int4")]
TOKENS = torch.randint(0, 2200, (2, 33), generator=torch.Generator().manual_seed(0))
PROMPTS = [[5, 9, 17], [1000, 3]]
# Several processes on few cores take their time, so not every case makes long texts.
LONG = ("hf", "int4", "uneven")
TEXTS = (
    ("greedy", 200, {"temperature": 0}),
    ("drawn", 12, {"seed": 3}),
    ("fresh", 12, {}),
)


def found_with(folder: Path, case: str, mesh=None) -> dict:
    """What a model gives: logits, greedy texts and drawn ones."""
    name, settings = CASES[case]
    # Before what is counted: of Meta's files a block of the embedding and of the head tells whether
    # they are one.
    source = checkpoint.open_checkpoint(folder / name)
    with counting() as count:
        model = Llama.from_pretrained(source, mesh=mesh, **settings)
    bytes_read = count()
    held = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    rope = sum(x.nbytes for x in model.rope.buffers())
    with torch.inference_mode():
        if case == "int8 cache":
            cache = model.new_cache(2, 64, "int8")
            logits = torch.cat([model(part, cache=cache) for part in TOKENS.split((32, 1), 1)], 1)
        else:
            logits = model(TOKENS)
    found = {"logits": logits, "bytes": bytes_read, "held": held - rope}
    found["given"] = given_in_a_step(model)
    with Engine.acquire(model, 1, 8) as engine:
        engine.prefill([[5]])
        for _ in range(3):
            engine.step(torch.tensor([7]))
        found["replayed"] = engine.captured().replay is not None
    tokenizer = Tokenizer.from_pretrained(folder / "tied")
    for kind, count, drawn in TEXTS:
        if kind == "greedy" or case in ("hf", "uneven"):
            count = count if case in LONG else 12
            with exchanges() as given:
                made = generate(model, tokenizer, PROMPTS, max_new_tokens=count, **drawn)
            found[kind] = [completion.tokens for completion in made]
            found[f"given {kind}"] = sum(given["gather"])
    return found


def given_in_a_step(model: Llama) -> dict[str, list[int]]:
    """The bytes that this rank gives to each exchange of a step of two rows and its draw."""
    drawer = Drawer(model, CONFIG.vocab_size)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    with acquire(model, 2, 64) as engine:
        engine.prefill(TOKENS[:, :3])
        with exchanges() as given:
            logits = engine.step(TOKENS[:, 3])
            drawer.draw(logits, [None, None], [Sampling()] * 2, generators)
    return given


@contextmanager
def exchanges() -> Iterator[dict[str, list[int]]]:
    """Gives the bytes that this rank gives to each sum and each gathering inside the block."""
    given, own = {"sum": [], "gather": []}, {}

    def counted(name):
        def exchange(ranks, x):
            given[name].append(x.nbytes)
            return own[name](ranks, x)

        return exchange

    for name in given:
        own[name] = getattr(Ranks, name)
        setattr(Ranks, name, counted(name))
    try:
        yield given
    finally:
        for name in given:
            setattr(Ranks, name, own[name])


class counting:
    """Counts the bytes that are read of weight files inside the block."""

    def __enter__(self) -> Callable[[], int]:
        self.own = [(kind, kind.rows) for kind in (SafetensorsFile, PthFile)]
        total = 0

        def counted(own):
            def rows(*args):
                nonlocal total
                found = own(*args)
                total += found.nbytes
                return found

            return rows

        for kind, own in self.own:
            kind.rows = counted(own)
        return lambda: total

    def __exit__(self, *_) -> None:
        for kind, own in self.own:
            kind.rows = own


def compiled(folder: Path, mesh) -> bool:
    """Whether a graph of `torch.compile` has the bits of the model, exchanges included."""
    model = Llama.from_pretrained(folder / "hf", mesh=mesh, dtype=torch.float32)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        return torch.equal(*(run(TOKENS, cache=model.new_cache(2, 64)) for run in (graph, model)))


def near_the_end(folder: Path, mesh=None, context: int = 2304) -> list[int]:
    """What the demo's shape says at the end of a longer context than its own, after chunks of a
    prompt that leave three tokens of room."""
    longer = folder / f"longer-{context}"
    model = Llama.from_pretrained(longer, mesh=mesh, dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(folder / "tied")
    text = "Once upon a time there was a little girl. " * 300
    prompt = tokenizer.encode(text)[: context - 3]
    (made,) = generate(model, tokenizer, [prompt], max_new_tokens=9, temperature=0)
    assert made.finish_reason == "length"
    return made.tokens


def led_texts(folder: Path, case: str, mesh=None) -> dict | None:
    """What the first rank makes where it leads: two turns of a dialog, and answers of a server."""
    name, settings = CASES[case]
    model = Llama.from_pretrained(folder / name, mesh=mesh, **settings)
    tokenizer = Tokenizer.from_pretrained(folder / "tied")
    with led(model) as leads:
        if not leads:
            return None
        turns, text = [], list(PROMPTS[0])
        with Session(model, tokenizer, max_seq_len=64) as session:
            for _ in range(2):
                with suppress(ShapeError):  # an error of every rank ends none of them
                    session.engine.truncate([60])
                made = session.stream(text, max_new_tokens=6, temperature=0)
                turns.append([chunk.token for chunk in made])
                text += [*turns[-1], 7, 8]
            prefilled = session.prefilled
        pieces = []
        batch = Batch(model, pieces.extend, rows=2, max_seq_len=64)
        batch.start()
        jobs = [
            Job(Rows(model, tokenizer, [prompt], 6, None, None, None, None), Sampling(0))
            for prompt in PROMPTS
        ]
        batch.submit(jobs)
        until = time.monotonic() + 60
        while sum(piece.finish_reason is not None for _, piece in pieces) < len(jobs):
            assert time.monotonic() < until and not batch.failed, "the answers do not end"
            time.sleep(0.01)
        batch.stop()
    served = [[piece.token for of, piece in pieces if of is job] for job in jobs]
    return {"turns": turns, "prefilled": prefilled, "served": served}


def refusals(folder: Path, mesh) -> dict[str, str]:
    """What is said of what a model over ranks is not for."""
    model = Llama.from_pretrained(folder / CASES_OF[mesh.size()][0], mesh=mesh)

    def one_head():
        config = checkpoint.open_checkpoint(folder / "hf").config
        one = folder / f"odd-{mesh.size()}-{dist.get_rank()}"
        checkpoint.write_random(one, dataclasses.replace(config, n_heads=1, n_kv_heads=1), seed=0)
        Llama.from_pretrained(one, mesh=mesh)

    tries = {
        "loss": lambda: model.loss(TOKENS, TOKENS),
        "save": lambda: model.save_pretrained(folder / "saved"),
        "token": lambda: model(torch.tensor([[CONFIG.vocab_size]])),
        "device": lambda: Llama.from_pretrained(folder / "hf", mesh=mesh, device="meta"),
        "another": lambda: Llama.from_pretrained(
            folder / "hf", mesh=mesh, max_seq_len=100 + dist.get_rank() // (mesh.size() - 1)
        ),
        "two dims": lambda: Llama.from_pretrained(
            folder / "hf", mesh=init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("a", "b"))
        ),
        "heads": one_head,
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except (LlamaFastError, IndexError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def die(folder: Path, mesh) -> None:
    """The second rank ends in the middle of a text."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: the others are to end by themselves
    model = Llama.from_pretrained(folder / CASES_OF[mesh.size()][0], mesh=mesh)
    if dist.get_rank() == 1:
        step, count = type(model.head).own, 0

        def end(*args):
            nonlocal count
            count += 1
            return step(*args) if count < 6 else os._exit(3)

        type(model.head).own = end
    tokenizer = Tokenizer.from_pretrained(folder / "tied")
    begun = time.perf_counter()
    try:
        generate(model, tokenizer, PROMPTS, max_new_tokens=200, temperature=0)
    except ProcessError as error:
        (folder / f"said-{dist.get_world_size()}-{dist.get_rank()}.txt").write_text(
            f"{time.perf_counter() - begun} {error}"
        )
        os._exit(4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    cases = CASES_OF[mesh.size()]
    if "--all" not in sys.argv:
        cases = [case for case in cases if (mesh.size(), case) not in THOROUGH]
    found = {case: found_with(folder, case, mesh) for case in cases}
    with exchanges() as given:
        found["led"] = led_texts(folder, CASES_OF[mesh.size()][0], mesh)
    found["given led"] = given["gather"]
    if mesh.size() == 2:
        found["compiled"] = compiled(folder, mesh)
    if mesh.size() == 3:  # the demo has a KV head for 3 heads
        found["long"] = near_the_end(folder, mesh)
    if mesh.size() != 3:  # which does not divide its KV heads
        of_ops = mesh if mesh.size() == 2 else init_device_mesh("cpu", (2, 2))
        found["dtensors"] = [sharded_ops.found(of_ops, sequence) for sequence in (False, True)]
    found["refusals"] = refusals(folder, mesh)
    torch.save(found, folder / f"found-{mesh.size()}-{dist.get_rank()}.pt")
    dist.barrier()
    die(folder, mesh)
