"""What `llama-fast profile` shows of steps that run here."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from ..errors import BackendError
from ..utils.files import check_file
from .sizes import sized
from .terminal import columns, note, show, size, table
from .units import count, duration, rate, write_json

if TYPE_CHECKING:
    import torch

    from ..bench.profile.calls import Profile, Step
    from ..bench.profile.counters import Counters
    from ..bench.profile.trace import TorchOp
    from ..bench.roofline import Roofline
    from ..bench.shapes import Work
    from ..config import LlamaConfig

LAYERS = 2
TOKENS = {"prefill": 512, "train": 256}
CONTEXT = 1024  # of a single token
MOST = 6  # of torch's own ops that are shown


class Prepared(NamedTuple):
    """What is to be run, what it is in words, and of decoding, how `generate` does it."""

    step: Step
    title: str
    replayed: Callable[[], None] | None = None


@dataclass
class Wanted:
    """What the command line asks for. `dtype` and `quantize` None: as it is."""

    what: str
    shape: str
    layers: int | None
    model: Path | None
    batch: int
    tokens: int | None
    context: int | None
    dtype: torch.dtype | None
    quantize: str | None
    backward: bool

    def check(self) -> None:
        """Fills in the defaults. Raises typer.BadParameter or BackendError for what cannot be."""
        from ..bench.profile.steps import MODEL_STEPS
        from ..bench.shapes import NAMES

        if self.what not in (*MODEL_STEPS, *NAMES):
            raise BackendError(
                f"cannot profile {self.what!r}; write {', '.join(MODEL_STEPS)}, or one of the ops "
                f"{', '.join(NAMES)}"
            )
        if self.is_op and (self.model or self.layers):
            option = "--model" if self.model else "--layers"
            raise typer.BadParameter(
                f"{self.what} is a single op, which has no layers and no checkpoint. Write: "
                f"profile {self.what} --shape 8b; or for a whole step: profile decode {option} "
                f"{self.model or self.layers}",
                param_hint=option,
            )
        if self.model and self.layers:
            raise typer.BadParameter(
                f"the checkpoint of --model runs with all of its layers. For fewer, of random "
                f"weights, write: profile {self.what} --shape 8b --layers {self.layers}",
                param_hint="--layers",
            )
        if self.backward and not self.is_op:
            raise typer.BadParameter(
                f"{self.what} is a whole step, and --backward is for a single op. For the "
                "gradients of a model write: profile train",
                param_hint="--backward",
            )
        if self.quantize and not self.is_op and self.what not in ("decode", "prefill"):
            raise typer.BadParameter(
                f"{self.what} has no quantised weights here. Leave it out, or profile decode, "
                "prefill or an op that multiplies by weights: linear",
                param_hint="--quantize",
            )
        if self.what == "decode" and (self.tokens or 1) != 1:
            raise typer.BadParameter(
                "decode reads one token a step. For more tokens at once write: profile prefill "
                f"--tokens {self.tokens}; for more sequences: profile decode --batch {self.tokens}",
                param_hint="--tokens",
            )
        if self.context and self.what in ("prefill", "train"):
            raise typer.BadParameter(
                f"{self.what} starts with no tokens before its own. Write --tokens {self.context} "
                f"for a longer one, or: profile decode --context {self.context}",
                param_hint="--context",
            )
        self.tokens = self.tokens or TOKENS.get(self.what, 1)
        if self.context is None:
            self.context = CONTEXT if self.tokens == 1 else 0

    @property
    def is_op(self) -> bool:
        from ..bench.shapes import NAMES

        return self.what in NAMES

    @property
    def config(self) -> LlamaConfig:
        return sized(self.shape)

    @property
    def work(self) -> Work:
        from ..bench.shapes import Work

        name = "decode" if self.tokens == 1 else "prefill"
        return Work(name, self.batch, self.tokens, self.context + self.tokens)

    @property
    def stem(self) -> str:
        """Returns the stem of the names of its files."""
        return f"llama-fast-{self.what}-{self.model.name if self.model else self.shape}"

    @property
    def amount(self) -> str:
        """Returns in words how much is run: "1 token of each of 4 sequences, after 1,024
        others"."""
        text = f"{self.tokens:,} token{'s' * (self.tokens > 1)}"
        text += f" of each of {self.batch} sequences" * (self.batch > 1)
        return text + f", after {self.context:,} others" * (self.context > 0)

    @property
    def arguments(self) -> list[str]:
        """Returns the command line that says the same."""
        given = {
            "--shape": None if self.model else self.shape,
            "--model": self.model,
            "--layers": self.layers,
            "--batch": self.batch,
            "--tokens": None if self.what == "decode" else self.tokens,
            "--context": None if self.what in ("prefill", "train") else self.context,
            "--dtype": self.dtype and _name(self.dtype),
            "--quantize": self.quantize,
        }
        options = [part for name, value in given.items() if value is not None
                   for part in (name, str(value))]  # fmt: skip
        return [self.what, *options, *["--backward"] * self.backward]

    def step(self, device: torch.device) -> Prepared:
        import torch

        from ..bench.profile import steps

        if self.is_op:
            dtype = self.dtype or torch.bfloat16
            step = steps.op_step(
                self.what,
                self.config,
                self.work,
                dtype=dtype,
                device=str(device),
                quantize=self.quantize,
                backward=self.backward,
            )
            both = " and its gradient" if self.backward else ""
            return Prepared(step, f"{self.what}{both} at the sizes of {self.shape}, {_name(dtype)}")
        if self.model:
            model = steps.opened_model(
                self.model,
                dtype=self.dtype,
                device=str(device),
                quantize=self.quantize,
                tokens=self.context + self.tokens,
            )
            of = f"{self.model.name}, {_name(model.dtype)}"
        else:
            config = self.config.shortened(
                min(self.config.max_seq_len, self.context + self.tokens + steps.STEPS)
            )
            few = config.n_layers if device.type == "meta" else LAYERS
            layers = min(self.layers or few, config.n_layers)
            dtype = self.dtype or torch.bfloat16
            if device.type != "meta":
                few = layers < config.n_layers
                note(
                    f"Random weights of {layers} of the {config.n_layers} layers of {self.shape}"
                    + ", so the head weighs more than in the whole model; --layers "
                    f"{config.n_layers} for all, --model DIR for your own" * few
                )
            model = steps.random_model(
                config, layers=layers, dtype=dtype, device=device, quantize=self.quantize
            )
            of = f"{self.shape}, {_name(dtype)}"
        if self.quantize:
            of += f", {self.quantize} weights"
        replayed = None
        if self.what == "decode":
            step = steps.decode_step(model, self.batch, self.context)
            if device.type != "meta":
                replayed = steps.ReplayedStep(model, self.batch, self.context)
        elif self.what == "prefill":
            step = steps.prefill_step(model, self.batch, self.tokens)
        else:
            step = steps.train_step(model, self.batch, self.tokens)
        return Prepared(step, f"{self.what} of {of}", replayed)


def run(
    wanted: Wanted,
    device: torch.device,
    backend: str | None,
    *,
    repeats: int,
    by_shape: bool,
    trace: Path | None,
    bare: bool,
    json_file: Path | None,
) -> None:
    from ..bench.profile.calls import no_section, profile, seconds_of
    from ..dispatch import use_backend

    step, title, replayed = wanted.step(device)
    title += f", on {device}: {wanted.amount}"
    with use_backend(backend, strict=wanted.is_op) if backend else nullcontext():
        if bare:
            for _ in range(repeats + 1):  # the first warms up
                step(no_section)
            return
        from ..bench.profile.counters import Counters
        from ..bench.profile.trace import write_trace
        from ..bench.roofline import measure
        from ..bench.timing import OtherPrograms

        path = trace or Path(f"{wanted.stem}.trace.json")
        check_file(path)
        note(f"Measuring this machine's peak rates, then {repeats} steps, then a trace …")
        roofline = measure(str(device))
        counters = Counters() if device.type == "cpu" else None
        with OtherPrograms([os.getpid()]) as others:
            found = profile(step, repeats, roofline, device, around=counters)
        again = None if replayed is None else seconds_of(replayed, repeats, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its profiler
            between = write_trace(step, path, device)
    show(title)
    _show_rows(found, by_shape or wanted.is_op)
    _show_step(found, wanted, roofline, others.share)
    if again is not None:
        middle = statistics.median(again)
        show(
            f"Recorded and replayed, as generate does: {duration(middle)}, "
            f"{wanted.batch / middle:,.1f} tokens a second"
        )
    _show_between(between)
    if counters is not None:
        _show_counters(counters, repeats)
    show(f"Trace: {path}, for ui.perfetto.dev or chrome://tracing")
    if json_file is not None:
        _write(json_file, title, found, again, between, roofline, counters, others.share)


def _show_rows(found: Profile, by_shape: bool) -> None:
    wide = columns() >= 110
    header = ["op", "backend", "calls", "time", "share"]
    header += ["bytes", "FLOPs"] * wide
    rows = table(*header, "GB/s", "GFLOP/s", "of peak", numbers=True, texts=2)
    for row in found.rows(by_shape):
        share = "" if row.share_of_peak is None else f"{row.share_of_peak:.0%} {row.bound}"
        rows.add_row(
            f"{row.op} {row.shapes}".rstrip() if by_shape else row.op,
            row.backend,
            f"{row.calls}",
            duration(row.seconds),
            f"{row.seconds / found.step:.1%}",
            *[size(row.bytes), count(row.flops)] * wide,
            rate(row.bytes / row.seconds),
            rate(row.flops / row.seconds),
            share,
        )
    more = [""] * (2 * wide)
    rest = f"{found.rest / found.step:.1%}"
    rows.add_row("(the rest)", "", "", duration(found.rest), rest, *more, end_section=True)
    nbytes, flops = (sum(getattr(c, n) for c in found.calls) for n in ("bytes", "flops"))
    rows.add_row(
        "the step",
        "",
        f"{len(found.calls)}",
        duration(found.step),
        "100.0%",
        *[size(nbytes), count(flops)] * wide,
        rate(nbytes / found.step),
        rate(flops / found.step),
    )
    show(rows)


def _show_step(found: Profile, wanted: Wanted, roofline: Roofline, others: float | None) -> None:
    from ..bench.timing import TOO_BUSY, TOO_NOISY

    steps = len(found.seconds)
    text = f"The median of {steps} steps" + f", which spread {found.spread:.0%}" * (steps > 1)
    if not wanted.is_op:
        speed = wanted.batch * wanted.tokens / found.step
        text += f": {speed:,.1f} tokens a second"
    show(text)
    limits = [
        f"{name} {value / 1e9:,.1f} {unit}"
        for name, value, unit in (
            ("read", roofline.read, "GB/s"),
            ("copy", roofline.copy, "GB/s"),
            ("float32", roofline.float32, "GFLOP/s"),
            ("bfloat16", roofline.bfloat16, "GFLOP/s"),
        )
        if value
    ]
    show(f"This machine's peak rates, measured now: {', '.join(limits)}")
    if found.spread > TOO_NOISY:
        note(f"The steps spread over more than {TOO_NOISY:.0%}: give more --repeats")
    if (others or 0) > TOO_BUSY:
        note(
            f"Other programs took {others:.0%} of the processors' time: these times are too noisy "
            "to count; end those programs and measure again"
        )


def _show_between(between: list[TorchOp]) -> None:
    if not between:
        return
    rows = table("torch's own ops in the rest", "calls", "time", numbers=True)
    for op in between[:MOST]:
        rows.add_row(op.name, f"{op.calls}", duration(op.seconds))
    if len(between) > MOST:
        left = between[MOST:]
        calls, seconds = sum(op.calls for op in left), sum(op.seconds for op in left)
        rows.add_row(f"{len(left)} others", f"{calls}", duration(seconds))
    show(rows)


def _show_counters(counters: Counters, repeats: int) -> None:
    if counters.counts:
        rows = table("counted in user space, all threads", "a step", numbers=True)
        for name, value in counters.counts.items():
            each = value / repeats
            rows.add_row(name, duration(each / 1e9) if name == "task clock" else count(each))
        if counters.instructions_per_cycle is not None:
            rows.add_row("instructions per cycle", f"{counters.instructions_per_cycle:.2f}")
        show(rows)
    reasons: dict[str, list[str]] = {}
    for name, why in counters.missing.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        note(f"Not counted: {', '.join(names)}; {why}")


def _write(
    path: Path,
    title: str,
    found: Profile,
    replayed: list[float] | None,
    between: list[TorchOp],
    roofline: Roofline,
    counters: Counters | None,
    others: float | None,
) -> None:
    from ..bench import machine

    content: dict[str, Any] = {
        "machine": machine.describe(roofline.isa),
        "versions": machine.versions("triton"),
        "roofline": vars(roofline),
        "profile": title,
        "seconds": found.seconds,
        "replayed": replayed,
        "others": others,
        "rest": found.rest,
        "rows": [asdict(row) for row in found.rows(by_shape=True)],
        "torch": [op._asdict() for op in between],
        "counters": counters and {"counts": counters.counts, "missing": counters.missing},
    }
    write_json(path, content)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
