"""Adapters on a model: put on, switched, saved in PEFT's format, loaded, merged, taken off.

    adapter = lora(model, rank=16, alpha=32)
    …                                    # train adapter.parameters()
    with adapter.disabled(): …           # the model as it was
    adapter.save("my-adapter")           # PEFT reads it, and writes what load_adapter reads
    adapter.merge()                      # or adapter.unload(): the model as it was, bit for bit

The modules themselves are in `llama_fast.nn.lora`, the files in `llama_fast.checkpoint.adapter`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint.adapter import ROWS_KEY, adapter_shapes, read_adapter, write_adapter
from ..checkpoint.adapter_config import EMBED_MODULE, HEAD_MODULE, AdapterConfig, Part, parts
from ..checkpoint.adapter_merge import Merge
from ..distributed import is_fully_sharded
from ..distributed.tensor_parallel import refuse_spread
from ..errors import ConfigError
from ..model import Llama
from ..nn.lora import (
    AdaptedEmbedding,
    AdaptedLinear,
    Block,
    LowRank,
    LowRankEmbedding,
    adapted_modules,
    adapter_names,
)
from ..nn.trained_rows import TrainedRows
from ..ops import QuantizedWeight
from ..utils.normal_tensors import normal_tensors
from .places import adapted, dequantize_, extra_parameters, parts_of, put, set_weight

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora(
    model: Llama,
    rank: int = 16,
    alpha: float = 32,
    *,
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all",
    rows: Sequence[int] | None = None,
    modules_to_save: Sequence[str] = (),
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """Puts a new adapter on the model, freezes all other weights, and returns it.

    rank, alpha      s = alpha / rank multiplies B(A x); alpha / √rank with rslora
    dora             rows of W + s·B A have magnitudes of their own, which are trained
    dropout          of the input of A, while the model is in training mode
    targets          "all" seven matrices of a layer, names of them ("q_proj"; also "embed_tokens"
                     and "lm_head"), or a regular expression of Hugging Face's module names
    rows             ids of tokens whose rows are trained in the embedding and in the head: new ones
    modules_to_save  modules that are trained whole: "embed_tokens", "lm_head", "norm",
                     "input_layernorm", "post_attention_layernorm"
    rank_pattern, alpha_pattern   other ranks and alphas, by a regular expression of the names
    name             several adapters are on a model at a time; those that are enabled add up
    dtype            of A, B, magnitudes and rows; modules_to_save have that of the model

    Beside a fully sharded model (`distributed.fully_shard`) each process has all of the adapter;
    dora and modules_to_save are refused there. The weights may be quantised (QLoRA). One which is
    trained whole is a float while the adapter is enabled. Raises ConfigError for settings that
    do not fit the model.
    """
    if isinstance(targets, str):
        targets = LINEAR if targets == "all" else targets
    new_rows = {"embed_tokens": tuple(rows)} if rows is not None else {}
    if rows is not None and not model.config.tied:
        new_rows["lm_head"] = tuple(rows)
    config = AdapterConfig(
        rank=rank,
        alpha=alpha,
        targets=targets if isinstance(targets, str) else tuple(targets),
        rslora=rslora,
        dora=dora,
        dropout=dropout,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        modules_to_save=tuple(modules_to_save),
        rows=new_rows,
    )
    adapter_shapes(model.config, config)  # raises where they do not fit
    return Adapter(model, config, name, dtype)


def load_adapter(
    model: Llama,
    folder: str | Path,
    *,
    name: str = "default",
    trainable: bool = False,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Puts the adapter of a folder in PEFT's format on the model, enabled, and returns it.

    trainable  whether it is to be trained further; then the model's weights are frozen
    dtype      of its tensors; None: float32 where it is trained, else the model's

    Raises CheckpointError and ConfigError as `checkpoint.adapter.read_adapter` does: a tensor that
    is missing, unknown or of a wrong shape is no adapter of this model.
    """
    config, tensors = read_adapter(folder, model.config)
    if dtype is None:
        dtype = torch.float32 if trainable else model.dtype
    adapter = Adapter(model, config, name, dtype, trainable=trainable)
    adapter.load(tensors)
    return adapter


class Adapter:
    """One adapter on one model; made by `lora` and `load_adapter`.

    name     the one that its modules have it by
    config   its settings
    enabled  whether it takes part
    """

    @normal_tensors()
    def __init__(
        self,
        model: Llama,
        config: AdapterConfig,
        name: str = "default",
        dtype: torch.dtype = torch.float32,
        *,
        trainable: bool = True,
    ) -> None:
        refuse_spread(model, "an adapter")
        if is_fully_sharded(model) and (config.dora or config.modules_to_save):
            raise ConfigError(
                "the model is fully sharded, and beside it low ranks and rows of tokens are "
                "trained: leave dora and modules_to_save out, or load it as a whole"
            )
        if not name.isidentifier():
            raise ConfigError(f"the adapter's name is {name!r}; give letters, digits and _ alone")
        if name in adapter_names(model):
            raise ConfigError(f"the model has an adapter {name!r} already; give another name=")
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype is {dtype}; give a float one")
        self.model, self.config, self.name = model, config, name
        self._on, self._loaded = False, True
        self._frozen = self._freeze() if trainable else []
        self._modules: dict[str, AdaptedLinear | AdaptedEmbedding] = {}
        # Of modules trained whole: the trained weight, and the one that is there without it.
        self._saved: dict[str, tuple[nn.Parameter, nn.Parameter | QuantizedWeight]] = {}
        try:
            for part in parts(model.config):
                self._add(part, dtype)
            for parameter in self.parameters():
                parameter.requires_grad_(trainable)
            for module in self._modules.values():
                module.train(module.training)  # what is new in it too
            self._switch(True)
        except BaseException:
            self._take_off()
            raise

    # --- putting on -------------------------------------------------------------------------

    def _freeze(self) -> list[nn.Parameter]:
        own = {id(p) for m in adapted_modules(self.model).values() for p in extra_parameters(m)}
        frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
        for parameter in frozen:
            parameter.requires_grad_(False)
        return frozen

    def _add(self, part: Part, dtype: torch.dtype) -> None:
        config = self.config
        if config.adapts(part):
            rank, scale = config.rank_of(part.hf), config.scale_of(part.hf)
            module = self._adapted(part.ours)
            if part.is_linear:
                self._add_low_rank(module, part, dtype)
            else:
                module.lora[self.name] = LowRankEmbedding(rank, scale, module.weight, dtype)
        if config.saves(part):
            self._save_whole(part)
        if ids := config.rows_of(part, self.model.config.tied):
            module = self._adapted(part.ours)
            if part.hf == HEAD_MODULE and config.shares_rows(self.model.config.tied):
                module.rows[self.name] = self._modules["embed"].rows[self.name]  # serves both
            else:
                module.rows[self.name] = TrainedRows(ids, module.weight, dtype)

    def _add_low_rank(self, module: AdaptedLinear, part: Part, dtype: torch.dtype) -> None:
        """All blocks of a module at once, when its first part comes."""
        if self.name in module.lora:
            return
        config, row, blocks = self.config, 0, []
        for index, of in enumerate(parts_of(self.model, part.ours)):
            if config.adapts(of):
                rank, scale = config.rank_of(of.hf), config.scale_of(of.hf)
                blocks.append(Block(index, row, of.shape[0], rank, scale))
            row += of.shape[0]
        module.lora[self.name] = LowRank(
            blocks, module.weight, dropout=config.dropout, dora=config.dora, dtype=dtype
        )

    def _adapted(self, name: str) -> AdaptedLinear | AdaptedEmbedding:
        """Returns the module of that name, with adapters, which replaces a plain one."""
        module = self.model.get_submodule(name)
        if not isinstance(module, AdaptedLinear | AdaptedEmbedding):
            module = adapted(self.model, name)
            put(self.model, name, module)
        self._modules[name] = module
        return module

    def _save_whole(self, part: Part) -> None:
        module = self.model.get_submodule(part.ours)
        first = self._saved.get("embed")
        if first is not None and module.weight is first[1]:  # a tied head
            self._saved[part.ours] = first
            return
        weight = module.weight
        values = (
            weight.dequantize(self.model.dtype) if isinstance(weight, QuantizedWeight) else weight
        )
        trained = nn.Parameter(values.detach().clone())
        self._saved[part.ours] = trained, weight

    # --- switching --------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        return self._on

    def enable(self) -> None:
        """Lets it take part. Raises ConfigError where another one has replaced the same weight."""
        self._refuse_unloaded()
        if not self._on:
            self._switch(True)

    def disable(self) -> None:
        """Leaves it on the model, without a part in what is computed."""
        self._refuse_unloaded()
        if self._on:
            self._switch(False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block the model computes as if the adapter were not on it."""
        before = self.enabled
        self.disable()
        try:
            yield
        finally:
            if before:
                self.enable()

    def _switch(self, on: bool) -> None:
        for name, (trained, other) in self._saved.items():
            here = self.model.get_submodule(name).weight
            if here is not (other if on else trained):
                raise ConfigError(
                    f"{name} has another weight than when the adapter {self.name!r} was put on: "
                    "another adapter trains it whole, or it was assigned; disable that one first"
                )
        for name, (trained, other) in self._saved.items():
            set_weight(self.model.get_submodule(name), trained if on else other)
        for module in self._modules.values():
            module.activate(self.name, on)
        self._on = on

    def unload(self) -> None:
        """Takes it off: the model's weights and modules are those that they were, and what was
        frozen can be trained again unless another adapter is left."""
        self.disable()
        self._take_off()

    def _take_off(self) -> None:
        for name, module in self._modules.items():
            module.drop(self.name)
            if not module.names():
                put(self.model, name, module.plain())
        if not adapter_names(self.model):
            for parameter in self._frozen:
                parameter.requires_grad_(True)
        self._loaded = False

    def _refuse_unloaded(self) -> None:
        if not self._loaded:
            raise ConfigError(f"the adapter {self.name!r} is no longer on its model")

    # --- its tensors ------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields (name, parameter), each once: "layers.0.attention.qkv.A" and so on."""
        seen: set[int] = set()
        for name, module in self._modules.items():
            for held in (module.lora, module.rows):
                if self.name in held:
                    for inner, parameter in held[self.name].named_parameters():
                        if id(parameter) not in seen:
                            seen.add(id(parameter))
                            yield f"{name}.{inner}", parameter
        for name, (parameter, _) in self._saved.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.weight", parameter

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named_parameters()]

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Returns views of its tensors by the names of PEFT's files, without their prefix."""
        found: dict[str, Tensor] = {}
        for part in parts(self.model.config):
            if self.config.adapts(part):
                found |= self._low_rank_tensors(part)
            if self.config.saves(part):
                found[f"{part.hf}.weight"] = self._saved[part.ours][0].detach()
            tied = self.model.config.tied
            rows = self.config.rows_of(part, tied)
            if rows and not (part.hf == HEAD_MODULE and self.config.shares_rows(tied)):
                values = self._modules[part.ours].rows[self.name].values
                found[f"{part.hf}.{ROWS_KEY}"] = values.detach()
        return found

    def _low_rank_tensors(self, part: Part) -> dict[str, Tensor]:
        held = self._modules[part.ours].lora[self.name]
        if not part.is_linear:
            names = "lora_embedding_A", "lora_embedding_B"
            return {
                f"{part.hf}.{n}": t.detach() for n, t in zip(names, (held.A, held.B), strict=True)
            }
        at = next(i for i, block in enumerate(held.blocks) if block.row == part.row)
        start = sum(held.ranks[:at])
        found = {
            f"{part.hf}.lora_A.weight": held.A.detach()[start : start + held.ranks[at]],
            f"{part.hf}.lora_B.weight": held.B[at].detach(),
        }
        if self.config.dora:
            found[f"{part.hf}.lora_magnitude_vector"] = held.magnitude[at].detach()
        return found

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copies values in, by the names of `tensors()`."""
        own = self.tensors()
        shared = f"{HEAD_MODULE}.weight", f"{EMBED_MODULE}.weight"
        if set(shared) <= own.keys() and self.model.config.tied:
            self._untie(tensors, *shared)
            own = self.tensors()
        for name, tensor in own.items():
            if name in tensors:
                tensor.copy_(tensors[name])

    def _untie(self, tensors: dict[str, Tensor], head: str, embed: str) -> None:
        """Gives a tied head a weight of its own where the folder has two that differ."""
        if head in tensors and not torch.equal(tensors[head], tensors[embed]):
            trained, other = self._saved["head"]
            own = nn.Parameter(trained.detach().clone(), requires_grad=trained.requires_grad)
            self._saved["head"] = own, other
            if self._on:
                set_weight(self.model.head, own)

    def save(self, folder: str | Path, *, base: str | None = None) -> None:
        """Writes a new folder in PEFT's format: adapter_config.json and adapter_model.safetensors.

        base  the name or folder of the model, which PEFT looks for it by
        Raises as `checkpoint.adapter.write_adapter` does; nothing half-written is left behind.
        """
        config = self.config if base is None else dataclasses.replace(self.config, base=base)
        write_adapter(folder, self.model.config, config, self.tensors())

    @normal_tensors()
    def merge(self) -> None:
        """Makes it part of the model's weights, in float32 and rounded once, and takes it off.

        A quantised model becomes one of floats in `model.dtype`: the adapter fits what the integers
        stand for. To merge into the weights before they were quantised, load those, and the adapter
        on them. A tied model whose embedding and head now differ is tied no longer.
        """
        self._refuse_unloaded()
        if is_fully_sharded(self.model):
            raise ConfigError(
                "the model is fully sharded, so no process has the weights that a merge changes: "
                "save the adapter, and load both in one process"
            )
        others = [x for x in adapter_names(self.model) if x != self.name]
        if others:
            raise ConfigError(f"the adapter {others[0]!r} is on the model too; take it off first")
        merge = Merge(self.model.config, self.config, self.tensors())
        self.unload()
        dequantize_(self.model)
        names = sorted(merge.changed)
        if self.model.config.tied and merge.config.tied:
            names = [name for name in names if name != "head.weight"]
        elif self.model.config.tied:  # the head of its own is the embedding as it was
            weight = self.model.head.weight
            self.model.config = merge.config
            self.model.head.weight = nn.Parameter(
                weight.detach().clone(), requires_grad=weight.requires_grad
            )
        for name in names:
            module = self.model.get_submodule(name.removesuffix(".weight"))
            merged = merge(name, module.weight)
            module.weight = nn.Parameter(merged, requires_grad=module.weight.requires_grad)
        self.model.tie()

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return (
            f"Adapter({self.name!r}, rank {self.config.rank}, {self.n_parameters:,} parameters, "
            f"{state if self._loaded else 'unloaded'})"
        )
