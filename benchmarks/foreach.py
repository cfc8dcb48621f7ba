"""The ``foreach`` backend beside PyTorch's own composition of the same operations, on the CPU.

    python -m benchmarks.foreach [--threads 1]

Clip, fused AdamW and average of a ViT with 3.4 million parameters. Each side is verified before it is timed, and all
take turns: a ratio is the median of those within rounds. 1.05 is what ``foreach`` is to stay below.
"""

import argparse
import os
import sys

import torch
from rich.console import Console
from rich.table import Table

from .bench_clip_grad_norm import ClipWork
from .bench_ema import EmaWork
from .bench_step import StepWork
from .device import Cpu
from .models import numel, vit
from .runner import Options, measure
from .saved import OURS
from .work import shapes_case

SHAPES = vit(146, 12)
WORKS = {"clip, AdamW, average": (StepWork, 10, 22), "clip": (ClipWork, 3, 3), "average": (EmaWork, 3, 4)}
BEST = {"clip, AdamW, average": "torch fused", "clip": "torch foreach", "average": "torch foreach"}


def main(arguments: list[str]) -> int:
    """Show a table; 1 where a side is wrong."""
    parser = argparse.ArgumentParser("python -m benchmarks.foreach", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args(arguments).threads)
    table = Table(
        "op", "PyTorch, ms", "foreach, ms", "foreach / PyTorch", "95%", title=f"{numel(SHAPES):,} parameters"
    )
    wrong = False
    for op, (work, elements, tensors) in WORKS.items():
        case = shapes_case(op, "ViT", SHAPES, work, elements, tensors, Options(), "float32")
        case.names = [BEST[op], OURS]
        found = measure(case, Cpu(), seconds=5.0, rounds=(15, 200)).get("providers", {})
        if any(found.get(name, {}).get("status") != "ok" for name in case.names):
            wrong = True
            table.add_row(op, *(found.get(name, {}).get("reason", "") for name in case.names), "", "")
            continue
        ratio, times = found[BEST[op]]["relative"], (1e3 * found[name]["seconds"]["median"] for name in case.names)
        ends = f"{1 / ratio['high']:.2f} to {1 / ratio['low']:.2f}"
        table.add_row(op, *(f"{x:.2f}" for x in times), f"{1 / ratio['median']:.2f}", ends)
    Console().print(table)
    return int(wrong)


if __name__ == "__main__":
    os.environ["TRAINOPS_BACKEND"] = "foreach"
    sys.exit(main(sys.argv[1:]))
