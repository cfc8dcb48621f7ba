"""AdamW in float32 or float64 by PyTorch's fused step.

That would rewrite gradients that it scales. So it is given copies that are scaled: on a CPU, those of a chunk at a
time, always in the same memory, which stays in the cache. Averages move while the weights of their chunk are there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._foreach_average import move, move_chunk
from ._foreach_rows import WIDE, Alike, Columns, alike, all_finite, batches, chunk_numel, chunks, on_host
from .interface import AVERAGES

# The types of device that have PyTorch's fused step.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

# In 1 - beta ** step, as PyTorch's fused step has it, more than this cancels too many digits of float64.
LARGEST_BETA = 0.9999


def takes(rule: str, columns: Columns, types_of: Mapping[str, torch.dtype], settings: Mapping[str, Any]) -> bool:
    """Whether these rows, whose columns have these types, can have the fused step."""
    device, dtype = columns["param"][0].device, types_of["param"]
    return (
        rule == "adamw"
        and dtype in WIDE
        and all(its == (torch.float32 if name == "step" else dtype) for name, its in types_of.items())
        and (dtype == torch.float32 or max(settings["beta1"], settings["beta2"]) <= LARGEST_BETA)
        and device.type in FUSED_DEVICES
        and (on_host(device) or not isinstance(settings["lr"], Tensor))
    )


def step(
    columns: Columns,
    settings: Mapping[str, Any],
    coefficient: Tensor | float,
    ema_decays: Sequence[float],
    found: Alike | None,
) -> None:
    """A step of rows in one piece each, and their averages. ``found``: which gradients are alike, if it is known."""
    torch._foreach_add_(columns["step"], torch.ones(()), alpha=1.0)
    scale = coefficient if isinstance(coefficient, Tensor) else None
    decays = dict(zip(AVERAGES, ema_decays, strict=False))
    if scale is None and columns.keys().isdisjoint(AVERAGES):
        _adamw(columns, columns["grad"], settings)
        return
    device, dtype = columns["param"][0].device, columns["param"][0].dtype
    if not on_host(device):
        for chunk in chunks(columns, chunk_numel(device)):
            grads = chunk["grad"] if scale is None else torch._foreach_mul(chunk["grad"], scale.to(dtype))
            _adamw(chunk, list(grads), settings)
            for name, decay in decays.items():
                if name in chunk:
                    move(chunk[name], chunk["param"], (dtype, dtype), decay, None)
        return
    limit = 2 * chunk_numel(device)  # of the seven columns, few are read twice
    copies = None if scale is None else Copies(scale, dtype, limit)
    for chunk, are_alike in batches(columns, found or alike(columns["grad"]), limit):
        grads = chunk["grad"] if copies is None else copies.scaled(chunk["grad"], are_alike)
        _adamw(chunk, grads, settings)
        averages = [(chunk[name], decay) for name, decay in decays.items() if name in chunk]
        is_finite = bool(averages) and all_finite(chunk["param"], are_alike)
        for its, decay in averages:
            move_chunk(its, chunk["param"], decay, is_finite)


class Copies:
    """Gradients times a coefficient, in memory that each chunk uses again."""

    def __init__(self, coefficient: Tensor, dtype: torch.dtype, limit: int) -> None:
        self._coefficient = coefficient.to(dtype)
        self._memory = torch.empty(limit, dtype=dtype, device=coefficient.device)

    def scaled(self, grads: list[Tensor], are_alike: bool) -> list[Tensor]:
        """Those of a chunk of at most ``limit`` elements; valid until the next."""
        if are_alike:
            first = grads[0]
            stack = self._memory[: len(grads) * first.numel()].view(len(grads), *first.shape)
            return list(torch.stack(grads, out=stack).mul_(self._coefficient).unbind())
        lines = [x.view(-1) for x in grads]
        sizes = list(map(Tensor.numel, lines))
        copies = torch.split_with_sizes(self._memory[: sum(sizes)], sizes)
        for line, copy in zip(lines, copies, strict=True):
            torch.mul(line, self._coefficient, out=copy)
        return list(copies)


def _adamw(chunk: Columns, grads: list[Tensor], settings: Mapping[str, Any]) -> None:
    torch._fused_adamw_(
        chunk["param"],
        grads,
        chunk["exp_avg"],
        chunk["exp_avg_sq"],
        chunk.get("max_exp_avg_sq", []),
        chunk["step"],
        lr=float(settings["lr"]),
        beta1=settings["beta1"],
        beta2=settings["beta2"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        amsgrad="max_exp_avg_sq" in chunk,
        maximize=bool(settings["maximize"]),
    )
