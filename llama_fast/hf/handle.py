"""Patching a transformers model in place, and the handle that takes it back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import explain
from ..errors import PatchError
from . import attention, forwards, structure, verify
from .report import Report, Row

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
OPS = (
    "rms_norm",
    "add_rms_norm",
    "rope",
    "attention",
    "swiglu",
    "linear",
    "linear_cross_entropy",
)
HANDLE = "_llama_fast_patch"  # where a patched model keeps its handle


class Change(NamedTuple):
    """An entry of a module's `__dict__`: what was there before, if anything, and what is now."""

    module: nn.Module
    name: str
    had: bool
    before: Any
    after: Any


class Patch:
    """A patched model: `remove()` takes the patch back, and so does leaving a `with` block.

    model   the model that was patched
    report  what was replaced in which module, by which op and backend, and what was left alone
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report()
        self._changes: list[Change] = []
        self._configs: list[tuple[Any, Any, dict[str, Any]]] = []

    @property
    def active(self) -> bool:
        return bool(self._changes)

    def remove(self) -> None:
        """Puts back the very objects that were there before. A second call does nothing.

        Raises PatchError, and changes nothing, where other code has since put something of its own
        in the place of what the patch had put there: that has to be taken back first.
        """
        for module, name, _, _, after in self._changes:
            now = vars(module).get(name)
            if now is not after:
                raise PatchError(
                    f"{name!r} of a {type(module).__name__} was replaced by other code after the "
                    f"patch (it is {now!r}): take that back first, then call remove() again"
                )
        for original, given, before in self._configs:
            _carry_over(original, given, before)
        self._take_back()

    def verify(
        self, inputs: Tensor | dict[str, Any], *, tolerance: float | None = None
    ) -> verify.Verification:
        """Runs the model with and without the patch and compares what its modules return.

        inputs     the ids (B,T) int64, or the keyword arguments of the model
        tolerance  the largest relative difference of a module's output; by dtype when None
        Returns a `Verification`. The model is in evaluation mode meanwhile, without gradients.
        Raises PatchError when the patch has been removed.
        """
        if not self.active:
            raise PatchError("the patch has been removed: there is nothing to verify")
        kwargs = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
        # A hook on a norm that is one kernel with the sum before it would part the two.
        fused = {
            id(change.module.post_attention_layernorm)
            for change in self._changes
            if forwards.function_of(change.module) is forwards.add_rms_norm_layer
        }
        modules = {n: m for n, m in self.model.named_modules() if n and id(m) not in fused}
        training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with torch.no_grad():
                with verify.recorded(modules) as patched:
                    patched_logits = getattr(self.model(**kwargs), "logits", None)
                with self._suspended(), verify.recorded(modules) as own:
                    own_logits = getattr(self.model(**kwargs), "logits", None)
        finally:
            for module, mode in training.items():
                module.training = mode
        return verify.compare(own, patched, (own_logits, patched_logits), tolerance)

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        """Inside the block, the model is as it was before the patch."""
        for change in reversed(self._changes):
            _undo(change)
        try:
            yield
        finally:
            for change in self._changes:
                vars(change.module)[change.name] = change.after

    def _take_back(self) -> None:
        while self._changes:
            _undo(self._changes.pop())
        self._configs.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
        return f"<Patch of {type(self.model).__name__}, {state}, {len(self.report)} rows>"

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        own = vars(module)
        self._changes.append(Change(module, name, name in own, own.get(name), value))
        own[name] = value


def _undo(change: Change) -> None:
    if change.had:
        vars(change.module)[change.name] = change.before
    else:
        del vars(change.module)[change.name]


def _carry_over(original: Any, given: Any, before: dict[str, Any]) -> None:
    """Settings that were changed on the patched model's config stay changed."""
    for name, value in vars(given).items():
        if name not in before or before[name] is not value:
            vars(original)[name] = value


def patch(model: nn.Module, *, ops: Iterable[str] | None = None, strict: bool = False) -> Patch:
    """Lets the ops of this package serve a transformers model; the model is changed in place.

    model   a Llama, Mistral, Qwen2 or Qwen3 model of transformers, its base model or one with
            another head, or a module that holds one, such as a PEFT model
    ops     the names of the ops to use; all of them when None: "rms_norm", "add_rms_norm", "rope",
            "attention", "swiglu", "linear", "linear_cross_entropy"
    strict  whether a module that an op was meant for and that has to be left alone is an error
    Returns the handle that takes it back. Nothing outside of this model changes: no class, no
    module of transformers, and no config that another model may share.
    Raises PatchError for a model that is not supported or is patched already, for unknown names in
    `ops`, and under `strict`; the model is then as it was.
    """
    wanted = _wanted(ops)
    if not isinstance(model, nn.Module):
        raise PatchError(f"patch() takes a model, a torch.nn.Module; given {type(model).__name__}")
    for name, module in model.named_modules():
        if HANDLE in vars(module) or forwards.function_of(module) is not None:
            raise PatchError(
                f"the model is patched already (at {name or 'its root'}): use the handle that "
                "patch() returned, or call its remove() first"
            )
    patched = Patch(model)
    try:
        _apply(patched, wanted)
        if strict and patched.report.left_alone:
            raise PatchError(
                "strict=True, and not everything could be replaced:\n"
                + "\n".join(
                    f"  {row.module} ({row.kind}), {row.op}: {row.reason}"
                    for row in patched.report.left_alone
                )
            )
        patched._set(model, HANDLE, patched)
    except BaseException:
        patched._take_back()
        raise
    return patched


def _wanted(ops: Iterable[str] | None) -> set[str]:
    if ops is None:
        return set(OPS)
    wanted = {ops} if isinstance(ops, str) else set(ops)
    if unknown := sorted(map(str, wanted - set(OPS))):
        raise PatchError(
            f"no op that patch() uses is named {', '.join(unknown)}; there are {', '.join(OPS)}"
        )
    return wanted


def _decoders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The stacks of decoder layers in the model that belong to a supported model type."""
    found, others = [], []
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and config is not None:
            kind = getattr(config, "model_type", None)
            (found if kind in MODEL_TYPES else others).append((name, module, kind))
    if not found:
        kinds = sorted({str(kind) for _, _, kind in others})
        given = f"its model type is {', '.join(kinds)}" if kinds else "it has no decoder layers"
        raise PatchError(
            f"{type(model).__name__} cannot be patched: {given}; supported are transformers models "
            f"of the types {', '.join(MODEL_TYPES)}"
        )
    return [(name, module) for name, module, _ in found]


def _apply(patched: Patch, wanted: set[str]) -> None:
    differences: dict[tuple, str | None] = {}

    def differs(module: nn.Module, ours: Callable[..., Any]) -> str | None:
        key = (type(module), ours)
        if key not in differences:
            differences[key] = structure.difference(module, ours)
        return differences[key]

    def replace(name: str, module: nn.Module, op: str, ours: Callable[..., Any], args: Any) -> bool:
        """Gives the module our forward, or says in the report why not."""
        if op not in wanted:
            return False
        reason = _foreign(module) or (ours in structure.STAND_INS and differs(module, ours)) or None
        backend = None
        if reason is None:
            backend, reason = _backend(op, args(module))
        patched.report.rows.append(Row(name, type(module).__name__, op, backend, reason))
        if reason is None:
            patched._set(module, "forward", forwards.Forward(ours, module))
        return reason is None

    decoders = _decoders(patched.model)
    for prefix, decoder in decoders:
        inside = f"{prefix}." if prefix else ""
        for i, layer in enumerate(decoder.layers):
            name = f"{inside}layers.{i}"
            for part, module in layer.named_modules(prefix=name):
                _replace_part(part, module, replace)
            norm = getattr(layer, "post_attention_layernorm", None)
            if norm is not None and "add_rms_norm" in wanted:
                replace(name, layer, "add_rms_norm", forwards.add_rms_norm_layer, _of_add_norm)
        if (norm := getattr(decoder, "norm", None)) is not None:
            _replace_part(f"{inside}norm", norm, replace)
        if "attention" in wanted:
            _use_attention(patched, prefix, decoder)
    bodies = {id(decoder) for _, decoder in decoders}
    for name, module in patched.model.named_modules():
        head = getattr(module, "lm_head", None)
        if isinstance(head, nn.Module) and id(getattr(module, "model", None)) in bodies:
            _replace_part(f"{name}.lm_head" if name else "lm_head", head, replace)
            replace(name, module, "linear_cross_entropy", forwards.causal_lm_loss, _of_loss)


def _replace_part(name: str, module: nn.Module, replace: Callable[..., bool]) -> None:
    if hasattr(module, "variance_epsilon") and hasattr(module, "weight"):
        replace(name, module, "rms_norm", forwards.rms_norm, _of_norm)
    elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        replace(name, module, "swiglu", forwards.swiglu, _of_mlp)
    elif all(hasattr(module, part) for part in ("q_proj", "k_proj", "v_proj", "o_proj")):
        replace(name, module, "rope", forwards.rope_attention, _of_rope)
    elif isinstance(module, nn.Linear):
        replace(name, module, "linear", forwards.linear, _of_linear)


def _foreign(module: nn.Module) -> str | None:
    """Why a module is not as its class made it."""
    own = vars(module).get("forward")
    if own is not None and not (
        isinstance(own, MethodType)
        and own.__self__ is module
        and own.__func__ is type(module).forward
    ):
        return f"other code has replaced its forward (by {own!r})"
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return "it is no plain torch.nn.Linear"
        if module.bias is not None:
            return "it has a bias, which the op has not"
    return None


def _backend(op: str, args: tuple) -> tuple[str | None, str | None]:
    """The backend that serves the op for such arguments; or the reason why none but eager does."""
    if any(isinstance(arg, Tensor) and arg.is_meta for arg in args):
        return "meta", None  # decided when the weights have come
    decision = explain(op, *args)
    if decision.chosen != "eager":
        return decision.chosen, None
    reasons = [r for name, why in decision.reasons.items() if name != "eager" for r in why]
    return None, "no kernel serves it: " + ("; ".join(reasons) or f"none for {decision.device}")


def _like(parameter: Tensor, *shape: int) -> Tensor:
    """A tensor of the parameter's dtype and device: backends are chosen by these and the shape."""
    return torch.empty(shape, dtype=parameter.dtype, device=parameter.device)


def _of_norm(module: nn.Module) -> tuple:
    C = module.weight.shape[-1]
    return _like(module.weight, 1, C), _like(module.weight, C), module.variance_epsilon


def _of_add_norm(layer: nn.Module) -> tuple:
    x, weight, eps = _of_norm(layer.post_attention_layernorm)
    return x, x, weight, eps


def _of_mlp(module: nn.Module) -> tuple:
    h = _like(next(module.parameters()), 1, 8)
    return h, h


def _of_rope(module: nn.Module) -> tuple:
    weight = next(module.parameters())
    q = _like(weight, 1, 1, 1, module.head_dim)
    table = torch.empty(1, module.head_dim // 2, dtype=torch.float32, device=weight.device)
    return q, q, table, table


def _of_attention(module: nn.Module) -> tuple:
    q = _like(next(module.parameters()), 1, 1, 1, module.head_dim)
    return q, q, q


def _of_linear(module: nn.Linear) -> tuple:
    return _like(module.weight, 1, 8), _like(module.weight, 1, 8)


def _of_loss(module: nn.Module) -> tuple:
    x = _like(module.lm_head.weight, 1, 8)
    return x, x, torch.zeros(1, dtype=torch.int64, device=x.device)


def _use_attention(patched: Patch, prefix: str, decoder: nn.Module) -> None:
    """Gives the decoder, and what holds it, a config of its own that names our attention."""
    config = decoder.config
    modules = {
        name: module
        for name, module in decoder.layers.named_modules()
        if getattr(module, "config", None) is config and hasattr(module, "is_causal")
    }
    if not modules:
        return
    name, module = next(iter(modules.items()))
    backend, reason = _backend("attention", _of_attention(module))
    if not getattr(decoder, "_supports_attention_backend", False):
        reason = f"{type(decoder).__name__} does not take attention functions"
    base = f"{prefix}.layers" if prefix else "layers"
    for name, module in modules.items():
        row = Row(f"{base}.{name}", type(module).__name__, "attention", backend, reason)
        patched.report.rows.append(row)
    if reason is not None:
        return
    # A copy: the config may be shared with a model that is not to be patched.
    given = copy.copy(config)
    given._attn_implementation = attention.NAME
    for module in patched.model.modules():
        if vars(module).get("config") is config:
            patched._set(module, "config", given)
    patched._configs.append((config, given, dict(vars(given))))
