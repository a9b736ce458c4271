"""The demo model's shape and how it is trained: everything that ``make.py`` decides."""

from __future__ import annotations

import re
from itertools import islice

from llama_fast.config import LlamaConfig
from llama_fast.tokenizer import Tokenizer
from llama_fast.tokenizer.bpe import train_bpe
from llama_fast.training.blocks import PackedDataset
from llama_fast.training.config import TrainConfig

from .texts import documents

RANKS = 2048
CONFIG = LlamaConfig(
    dim=192,
    n_layers=4,
    n_heads=3,
    n_kv_heads=1,
    head_dim=64,
    hidden_dim=512,
    vocab_size=RANKS + 256,
    max_seq_len=512,
    tied=True,
)
# Texts are short: half of the context holds several of them and trains faster.
BLOCK = 256
TRAINING = TrainConfig(
    steps=6000,
    batch_size=3,
    learning_rate=2e-3,
    final_fraction=0.02,
    warmup_steps=150,
    weight_decay=0.1,
    eval_every=500,
    save_every=100,
)
SEED = 42
HELD_OUT_TOKENS = 40_000
# Of the texts that ship, on which `llama-fast quantize --report` judges: 4,096 tokens in any
# vocabulary.
STORY_BYTES = 40_000

# A prompt may end anywhere, also where the whole text would have one token: so many of the texts
# are encoded in two parts.
CUT_SHARE = 0.3

_TOKENIZER_TEXTS = 20_000
_BOUNDARY = "\x1f"
_HAN = re.compile(r"[\u4e00-\u9fff]")
_MAX_HAN = 3
# A run of Chinese letters, or what stands between two of them.
_FRAGMENT = re.compile(rf"[\u4e00-\u9fff]+|[^\u4e00-\u9fff{_BOUNDARY}]+")


def make_tokenizer() -> Tokenizer:
    """A vocabulary of ``RANKS`` tokens for the world's texts.

    Chinese has no spaces, so merges would go on to whole sentences of the templates, which no other
    text contains. Tokens therefore hold at most three Chinese letters, no punctuation besides, and
    no name together with what stands beside it.
    """
    texts = islice(documents(SEED, boundary=_BOUNDARY), _TOKENIZER_TEXTS)
    fragments = (fragment for text in texts for fragment in _FRAGMENT.findall(text))
    tokens = [
        token
        for token in train_bpe(fragments, 2 * RANKS)
        if len(_HAN.findall(token.decode(errors="ignore"))) <= _MAX_HAN
    ]
    return Tokenizer(tokens[:RANKS])


def training_data(tokenizer: Tokenizer, training: TrainConfig) -> PackedDataset:
    """As many texts as the training takes tokens, so that none is repeated."""
    return PackedDataset.from_texts(
        documents(SEED),
        tokenizer,
        BLOCK,
        n_tokens=training.steps * training.batch_size * BLOCK + 1,
        cut_share=CUT_SHARE,
        seed=SEED,
    )


def held_out_data(
    tokenizer: Tokenizer, split: str, n_tokens: int = HELD_OUT_TOKENS
) -> PackedDataset:
    """Texts of ``split``, one of ``world.SPLITS``, that training has not seen."""
    return PackedDataset.from_texts(documents(SEED, split), tokenizer, BLOCK, n_tokens=n_tokens)


def stories() -> list[str]:
    """Texts that combine facts as no text of the training does: `STORY_BYTES` or little more."""
    found: list[str] = []
    for text in documents(SEED, "combinations"):
        found.append(text)
        if sum(len(text.encode()) for text in found) >= STORY_BYTES:
            return found
