"""Patching a transformers model in place, and the handle that takes it back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import explain
from ..errors import PatchError
from . import attention, forwards, structure, verify
from .conditions import DTYPES
from .patched import function_of, is_patched, patch_class, replaced_forward, unpatch_class
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
REPORT = "_llama_fast_report"  # where a patched model keeps what was done to it


class Patch:
    """A patched model: `remove()` takes the patch back, and so does leaving a `with` block.

    model   the model that was patched; the handle alone does not keep it
    report  what was replaced in which module, by which op and backend, and what was left alone
    """

    def __init__(self, model: nn.Module, report: Report) -> None:
        self._model = weakref.ref(model)
        self.report = report
        # Modules that were patched, also if they have left the model since.
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # Bound methods of the modules themselves that other code had left in their `forward`.
        self._bound: list[nn.Module] = []

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise PatchError("the patched model is gone: nothing but its patch was kept")
        return model

    @property
    def active(self) -> bool:
        model = self._model()
        return model is not None and REPORT in vars(model)

    def remove(self, *, force: bool = False) -> None:
        """Makes the model what it was before, object by object. A second call does nothing.

        force  takes away what other code has put in the place of a patched forward too

        Raises PatchError, and changes nothing, where other code wraps a patched forward: that has
        to be taken back first, or `force` be given.
        """
        if not self.active:
            return
        modules = self._patched()
        wrapped = [module for module in modules if _wrapped(module)]
        if wrapped and not force:
            module = wrapped[0]
            raise PatchError(
                f"the forward of a {type(module).__name__} was replaced by other code after the "
                f"patch (it is {vars(module)['forward']!r}): take that back first, then call "
                "remove() again; or remove(force=True) takes both away"
            )
        for module in modules:
            if function_of(module) is not None:
                vars(module).pop("forward", None)
            unpatch_class(module)
        for module in self._bound:
            vars(module)["forward"] = MethodType(type(module).forward, module)
        del vars(self.model)[REPORT]

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
            id(module.post_attention_layernorm)
            for module in self._patched()
            if function_of(module) is forwards.add_rms_norm_layer
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

    def _patched(self) -> list[nn.Module]:
        here = dict.fromkeys([*self.model.modules(), *self._modules])
        return [module for module in here if is_patched(module)]

    @contextmanager
    def _suspended(self) -> Iterator[None]:
        """Inside the block, the model is as it was before the patch."""
        classes = [(module, type(module)) for module in self._patched()]
        for module, _ in classes:
            unpatch_class(module)
        try:
            yield
        finally:
            for module, patched in classes:
                module.__class__ = patched

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        model = self._model()
        of = "a model that is gone" if model is None else type(model).__name__
        return f"<Patch of {of}, {'active' if self.active else 'removed'}, {len(self.report)} rows>"

    def _replace(self, module: nn.Module, function: Callable[..., Any] | None) -> None:
        # A model that has its class for the handle alone keeps what other code gave it.
        if function is not None and vars(module).pop("forward", None) is not None:
            self._bound.append(module)
        patch_class(module, function, handle_of if module is self.model else None)
        self._modules.add(module)


def handle_of(model: nn.Module) -> Patch:
    """The handle of a patched model, or of a copy of one."""
    if REPORT not in vars(model):
        raise AttributeError(f"{type(model).__name__} is a part of a patched model")
    return Patch(model, vars(model)[REPORT])


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
        if is_patched(module):
            raise PatchError(
                f"the model is patched already (at {name or 'its root'}): use the handle that "
                "patch() returned, or call its remove() first"
            )
    patched = Patch(model, Report())
    vars(model)[REPORT] = patched.report
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
    except BaseException:
        patched.remove()
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

    def replace(name: str, module: nn.Module, ways: dict[Ops, Way]) -> None:
        """Gives the module the forward of those of its ops that are wanted and can be served, and
        says in the report why others cannot."""
        served = set()
        for op in sorted({op for ops in ways for op in ops} & wanted):
            ours, args = ways[(op,)]
            reason = _foreign(module) or (ours in structure.STAND_INS and differs(module, ours))
            if op == "attention":
                reason = reason or _other_attention(module)
            backend = None
            if not reason:
                backend, reason = _backend(op, module, args, like)
            if not reason:
                served.add(op)
            row = Row(name, type(module).__name__, op, backend, reason or None)
            patched.report.rows.append(row)
        for ops, (ours, _) in ways.items():
            if served == set(ops):
                found[module] = ours

    # Classes change when all has been looked at, for the trials are of the modules' own; and once,
    # wherever a module stands.
    found: dict[nn.Module, Callable[..., Any]] = {}
    decoders = _decoders(patched.model)
    for prefix, decoder in decoders:
        inside, like = f"{prefix}." if prefix else "", _computes_in(decoder)
        for i, layer in enumerate(decoder.layers):
            name = f"{inside}layers.{i}"
            for part, module in layer.named_modules(prefix=name):
                _replace_part(part, module, replace)
            if getattr(layer, "post_attention_layernorm", None) is not None:
                replace(name, layer, LAYER)
        if (norm := getattr(decoder, "norm", None)) is not None:
            _replace_part(f"{inside}norm", norm, replace)
    bodies = {id(decoder) for _, decoder in decoders}
    for name, module in patched.model.named_modules():
        head = getattr(module, "lm_head", None)
        if isinstance(head, nn.Module) and id(getattr(module, "model", None)) in bodies:
            _replace_part(f"{name}.lm_head" if name else "lm_head", head, replace)
            replace(name, module, MODEL)
    for module, ours in found.items():
        patched._replace(module, ours)
    if not is_patched(patched.model):  # its class gives the handle
        patched._replace(patched.model, None)


def _replace_part(name: str, module: nn.Module, replace: Callable[..., None]) -> None:
    if hasattr(module, "variance_epsilon") and hasattr(module, "weight"):
        replace(name, module, NORM)
    elif all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        replace(name, module, MLP)
    elif all(hasattr(module, part) for part in ("q_proj", "k_proj", "v_proj", "o_proj")):
        replace(name, module, ATTENTION)
    elif isinstance(module, nn.Linear):
        replace(name, module, LINEAR)


def _computes_in(decoder: nn.Module) -> Tensor:
    """An empty tensor of the dtype and on the device that the decoder computes in. Its weights may
    be integers, so the floats of its norms say it first; then its config."""
    tensors = [
        tensor
        for module in (getattr(decoder, "norm", None), decoder.layers, decoder)
        if module is not None
        for tensor in (*module.parameters(), *module.buffers())
    ]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtypes = (tensor.dtype for tensor in tensors if tensor.dtype in (*DTYPES, torch.float64))
    dtype = next(dtypes, None)
    if dtype is None:  # the config's name for it was torch_dtype before transformers 5
        named = vars(decoder.config)
        dtype = named.get("dtype") or named.get("torch_dtype") or torch.float32
    return torch.empty(0, dtype=dtype, device=device)


def _wrapped(module: nn.Module) -> bool:
    """Whether other code has put something over a forward of ours."""
    return function_of(module) is not None and replaced_forward(module) is not None


def _foreign(module: nn.Module) -> str | None:
    """Why a module is not as its class made it."""
    if (other := replaced_forward(module)) is not None:
        return f"other code has replaced its forward (by {other!r})"
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            return "it is no plain torch.nn.Linear"
        if module.bias is not None:
            return "it has a bias, which the op has not"
    return None


def _other_attention(module: nn.Module) -> str | None:
    """Why the module's attention function is not one that ours may stand in for."""
    name = module.config._attn_implementation
    if name in (None, attention.NAME, *attention.REPLACED):
        return None
    return f"its config asks for {name!r}; ours stands in for {' and '.join(attention.REPLACED)}"


def _backend(
    op: str, module: nn.Module, args: Callable[..., tuple], like: Tensor
) -> tuple[str | None, str | None]:
    """The backend that serves the op for such arguments; or the reason why none but eager does."""
    try:
        given = args(module, like)
        if any(isinstance(arg, Tensor) and arg.is_meta for arg in given):
            return "meta", None  # decided when the weights have come
        decision = explain(op, *given)
    except Exception as error:  # whatever a module of an unknown kind raises is the reason
        return None, f"what it computes in cannot be told: {error}"
    if decision.chosen != "eager":
        return decision.chosen, None
    reasons = [r for name, why in decision.reasons.items() if name != "eager" for r in why]
    return None, "no kernel serves it: " + ("; ".join(reasons) or f"none for {decision.device}")


# Arguments of the ops as the modules will give them: backends are chosen by dtype, device, shape.


def _of_norm(module: nn.Module, like: Tensor) -> tuple:
    weight = module.weight
    C = weight.shape[-1]
    return weight.new_empty(1, C), weight.new_empty(C), float(module.variance_epsilon)


def _of_add_norm(layer: nn.Module, like: Tensor) -> tuple:
    x, weight, eps = _of_norm(layer.post_attention_layernorm, like)
    return x, x, weight, eps


def _of_mlp(module: nn.Module, like: Tensor) -> tuple:
    h = like.new_empty(1, 8)
    return h, h


def _of_rope(module: nn.Module, like: Tensor) -> tuple:
    q = like.new_empty(1, 1, 1, module.head_dim)
    table = like.new_empty(1, module.head_dim // 2, dtype=torch.float32)
    return q, q, table, table


def _of_attention(module: nn.Module, like: Tensor) -> tuple:
    q = like.new_empty(1, 1, 1, module.head_dim)
    return q, q, q


def _of_linear(module: nn.Linear, like: Tensor) -> tuple:
    return module.weight.new_empty(1, 8), module.weight.new_empty(1, 8)


def _of_loss(module: nn.Module, like: Tensor) -> tuple:
    x = module.lm_head.weight.new_empty(1, 8)
    return x, x, torch.zeros(1, dtype=torch.int64, device=x.device)


# What a kind of module can be given: for each set of ops, its forward, and of one op arguments.
Ops = tuple[str, ...]
Way = tuple[Callable[..., Any], Callable[..., tuple] | None]
NORM = {("rms_norm",): (forwards.rms_norm, _of_norm)}
MLP = {("swiglu",): (forwards.swiglu, _of_mlp)}
LINEAR = {("linear",): (forwards.linear, _of_linear)}
LAYER = {("add_rms_norm",): (forwards.add_rms_norm_layer, _of_add_norm)}
MODEL = {("linear_cross_entropy",): (forwards.causal_lm_loss, _of_loss)}
ATTENTION = {
    ("rope",): (forwards.rope_attention, _of_rope),
    ("attention",): (forwards.fused_attention, _of_attention),
    ("attention", "rope"): (forwards.rope_fused_attention, None),
}
