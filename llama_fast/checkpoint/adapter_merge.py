"""A LoRA folded into the weights of its model: in float32 or wider, rounded once.

W' = W + s·B A             DoRA: W' = m / ‖W + s·B A‖ · (W + s·B A), the norm over each row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import LlamaConfig
from .adapter import ROWS_KEY
from .adapter_config import EMBED_MODULE, HEAD_MODULE, AdapterConfig, Part, parts


class Merge:
    """`merge(name, weight)` gives the weight of that name of ours with the adapter in it.

    config   the model's after the merge: not tied where the adapter makes embedding and head differ
    unties   whether it is tied no longer
    changed  the names of the weights that are not what they were
    tensors  by the names of `adapter_shapes`
    """

    def __init__(
        self, config: LlamaConfig, adapter: AdapterConfig, tensors: Mapping[str, Tensor]
    ) -> None:
        self._adapter, self._tensors, self._tied = adapter, tensors, config.tied
        self._parts: dict[str, list[Part]] = {}
        for part in parts(config):
            if adapter.adapts(part) or adapter.saves(part) or adapter.rows_of(part, config.tied):
                self._parts.setdefault(f"{part.ours}.weight", []).append(part)
        self.changed = set(self._parts)
        self.unties = config.tied and self._unties(parts(config))
        self.config = dataclasses.replace(config, tied=False) if self.unties else config

    def _unties(self, known: list[Part]) -> bool:
        embed = next(part for part in known if part.hf == EMBED_MODULE)
        head = next(part for part in known if part.hf == HEAD_MODULE)
        if self._adapter.adapts(embed) or self._adapter.adapts(head):
            return True
        if self._adapter.rows and not self._adapter.shares_rows(True):
            return True
        saved = [self._adapter.saves(part) for part in (embed, head)]
        if saved == [True, True]:
            return not torch.equal(self._saved(embed), self._saved(head))
        return any(saved)

    @torch.no_grad()
    def __call__(self, name: str, weight: Tensor) -> Tensor:
        """weight: the whole one, float → a new one of its dtype; itself where nothing changes."""
        if name not in self._parts:
            return weight
        merged = weight.detach().clone()
        for part in self._parts[name]:
            rows = slice(part.row, part.row + part.shape[0])
            merged[rows] = self._merged(part, weight.detach()[rows]).to(weight.dtype)
        return merged

    def _merged(self, part: Part, weight: Tensor) -> Tensor:
        if self._adapter.saves(part):
            return self._saved(part).to(weight.device)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if ids := self._adapter.rows_of(part, self._tied):
            merged = weight.to(dtype, copy=True)
            index = torch.tensor(ids, device=weight.device)
            merged[index] = self._rows(part).to(merged)
            return merged
        return merged_low_rank(
            weight.to(dtype),
            *self._low_rank(part, weight.device, dtype),
            self._adapter.scale_of(part.hf),
            self._get(f"{part.hf}.lora_magnitude_vector", weight.device, dtype),
        )

    def _low_rank(
        self, part: Part, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """A and B of W + s·B A. Those of an embedding are stored for its transpose."""
        if part.is_linear:
            names = f"{part.hf}.lora_A.weight", f"{part.hf}.lora_B.weight"
            return tuple(self._get(name, device, dtype) for name in names)
        names = f"{part.hf}.lora_embedding_A", f"{part.hf}.lora_embedding_B"
        a, b = (self._get(name, device, dtype) for name in names)
        return b.t(), a.t()

    def _saved(self, part: Part) -> Tensor:
        own = self._tensors.get(f"{part.hf}.weight")
        return self._tensors[f"{EMBED_MODULE}.weight"] if own is None else own  # stored once, tied

    def _rows(self, part: Part) -> Tensor:
        hf = EMBED_MODULE if self._adapter.shares_rows(self._tied) else part.hf
        return self._tensors[f"{hf}.{ROWS_KEY}"]

    def _get(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.detach().to(device, dtype)


def merged_low_rank(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None
) -> Tensor:
    """Returns W + s·B A of W (out, in), A (r, in), B (out, r), all of one dtype; with a magnitude
    (out,) each row scaled to that length."""
    merged = torch.addmm(weight, B, A, alpha=scale)
    if magnitude is None:
        return merged
    return merged * (magnitude / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
