"""What changed between two saved results."""

from typing import Any

from rich.console import Console
from rich.table import Table

from .saved import OURS, caption, fastest, ratio

Key = tuple[str, str, str]

CONDITIONS = ("device", "threads", "instructions", "torch", "cuda", "backend", "peers", "quick", "huge pages")


def by_key(results: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """The cases that were measured."""
    return {(case["op"], case["name"], case["dtype"]): case for case in results["cases"] if "skipped" not in case}


def changed(before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether two times differ by more than their noise: from p20 to p80, they do not overlap."""
    return before["p80"] < after["p20"] or after["p80"] < before["p20"]


def ahead_by(case: dict[str, Any]) -> str:
    """The ratio to the fastest opponent, where it lies with 95% confidence, and who that is."""
    found = ratio(case)
    return f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f}) {fastest(case)}" if found else "-"


def show(before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    """A line for each case of both, and the cases of one alone."""
    console.print(f"before: {caption(before)}\nafter:  {caption(after)}")
    one, other = before["environment"], after["environment"]
    if differing := [what for what in CONDITIONS if one.get(what) != other.get(what)]:
        console.print(f"[yellow]Not the same: {', '.join(differing)}. Compare the ratios, not the times.[/]")
    old, new = by_key(before), by_key(after)
    table = Table(caption="ahead: time of the fastest opponent / trainops. bold: beyond the noise (p20 to p80)")
    for name in ("op", "work", "dtype", "before", "after", "change", "ahead before", "ahead after"):
        table.add_column(name, justify="left" if name in ("op", "work", "dtype") else "right")
    for key in (key for key in old if key in new):
        first, second = (case[key]["providers"].get(OURS, {}).get("seconds") for case in (old, new))
        cells = ["-", "-", "not timed"]
        if first and second:
            change = f"{100 * (second['median'] / first['median'] - 1):+.1f}%"
            cells = [f"{1e3 * x['median']:.3f} ms" for x in (first, second)]
            cells.append(f"[bold]{change}[/]" if changed(first, second) else change)
        ahead = (ahead_by(case[key]) for case in (old, new))
        table.add_row(*key, *cells, *ahead)
    console.print(table)
    for label, keys in (("before", old.keys() - new.keys()), ("after", new.keys() - old.keys())):
        for key in sorted(keys):
            console.print(f"only {label}: {', '.join(key)}")
