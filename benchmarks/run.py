"""Measure everything that the command line asks for."""

import argparse
import importlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from trainops.adapters import check

from . import report
from .device import environment, open_device
from .runner import Case, Options, measure
from .saved import AGAIN, OURS

# Seconds of timing for each case, and the least and most rounds.
FULL, QUICK = (2.0, (15, 101)), (0.25, (6, 15))


def all_cases(ops: list[str], options: Options) -> Iterator[Case]:
    """Of all ops, each from its own module."""
    for op in ops:
        yield from importlib.import_module(f".bench_{op}", __package__).cases(options)


def run(args: argparse.Namespace, console: Console) -> int:
    """Measure everything, save after each case, and report; 1 if trainops itself was wrong somewhere."""
    if args.threads:
        torch.set_num_threads(args.threads)
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU")
    if args.backend:
        try:
            check(args.backend)
        except RuntimeError as reason:
            raise SystemExit(str(reason)) from None
        os.environ["TRAINOPS_BACKEND"] = args.backend
    options = Options(kind, args.models, args.dtypes, args.quick, compiles=not (args.quick or args.no_compile))
    device, found = open_device(kind), environment(kind)
    console.print("  ".join(f"[dim]{key}[/] {value}" for key, value in found.items() if value))
    cases = list(all_cases(args.ops, options))
    duration = "some minutes" if args.quick else "half an hour or more (--quick: some minutes)"
    console.print(f"{len(cases)} cases: {duration}. Results go to {args.output}.")
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
            torch.compiler.reset()  # what is compiled keeps its tensors
    report.save(results, args.output, console)
    cases_of_ours = [
        case["providers"].get(name, {}) for case in results["cases"] for name in (OURS, AGAIN) if "providers" in case
    ]
    return int(any(found.get("status") in ("wrong", "failed") for found in cases_of_ours))
