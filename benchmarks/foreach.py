"""The ``foreach`` backend beside PyTorch's best composition of its own operations, on the CPU.

    python -m benchmarks.foreach [--ops step clip adamw ema] [--threads 1] [--seconds 5]

Multi-tensor clip, fused AdamW and multi-tensor average, together (``step``) and each by itself.
Each side is verified in float64 before it is timed, and the
two take turns: a ratio is the median of those within rounds. What ``foreach`` keeps and PyTorch does not has a cost:
it only reads gradients, its norms neither overflow nor vanish, and an infinite average stays.
"""

import argparse
import os
import sys
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from . import bench_adamw, bench_clip_grad_norm, bench_ema, bench_step
from .device import Cpu
from .models import MODELS
from .runner import Options, measure
from .saved import OURS
from .work import Work, shapes_case

CHOSEN = ["1,000 small tensors", "ViT-Ti", "ViT-B"]

# The work of each op, what it moves, and the best of PyTorch's own ways.
OPS: dict[str, tuple[type[Work], int, str]] = {
    "step": (bench_step.StepWork, bench_step.ELEMENTS, "torch fused"),
    "clip": (bench_clip_grad_norm.ClipWork, bench_clip_grad_norm.ELEMENTS, "torch foreach"),
    "adamw": (bench_adamw.AdamWork, bench_adamw.ELEMENTS, "torch fused"),
    "ema": (bench_ema.EmaWork, bench_ema.ELEMENTS, "torch foreach"),
}
TENSORS = 22  # of the model's size, at most


def main(arguments: list[str]) -> int:
    """Show a table; 1 where a side is wrong or was not measured."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.foreach", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=["step"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=CHOSEN)
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=5.0, help="for each case, in at least seven rounds")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    table = Table("op", "model", "type", "PyTorch, ms", "foreach, ms", "foreach / PyTorch", "95%")
    missing = False
    for op, model, dtype in product(args.ops, args.models, args.dtypes):
        work, elements, best = OPS[op]
        case = shapes_case(op, model, MODELS[model], work, elements, TENSORS, Options(), dtype)
        case.names = [best, OURS]
        result = measure(case, Cpu(), args.seconds, rounds=(7, 200))
        found = result.get("providers", {})
        if any(found.get(name, {}).get("status") != "ok" for name in case.names):
            missing = True
            reasons = (found.get(name, {}).get("reason", result.get("skipped", "")) for name in case.names)
            table.add_row(op, model, dtype, *reasons, "", "")
            continue
        ratio, times = found[best]["relative"], (1e3 * found[x]["seconds"]["median"] for x in case.names)
        ends = f"{1 / ratio['high']:.2f} to {1 / ratio['low']:.2f}"
        table.add_row(op, model, dtype, *(f"{x:.2f}" for x in times), f"{1 / ratio['median']:.2f}", ends)
    Console().print(table)
    return int(missing)


if __name__ == "__main__":
    os.environ["TRAINOPS_BACKEND"] = "foreach"
    sys.exit(main(sys.argv[1:]))
