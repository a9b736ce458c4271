"""Texts as one long row of tokens, cut into blocks of one length, in memory.

    <bos> a document <eos> <bos> the next document <eos> …

Block i holds tokens i·T … i·T+T-1 and asks for the ones that follow each, so every token but the
very first is asked for exactly once, and no token is padding. A document may begin in one block and
end in the next, and a block's tokens see all documents before them in the block: what stood before
``<bos>`` is left to the model to ignore. `data.read` packs documents that see only themselves.
"""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import LlamaFastError
from ..tokenizer import Tokenizer
from .data import Batch
from .packing import shuffled


class PackedDataset:
    """tokens: (n,) integers; block: T, the tokens of a training row. Its length is in blocks.

    n_bytes: the UTF-8 bytes of the text behind the tokens, for losses per byte; 0 if unknown.
    Raises LlamaFastError for a block below 1 and for too few tokens to fill one block.
    """

    def __init__(self, tokens: Tensor, block: int, *, n_bytes: int = 0) -> None:
        if block < 1:
            raise LlamaFastError(f"block is {block}; a block needs at least one token")
        if tokens.ndim != 1 or len(tokens) < block + 1:
            raise LlamaFastError(
                f"tokens has shape {tuple(tokens.shape)}; one row of at least {block + 1} tokens "
                f"is needed for blocks of {block}: give more text or a smaller block"
            )
        self.tokens = tokens.to(torch.int32)
        self.block = block
        self.n_bytes = n_bytes

    @classmethod
    def from_texts(
        cls,
        texts: Iterable[str],
        tokenizer: Tokenizer,
        block: int,
        *,
        n_tokens: int | None = None,
        cut_share: float = 0.0,
        seed: int = 0,
    ) -> PackedDataset:
        """Encodes documents, each between begin and end tokens, until n_tokens are there.

        Without n_tokens, or with too few documents, all are taken. Of the documents, cut_share are
        encoded in two parts, cut at a character drawn from seed: so a model learns to go on from a
        prompt that ends where the whole text would have one token.
        """
        ids, n_bytes, rng = array("i"), 0, random.Random(seed)
        for text in texts:
            cut = rng.randrange(len(text) + 1) if rng.random() < cut_share else 0
            ids.extend(tokenizer.encode(text[:cut], bos=True))
            ids.extend(tokenizer.encode(text[cut:], eos=True))
            n_bytes += len(text.encode())
            if n_tokens is not None and len(ids) >= n_tokens:
                break
        return cls(torch.tensor(ids, dtype=torch.int32, device="cpu"), block, n_bytes=n_bytes)

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block

    def rows(self, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B,T) int64, of the blocks ``indices``."""
        starts = [index * self.block for index in indices]
        inputs = torch.stack([self.tokens[s : s + self.block] for s in starts])
        targets = torch.stack([self.tokens[s + 1 : s + 1 + self.block] for s in starts])
        return inputs.long(), targets.long()

    def batch(self, indices: Iterable[int]) -> Batch:
        """The blocks one behind another, each a document. The bytes of its text are this share of
        all."""
        inputs, targets = self.rows(indices)
        B, T = inputs.shape
        return Batch(
            tokens=inputs.view(1, -1),
            targets=targets.view(1, -1),
            cu_seqlens=torch.arange(0, B * T + 1, T, dtype=torch.int32, device="cpu"),
            longest=T,
            kept=B * T,
            n_bytes=round(self.n_bytes * B * T / len(self.tokens)),
        )

    def order(self, seed: int, epoch: int) -> list[int]:
        """The blocks of an epoch, each once, shuffled; it depends on the arguments alone."""
        return shuffled(len(self), seed, epoch)

    def fingerprint(self) -> str:
        """A checksum of tokens and block; a training is resumed only with the same data."""
        return f"{zlib.crc32(self.tokens.numpy().tobytes(), self.block):08x}"
