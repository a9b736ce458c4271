"""Documents become one long row of tokens, cut into blocks of one length.

    <bos> a document <eos> <bos> the next document <eos> …

Block i holds tokens i·T … i·T+T-1 and asks for the ones that follow each, so every token but the
very first is asked for exactly once, and no token is padding. A document may begin in one block and
end in the next, and a block's tokens see all documents before them in the block: what stood before
``<bos>`` is left to the model to ignore (there is no attention mask between documents).
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

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The rows of training step ``step`` (from 0): a new shuffle of all blocks in each epoch.

        The rows depend on the arguments alone, so a resumed training continues with the very rows
        that would have come. An epoch's last rows that fill no batch are left out.
        Raises LlamaFastError if there are fewer blocks than batch_size.
        """
        per_epoch = len(self) // batch_size
        if not per_epoch:
            raise LlamaFastError(
                f"{len(self)} blocks of {self.block} tokens fill no batch of {batch_size}; "
                "give more text, smaller blocks or a smaller batch_size"
            )
        epoch, at = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator, device="cpu")
        return self.rows(order[at * batch_size : (at + 1) * batch_size].tolist())

    def fingerprint(self) -> int:
        """A checksum of tokens and block; a training is resumed only with the same data."""
        return zlib.crc32(self.tokens.numpy().tobytes(), self.block)
