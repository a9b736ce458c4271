"""What the adapter_config.json of a LoRA in PEFT's format says, and which matrices it means.

PEFT's own names are used: "model.layers.0.self_attn.q_proj" is a module of a Hugging Face Llama.
Legend of dims: C model dim, V vocabulary, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import LlamaConfig
from ..errors import ConfigError
from .names import EMBED, HEAD, weights

EMBED_MODULE, HEAD_MODULE = "model.embed_tokens", "lm_head"
ALL_LINEAR = "all-linear"  # PEFT's word: every linear but the head

# Settings that PEFT writes and that change nothing of what is computed.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode",
    "loftq_config", "megatron_core", "modules_to_tie", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save",
    "trainable_token_indices",
}  # fmt: skip
# First values of A and B that leave W as it is; others (PiSSA, OLoRA, LoftQ …) fit a changed W.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass(frozen=True)
class Part:
    """A published matrix as an adapter sees it.

    hf     its module in a Hugging Face model: "model.layers.0.self_attn.q_proj"
    ours   the module of ours that holds it, and `row` its first row in that module's weight
    shape  (out, in); of the embedding (V, C); of a norm (C,)
    """

    hf: str
    ours: str
    row: int
    shape: tuple[int, ...]

    @property
    def is_linear(self) -> bool:
        return len(self.shape) == 2 and self.hf != EMBED_MODULE


def parts(config: LlamaConfig) -> list[Part]:
    """Returns every matrix and norm of a model, the head of a tied one too."""
    found = [
        Part(w.hf.removesuffix(".weight"), w.ours.removesuffix(".weight"), w.row, w.shape)
        for w in weights(config)
    ]
    if config.tied:
        shape = (config.vocab_size, config.dim)
        found.append(Part(HEAD_MODULE, HEAD.removesuffix(".weight"), 0, shape))
    assert found[0].ours == EMBED.removesuffix(".weight")
    return found


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA: y = W x + s·B(A x), s = alpha/rank, or alpha/√rank with rslora.

    targets          names of modules ("q_proj"), a regular expression of whole names, or
                     "all-linear"
    exclude          names or a regular expression of modules that are left out
    layers           the only layers that are adapted; None: all
    rank_pattern, alpha_pattern   other ranks and alphas, by a regular expression of the names
    modules_to_save  modules that are trained whole: "embed_tokens", "lm_head", "norm" …
    rows             ids of tokens whose rows are trained, by module: {"embed_tokens": (128256,)}
    base             the name or folder of the model it belongs to
    """

    rank: int = 16
    alpha: float = 32
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    base: str | None = None

    def __post_init__(self) -> None:
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ConfigError(f"{name}: the rank is {rank!r}; it must be a whole number from 1")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not number or not math.isfinite(alpha) or alpha == 0:
                raise ConfigError(f"{name}: alpha is {alpha!r}; it must be a number other than 0")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")
        for regex in (self.targets, self.exclude, *self.rank_pattern, *self.alpha_pattern):
            if isinstance(regex, str):
                _compiled(regex)
        for name, ids in self.rows.items():
            if not ids or len(set(ids)) != len(ids) or any(not isinstance(i, int) for i in ids):
                raise ConfigError(
                    f"rows of {name}: the token ids are {list(ids)[:8]}; give whole numbers, at "
                    "least one and each once"
                )

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        return self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha)

    def scale_of(self, module: str) -> float:
        """Returns s, which B(A x) is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, part: Part) -> bool:
        """Whether it has an A and a B."""
        module = part.hf
        if len(part.shape) != 2 or _named(self.exclude, module) or self._saves(module):
            return False
        if self.targets == ALL_LINEAR:
            return part.is_linear and module != HEAD_MODULE
        return _named(self.targets, module) and self._in_layers(module)

    def saves(self, part: Part) -> bool:
        """Whether it is trained whole."""
        return self._saves(part.hf)

    def _saves(self, module: str) -> bool:
        return any(module == name or module.endswith(f".{name}") for name in self.modules_to_save)

    def rows_of(self, part: Part, tied: bool) -> tuple[int, ...]:
        """Returns the ids of its rows that are trained. On a tied model those of the embedding are
        the head's too, unless the head is named."""
        found = self._rows_of(part.hf)
        if not found and tied and part.hf == HEAD_MODULE:
            return self._rows_of(EMBED_MODULE)
        return found

    def shares_rows(self, tied: bool) -> bool:
        """Whether one tensor is the trained rows of the embedding and of the head."""
        embed, head = self._rows_of(EMBED_MODULE), self._rows_of(HEAD_MODULE)
        return tied and bool(embed) and head in ((), embed)

    def _rows_of(self, module: str) -> tuple[int, ...]:
        named = (ids for n, ids in self.rows.items() if module == n or module.endswith(f".{n}"))
        return next(named, ())

    def _in_layers(self, module: str) -> bool:
        if self.layers is None or isinstance(self.targets, str):
            return True
        for pattern in self.layers_pattern or (r"[^.]*",):
            if found := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                return int(found[1]) in self.layers
        return False


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and _compiled(names).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first of the patterns that the end of the module's name matches, as PEFT chooses it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), module)


def _compiled(regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise ConfigError(f"{regex!r} is no regular expression of module names: {error}") from None


def to_peft(config: AdapterConfig, tied: bool) -> dict[str, Any]:
    """Returns what adapter_config.json says, in PEFT's words."""
    rows: Any = {name: list(ids) for name, ids in config.rows.items()} or None
    if config.shares_rows(tied):
        rows = next(iter(rows.values()))  # a list: PEFT trains the head with the embedding
    targets = config.targets
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "exclude_modules": _listed(config.exclude),
        "layers_to_transform": _listed(config.layers),
        "layers_pattern": _listed(config.layers_pattern),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": _listed(config.modules_to_save),
        "trainable_token_indices": rows,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _listed(value: str | tuple | None) -> str | list | None:
    return value if isinstance(value, str) and value else list(value) if value else None


def from_peft(said: Mapping[str, Any], where: str) -> AdapterConfig:
    """Returns the settings of an adapter_config.json, `said`, of the file `where`.

    Raises ConfigError for another kind of adapter, for what this package cannot compute (a bias,
    replicated layers, other variants), and for settings of the wrong type.
    """
    if said.get("peft_type") != "LORA":
        raise ConfigError(
            f"{where}: peft_type is {said.get('peft_type')!r}; llama_fast reads LORA adapters"
        )
    if said.get("bias", "none") != "none" or said.get("lora_bias"):
        raise ConfigError(f"{where}: it trains biases, which a Llama 3 has none of; train without")
    if said.get("fan_in_fan_out"):
        raise ConfigError(f"{where}: fan_in_fan_out is set, so it is no adapter of a Llama")
    if (start := said.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise ConfigError(
            f"{where}: init_lora_weights is {start!r}, which changes the model's own weights; "
            "convert it to a plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    handled = _HARMLESS | _READ | {"bias", "lora_bias", "fan_in_fan_out", "init_lora_weights"}
    for key, value in said.items():
        if key not in handled and value not in (None, False, [], {}, ""):
            raise ConfigError(
                f"{where}: {key} is {value!r}, a variant of LoRA that llama_fast does not compute; "
                "merge the adapter with PEFT (merge_and_unload) and load the merged model"
            )
    try:
        return _settings(said)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        known = isinstance(error, ConfigError)
        text = str(error) if known else f"its settings are malformed: {error}"
        raise ConfigError(f"{where}: {text}") from None


def _settings(said: Mapping[str, Any]) -> AdapterConfig:
    rows = said.get("trainable_token_indices") or {}
    if not isinstance(rows, dict):
        rows = {"embed_tokens": rows}
    layers = said.get("layers_to_transform")
    pattern = said.get("layers_pattern") or ()
    return AdapterConfig(
        rank=said["r"],
        alpha=said["lora_alpha"],
        targets=_names(said.get("target_modules")),
        exclude=_names(said.get("exclude_modules")),
        layers=None if layers in (None, []) else _numbers(layers),
        layers_pattern=(pattern,) if isinstance(pattern, str) else (*pattern,),
        rslora=bool(said.get("use_rslora")),
        dora=bool(said.get("use_dora")),
        dropout=said.get("lora_dropout", 0.0),
        rank_pattern=dict(said.get("rank_pattern") or {}),
        alpha_pattern=dict(said.get("alpha_pattern") or {}),
        modules_to_save=(*(said.get("modules_to_save") or ()),),
        rows={name: (*ids,) for name, ids in rows.items()},
        base=said.get("base_model_name_or_path"),
    )


def _numbers(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else (*map(int, value),)


def _names(value: Any) -> str | tuple[str, ...]:
    if value is None or isinstance(value, str):
        return value or ()
    names = (*value,)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names of modules are {value!r}")
    return names
