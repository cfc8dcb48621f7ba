"""Runs all experiments and makes one page of them.

    python examples/tricks/page.py [--output outputs/tricks] [--jobs 2] [--only weight_decay,clipping]

With ``--markdown docs/tricks.md`` it is a page of the documentation, too, and the pictures lie beside it. The exit
status is 1 where a claim does not hold.
"""

import argparse
import importlib
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from html import escape
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
from experiment import OUTPUT, Report, perform, title_of
from PIL import Image
from rich.progress import track

import trainops

# In the order of the page.
EXPERIMENTS = (
    "vanishing_gradients",
    "initialisation",
    "learning_rate",
    "valleys",
    "optimizers",
    "clipping",
    "accumulation",
    "weight_decay",
    "regularisers",
    "drop_path",
    "averaging",
)

STYLE = """
body { margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; color: #1f2933; background: #fff;
       font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { margin-bottom: 0; } h2 { margin: 56px 0 8px; font-size: 1.3em; }
p { max-width: 46em; } a { color: #1d5f8a; } nav li { margin: 2px 0; }
.found { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 24px; align-items: start; }
img { width: 100%; min-width: 600px; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85em; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e7eb; }
ul.claims { padding: 0; list-style: none; font-size: 0.9em; }
ul.claims li { margin: 4px 0; padding-left: 4.6em; text-indent: -4.6em; }
ul.claims b { display: inline-block; width: 4.6em; text-indent: 0; color: #1f7a6c; }
ul.claims .fails b { color: #c8374a; }
code { font-size: 0.9em; background: #f2f4f7; padding: 1px 4px; border-radius: 3px; }
.small { color: #52606d; font-size: 0.85em; }
@media (max-width: 820px) { .found { grid-template-columns: minmax(0, 1fr); } }
"""


class Made(NamedTuple):
    """An experiment that was run: its part of the page, and what of it did not hold."""

    name: str
    title: str
    section: str
    markdown: str
    failed: list[str]


def make(name: str, output: Path) -> Made:
    """Run one experiment and save its picture."""
    began = time.perf_counter()
    module = importlib.import_module(name)
    picture = output / f"{name}.png"
    report = perform(module.run, picture)
    _, usage, *text = module.__doc__.strip().split("\n\n")
    title = title_of(module.__doc__)
    seconds = f"{usage.strip()} took {time.perf_counter() - began:.0f} s"
    failed = [claim.text for claim in report.claims if not claim.holds]
    in_markdown = markdown(name, title, text, report, usage.strip())
    return Made(name, title, section(name, title, text, report, picture.name, seconds), in_markdown, failed)


def section(name: str, title: str, text: Sequence[str], report: Report, picture: str, seconds: str) -> str:
    """The picture beside the table, and below them the claims."""

    def cells(row: Sequence[str], tag: str) -> str:
        lines = (escape(cell).replace(" (", '<br><span class="small">(') for cell in row)
        return "<tr>" + "".join(f"<{tag}>{line}</{tag}>" for line in lines) + "</tr>"

    paragraphs = "".join(f"<p>{with_code(paragraph)}</p>" for paragraph in text)
    table = cells(report.header, "th") + "".join(cells(row, "td") for row in report.rows)
    claims = "".join(
        f'<li class="{"holds" if holds else "fails"}"><b>{"holds" if holds else "fails"}</b>{escape(claim)}</li>'
        for claim, holds in report.claims
    )
    return f"""<section id="{name}"><h2>{escape(title)}</h2>{paragraphs}
<div class="found">
<div class="scroll"><img src="{picture}" alt="{escape(title)}"></div>
<div class="scroll"><table>{table}</table></div>
</div>
<ul class="claims">{claims}</ul><p class="small"><code>{escape(seconds)}</code></p></section>"""


def markdown(name: str, title: str, text: Sequence[str], report: Report, usage: str) -> str:
    """The same for the documentation."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|").replace(" (", "<br>(") for cell in cells) + " |"

    table = "\n".join([line(report.header), line(["---"] * len(report.header)), *map(line, report.rows)])
    claims = "\n".join(f"- {'holds' if holds else '**does not hold**'}: {claim}" for claim, holds in report.claims)
    parts = [f"## {title}", *text, f"![{title}](tricks/{name}.png)", table, claims, f"`{usage}`"]
    return "\n\n".join(parts) + "\n"


MARKDOWN = """# What each trick does

Small experiments on data that scikit-learn makes or ships. `make tricks` runs them in a minute or two. Tables have
the median of the seeds, then the lowest and the highest one. A claim about seeds holds where a sign test is
significant at 5%: five of five seeds have to agree, or nine of ten.
"""


def save_markdown(made: Sequence[Made], output: Path, path: Path) -> None:
    """Write the page of the documentation, and the pictures beside it in 64 colours."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        picture = Image.open(output / f"{one.name}.png").convert("RGB")
        picture.quantize(64, dither=Image.Dither.NONE).save(folder / f"{one.name}.png", optimize=True)
    path.write_text("\n".join([MARKDOWN, *(one.markdown for one in made)]), encoding="utf-8")


def with_code(text: str) -> str:
    """Text in HTML, with what stands between backquotes as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def page(made: Sequence[Made]) -> str:
    """The whole page."""
    links = "".join(f'<li><a href="#{one.name}">{escape(one.title)}</a></li>' for one in made)
    versions = f"trainops {trainops.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>What each trick does</title>
<style>{STYLE}</style><h1>What each trick does</h1>
<p>Small experiments on data that scikit-learn makes or ships. Tables have the median of the seeds, then the lowest
and the highest one. A claim about seeds holds where a sign test is significant at 5%: five of five seeds have to
agree, or nine of ten.</p><p class="small">{versions}</p><nav><ul>{links}</ul></nav>
{"".join(one.section for one in made)}</html>
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the experiments and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="experiments at a time; default: all cores"
    )
    parser.add_argument("--only", default=",".join(EXPERIMENTS), help="names, separated by commas; default: all")
    parser.add_argument("--markdown", type=Path, metavar="docs/tricks.md", help="also write this page")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := sorted({*names} - {*EXPERIMENTS}):
        parser.error(f"--only: there is no {', '.join(unknown)}, but {', '.join(EXPERIMENTS)}")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    options.output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        run = map if options.jobs == 1 else pool.map
        made = list(track(run(make, names, repeat(options.output)), "experimenting", len(names)))
    path = options.output / "index.html"
    path.write_text(page(made), encoding="utf-8")
    if options.markdown:
        save_markdown(made, options.output, options.markdown)
    for one in made:
        for claim in one.failed:
            print(f"DOES NOT HOLD: {one.name}: {claim}")
    print(f"saved {path}")
    return int(any(one.failed for one in made))


if __name__ == "__main__":
    raise SystemExit(main())
