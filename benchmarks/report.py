"""Tables and a Markdown report, from saved results alone. The pictures are in `plots.py`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .saved import OURS, Interval, caption, fastest, medians, noise, ratio, share, verdict

TITLES = {
    "step": "The whole step: clip, AdamW, average",
    "adamw": "AdamW",
    "adam": "The whole step with Adam: clip, Adam, average",
    "sgd": "The whole step with SGD: clip, SGD with momentum, average",
    "clip_grad_norm": "Clipping by the norm",
    "ema": "The average (EMA)",
    "drop_path": "DropPath and stochastic depth, forward and backward",
    "low_precision": "The whole step in low precision: clip, AdamW, float32 average",
    "training": "Training: forward, backward and the tail",
}

PICTURES_OF = {"step": ("step.png", "speedup.png", "bandwidth.png", "scaling.png"), "training": ("training.png",)}

METHOD = (
    "Every provider was compared with float64 before it was timed. Times are medians of interleaved rounds, with "
    "the caches full of something else before each call (but for DropPath and training). `x` is the time of the "
    "fastest opponent over that of trainops in the same round, the median of all rounds: above 1, trainops is "
    "ahead. It is not quite the ratio of the times beside it, which are medians each by themselves. Between the "
    "two numbers after it that median lies with 95% confidence. (Which opponent is the fastest comes from the "
    "same rounds, which favours it a little.) A/A is the same for trainops and trainops again, which is noise; "
    "where a difference is not beyond that and 1 with confidence, the two are level. Bandwidth counts the bytes "
    "that the best possible implementation moves, whatever a provider moves. Extra memory is the most of "
    "PyTorch's memory that a call holds beyond what was there before it. In a training step, forward and backward "
    "are the same work for all, and count with their mean over the providers of a round, in A/A, too."
)
METHOD_LIMIT = " The last column is trainops' share of the bandwidth of `{limit}` in the same rounds."
METHOD_OF = {
    "cpu": " All of PyTorch's memory is in huge pages where the system gives them.",
    "cuda": (
        " The device waits until the host has issued a step, so times are its own; the host's are beside them. Where "
        "it could not wait so long, times are marked with the share of such rounds."
    ),
}

# What some do besides or instead, as far as it is allowed for.
NOTES = {
    "optimi": "adds up 16-bit parameters with compensation, which takes one more tensor",
    "DeepSpeed CPUAdam": "keeps moments in float32 by default",
    "bitsandbytes": "keeps moments in float32",
    "timm ModelEmaV3": "rounds 16-bit averages stochastically",
    "Apex FusedAdamSWA": "writes a copy of the parameters to compute with",
}

WIDTHS = (14, 37, 9, 11, 31, 11, 12, 12, 12, 9)
HEADER = ("op", "work", "dtype", "trainops", "fastest opponent", "its time", "x", "95%", "A/A", "of limit")
LEFT = (0, 1, 2, 4)
COLOURS = {"ahead": "green", "behind": "yellow"}


class Row(NamedTuple):
    """What one line of a table says of a case."""

    op: str
    work: str
    dtype: str
    ours: str
    opponent: str
    theirs: str
    ratio: str
    interval: str
    noise: str
    share: str


def load(path: Path) -> dict[str, Any]:
    """Saved results; the program ends with a message where the file holds none."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from None
    if not isinstance(results, dict) or not {"environment", "cases"} <= results.keys():
        raise SystemExit(f"{path} holds no results of this suite")
    return results


def milliseconds(seconds: float) -> str:
    """Three digits or so."""
    return f"{1e3 * seconds:.3f} ms" if seconds < 0.01 else f"{1e3 * seconds:.1f} ms"


def row(case: dict[str, Any]) -> Row:
    """A case in a line."""
    times, best, found = medians(case), fastest(case), ratio(case)
    part = share(case)
    return Row(
        case["op"],
        case["name"],
        case["dtype"],
        milliseconds(times[OURS]) if OURS in times else "-",
        best or "-",
        milliseconds(times[best]) if best else "-",
        f"{found.median:.2f}" + ("" if verdict(case) == "ahead" else f" ({verdict(case)})") if found else "-",
        interval(found),
        interval(noise(case)),
        f"{100 * part.median:.0f}%" if part else "",
    )


def interval(found: Interval | None) -> str:
    """Its ends."""
    return f"{found.low:.2f} to {found.high:.2f}" if found else "-"


def line(cells: tuple[str, ...]) -> str:
    """Cells in columns, for what is printed as it goes."""
    return " ".join(
        cell.ljust(width) if i in LEFT else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )


def progress_header() -> str:
    """Above the lines that are printed as it goes."""
    return line(HEADER)


def progress_line(case: dict[str, Any]) -> str:
    """A case when it has been measured, or why it was not, and who was wrong."""
    if "skipped" in case:
        return (
            line((case["op"], case["name"], case["dtype"], *[""] * 7)).rstrip()
            + f" [yellow]skipped: {escape(case['skipped'])}[/]"
        )
    text = line(row(case))
    if colour := COLOURS.get(verdict(case)):
        text = f"[{colour}]{text}[/]"
    for name, status, reason in not_timed(case):
        if status != "not here" or name == OURS:
            text += f"\n    [red]{name} {status}: {escape(reason)}[/]"
    return text


def not_timed(case: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Who took no part, and why."""
    for name, found in case.get("providers", {}).items():
        if found["status"] != "ok":
            yield name, found["status"], found["reason"]


def summary(results: dict[str, Any]) -> Table:
    """Every case in one table, for the terminal."""
    table = Table(title=caption(results), title_justify="left", caption="x: time of the fastest opponent / trainops")
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i in LEFT else "right", no_wrap=True)
    for case in results["cases"]:
        cells = row(case)
        style = COLOURS.get(verdict(case), "")
        table.add_row(
            *(cells if "skipped" not in case else (*cells[:4], escape(case["skipped"]), *[""] * 5)), style=style
        )
    return table


def markdown(results: dict[str, Any], pictures: dict[str, str]) -> str:
    """The report: a table for each op, the pictures, every provider in detail, and who was not timed."""
    limits = {case["limit"]["name"] for case in results["cases"] if "limit" in case}
    method = METHOD + "".join(METHOD_LIMIT.format(limit=limit) for limit in limits)
    peers = results["environment"].get("peers")
    about = caption(results) + (f"; {peers}" if peers else "")
    text = ["# Benchmarks", "", about + ".", "", method + METHOD_OF[results["environment"]["type"]], ""]
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        cases = [case for case in results["cases"] if case["op"] == op]
        text += [f"## {TITLES.get(op, op)}", ""]
        text += [f"![{alt}]({name})\n" for name, alt in pictures.items() if name in PICTURES_OF.get(op, ())]
        text += markdown_table(HEADER[1:], [row(case)[1:] for case in cases if "skipped" not in case])
        text += [
            f"- {case['name']}, {case['dtype']}: skipped, {case['skipped']}" for case in cases if "skipped" in case
        ]
        text += ["", "<details><summary>Every provider</summary>", ""]
        text += markdown_table(DETAILS, [cells for case in cases for cells in detail(case)])
        text += ["", "</details>", ""]
    timed = {name for case in results["cases"] for name in medians(case)}
    text += ["## Who does something else", ""]
    text += [f"- {name} {note}." for name, note in NOTES.items() if name in timed]
    text += ["", "## Who was not timed, and why", ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for case in results["cases"]:
        for name, status, reason in not_timed(case):
            why = reason if status == "not here" else f"**{status}**: {reason}"
            reasons.setdefault((name, why), []).append(f"{case['op']}, {case['name']}, {case['dtype']}")
    text += [f"- {name}: {why} ({where(cases)})" for (name, why), cases in reasons.items()]
    return "\n".join(text).rstrip() + "\n"


def where(cases: list[str]) -> str:
    """The cases by name, where they are few."""
    return "; ".join(cases) if len(cases) <= 2 else f"{len(cases)} cases"


DETAILS = (
    "work",
    "dtype",
    "provider",
    "time",
    "p20 to p80",
    "/ trainops",
    "GB/s",
    "extra memory",
    "launches",
    "host",
    "note",
)


def detail(case: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A line for each provider that was timed."""
    for name, found in case.get("providers", {}).items():
        if found["status"] != "ok":
            continue
        seconds, host = found["seconds"], found.get("host_seconds")
        yield (
            case["name"],
            case["dtype"],
            name,
            milliseconds(seconds["median"]) + held_up(found),
            f"{1e3 * seconds['p20']:.3f} to {1e3 * seconds['p80']:.3f}",
            "1.00" if name == OURS else f"{found['relative']['median']:.2f}" if "relative" in found else "-",
            f"{found['bytes_per_second'] / 1e9:.1f}" if "bytes_per_second" in found else "",
            f"{found['extra_bytes'] / 1e6:.1f} MB" if found["extra_bytes"] is not None else "",
            str(found["launches"]) if found["launches"] is not None else "",
            milliseconds(host["median"]) if host else "",
            found.get("note", ""),
        )


def held_up(found: dict[str, Any]) -> str:
    """A mark on times that are the host's in part."""
    return f" ({100 * found['held_up'] / found['rounds']:.0f}% held up)" if "held_up" in found else ""


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table, without the columns that are empty throughout."""
    kept = [i for i in range(len(header)) if any(cells[i] for cells in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *([cells[i] for i in kept] for cells in rows)]
    return ["| " + " | ".join(cells) + " |" for cells in lines] if rows else []


def save(results: dict[str, Any], output: Path, console: Console) -> None:
    """Write the report and its pictures."""
    from . import plots  # which takes a while to import

    output.mkdir(parents=True, exist_ok=True)
    pictures = plots.save(results, output)
    (output / "report.md").write_text(markdown(results, pictures))
    console.print(f"report and pictures: {output}")
