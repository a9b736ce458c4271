"""The regression guard: is each kernel as near the peak rate and as far ahead of eager as it was?

    make bench-check                        # python -m benchmarks.check [--rows WORD ...] [--help]
    python -m benchmarks.check --record     # makes what the next ones compare with

A quick run of the ops is compared with the committed results of the same class of machine. Only
ratios of one run are: the part of the measured peak rate, and how many times faster than the eager
reference. A kernel has slowed down when both have fallen, beyond the tolerance and what the samples
spread, in each of three attempts: what slows the whole machine leaves one of them as it was. A
kernel whose result is wrong is refused before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_fast.bench import baselines, machine, results, roofline
from llama_fast.bench import measure as speed
from llama_fast.bench.results import Row
from llama_fast.bench.shapes import Work, problem_shapes
from llama_fast.config import LlamaConfig
from llama_fast.dispatch import OPS, ORDER
from llama_fast.errors import LlamaFastError, WrongResultError

RESULTS = Path(__file__).parent / "results"
SHAPE = "1b"
TOLERANCE = 0.25  # of a ratio: what runs of the same code differ by on a machine that others share
TOO_WIDE = 0.6  # a row whose samples ask for more than this tells nothing
ATTEMPTS = 3

# What one token of a sequence, and a prompt, ask of the ops; one matrix of each size that differs.
DECODE, PREFILL = Work.decode(8192), Work.prefill(512)
FEW_ROWS = ("linear qkv", "linear gate_up", "linear head",
            "linear gate_up int8", "linear gate_up int4")  # fmt: skip
MANY_ROWS = ("linear qkv", "linear gate_up", "linear gate_up int8",
             "linear gate_up int4")  # fmt: skip
CHECKED = [
    *((name, DECODE) for name in ("attention", *FEW_ROWS)),
    *((n, PREFILL) for n in ("rms_norm", "add_rms_norm", "swiglu", "kv_append", "attention")),
    *((name, PREFILL) for name in MANY_ROWS),
]
# Recorded too, for the figures: gradients, and attention over the length of the sequence.
RECORDED = [
    *CHECKED,
    *((name, Work.training(256)) for name in ("rope", "attention", "linear gate_up",
                                              "linear_cross_entropy")),
    *(("attention", Work.decode(keys)) for keys in (512, 2048, 32768)),
    *(("attention", Work.prefill(tokens)) for tokens in (128, 256, 1024, 2048)),
]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """ratios  the fresh part of the peak rate, and the fresh lead over eager, over the committed"""

    row: str
    ratios: dict[str, float]
    allowed: float

    @property
    def judged(self) -> bool:
        return bool(self.ratios) and self.allowed <= TOO_WIDE

    @property
    def slower(self) -> bool:
        return self.judged and max(self.ratios.values()) < 1 - self.allowed

    def __str__(self) -> str:
        said = ", ".join(f"{value:.2f} × {what}" for what, value in self.ratios.items())
        if not self.judged:
            return f"{self.row}: too noisy to judge ({said}; samples spread {self.allowed / 2:.0%})"
        word = "SLOWER" if self.slower else "as it was"
        return f"{self.row}: {word}: {said} (from {1 - self.allowed:.2f} on)"


def compare(committed: Row, fresh: Row) -> Verdict:
    """Rows of the same name; absolute times are not looked at."""
    ratios, own, was = {}, fresh.own(), committed.own()
    if own and was:
        found = fresh.share(own), committed.share(was)
        if None not in found:
            ratios["the part of the peak rate"] = found[0] / found[1]
        found = fresh.times("eager", own), committed.times("eager", was)
        if None not in found:
            ratios["the lead over eager"] = found[0] / found[1]
    spreads = [
        row.spreads()[name]
        for row, name in ((fresh, own), (committed, was), (fresh, "eager"), (committed, "eager"))
        if name in row.samples
    ]
    return Verdict(fresh.name, ratios, max(TOLERANCE, 2 * max(spreads, default=0.0)))


def judge(committed: Row, measure: Callable[[], Row]) -> Verdict:
    """Of several attempts the best, since other programs can only make a kernel look slower."""
    best: Verdict | None = None
    for _ in range(ATTEMPTS):
        verdict = compare(committed, measure())
        if best is None or _worst_first(verdict) > _worst_first(best):
            best = verdict
        if best.judged and not best.slower:
            break
    return best


def _worst_first(verdict: Verdict) -> tuple[bool, float]:
    return verdict.judged, max(verdict.ratios.values(), default=0.0)


def measured(
    wanted: list[tuple[str, Work]], rounds: int, everybody: bool
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name of the row, what measures it), of our backend beside eager or beside everybody. The
    peak rates are measured with each row: on a machine that others use too they drift."""
    for problem, work in wanted:
        op, training = OPS[problem.split()[0]], work.name == "training"
        which = speed.passes(op)[-1] if training else speed.FORWARD
        make = problem_shapes(op.name, LlamaConfig.preset(SHAPE), work, gradient=training)[problem]

        def measure(
            problem=problem, make=make, op=op, work=work, which=which, training=training
        ) -> Row:
            args, names = make(0), [*ORDER["cpu"], *(baselines.peers(op) if everybody else ())]
            able = [n for n in names if not baselines.why_not(n, op, args, gradient=training)]
            roofline.forget()
            found = roofline.measure("cpu")
            row = speed.measure(
                problem, make, able, shape=SHAPE, work=work, roofline=found, which=which,
                rounds=rounds, thorough=everybody,
            )  # fmt: skip
            row.measured_with = {
                "date": results.today(),
                "threads": found.threads,
                "roofline": dataclasses.asdict(found),
                "versions": machine.versions("triton"),
            }
            return row

        yield f"{problem}, {SHAPE}, {work}, bfloat16, {which}", measure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="those whose name has all these")
    parser.add_argument("--against", type=Path, help="results; else those of this class of machine")
    parser.add_argument("--record", action="store_true", help="write the results instead")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    where = machine.describe(roofline.measure("cpu").isa)
    path = given.against or RESULTS / f"{machine.file_name(where, given.threads)}.json"
    words = given.rows or []
    try:
        rows = [
            (name, measure)
            for name, measure in measured(
                RECORDED if given.record else CHECKED, given.rounds, given.record
            )
            if all(word in name for word in words)
        ]
        if not rows:
            raise LlamaFastError(f"no row's name has all of {', '.join(words)}")
        return _record(path, where, rows) if given.record else _check(path, rows)
    except LlamaFastError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _record(path: Path, where: dict, rows: list) -> int:
    for name, measure in rows:
        row = measure()
        results.save(path, where, [row])
        print(f"{name}: {'; '.join(row.too_noisy) or 'recorded'}", flush=True)
    print(f"written to {path}")
    return 0


def _recorded(rows: list[Row]) -> str:
    """When, and at which commits."""
    runs = [row.measured_with for row in rows]
    dates = {run["date"] for run in runs if "date" in run}
    commits = {run.get("versions", {}).get("commit") for run in runs} - {None}
    found = {"recorded on": sorted(dates), "at": sorted(commits)}
    return "".join(f", {word} {', '.join(some)}" for word, some in found.items() if some)


def _check(path: Path, rows: list) -> int:
    if not path.exists():
        raise LlamaFastError(
            f"there are no results of this class of machine ({path.name}) to compare with: record "
            "some with python -m benchmarks.check --record, or name a file with --against"
        )
    committed = results.load(path).rows
    wanted = [committed[name] for name, _ in rows if name in committed]
    print(f"compared with {path}{_recorded(wanted)}", flush=True)
    bad, judged = [], 0
    for name, measure in rows:
        if name not in committed:
            print(f"{name}: not among the committed results")
            continue
        try:
            verdict = judge(committed[name], measure)
        except WrongResultError as error:
            print(f"{name}: REFUSED: {error}", flush=True)
            bad.append(name)
            continue
        print(verdict, flush=True)
        judged += verdict.judged
        if verdict.slower:
            bad.append(name)
    if bad:
        print(f"{len(bad)} of {len(wanted)} rows are slower or wrong: {'; '.join(bad)}")
        return 1
    if judged < len(rows):
        print(f"{len(rows) - judged} of {len(rows)} rows could not be judged")
    if not judged:
        raise LlamaFastError(f"no row could be judged against {path}: record them anew")
    print(f"{judged} rows are as they were")
    return 0


if __name__ == "__main__":
    sys.exit(main())
