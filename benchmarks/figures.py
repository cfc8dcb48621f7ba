"""Writes the figures of saved results into the README and the documentation: one source for every figure.

    python -m benchmarks.figures            # after `make bench`: rewrites what stands between two comments
    python -m benchmarks.figures --check    # fails where a page has other figures

In a page, ``<!-- figures: step -->`` and ``<!-- end of figures -->`` stand around what is written here.
"""

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from .report import load, milliseconds
from .saved import AGAIN, OURS, Case, caption, fastest, medians, ratio, relative, relative_of, verdict

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIRST = "cpu"  # of its folders; others have what is not in it
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def pages() -> list[Path]:
    """Where figures may stand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose figures stand below each other."""
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def told(case: Case, opponent: str | None = None) -> str:
    """The time of an opponent, the fastest one by default, over that of trainops, and what is to be said of it."""
    found = ratio(case) if opponent is None else relative(case).get(opponent)
    if found is None:
        return "-"
    word = verdict(case, opponent)
    return f"**{found.median:.2f}**" if word == "ahead" else f"{found.median:.2f} ({word})"


def by_name(cases: list[Case], op: str, group: str) -> dict[str, dict[str, Case]]:
    """The cases of an op that were measured, by work and dtype."""
    found: dict[str, dict[str, Case]] = {}
    for case in cases:
        if (case["op"], case["group"]) == (op, group) and OURS in medians(case):
            found.setdefault(case["name"], {})[case["dtype"]] = case
    return found


def step(cases: list[Case], op: str = "step") -> list[str]:
    """The whole step, with the interval of the ratio."""
    rows = []
    for name, found in by_name(cases, op, "models").items():
        case = found["float32"]
        times, best, x = medians(case), fastest(case), ratio(case)
        if best is None or x is None:
            continue
        row = [name, f"{case['numel'] / 1e6:.1f} M", best, milliseconds(times[best]), milliseconds(times[OURS])]
        rows.append([*row, f"{told(case)} ({x.low:.2f} to {x.high:.2f})", told(found["bfloat16"])])
    header = ("model", "parameters", "fastest alternative", "its time", "trainops", "ratio (95%)", "bfloat16 ratio")
    return table(header, rows)


def adam(cases: list[Case]) -> list[str]:
    """The whole step with Adam."""
    return step(cases, "adam")


def sgd(cases: list[Case]) -> list[str]:
    """The whole step with SGD."""
    return step(cases, "sgd")


def step_short(cases: list[Case]) -> list[str]:
    """The same in fewer words."""
    chosen = ("ViT-Ti", "ViT-B", "GPT-2")
    rows = [
        [name, f"{found['float32']['numel'] / 1e6:.1f} M", *(told(found[x]) for x in ("float32", "bfloat16"))]
        for name, found in by_name(cases, "step", "models").items()
        if name in chosen
    ]
    return table(("model", "parameters", "float32", "bfloat16"), rows)


def share(cases: list[Case]) -> list[str]:
    """How near to the bandwidth of memory a step comes."""
    rows = []
    for name, found in by_name(cases, "step", "models").items():
        limits = [found[dtype].get("limit") for dtype in ("float32", "bfloat16")]
        rows.append([name, *(f"{100 * limit['share']['median']:.0f}%" if limit else "-" for limit in limits)])
    return table(("model", "float32", "bfloat16"), rows)


def ops(cases: list[Case]) -> list[str]:
    """Each op by itself."""
    shown = {"adamw": "AdamW", "clip_grad_norm": "`clip_grad_norm_`", "ema": "EMA"}
    found = {op: by_name(cases, op, "models") for op in shown}
    rows = [
        [name, *(told(of[name][dtype]) for of in found.values() for dtype in ("float32", "bfloat16"))]
        for name in found["adamw"]
    ]
    return table(("model", *(title + end for title in shown.values() for end in ("", ", bfloat16"))), rows)


def drop_path(cases: list[Case]) -> list[str]:
    """DropPath and stochastic depth, beside timm in eager mode and compiled."""
    rows = []
    for group in ("add", "depth"):
        for name, found in by_name(cases, "drop_path", group).items():
            narrow = found["bfloat16"]
            wide = [told(found["float32"], opponent) for opponent in ("timm", "timm, compiled")]
            rows.append([name, *wide, told(narrow, "timm")])
    return table(("work", "beside timm", "beside timm, compiled", "beside timm, bfloat16"), rows)


def training(cases: list[Case]) -> list[str]:
    """Whole training steps."""
    rows = []
    for name, found in by_name(cases, "training", "training").items():
        case = found["float32"]
        parts = case["providers"][OURS]["parts"]
        tail = parts["tail"]["median"] / sum(part["median"] for part in parts.values())
        rows.append([name, told(case, "torch fused"), told(case, "torch as written"), f"{100 * tail:.0f}%"])
    beside = ("beside fused AdamW, `foreach` clip and EMA", "beside PyTorch's defaults and `AveragedModel`")
    return table(("training step", *beside, "tail of ours"), rows)


def training_range(cases: list[Case]) -> list[str]:
    """The same in a sentence."""
    found = [of["float32"] for of in by_name(cases, "training", "training").values()]
    ends = []
    for opponent in ("torch fused", "torch as written"):
        ratios = sorted(relative(case)[opponent].median for case in found)
        ends.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f}")
    return [
        f"Whole training steps of a small ViT and a small GPT are {ends[0]} times as fast as with fused AdamW,",
        f"`foreach` clipping and EMA, and {ends[1]} times as fast as with PyTorch's defaults and `AveragedModel`.",
    ]


def low_precision(cases: list[Case]) -> list[str]:
    """Every way to keep weights, with what it keeps, where it was measured."""
    rows = []
    for name, of in by_name(cases, "low_precision", "models").items():
        for case in of.values():
            times = {way: seconds for way, seconds in medians(case).items() if way != AGAIN}
            for way, seconds in sorted(times.items(), key=lambda item: item[1]):
                kept = case["providers"][way].get("note", "").rpartition("= ")[2]
                own = relative_of(case, way)
                beside = "1" if own is None else told(case, way) if way in relative(case) else f"{own.median:.2f}"
                title = "trainops split, bfloat16 moments" if way == OURS else way
                rows.append([name, title, kept, milliseconds(seconds), beside])
    if not rows:
        return ["The saved results have no figures of this yet: `python -m benchmarks run --ops low_precision`."]
    return table(("model", "way", "bytes per parameter", "time", "over split with bfloat16 moments"), rows)


TABLES: dict[str, Callable[[list[Case]], list[str]]] = {
    "step": step,
    "adam": adam,
    "sgd": sgd,
    "step_short": step_short,
    "share": share,
    "ops": ops,
    "drop_path": drop_path,
    "training": training,
    "training_range": training_range,
    "low_precision": low_precision,
}


# The ops of tables that do not have their name.
OPS = {
    "step_short": ["step"],
    "share": ["step"],
    "training_range": ["training"],
    "ops": ["adamw", "clip_grad_norm", "ema"],
}


def written(text: str) -> str:
    """A page with the figures of saved results."""
    first = load(RESULTS / FIRST / "results.json")
    cases, ops = list(first["cases"]), {case["op"] for case in first["cases"]}
    more: dict[str, str] = {}  # where ops of other folders were measured
    for path in sorted(RESULTS.glob(f"{FIRST}-*/results.json")):
        results = load(path)
        new = [case for case in results["cases"] if case["op"] not in ops]
        cases += new
        more |= {case["op"]: caption(results) for case in new}

    def block(found: re.Match[str]) -> str:
        name = found[2]
        lines = [caption(first) + "."] if name == "hardware" else TABLES[name](cases)
        for where in dict.fromkeys(more[op] for op in OPS.get(name, [name]) if op in more):
            lines += ["", f"Measured by itself: {where}."]
        return found[1] + "\n" + "\n".join(lines) + "\n\n" + found[3]

    return BLOCK.sub(block, text)


def stale() -> Iterator[tuple[Path, str]]:
    """Pages whose figures are not those of the saved results, and what they should be."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := written(text)) != text:
            yield page, new


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the pages, or look whether they have to be."""
    parser = argparse.ArgumentParser("python -m benchmarks.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page has other figures")
    check = parser.parse_args(arguments).check
    found = list(stale())
    for page, new in found:
        print(f"{page.relative_to(ROOT)} {'has other figures' if check else 'rewritten'}")
        if not check:
            page.write_text(new, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
