"""Measure, report, compare.

python -m benchmarks [run] [--ops ...] [--models ...] [--quick] [--output DIR]
python -m benchmarks report results.json [--output DIR]
python -m benchmarks compare A.json B.json
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trainops.backends import NAMES

from . import compare, report
from .device import environment, open_device
from .models import MODELS
from .runner import Case, Options, measure
from .saved import OURS

OPS = ["step", "adamw", "clip_grad_norm", "ema", "drop_path", "training"]
DTYPES = ["float32", "bfloat16"]

# Seconds of timing for each case, and the least and most rounds.
FULL, QUICK = (2.0, (7, 101)), (0.4, (3, 15))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `run` may be left out."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=Raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report | compare")
    run = commands.add_parser("run", help="measure; the default", formatter_class=Raw)
    run.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    run.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}")
    run.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=" and ".join(DTYPES))
    run.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where PyTorch finds one")
    run.add_argument("--backend", choices=NAMES, help="of trainops; default: what it chooses")
    run.add_argument("--quick", action="store_true", help="some minutes: fewer cases and rounds, nothing compiled")
    run.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes most of the time"
    )
    run.add_argument("--threads", type=int, help="on the CPU; default: as many as PyTorch takes")
    run.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="default: %(default)s")
    again = commands.add_parser("report", help="tables and pictures of saved results")
    again.add_argument("results", type=Path)
    again.add_argument("--output", type=Path, help="default: beside the results")
    pair = commands.add_parser("compare", help="what changed between two results")
    pair.add_argument("before", type=Path)
    pair.add_argument("after", type=Path)
    if not arguments or (arguments[0] not in commands.choices and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    args = parser.parse_args(arguments)
    if args.command == "run":
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.device == "cuda" and not torch.cuda.is_available():
            parser.error("PyTorch finds no GPU")
    return args


Raw = argparse.RawDescriptionHelpFormatter


def all_cases(ops: list[str], options: Options) -> Iterator[Case]:
    """Of all ops, each from its own module."""
    for op in ops:
        yield from importlib.import_module(f".bench_{op}", __package__).cases(options)


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure everything, save after each case, and report; 1 if trainops itself was wrong somewhere."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.backend:
        os.environ["TRAINOPS_BACKEND"] = args.backend
    options = Options(args.device, args.models, args.dtypes, args.quick, compiles=not (args.quick or args.no_compile))
    device, found = open_device(args.device), environment(args.device)
    console.print("  ".join(f"[dim]{key}[/] {value}" for key, value in found.items() if value))
    cases = list(all_cases(args.ops, options))
    results: dict[str, Any] = {"environment": found | {"quick": args.quick}, "cases": []}
    args.output.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        console.print(report.progress_header(), style="bold")
        for case in cases:
            progress.update(task, description=f"{case.op}: {case.name}, {case.dtype}")
            result = measure(case, device, *(QUICK if args.quick else FULL))
            results["cases"].append(result)
            console.print(report.progress_line(result))
            (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            progress.advance(task)
    report.save(results, args.output, console)
    statuses = [case["providers"][OURS] for case in results["cases"] if "providers" in case]
    return int(any(status["status"] in ("wrong", "failed") for status in statuses))


def main(arguments: list[str]) -> int:
    """What the command line says."""
    args = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if args.command == "run":
        return run(args, console)
    if args.command == "report":
        report.save(report.load(args.results), args.output or args.results.parent, console)
        return 0
    compare.show(report.load(args.before), report.load(args.after), console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
