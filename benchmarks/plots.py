"""Pictures of saved results."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .saved import AGAIN, OURS, caption, medians, opponents, ratio, relative, verdict

INK, FAINT, ACCENT, BEHIND = "#1f2933", "#9aa5b1", "#c8374a", "#6b7280"
LEVEL = "#c9d1da"  # bars where trainops is not ahead

# A provider has one colour and one marker everywhere. Neighbours in a picture differ in both, and the colour-blind
# can tell the colours apart, too: most are those of Okabe and Ito.
LOOKS = {
    OURS: (ACCENT, "o"),
    "torch loop": ("#8a8f98", "v"),
    "torch foreach": ("#e69f00", "s"),
    "torch as written": ("#8a8f98", "v"),
    "torch fused": ("#0072b2", "o"),
    "torch fused, grad_scale": ("#111827", "D"),
    "torch compiled": ("#56b4e9", "^"),
    "torch AveragedModel": ("#8c564b", "P"),
    "timm": ("#009e73", "s"),
    "timm's formula": ("#009e73", "s"),
    "timm ModelEmaV3": ("#009e73", "s"),
    "DeepSpeed CPUAdam": ("#7a3fbf", "X"),
    "DeepSpeed CPUAdam, bf16 moments": ("#e07bc0", "*"),
    "DeepSpeed FusedAdam": ("#7a3fbf", "X"),
    "Apex FusedAdam": ("#4d7c0f", "h"),
    "Apex FusedAdamSWA": ("#a3c585", "H"),
    "optimi": ("#b8a000", "p"),
    "bitsandbytes": ("#8b4513", "d"),
    "torchao": ("#0f766e", "<"),
}
OTHER = ("#475569", ">")
SIZES = {"*": 7.5, "X": 6, "P": 6, "p": 6, "h": 6, "H": 6}  # of markers that look smaller than others

PANELS = {"step": "clip + AdamW + EMA", "adamw": "AdamW", "clip_grad_norm": "clip_grad_norm_", "ema": "EMA"}
SHORT = {"float32": "", "bfloat16": ", bf16"}

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def save(results: dict[str, Any], output: Path) -> dict[str, str]:
    """Draw what the results have cases for: the files by name, with a text for each."""
    drawn = {}
    with mpl.rc_context(STYLE):
        for name, (draw, text) in PICTURES.items():
            figure = draw(results["cases"])
            if figure is not None:
                figure.text(0.01, 0.004, caption(results), fontsize=7, color=BEHIND, va="bottom")
                figure.savefig(output / name)
                drawn[name] = text
    return drawn


def selected(cases: list[dict[str, Any]], op: str, group: str = "models") -> list[dict[str, Any]]:
    """The cases of an op in which trainops was timed."""
    return [case for case in cases if case["op"] == op and case["group"] == group and OURS in medians(case)]


def canvas(width: float, height: float) -> Figure:
    """A figure with room for the caption."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.24 / height, 1, 1 - 0.24 / height))
    return figure


def step(cases: list[dict[str, Any]]) -> Figure | None:
    """The whole step alone."""
    return panels(cases, ("step",), "clip + AdamW + EMA, float32 and bfloat16 (bf16)")


def speedup(cases: list[dict[str, Any]]) -> Figure | None:
    """Every op."""
    return panels(cases, tuple(PANELS))


def panels(cases: list[dict[str, Any]], ops: tuple[str, ...], title: str | None = None) -> Figure | None:
    """How many times as long as trainops the opponents take, a row for each model; a bar ends at the fastest one."""
    shown = {op: found for op in ops if (found := selected(cases, op))}
    if not shown:
        return None
    rows, columns = -(-len(shown) // 2), min(2, len(shown))
    tallest = max(map(len, shown.values()))
    figure = canvas((7.6 if columns == 1 else 5.6 * columns), rows * (0.9 + 0.26 * tallest) + 1.0)
    names: dict[str, None] = {}
    for i, (op, found) in enumerate(shown.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for y, case in enumerate(found):
            others, best = relative(case), ratio(case)
            names |= dict.fromkeys(others)
            for name, times in others.items():
                axes.plot(times.median, y, ls="", **marker(name, 5), mec="white", mew=0.6, zorder=3)
            if best:
                ahead = verdict(case) == "ahead"
                axes.barh(y, best.median - 1, 0.62, left=1, color=ACCENT if ahead else LEVEL, alpha=0.8, zorder=2)
                label = axes.text(1.02, y, f"{best.median:.2f}x", transform=axes.get_yaxis_transform(), va="center")
                label.set(fontweight="bold", color=ACCENT if ahead else BEHIND)
        axes.axvline(1.0, color=ACCENT, linewidth=1.2, zorder=1)
        axes.set_yticks(range(len(found)), [case["name"] + SHORT[case["dtype"]] for case in found])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xscale("log")
        nice_log(axes.xaxis, lambda x: f"{x:g}x", (0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50))
        axes.set_title(title or PANELS[op])
        axes.set_xlabel("time relative to trainops (log scale)")
    handles: list[Any] = [mpl.lines.Line2D([], [], ls="", **marker(name, 6), label=name) for name in names]
    words = {ACCENT: "bar: trainops is ahead of all", LEVEL: "bar: level, or behind"}
    handles += [mpl.patches.Patch(color=colour, alpha=0.8, label=text) for colour, text in words.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3 if columns == 1 else 4, fontsize=8.5)
    return figure


def bandwidth(cases: list[dict[str, Any]]) -> Figure | None:
    """Useful bytes per second against the size of the model, under the memory's roof."""
    found = [case for case in selected(cases, "step") if case["dtype"] == "float32" and "limit" in case]
    found = sorted(found, key=lambda case: case["numel"])
    if len(found) < 2:
        return None
    figure = canvas(7.6, 4.4)
    axes = figure.add_subplot()
    places = range(len(found))
    roof = [case["limit"]["bytes_per_second"] / 1e9 for case in found]
    reached = [case["bytes"] / seconds / 1e9 for case in found for seconds in medians(case).values()]
    top = 1.12 * max(*roof, *reached)
    axes.fill_between(places, roof, top, color="#eef0f3", linewidth=0, zorder=0)
    axes.plot(places, roof, color=INK, linewidth=1.4, linestyle=(0, (4, 2)))
    ends = {found[0]["limit"]["name"]: (roof[-1], INK)}
    for name in provider_names(found):
        points = [
            (x, case["bytes"] / medians(case)[name] / 1e9) for x, case in enumerate(found) if name in medians(case)
        ]
        draw_line(axes, name, points)
        if points[-1][0] == places[-1]:
            ends[name] = (points[-1][1], colour(name))
    labels = [f"{case['name'].replace(' tensors', '')}\n{case['numel'] / 1e6:.3g} M" for case in found]
    axes.set_xticks(places, labels, fontsize=8)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, top)
    axes.set_xlim(-0.35, len(found) - 0.65)
    label_ends(axes, ends)
    axes.set_ylabel("useful bandwidth, GB/s")
    axes.set_title("clip + AdamW + EMA, float32: 40 bytes per parameter over the time")
    return figure


def scaling(cases: list[dict[str, Any]]) -> Figure | None:
    """Time against the number of tensors, and against their size."""
    panels = {
        "count": ("tensors", "4.2 M elements in ever more tensors", lambda case: case["tensors"]),
        "size": (
            "elements per tensor",
            "100 tensors of ever more elements",
            lambda case: case["numel"] // case["tensors"],
        ),
    }
    groups = {group: found for group in panels if len(found := selected(cases, "step", group)) > 1}
    if not groups:
        return None
    figure = canvas(6.0 * len(groups), 4.2)
    for i, (group, found) in enumerate(groups.items()):
        label, title, position = panels[group]
        axes, ends = figure.add_subplot(1, len(groups), i + 1), {}
        for name in provider_names(found):
            points = [(position(case), 1e3 * medians(case)[name]) for case in found if name in medians(case)]
            draw_line(axes, name, points)
            if points[-1][0] == position(found[-1]):
                ends[name] = (points[-1][1], colour(name))
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds per step" if i == 0 else None)
        ticks = [position(case) for case in found]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.tick_params(axis="x", which="minor", length=0)
        axes.xaxis.set_minor_formatter(NullFormatter())
        nice_log(axes.yaxis, lambda y: f"{y:g}", None)
        label_ends(axes, ends)
        axes.set_title(title)
    return figure


def training(cases: list[dict[str, Any]]) -> Figure | None:
    """A whole step: forward and backward, and the tail."""
    found = selected(cases, "training", "training")
    if not found:
        return None
    figure = canvas(7.6, 0.9 + 0.95 * len(found))
    axes = figure.add_subplot()
    ticks: dict[float, str] = {}
    y = 0.0
    for case in found:
        times = {name: seconds for name, seconds in medians(case).items() if name != AGAIN}
        slowest = max(times.values())
        for name in times:
            parts = [part["median"] for part in case["providers"][name]["parts"].values()]
            axes.barh(y, parts[0] / slowest, 0.78, color="#e4e7eb")
            axes.barh(y, parts[1] / slowest, 0.78, left=parts[0] / slowest, color=colour(name))
            beside = relative(case).get(name)
            ratio_text = f"{beside.median:.2f}x" if beside else "1x"
            text = f"{ratio_text}, tail {1e3 * parts[1]:.0f} ms ({100 * parts[1] / sum(parts):.0f}%)"
            axes.text(sum(parts) / slowest + 0.012, y, text, va="center", fontsize=8)
            axes.text(0.008, y, name, va="center", fontsize=8, color=INK)
            y += 1
        ticks[y - (len(times) + 1) / 2] = case["name"].replace(", ", "\n", 1)
        y += 0.7
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="both", length=0)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.set_xlim(0, 1.42)
    axes.invert_yaxis()
    axes.set_xlabel("1.36x: takes 1.36 times as long as with trainops. A bar's length is its time.", fontsize=8)
    axes.set_title("a training step, float32: forward and backward (pale), and the tail (coloured)")
    return figure


def provider_names(cases: list[dict[str, Any]]) -> list[str]:
    """All who were timed, trainops last and so on top."""
    names = dict.fromkeys(name for case in cases for name in opponents(case))
    return [*names, OURS]


def draw_line(axes: Axes, name: str, points: list[tuple[float, float]]) -> None:
    """A provider's line, trainops' stronger than the others."""
    ours = name == OURS
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, ls="-", **marker(name, 5 if ours else 4), lw=2.4 if ours else 1.3, zorder=5 if ours else 2)


def label_ends(axes: Axes, ends: dict[str, tuple[float, str]]) -> None:
    """Names at the right ends of lines, moved apart where they would overlap."""
    axes.figure.draw_without_rendering()
    to_share = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    names = sorted(ends, key=lambda name: ends[name][0])
    places = [float(to_share.transform((x, ends[name][0]))[1]) for name in names]
    for _ in range(200):
        for i, (low, high) in enumerate(pairwise(places)):
            overlap = max(0.0, low + 0.052 - high)
            places[i], places[i + 1] = low - overlap / 2, high + overlap / 2
    for name, placed in zip(names, places, strict=True):
        ink = ends[name][1]
        weight = "bold" if name == OURS else "normal"
        axes.text(
            1.015, placed, name, transform=axes.transAxes, va="center", fontsize=8, color=ink, fontweight=weight
        )


def looks(name: str) -> tuple[str, str]:
    """The colour and the marker of a provider."""
    return LOOKS.get(name, LOOKS.get(name.removesuffix(", compiled"), OTHER))


def colour(name: str) -> str:
    """The colour of a provider."""
    return looks(name)[0]


def marker(name: str, size: float) -> dict[str, Any]:
    """The marker of a provider, for a plot."""
    own, shape = looks(name)
    return {"color": own, "marker": shape, "ms": size * SIZES.get(shape, 5) / 5}


def nice_log(axis: Any, form: Callable[[float], str], ticks: tuple[float, ...] | None) -> None:
    """Plain numbers on a logarithmic axis."""
    if ticks:
        low, high = axis.get_view_interval()
        shown: list[float] = []
        for tick in ticks:
            room = math.log(tick / shown[-1]) / math.log(high / low) if shown else 1.0
            if low <= tick <= high and room > 0.07:
                shown.append(tick)
        axis.set_ticks(shown)
    axis.set_major_formatter(FuncFormatter(lambda x, _: form(x)))
    axis.set_minor_formatter(NullFormatter())


PICTURES: dict[str, tuple[Callable[[list[dict[str, Any]]], Figure | None], str]] = {
    "step.png": (step, "time of the opponents relative to trainops in the whole step, by model"),
    "speedup.png": (speedup, "time of the opponents relative to trainops, by model"),
    "bandwidth.png": (bandwidth, "bandwidth by size of the model, under that of the memory"),
    "scaling.png": (scaling, "time by number and by size of tensors"),
    "training.png": (training, "how the time of a training step divides"),
}
