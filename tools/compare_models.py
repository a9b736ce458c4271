"""Models beside each other on the same texts, whatever their vocabularies:

    python -m tools.compare_models held-out.jsonl MODEL OTHER …

Of each: tokens a sentence, bytes a token, bits per byte, and how much text a second of one thread's
processor time decodes, token by token (the text itself is fed, nothing is drawn). The models take
turns; told are medians.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from llama_fast import Llama
from llama_fast.generation.engine import Engine
from llama_fast.tokenizer import Tokenizer
from llama_fast.training import evaluate, read
from llama_fast.training.texts import read_texts

DECODED, ROUNDS = 256, 7
_SENTENCE_END = re.compile(r"[。！？.!?]+[”\"]?\s*|\n+")


class Figures(NamedTuple):
    tokens_per_sentence: float
    bytes_per_token: float
    bits_per_byte: float
    tokens_per_second: float

    @property
    def bytes_per_second(self) -> float:
        return self.tokens_per_second * self.bytes_per_token


def compare(path: Path, folders: list[Path]) -> list[Figures]:
    """The figures of each model."""
    texts = list(read_texts(path))
    sentences = sum(bool(part.strip()) for text in texts for part in _SENTENCE_END.split(text))
    n_bytes = sum(len(text.encode()) for text in texts)
    models, fits = [], []
    for folder in folders:
        tokenizer = Tokenizer.from_pretrained(folder)
        model = Llama.from_pretrained(folder, device="cpu")
        ids = [tokenizer.encode(text) for text in texts]
        count = sum(map(len, ids))
        data = read(path, tokenizer, block=min(512, model.config.max_seq_len))
        bits = evaluate(model, data).bits_per_byte
        fits.append((count / sentences, n_bytes / count, bits))
        fed = [id_ for text in ids for id_ in text][: min(DECODED, model.config.max_seq_len)]
        models.append((model, fed))
    rates = [[decoded(*each) for each in models] for _ in range(ROUNDS + 1)][1:]
    medians = map(statistics.median, zip(*rates, strict=True))
    return [Figures(*fit, rate) for fit, rate in zip(fits, medians, strict=True)]


def decoded(model: Llama, ids: list[int]) -> float:
    """Tokens that a second of processor time decodes."""
    with torch.inference_mode(), Engine.acquire(model, 1, len(ids)) as engine:
        engine.prefill([ids[:1]])
        begin = time.process_time()
        for id_ in ids[1:]:
            engine.step(torch.tensor([id_]))
        return (len(ids) - 1) / (time.process_time() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("texts", type=Path, help="texts as for finetune")
    parser.add_argument("models", type=Path, nargs="+", help="folders of models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("tokens/sentence  bytes/token  bits/byte  tokens/s  kB of text/s  model")
    for folder, found in zip(options.models, compare(options.texts, options.models), strict=True):
        print(
            f"{found.tokens_per_sentence:15.1f}  {found.bytes_per_token:11.2f}  "
            f"{found.bits_per_byte:9.3f}  {found.tokens_per_second:8.0f}  "
            f"{found.bytes_per_second / 1000:12.2f}  {folder}"
        )


if __name__ == "__main__":
    main()
