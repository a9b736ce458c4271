"""The pictures of a report: roofline, speed-ups, sequence lengths, memory.

Each function takes rows of one machine and returns a matplotlib Figure, or None where they have
nothing for it. A row that is too noisy to count is marked with ~ and drawn pale or hollow.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from ...errors import LlamaFastError
from ..results import OURS, OWN, Row
from .choose import NOISY, PARTS, baselines, calls, labels, mark, said, sweeps, without_rival

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which every eye tells apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C8C00",
           "#000000", "#999999", "#6B4226", "#F0E442")  # fmt: skip
MARKERS = {"decode": "o", "prefill": "^", "training": "s"}
# The same baseline has the same colour in every figure.
BASELINES = {
    "eager": COLOURS[1], "torch": COLOURS[2], "torch flash": COLOURS[3], "torch math": COLOURS[4],
    "torch.compile": COLOURS[5], "torch cudnn": COLOURS[6], "torch efficient": COLOURS[7],
    "liger-kernel": COLOURS[8], "flash-attn": COLOURS[9], **dict.fromkeys(OWN, COLOURS[0]),
    "triton": "#00364F",
}  # fmt: skip
OTHER_WAYS = "#8FBFDD"  # of our own kernels
LEAST_MEMORY = 1e7  # bytes: calls that hold less are no matter
DPI = 100
DAGGER = "†"
MOST_CALLS = 10  # of the figure of memory, the hungriest first


def new_figure(width: float, height: float) -> Figure:
    """Raises LlamaFastError where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LlamaFastError(
            "the figures of a report need matplotlib: pip install 'llama_fast[report]', or "
            "pip install matplotlib; --no-figures makes the tables alone"
        ) from error
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def peaks_of(rows: list[Row]) -> dict[str, float]:
    """The highest that was measured of each: other programs can only make one look lower."""
    found: dict[str, float] = {}
    for row in rows:
        measured = row.measured_with.get("roofline") or {}
        for name in ("read", "copy", "float32", "bfloat16"):
            if measured.get(name):
                found[name] = max(measured[name], found.get(name, 0.0))
    return found


def colours_of(baselines: list[str]) -> dict[str, str]:
    """Ours are blue, and two baselines have one colour only where there are more than colours."""
    found = {name: BASELINES[name] for name in baselines if name in BASELINES}
    found |= {n: OTHER_WAYS for n in baselines if n not in found and n.startswith(OURS)}
    free = [colour for colour in COLOURS[1:] if colour not in found.values()]
    others = itertools.cycle(free or COLOURS[1:])
    return {name: found.get(name) or next(others) for name in baselines}


def roofline(rows: list[Row], title: str) -> Figure | None:
    """FLOP/s over FLOPs a byte, below the machine's own peak rates; from eager's speed to ours."""
    rows, peaks = calls(rows), peaks_of(rows)
    if not rows or "read" not in peaks:
        return None
    figure = new_figure(8.6, 5.4)
    axes = figure.add_subplot()
    ops = list(dict.fromkeys(row.call["op"] for row in rows))
    colours = dict(zip(ops, COLOURS * 2, strict=False))
    for row in rows:
        x, colour = row.flops / row.bytes, colours[row.call["op"]]
        ours = row.flops / row.seconds(row.own()) / 1e9
        noisy = row.noisy(row.own())
        if "eager" in row.samples:
            eager = row.flops / row.seconds("eager") / 1e9
            axes.plot([x, x], [eager, ours], color=colour, linewidth=0.8, alpha=0.55)
            axes.plot(x, eager, "_", color=colour, markersize=6, alpha=0.8)
        axes.plot(
            x, ours, MARKERS[row.call["work"]], markersize=7, color=colour,
            markerfacecolor="white" if noisy else colour, markeredgewidth=1.2, zorder=3,
        )  # fmt: skip
    low = min(row.flops / row.bytes for row in rows) / 2
    high = max(max(row.flops / row.bytes for row in rows) * 2, 64)
    _draw_peaks(axes, peaks, low, high, {row.call["dtype"] for row in rows})
    axes.set(
        xscale="log", yscale="log", xlim=(low, high),
        xlabel="FLOPs for each byte that must be moved", ylabel="GFLOP/s",
    )  # fmt: skip
    figure.suptitle(title, fontsize=11)
    axes.grid(alpha=0.25, which="major")
    _roofline_legend(axes, colours, rows)
    return figure


def _draw_peaks(
    axes: Axes, peaks: dict[str, float], low: float, high: float, dtypes: set[str]
) -> None:
    flat = {
        name: peaks[name]
        for name in ("float32", "bfloat16")
        if name in peaks and (name in dtypes or name == "float32")
    }
    peak = max(flat.values(), default=0.0)
    if len(flat) == 2 and min(flat.values()) > 0.9 * peak:  # one line, or their names overlap
        flat = {"float32 and bfloat16": peak}
    knee = peak / peaks["read"] if peak else high
    xs = [low, min(knee, high)]
    axes.plot(xs, [x * peaks["read"] / 1e9 for x in xs], color="#444444", linewidth=1.4)
    x = low * (xs[1] / low) ** 0.75
    axes.annotate(
        f"memory read {peaks['read'] / 1e9:.3g} GB/s",
        (x, x * peaks["read"] / 1e9), xytext=(-6, 6), textcoords="offset points",
        ha="right", fontsize=8, color="#444444",
    )  # fmt: skip
    for name, rate in flat.items():
        start = rate / peaks["read"]
        if start < high:
            axes.plot([start, high], [rate / 1e9] * 2, color="#444444", linewidth=1.4)
        # At the knee, where no kernel is: those that arithmetic bounds are further right.
        axes.annotate(
            f"{name} multiply-add {rate / 1e9:.3g} GFLOP/s", (max(low, start), rate / 1e9),
            xytext=(0, 4), textcoords="offset points", ha="left", fontsize=8, color="#444444",
        )  # fmt: skip


def _roofline_legend(axes: Axes, colours: dict[str, str], rows: list[Row]) -> None:
    from matplotlib.lines import Line2D

    works = [work for work in PARTS if any(row.call["work"] == work for row in rows)]
    longer = {"training": "gradients of a training step"}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=op)
        for op, colour in colours.items()
    ]
    handles += [
        Line2D([], [], marker=MARKERS[w], linestyle="", color="#555555", label=longer.get(w, w))
        for w in works
    ]
    handles.append(
        Line2D([], [], marker="_", linestyle="", color="#555555", label="eager PyTorch, below ours")
    )
    if any(row.noisy(row.own()) for row in rows):
        handles.append(
            Line2D([], [], marker="o", linestyle="", color="#555555", markerfacecolor="white",
                   label="hollow: too noisy to count")
        )  # fmt: skip
    axes.legend(
        handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )


def speed_ups(rows: list[Row], title: str) -> Figure | None:
    """How many times faster ours is than each baseline: a panel for each kind of work."""
    rows = [row for row in calls(rows) if baselines(row)]
    parts = {part: [row for row in rows if row.call["work"] == part] for part in PARTS}
    names, note = labels(rows), ""
    if own := [row for row in rows if without_rival(row)]:
        note = (
            f"{DAGGER} PyTorch has no such op: beside our own definition, which dequantises first"
        )
        names |= {row.name: f"{names[row.name]} {DAGGER}" for row in own}
    return _bar_figure({k: v for k, v in parts.items() if v}, title, names, note)


def models(rows: list[Row], title: str) -> Figure | None:
    """The same of whole models."""
    rows = [row for row in rows if not row.call and row.unit == "tok/s" and row.own()]
    rows = [row for row in rows if baselines(row)]
    names = {row.name: row.name + mark(row) for row in rows}
    return _bar_figure({"whole models": rows} if rows else {}, title, names)


def _bar_figure(
    parts: dict[str, list[Row]], title: str, names: dict[str, str], note: str = ""
) -> Figure | None:
    if not parts:
        return None
    known = list(
        dict.fromkeys(name for rows in parts.values() for r in rows for name in baselines(r))
    )
    colours = colours_of(known)
    heights = [sum(len(baselines(row)) for row in rows) + len(rows) for rows in parts.values()]
    figure = new_figure(8.0, 1.3 + 0.17 * sum(heights))
    panels = figure.subplots(len(parts), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    for axes, (part, rows) in zip(panels, parts.items(), strict=True):
        ticks, y = [], 0.0
        for row in rows:
            top = y
            for name in baselines(row):
                times = row.times(name, row.own())
                axes.barh(
                    y, times - 1, left=1, color=colours[name], height=0.85,
                    alpha=0.35 if row.noisy(row.own(), name) else 1.0,
                )  # fmt: skip
                axes.annotate(
                    f"{times:.2g}" if times < 10 else f"{times:.0f}", (max(times, 1.0), y),
                    xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
                )  # fmt: skip
                y += 1
            ticks.append(((top + y - 1) / 2, names[row.name]))
            y += 0.8
        axes.set(xscale="log", title=part if len(parts) > 1 else "")
        axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
        axes.set_ylim(y - 0.4, -0.9)
        axes.axvline(1, color="#444444", linewidth=1)
        axes.grid(alpha=0.25, axis="x")
    _plain_ticks(panels[-1], panels)
    pale = any(row.noisy(row.own(), name) for r in parts.values() for row in r for name in known
               if name in row.samples)  # fmt: skip
    said_of_pale = "; pale: too noisy to count" if pale else ""
    said_of_axis = f"times as fast as the baseline (log scale{said_of_pale})"
    panels[-1].set_xlabel("\n".join(filter(None, (said_of_axis, note))))
    figure.suptitle(title, fontsize=11)
    _legend_below(figure, colours, known)
    return figure


def _legend_below(figure: Figure, colours: dict[str, str], known: list[str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colours[name], label=said(name)) for name in known],
        fontsize=8, frameon=False, loc="outside lower center", ncols=min(5, len(known)),
    )  # fmt: skip


def _plain_ticks(axes: Axes, panels: Any) -> None:
    """0.5, 1, 2, 5, 10 … instead of powers of ten, with room for the numbers at the bars."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    low, high = min(low, 0.8), max(high * 1.25, 2.5)
    between = (1, 2, 5) if high / low < 1000 else (1,)
    steps = [m * 10.0**e for e in range(-4, 6) for m in between]
    for panel in panels:
        panel.set_xlim(low, high)
        panel.xaxis.set_major_locator(FixedLocator([x for x in steps if low <= x <= high]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def attention_lengths(rows: list[Row], title: str) -> Figure | None:
    """Attention's rate over the length of the sequence, for each baseline."""
    groups = sweeps(rows)
    if not groups:
        return None
    figure = new_figure(max(7.5, 4.4 * len(groups)), 4.2)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    known = list(dict.fromkeys(name for g in groups for row in g for name in row.samples))
    colours = colours_of(known)
    for axes, group in zip(panels, groups, strict=True):
        call = group[0].call
        decode = call["work"] == "decode"
        unit = "GB/s" if decode else "GFLOP/s"
        for name in known:
            some = [row for row in group if name in row.samples]
            xs = [row.call["keys"] for row in some]
            ys = [(r.bytes if decode else r.flops) / r.seconds(name) / 1e9 for r in some]
            axes.plot(xs, ys, "-", color=colours[name], linewidth=2.2 if name in OWN else 1.2)
            for row, x, y in zip(some, xs, ys, strict=True):
                face = "white" if row.noisy(name) else colours[name]
                axes.plot(x, y, "o", color=colours[name], markersize=4.5, markerfacecolor=face)
        peak = peaks_of(group).get("read" if decode else call["dtype"])
        if peak:
            axes.axhline(peak / 1e9, color="#444444", linewidth=1.2, linestyle="--")
            axes.annotate(
                "memory read" if decode else f"{call['dtype']} multiply-add",
                (1, peak / 1e9), xycoords=("axes fraction", "data"), xytext=(-3, 3),
                textcoords="offset points", ha="right", fontsize=8, color="#444444",
            )  # fmt: skip
        what = "decode: one query" if decode else f"{call['work']}, {call['pass']}"
        axes.set(xscale="log", yscale="log", ylabel=unit)
        axes.set_title(what, fontsize=10)
        hollow = any(row.noisy(name) for row in group for name in row.samples)
        said_of_hollow = " (hollow: too noisy to count)" if hollow else ""
        axes.set_xlabel(("keys" if decode else "tokens") + said_of_hollow)
        axes.margins(y=0.15)
        _powers_of_two(axes, sorted({row.call["keys"] for row in group}))
        axes.grid(alpha=0.25)
    figure.suptitle(title, fontsize=11)
    _legend_below(figure, colours, known)
    return figure


def _powers_of_two(axes: Axes, lengths: list[int]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    said = [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths]
    axes.xaxis.set_major_formatter(FixedFormatter(said))
    axes.tick_params(axis="x", labelsize=8)


def memory(rows: list[Row], title: str) -> Figure | None:
    """What a call of each baseline holds at its peak beyond what was held before."""
    rows = [row for row in calls(rows) if max(row.memory.values(), default=0) >= LEAST_MEMORY]
    rows = sorted(rows, key=lambda row: -max(row.memory.values()))[:MOST_CALLS]
    if not rows:
        return None
    known = list(dict.fromkeys(name for row in rows for name in row.memory))
    colours = colours_of(known)
    bars = sum(len(row.memory) + 1 for row in rows)
    figure = new_figure(8.0, 1.3 + 0.17 * bars)
    axes = figure.add_subplot()
    ticks, y, names = [], 0.0, labels(rows)
    for row in rows:
        top = y
        for name, nbytes in row.memory.items():
            megabytes = nbytes / 1e6
            axes.barh(y, max(megabytes, 0.1), color=colours[name], height=0.85)
            axes.annotate(
                f"{megabytes:.3g}" if megabytes >= 0.1 else "< 0.1", (max(megabytes, 0.1), y),
                xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
            )  # fmt: skip
            y += 1
        said_of = f"{names[row.name].removesuffix(NOISY)}\n{row.call['work']}"
        ticks.append(((top + y - 1) / 2, said_of))
        y += 0.8
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.set_ylim(y - 0.4, -0.9)
    axes.set(xlabel="MB that a call holds at its peak, its results among them (log scale)")
    figure.suptitle(title, fontsize=11)
    axes.set(xscale="log", xlim=(0.08, None))
    axes.margins(x=0.1)
    axes.grid(alpha=0.25, axis="x")
    _legend_below(figure, colours, known)
    return figure


# By the end of the file's name: the function, and what the figure is about.
FIGURES = {
    "roofline": (roofline, "Roofline"),
    "speed-ups": (speed_ups, "Ops beside PyTorch"),
    "models": (models, "Whole models beside their peers"),
    "attention": (attention_lengths, "Attention over the length of the sequence"),
    "memory": (memory, "Memory of a call"),
}
