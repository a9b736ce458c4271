"""The keys and values of past tokens, with a position of its own for each row of the batch.

Prompts of different lengths batch in one prefill by padding on the left: a row whose prompt is n
tokens shorter than the longest starts at length -n, so its padding falls on negative positions,
which are neither stored nor seen, and its first real token has position 0. No slot is wasted and
no token is fed twice.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..dispatch import reserve
from ..errors import ConfigError, PromptError, ShapeError
from ..utils.normal_tensors import normal_tensors

# Names of what a cache may be stored as, where that is not the model's dtype.
KV_CACHES = {"int8": torch.int8}


def cache_dtype(kv_cache: str | None, dtype: torch.dtype) -> torch.dtype:
    """What a cache of this name is stored as; `dtype`, the model's, for None. Raises ConfigError
    for a name that is none of KV_CACHES."""
    if kv_cache is not None and not (isinstance(kv_cache, str) and kv_cache in KV_CACHES):
        raise ConfigError(
            f"kv_cache is {kv_cache!r}; it must be {', '.join(map(repr, KV_CACHES))}, or None to "
            "store keys and values in the model's dtype"
        )
    return dtype if kv_cache is None else KV_CACHES[kv_cache]


class KVCache:
    """Rotated keys and values of every layer, for B sequences of at most `max_seq_len` tokens.

    dtype    the model's; or torch.int8, with a float32 scale for each head's vector
    lengths  (B,) int64 on the device: tokens held by each row; negative while padding is due
    used     the largest length; lengths are known on the host too, so no call asks the device

    A step of a model takes `ahead(T)` and `layer(index, T)`, and calls `advance(T)` when all layers
    have stored their tokens. Where it raises, on a bad token or Ctrl-C, the cache is as it was.

    Takes 2 · layers · B · K · max_seq_len · D elements. Each layer's keys, and its values, are a
    tensor of their own, stored (B, K, S, D): what one head reads is contiguous. Scales are stored
    (B, K, S). One tensor for all layers would be lost to torch.compile: where shapes are dynamic,
    inductor writes every slice of it to where the first one lies.
    """

    @normal_tensors()
    def __init__(
        self,
        batch: int,  # B
        max_seq_len: int,  # S
        *,
        n_layers: int,
        n_kv_heads: int,  # K
        head_dim: int,  # D
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if batch < 1 or max_seq_len < 1:
            raise ShapeError(
                f"a cache for a batch of {batch} and {max_seq_len} tokens was asked for; both must "
                "be at least 1"
            )
        heads = (batch, n_kv_heads, max_seq_len)

        # Left uninitialised: only slots below a row's length are ever read.
        def vectors() -> Tensor:
            return reserve(torch.empty((*heads, head_dim), device=device, dtype=dtype))

        def scales() -> Tensor | None:
            int8 = dtype is torch.int8
            return torch.empty(heads, device=device, dtype=torch.float32) if int8 else None

        self.dtype = dtype
        self._k = [vectors() for _ in range(n_layers)]
        self._v = [vectors() for _ in range(n_layers)]
        self._k_scale = [scales() for _ in range(n_layers)]
        self._v_scale = [scales() for _ in range(n_layers)]
        # Where captured steps count. Only compiled ones leave these alone and put new ones in their
        # place: one that raises may have written anything that it writes.
        self._counted_here = torch.zeros(batch, device=device, dtype=torch.int64)
        self.lengths = self._counted_here
        self._lengths = [0] * batch
        self._max_seq_len = max_seq_len
        self._whole = False
        self._start = 0  # its first row in the cache that it is a part of

    @property
    def used(self) -> int:
        return max(self._lengths)

    @property
    def host_lengths(self) -> list[int]:
        """The lengths, without asking the device."""
        return list(self._lengths)

    @property
    def batch(self) -> int:
        return len(self._lengths)

    @property
    def max_seq_len(self) -> int:
        return self._max_seq_len

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Everything that keys and values are stored in: quantised values and scales apart."""
        return [x for layers in self._stored for x in layers if x is not None]

    @property
    def _stored(
        self,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor | None], list[Tensor | None]]:
        return self._k, self._v, self._k_scale, self._v_scale

    def reset(self, padding: Sequence[int] | None = None) -> None:
        """Forgets everything; row b then expects `padding[b]` tokens of padding first."""
        padding = [0] * self.batch if padding is None else list(padding)
        if len(padding) != self.batch or min(padding) < 0:
            raise ShapeError(
                f"padding is {padding}; it must be one count ≥ 0 for each of the {self.batch} rows"
            )
        self._set_lengths([-count for count in padding])

    def restart(self, row: int, length: int = 0) -> None:
        """Gives one row this length, while the others go on. Its slots below it must have been
        filled, and are taken as they are; a negative length is padding, as in `reset`."""
        self._set_lengths([*self._lengths[:row], length, *self._lengths[row + 1 :]])

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forgets the last tokens of each row b, so that `lengths[b]` are left. Raises ShapeError
        where a row holds fewer."""
        lengths = list(lengths)
        if len(lengths) != self.batch or any(map(operator.gt, lengths, self._lengths)):
            raise ShapeError(
                f"a cache whose rows hold {self._lengths} tokens cannot be truncated to {lengths}; "
                "give each row's length, at most what it holds"
            )
        self._set_lengths(lengths)

    def held(self, row: int) -> dict[str, Tensor]:
        """Returns copies of what a row holds: "k.LAYER", "v.LAYER", (K, length, D), and for 8 bits
        "k_scale.LAYER", "v_scale.LAYER", (K, length) float32."""
        length = max(self._lengths[row], 0)
        return {name: x[row, :, :length].clone() for name, x in self._named()}

    def restore(self, row: int, held: Mapping[str, Tensor]) -> None:
        """Puts what `held` returned into a row, in the place of what it holds. Raises ShapeError
        where it is of another model or form, or there is no room; nothing is changed then."""
        length = held["k.0"].shape[1] if "k.0" in held else -1
        named = dict(self._named())
        wanted = {
            name: (x.dtype, x[row, :, :length].shape)
            for name, x in named.items()
            if 0 <= length <= self.max_seq_len
        }
        if {name: (x.dtype, x.shape) for name, x in held.items()} != wanted:
            raise ShapeError(
                f"keys and values of {length} tokens, {len(held)} tensors, are not what this cache "
                f"of {len(named)} tensors of {self.max_seq_len} slots in {self.dtype} holds; they "
                "are of another model, another kv_cache or a longer context"
            )
        for name, x in named.items():
            x[row, :, :length].copy_(held[name])
        self.restart(row, length)

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for kind, layers in zip(("k", "v", "k_scale", "v_scale"), self._stored, strict=True):
            yield from ((f"{kind}.{n}", x) for n, x in enumerate(layers) if x is not None)

    def rows(self, start: int, stop: int) -> KVCache:
        """Returns a cache of these rows alone, in the same memory. On the host it counts for
        itself: `take_lengths` brings this one up to date."""
        part = copy.copy(self)
        part._k, part._v, part._k_scale, part._v_scale = (
            [x if x is None else x[start:stop] for x in layers] for layers in self._stored
        )
        self._return_lengths()
        part.lengths = part._counted_here = self.lengths[start:stop]
        part._lengths = self._lengths[start:stop]
        part._start = start
        return part

    def first(self, rows: int) -> KVCache:
        """Returns a cache of the first rows alone: see `rows`."""
        return self.rows(0, rows)

    def take_lengths(self, part: KVCache) -> None:
        """Counts what a cache of some rows has counted."""
        part._return_lengths()
        self._lengths[part._start : part._start + part.batch] = part._lengths

    def give_lengths(self, part: KVCache) -> None:
        """The way back of `take_lengths`: a cache of some rows counts what this one has counted."""
        self._return_lengths()
        part._lengths = self._lengths[part._start : part._start + part.batch]

    def ahead(self, T: int) -> Tensor:
        """The lengths after T more tokens, (B,). Raises PromptError where they have no room."""
        if not self._whole:
            self._check_room(T)
        return self.lengths + T

    def advance(self, T: int) -> Tensor:
        """Counts T more tokens in every row; returns the lengths after them, and raises as `ahead`
        does."""
        if self._whole:
            self.lengths += T
            return self.lengths
        lengths = self.ahead(T)
        if torch.compiler.is_compiling():
            self.lengths = lengths
        else:
            self.lengths.copy_(lengths)
        self._lengths = [length + T for length in self._lengths]
        return self.lengths

    def count(self, T: int) -> None:
        """The host's part of `advance`: a step inside of `whole` does the device's part alone."""
        self._check_room(T)
        self._return_lengths()
        self._lengths = [length + T for length in self._lengths]

    def _check_room(self, T: int) -> None:
        if self.used + T > self.max_seq_len:
            raise PromptError(
                f"the cache holds {self.max_seq_len} tokens a row; {self.used} are taken and "
                f"{T} more were given. Make it larger, or shorten the prompt"
            )

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block, `layer` gives all slots, the same memory however long the rows are, and
        `advance` leaves the counting on the host to `count`. A step then depends on no number
        that changes, so that it can be captured, or compiled, once for all lengths."""
        self._return_lengths()
        self._whole = True
        try:
            yield
        finally:
            self._whole = False

    def _set_lengths(self, lengths: list[int]) -> None:
        self._lengths, self.lengths = lengths, self._counted_here
        self.lengths.copy_(torch.tensor(lengths, device="cpu"))

    def _return_lengths(self) -> None:
        """Puts the lengths where captured steps, and the cache that this one is a part of, find
        them."""
        if self.lengths is not self._counted_here:
            self.lengths = self._counted_here.copy_(self.lengths)

    def layer(self, index: int, T: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Keys and values of one layer, (B,S,K,D) views of the slots in use, those of T more tokens
        included; and their scales (B,S,K), where they are in 8 bits."""
        used = self.max_seq_len if self._whole else max(self.used + T, 0)
        return tuple(
            x if x is None else x[:, :, :used].transpose(1, 2)
            for x in (layers[index] for layers in self._stored)
        )
