"""One forward pass, watched: the tensors of its steps, and the calls that made them.

Tensors come from hooks on the model's modules, and calls from the launches of ops. Both are gone
when the pass ends, however it ends. The pass runs the kernels that it runs without being watched.

Legend of dims: B batch, T query tokens, S key tokens, H query heads, K KV heads, D head dim,
C model dim, F hidden dim, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..dispatch import Op, wrapped_launches
from ..ops import documents
from ..ops.attention import valid_only, visible
from ..ops.quantized_kv import dequantize
from .launches import DeviceClock, HostClock, Observer, clock_of
from .parts import Part, Parts

# Parts that are made of others.
CONTAINERS = ("attention", "mlp")
NORMS = ("rms_norm", "add_rms_norm")
# One pass is watched at a time: what sees the launches is shared by all threads.
_one_at_a_time = threading.RLock()


@dataclass
class Call:
    """What made one step or several.

    op        the op with its variant, "linear swiglu"; or the module that called torch's own ops
    backend   that served it: "cpu", "cuda", "triton", "eager"; "torch" where no op did
    seconds   on a GPU the device's own
    bytes     that it had to move at least; None where no op says so
    """

    op: str
    backend: str
    seconds: float = 0.0
    bytes: int | None = None


@dataclass
class Step:
    """A tensor of the pass.

    letters   its shape in the letters of docs/shapes.md: "BTHD"
    call      what made it; None where no op did
    recomputed  from other steps, since the pass did not store it
    """

    name: str
    letters: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    call: Call | None
    tensor: Callable[[], Tensor]
    recomputed: bool = False


@dataclass
class Attended:
    """A layer's attention as it was called.

    q (B,T,H,D) after the rotation, keys and values (B,S,K,D) of all that is attended to, o
    (B,T,H,D), seen: bool (B or 1, 1, T, S)
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    o: Tensor
    scale: float
    seen: Tensor
    call: Call


@dataclass
class Pass:
    """What a watched pass gave: steps by name, calls in their order, attention by layer."""

    steps: dict[str, Step] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    attended: dict[int, Attended] = field(default_factory=dict)
    seconds: float = 0.0

    def keep(
        self,
        name: str,
        letters: str,
        tensor: Tensor,
        call: Call | None,
        recomputed: bool = False,
    ) -> None:
        kept = tensor.detach()
        self.steps[name] = Step(
            name, letters, tuple(kept.shape), kept.dtype, call, lambda: kept, recomputed
        )


def watch(
    model: nn.Module, parts: Parts, tokens: Tensor, cache: Any, layers: frozenset[int]
) -> Pass:
    """Runs the model once. Of layers that are not in `layers` it keeps the residual stream."""
    clock = clock_of(tokens.device)
    watcher = _Watcher(parts, clock, layers, cached=cache is not None)
    with _one_at_a_time, ExitStack() as stack:
        stack.enter_context(wrapped_launches(watcher.launch))
        stack.enter_context(_hooks(parts, watcher))
        if any(_is_compiled(module) for module in model.modules()):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if not parts.own:
            stack.enter_context(_TorchAttention(watcher))
        start = clock.now()
        if parts.own:
            logits = model(tokens, cache=cache)
        else:
            logits = model(tokens, past_key_values=cache, use_cache=cache is not None).logits
        end = clock.now()
    clock.wait()
    done = watcher.done
    done.seconds = clock.seconds(start, end)
    for call, stamps in watcher.stamps:
        call.seconds = clock.seconds(*stamps)
    done.keep("logits", "BTV", logits, watcher.made.get(Part("head")))
    return done


def _is_compiled(module: nn.Module) -> bool:
    """Whether it is torch.compile's wrapper of a module, or was compiled in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def _hooks(parts: Parts, watcher: _Watcher) -> Iterator[None]:
    with ExitStack() as stack:
        for module, part in parts.hooked():
            enter, leave = watcher.enter(part), watcher.leave(part)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


class _Running(NamedTuple):
    """A module that is running, its start, and the calls of ops made in it so far."""

    part: Part
    start: Any
    calls: list[Call]


class _Watcher(Observer):
    def __init__(
        self, parts: Parts, clock: HostClock | DeviceClock, layers: frozenset[int], cached: bool
    ) -> None:
        self.parts, self.clock, self.layers, self.cached = parts, clock, layers, cached
        self.thread = threading.get_ident()
        self.norms = parts.norms()
        self.done = Pass()
        self.stamps: list[tuple[Call, tuple]] = []
        self.running: list[_Running] = []
        self.made: dict[Part, Call] = {}  # by the part, or by the op that has no part of its own

    def watches(self) -> bool:
        return threading.get_ident() == self.thread

    def keep(self, part: Part, name: str, letters: str, tensor: Tensor, call: Call | None) -> None:
        if part.layer is None or part.layer in self.layers:
            self.done.keep(part.step(name), letters, tensor, call)

    def called(self, op: str, backend: str, start: Any) -> Call:
        call = Call(op, backend)
        self.stamps.append((call, (start, self.clock.now())))
        self.done.calls.append(call)
        if self.running:
            self.running[-1].calls.append(call)
        return call

    # Modules, by hooks

    def enter(self, part: Part) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            if self.watches():
                self.running.append(_Running(part, self.clock.now(), []))

        return hook

    def leave(self, part: Part) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not self.watches():
                return
            _, start, calls = self.running.pop()
            if part.role in CONTAINERS:
                return
            call = calls[-1] if calls else self.called(_torch_name(part.role), "torch", start)
            self.made[part] = call
            if not part.role.endswith("norm"):
                self.see_output(part, args[0], output, call)
            elif not calls:
                self.see_norm(part, args[0], output, call)

        return hook

    def see_output(self, part: Part, x: Tensor, y: Tensor, call: Call) -> None:
        """x and y are what a module of that part was given, and gave."""
        role, layer = part
        if role == "embedding":
            self.keep(part, "embedding", "BTC", y, call)
        elif role == "qkv":
            q, k, v = y.unflatten(-1, (-1, self.parts.head_dim)).split(self.parts.heads, dim=-2)
            self.keep(part, "attention.q", "BTHD", q, call)
            self.keep(part, "attention.k", "BTKD", k, call)
            self.keep(part, "attention.v", "BTKD", v, call)
        elif role[0] in "qkv" and role[1:] in ("", "_per_head"):
            letters = "BTHD" if role[0] == "q" else "BTKD"
            heads = y.view(*x.shape[:2], -1, self.parts.head_dim)
            self.keep(part, f"attention.{role[0]}", letters, heads, call)
        elif role == "attention_output":
            self.keep(part, "attention.output", "BTC", y, call)
        elif role in ("gate", "up"):
            self.keep(part, f"mlp.{role}", "BTF", y, call)
        elif role == "down":
            made = self.made.get(Part("gate_up", layer)) or self.made.get(Part("swiglu", layer))
            self.keep(part, "mlp.hidden", "BTF", x, made)
            self.keep(part, "mlp.output", "BTC", y, call)

    def see_norm(self, part: Part, x: Tensor, y: Tensor, call: Call) -> None:
        """x is the residual stream, which is kept of every layer, and y its norm."""
        if part.role == "norm":
            self.done.keep("residual", "BTC", x, call)
            self.done.keep("norm", "BTC", y, call)
        elif part.role == "attention_norm":
            self.done.keep(part.step("input"), "BTC", x, call)
            self.keep(part, "attention.norm", "BTC", y, call)
        else:
            self.keep(part, "mlp.input", "BTC", x, call)
            self.keep(part, "mlp.norm", "BTC", y, call)

    # Ops, by their launches

    def see(self, op: Op, backend: str, launch: Callable[..., Any], args: tuple) -> Any:
        start = self.clock.now()
        results = launch(*args)
        call = self.called(op.label(*args), backend, start)
        call.bytes = op.cost(*args).bytes if op.cost is not None else None
        if op.name in NORMS:
            part = self.norms.get(args[NORMS.index(op.name) + 1].data_ptr())
            if part is not None:
                y, x = (results, args[0]) if op.name == "rms_norm" else results
                self.see_norm(part, x, y, call)
        elif self.running:
            part = self.running[-1].part
            if op.name in ("rope", "kv_append"):
                self.made[Part("rotation", part.layer)] = call
            elif op.name == "swiglu":
                self.made[Part("swiglu", part.layer)] = call
            elif op.name == "attention" and part.role == "attention":
                self.see_attention(part, args, results[0], call)
        return results

    def see_attention(self, part: Part, args: tuple, o: Tensor, call: Call) -> None:
        q, k, v, causal, scale, lengths, _, k_scale, v_scale, cu_seqlens = args
        if k_scale is not None:
            k, v = dequantize(k, k_scale, q.dtype), dequantize(v, v_scale, q.dtype)
        S = k.shape[1] if lengths is None else max(1, int(lengths.max()))
        seen = visible(q.shape[1], k.shape[1], causal, lengths, q.device)[:, 0, :, :, :S]
        if cu_seqlens is not None:
            seen = seen & documents.same(cu_seqlens, S)
        k, v = (valid_only(x[:, :S], lengths) for x in (k, v))
        self.keep_attention(part, Attended(q, k, v, o, scale or q.shape[-1] ** -0.5, seen, call))

    def keep_attention(self, part: Part, attended: Attended) -> None:
        if part.layer not in self.layers:
            return
        if self.cached:  # whose memory later passes write
            attended.keys, attended.values = attended.keys.clone(), attended.values.clone()
        self.done.attended[part.layer] = attended
        rotation = self.made.get(Part("rotation", part.layer))
        self.keep(part, "attention.q_rotated", "BTHD", attended.q, rotation)
        self.keep(part, "attention.keys", "BSKD", attended.keys, rotation)
        value = self.made.get(Part("qkv", part.layer)) or self.made.get(Part("v", part.layer))
        self.keep(part, "attention.values", "BSKD", attended.values, value)
        self.keep(part, "attention.heads", "BTHD", attended.o, attended.call)


class _TorchAttention(TorchFunctionMode):
    """Sees torch's own attention, which a model of transformers calls where no op serves it."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        watcher = self.watcher
        if function is not F.scaled_dot_product_attention or not watcher.running:
            return function(*args, **kwargs)
        start = watcher.clock.now()
        o = function(*args, **kwargs)
        call = watcher.called("attention", "torch", start)
        part = watcher.running[-1].part
        if part.role == "attention":
            self.see(part, o, call, *args, **kwargs)
        return o

    def see(
        self,
        part: Part,
        o: Tensor,  # (B,H,T,D), as query
        call: Call,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        T, S = query.shape[2], key.shape[2]
        if attn_mask is None:
            seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=query.device)
            seen = seen.tril() if is_causal else seen
        else:
            seen = attn_mask
            if seen.dtype is not torch.bool:  # numbers to add, the lowest where nothing is seen
                seen = seen > torch.finfo(seen.dtype).min
        # transformers repeats the KV heads for the queries that share them.
        repeats = key.shape[1] // self.watcher.parts.heads[1]
        q, k, v, o = (x.transpose(1, 2) for x in (query, key[:, ::repeats], value[:, ::repeats], o))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.watcher.keep_attention(part, Attended(q, k, v, o, scale, seen, call))


def _torch_name(role: str) -> str:
    if role.endswith("norm") or role.endswith("per_head"):
        return "rms_norm"
    return "embedding" if role == "embedding" else "linear"
