"""`llama-fast vocab prune`: a model with the tokens that a corpus needs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CheckpointError
from .convert import report_written
from .options import Debug, Threads, example, set_threads
from .terminal import note, weights_bar
from .vocab_train import Corpus, Out

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer
    from ..tokenizer.vocabulary import Pruned

CHECKED_TEXTS, CHECKED_TOKENS = 8, 128


@example("llama-fast vocab prune MODEL corpus.txt --out smaller-model")
def prune(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of the model to read.")],
    corpus: Corpus,
    out: Out,
    min_count: Annotated[
        int, typer.Option(min=1, metavar="N", help="How often a token must occur to be kept.")
    ] = 1,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare the logits of both models on texts of the corpus; loads both.",
        ),
    ] = True,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Keep the tokens that a corpus needs, and their rows.

    Kept are the tokens that occur, those on the way to them when they are merged, the 256 bytes and
    the special tokens: any text can still be written. Ids are numbered anew, in the settings too;
    pruned_ids.json says which is which. The folder appears whole, or not at all.
    """
    set_threads(threads)
    from ..checkpoint.vocabulary import prune_folder
    from ..tokenizer import Tokenizer, vocabulary
    from ..training.texts import read_texts

    start = time.perf_counter()
    old = Tokenizer.from_pretrained(model)
    pruned = vocabulary.prune(old, read_texts(corpus), min_count=min_count)
    with weights_bar(f"Writing {out.name}", lines=True) as progress:
        prune_folder(model, pruned, out, progress=progress)
    report_written(out, start)
    note(f"kept {len(pruned.kept):,} of {old.vocab_size:,} tokens")
    if check:
        _check(model, out, old, pruned, _first_lines(read_texts(corpus)))


def _first_lines(texts: Iterable[str]) -> list[str]:
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    return list(islice(lines, CHECKED_TEXTS))


def _check(model: Path, out: Path, old: Tokenizer, pruned: Pruned, texts: list[str]) -> None:
    """Notes how far the logits of the kept tokens are from what they were. Raises CheckpointError
    where that is more than rounding."""
    import torch

    from ..model import Llama

    kept, new_ids = pruned.kept, pruned.new_ids()
    before, after = (Llama.from_pretrained(folder, device="cpu") for folder in (model, out))
    longest = min(CHECKED_TOKENS, before.config.max_seq_len)
    checked = largest = size = 0
    for text in texts:
        ids = old.encode(text[: 8 * longest])[:longest]
        if not ids or not new_ids.keys() >= set(ids):
            continue
        with torch.inference_mode():
            expected = before(torch.tensor([ids], device="cpu"))[..., kept]
            ids = torch.tensor([[new_ids[id_] for id_ in ids]], device="cpu")
            found = after(ids)[..., : len(kept)]
        checked += 1
        largest = max(largest, (found - expected).abs().max().item())
        size = max(size, expected.abs().max().item())
    # Products over other shapes may sum in another order.
    allowed = 8 * torch.finfo(before.dtype).eps * size
    if largest > allowed:
        raise CheckpointError(
            f"the logits of {out} differ from those of {model} by {largest:.3g}, more than "
            f"rounding ({allowed:.3g}); please report this, and do not use {out}"
        )
    note(
        f"checked {checked} texts: logits of the kept tokens differ by at most {largest:.3g}, of "
        f"logits up to {size:.3g}"
    )
