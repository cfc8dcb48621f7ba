"""Measure, report, compare.

python -m benchmarks [run] [--ops ...] [--models ...] [--quick] [--output DIR]
python -m benchmarks report results.json [--output DIR]
python -m benchmarks compare A.json B.json
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from . import compare, report
from .models import MODELS

OPS = ["step", "adamw", "adam", "sgd", "clip_grad_norm", "ema", "drop_path", "low_precision", "training"]
DTYPES = ["float32", "bfloat16"]
BACKENDS = ["reference", "foreach", "cpu", "cuda", "triton"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; `run` may be left out."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, formatter_class=Raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="run | report | compare")
    run = commands.add_parser("run", help="measure; the default", formatter_class=Raw)
    run.add_argument("--ops", nargs="+", choices=OPS, default=OPS, metavar="OP", help=", ".join(OPS))
    run.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help=f"of {', '.join(MODELS)}")
    run.add_argument("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=" and ".join(DTYPES))
    run.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where PyTorch finds one")
    run.add_argument("--backend", choices=BACKENDS, help="of trainops; default: what it chooses")
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
    return parser.parse_args(arguments)


Raw = argparse.RawDescriptionHelpFormatter


def main(arguments: list[str]) -> int:
    """What the command line says."""
    args = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    if args.command == "run":
        from .run import run  # saved results are read without PyTorch

        return run(args, console)
    if args.command == "report":
        results = report.load(args.results)
        console.print(report.summary(results))
        report.save(results, args.output or args.results.parent, console)
        return 0
    compare.show(report.load(args.before), report.load(args.after), console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
