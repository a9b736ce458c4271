"""Which calls of which ops are measured, beside whom, and what they must reach: lists to add to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llama_fast.backends import cuda
from llama_fast.bench import baselines
from llama_fast.bench import measure as speed
from llama_fast.bench.oracle import BACKWARD, BOTH, FORWARD
from llama_fast.bench.results import OURS, Row
from llama_fast.bench.shapes import Work, problem_shapes
from llama_fast.dispatch import OPS

from .goals import (
    COMPILED,
    CUDNN,
    Target,
    bandwidth,
    faster,
    host_time,
    memory_of_logits,
    triton_alone,
)
from .part import measured, said
from .parts import PARTS
from .setting import KERNELS, Setting, Sizes, constant

EAGER = "eager"
# What holds no matrix of scores: the others could not serve the longest prompts.
FUSED = (CUDNN, "torch flash", "flash-attn", "flashinfer")
MEMORY_BOUND = ("rms_norm", "add_rms_norm", "rope", "swiglu")


@dataclass(frozen=True)
class Call:
    """One row.

    rivals  who is timed beside our kernels; None: eager, and everybody who has it
    asked_for  constants of llama_fast.backends.cuda, each of which asks for another way of its
            kernel: it is timed too, where there is a constant of that name
    """

    problem: str
    work: Work
    which: str = FORWARD
    targets: tuple[Target, ...] = ()
    rivals: Sequence[str] | None = None
    asked_for: tuple[str, ...] = ()

    @property
    def op(self) -> str:
        return self.problem.split()[0]


def memory_bound(s: Sizes) -> list[Call]:
    large, small, most = map(Work.prefill, (s.rows, s.few_rows, s.most_rows))
    forward = (bandwidth(0.95), faster(COMPILED))
    return [
        *(Call(name, large, FORWARD, forward) for name in MEMORY_BOUND),
        *(Call(name, Work.training(s.rows), BACKWARD, (bandwidth(0.88),)) for name in MEMORY_BOUND),
        *(Call(name, small, FORWARD, (host_time(),)) for name in MEMORY_BOUND),
        *(Call(name, most, FORWARD, (bandwidth(0.95),), (EAGER,)) for name in MEMORY_BOUND),
    ]


def attention(s: Sizes) -> list[Call]:
    """Causal, without a cache."""
    calls = []
    for T in s.prompts:
        judged = T >= 4096 or s.at_once < 4096  # the rehearsal has no long ones
        work = Work.training(T, batch=s.at_once // T)
        for which, times in ((FORWARD, 0.8), (BACKWARD, 1 / 1.3)):
            goals = (faster(CUDNN), triton_alone(CUDNN, round(times, 2))) if judged else ()
            other = ("WARPGROUPS",) if which == FORWARD else ()
            calls.append(Call("attention", work, which, goals, FUSED, other))
    return calls


def attention_decode(s: Sizes) -> list[Call]:
    """Against a cache in bfloat16, and in 8 bits, which nobody else has in this form."""
    works, goals = [Work("decode", B, 1, S) for B, S in s.caches], (bandwidth(0.90),)
    return [
        *(Call("attention", w, FORWARD, goals, (EAGER, *FUSED)) for w in works),
        *(Call("attention int8", w, FORWARD, goals, (EAGER,)) for w in works),
    ]


def linear(s: Sizes) -> list[Call]:
    """Products of few rows with the weights of a layer, bfloat16 and quantised, and the first half
    of an MLP, whose weight is gate_up."""
    kinds = ("linear {}", "linear {} int8", "linear {} int4")
    names = [
        *(kind.format(matrix) for matrix in s.matrices for kind in kinds),
        *(f"linear gate_up swiglu{form}" for form in ("", " int8", " int4")),
    ]
    return [
        Call(name, Work("decode", batch, 1, 1), FORWARD, (), (EAGER,), ("OVERLAP",))
        for name in names
        for batch in s.batches
    ]


def loss(s: Sizes) -> list[Call]:
    """Both gradients with it, beside logits that are stored whole."""
    targets = (faster(COMPILED), memory_of_logits(s.config, s.rows, 0.05))
    return [Call("linear_cross_entropy", Work.training(s.rows), BOTH, targets)]


CALLS: dict[str, Callable[[Sizes], list[Call]]] = {
    "memory_bound": memory_bound,
    "attention": attention,
    "attention_decode": attention_decode,
    "linear": linear,
    "loss": loss,
}


def measure(setting: Setting, part: str) -> list[str]:
    """Runs a part of CALLS; returns what failed."""
    rows = {name_of(c, setting.sizes): partial(row, c, setting) for c in CALLS[part](setting.sizes)}
    return measured(setting, rows, PARTS[part].row)


def name_of(call: Call, sizes: Sizes) -> str:
    return f"{call.problem}, {sizes.shape}, {call.work}, bfloat16, {call.which}"


def row(call: Call, setting: Setting, failed: dict[str, Exception]) -> Row:
    """Measures one call; baselines that fail go to `failed`, those that cannot take part to the
    row's `missing`."""
    op, sizes, gradient = OPS[call.op], setting.sizes, call.which != FORWARD
    make = problem_shapes(
        call.op, sizes.config, call.work, device=setting.device, gradient=gradient
    )[call.problem]  # fmt: skip
    missing, able = dict(setting.without), []
    if not setting.gpu:
        missing[COMPILED] = "compiling would be most of a rehearsal"
    rivals = (EAGER, *baselines.peers(op)) if call.rivals is None else call.rivals
    args = make(0)
    for name in (*KERNELS, *rivals):
        if name in missing:
            continue
        if why := baselines.why_not(name, op, args, gradient=gradient):
            missing[name] = "; ".join(why)
        else:
            able.append(name)
    del args
    asked = {f"{OURS} cuda {name.lower()}": name for name in call.asked_for if "cuda" in able}
    others = {
        who: with_setting(name, call.op)
        for who, name in asked.items()
        if who not in missing and hasattr(cuda, name)
    }
    found = speed.measure(
        call.problem, make, able, shape=sizes.shape, work=call.work, roofline=setting.roofline,
        which=call.which, rounds=sizes.rounds, thorough=True, failed=failed, others=others,
    )  # fmt: skip
    for name, error in failed.items():
        found.missing[name] = said(error)
        found.notes.append(f"{name} failed: {said(error)}")
    found.missing = {**missing, **found.missing}
    found.goals = [target.measured(found) for target in call.targets]
    return found


def with_setting(name: str, op: str) -> Callable[..., Any]:
    """The CUDA C++ kernel of an op, with a constant of llama_fast.backends.cuda set to True."""
    call = baselines.call("cuda", OPS[op])

    def set_and_call(*args: Any) -> Any:
        with constant(name):
            return call(*args)

    return set_and_call
