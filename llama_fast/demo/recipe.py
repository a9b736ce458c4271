"""The demo model's shape and how it is trained: everything that ``make.py`` decides."""

from __future__ import annotations

import re
from itertools import islice

from llama_fast.config import LlamaConfig
from llama_fast.demo.texts import documents
from llama_fast.tokenizer import Tokenizer
from llama_fast.train.bpe import train_bpe
from llama_fast.train.data import PackedDataset
from llama_fast.train.loop import TrainConfig

RANKS = 2048
CONFIG = LlamaConfig(
    dim=256,
    n_layers=4,
    n_heads=4,
    n_kv_heads=2,
    head_dim=64,
    hidden_dim=704,
    vocab_size=RANKS + 256,
    max_seq_len=512,
    tied=True,
)
TRAINING = TrainConfig(
    steps=3000,
    batch_size=2,
    learning_rate=2e-3,
    final_fraction=0.02,
    warmup_steps=100,
    weight_decay=0.1,
    eval_every=300,
    save_every=100,
)
SEED = 42
HELD_OUT_TOKENS = 40_000

_TOKENIZER_TEXTS = 20_000
_HAN = re.compile(r"[\u4e00-\u9fff]")
_MAX_HAN = 3
# A run of Chinese letters, or what stands between two of them.
_FRAGMENT = re.compile(r"[\u4e00-\u9fff]+|[^\u4e00-\u9fff]+")


def make_tokenizer() -> Tokenizer:
    """A vocabulary of ``RANKS`` tokens for the world's texts.

    Chinese has no spaces, so merges would go on to whole sentences of the templates, which no other
    text contains. Tokens therefore hold at most three Chinese letters, and no punctuation besides.
    """
    texts = islice(documents(SEED), _TOKENIZER_TEXTS)
    fragments = (fragment for text in texts for fragment in _FRAGMENT.findall(text))
    tokens = [
        token
        for token in train_bpe(fragments, 2 * RANKS)
        if len(_HAN.findall(token.decode(errors="ignore"))) <= _MAX_HAN
    ]
    return Tokenizer(tokens[:RANKS])


def training_data(tokenizer: Tokenizer, training: TrainConfig) -> PackedDataset:
    """As many texts as the training takes tokens, so that none is repeated."""
    block = CONFIG.max_seq_len
    return PackedDataset.from_texts(
        documents(SEED), tokenizer, block, n_tokens=training.steps * training.batch_size * block + 1
    )


def held_out_data(
    tokenizer: Tokenizer, split: str, n_tokens: int = HELD_OUT_TOKENS
) -> PackedDataset:
    """Texts of ``split``, one of ``world.SPLITS``, that training has not seen."""
    return PackedDataset.from_texts(
        documents(SEED, split), tokenizer, CONFIG.max_seq_len, n_tokens=n_tokens
    )
