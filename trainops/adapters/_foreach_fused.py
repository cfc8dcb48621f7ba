"""AdamW in float32 or float64 by PyTorch's fused step.

That would rewrite gradients that it scales. So it is given copies that are scaled: on a CPU, those of a chunk at a
time, always in the same memory, which stays in the cache. Averages move while the weights of their chunk are there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._foreach_average import move, move_chunk
from ._foreach_rows import (
    WIDE,
    Alike,
    Columns,
    Run,
    alike,
    all_finite,
    batches,
    chunk_numel,
    chunks,
    copied_numel,
    on_host,
    rows_of,
)
from .interface import AVERAGES

# The types of device that have PyTorch's fused step.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def takes(rule: str, columns: Columns, types_of: Mapping[str, torch.dtype], settings: Mapping[str, Any]) -> bool:
    """Whether these rows, whose columns have these types, can have the fused step."""
    device, dtype = columns["param"][0].device, types_of["param"]
    return (
        rule == "adamw"
        and dtype in WIDE
        and all(its == (torch.float32 if name == "step" else dtype) for name, its in types_of.items())
        and device.type in FUSED_DEVICES
        and (on_host(device) or _is_exact_unseen(types_of, settings))
    )


def _is_exact_unseen(types_of: Mapping[str, torch.dtype], settings: Mapping[str, Any]) -> bool:
    """Whether the fused step is right without a look at numbers: step counts, the rate, NaN among squares."""
    is_plain = types_of["param"] == torch.float32 and "max_exp_avg_sq" not in types_of
    return is_plain and not isinstance(settings["lr"], Tensor)


def step(
    columns: Columns,
    settings: Mapping[str, Any],
    coefficient: Tensor | float,
    ema_decays: Sequence[float],
    found: Alike | None,
) -> None:
    """A step of rows in one piece each, and their averages. ``found``: which gradients are alike, if it is known."""
    torch._foreach_add_(columns["step"], torch.ones(()), alpha=1.0)
    dtype = columns["param"][0].dtype
    scale = coefficient.to(dtype) if isinstance(coefficient, Tensor) else None
    decays = {name: decay for name, decay in zip(AVERAGES, ema_decays, strict=False) if name in columns}
    if dtype == torch.float32:
        _step(columns, settings, scale, decays, found)
        return
    parts: dict[float, list[int]] = {}
    for i, count in enumerate(torch.stack(columns["step"]).tolist()):
        parts.setdefault(count, []).append(i)
    for count, rows in parts.items():
        exact = with_exact_corrections(settings, count)
        if len(parts) == 1:
            _step(columns, exact, scale, decays, found)
        else:
            _step(rows_of(columns, rows), exact, scale, decays, None)


def with_exact_corrections(settings: Mapping[str, Any], count: float) -> Mapping[str, Any]:
    """Settings with which PyTorch's fused step has the accuracy of float64, after so many steps with this one.

    Its ``c = 1 - beta ** count`` cancels digits. It moves weights by ``lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)``, so
    that what its c1 and c2 are off can be put right in ``lr`` and ``eps``.
    """
    if not count >= 1.0:
        return settings  # nobody's count
    beta1, beta2 = settings["beta1"], settings["beta2"]
    theirs1, theirs2 = 1.0 - beta1**count, 1.0 - beta2**count
    exact1, exact2 = (-math.expm1(count * math.log(beta)) if beta > 0.0 else 1.0 for beta in (beta1, beta2))
    by = math.sqrt(exact2) / math.sqrt(theirs2)
    lr = by * theirs1 / exact1
    own = {"lr": float(settings["lr"]) * lr, "eps": settings["eps"] * by}
    return {**settings, **own, "weight_decay": settings["weight_decay"] / lr}  # which the step multiplies by lr


def _step(
    columns: Columns,
    settings: Mapping[str, Any],
    scale: Tensor | None,
    decays: Mapping[str, float],
    found: Alike | None,
) -> None:
    """``scale``: of gradients, in their type. ``decays``: of the averages among the columns."""
    if scale is None and not decays:
        _adamw(columns, columns["grad"], settings)
        return
    device, dtype = columns["param"][0].device, columns["param"][0].dtype
    if not on_host(device):
        for chunk in chunks(columns, chunk_numel(device)):
            grads = chunk["grad"] if scale is None else torch._foreach_mul(chunk["grad"], scale)
            _adamw(chunk, list(grads), settings)
            for name, decay in decays.items():
                move(chunk[name], chunk["param"], (dtype, dtype), decay, None)
        return
    limit = copied_numel(device, dtype)
    alikes = found or alike(columns["grad"], of_one_type=True)
    plan = list(batches(columns, alikes, limit))  # views are made faster all at once
    copies: list[Copy] = []
    if scale is not None:
        memory = torch.empty(limit, dtype=dtype, device=device)
        copies = [Copy(chunk["grad"], runs, memory) for chunk, runs in plan]
    for i, (chunk, runs) in enumerate(plan):
        _adamw(chunk, chunk["grad"] if scale is None else copies[i].scaled(scale), settings)
        is_finite = bool(decays) and all_finite(chunk["param"], runs)
        for name, decay in decays.items():
            move_chunk(chunk[name], chunk["param"], decay, is_finite)


class Copy:
    """The gradients of a chunk, times a coefficient, in memory that each chunk uses again; stacks where they are."""

    def __init__(self, grads: list[Tensor], runs: Sequence[Run], memory: Tensor) -> None:
        self._tensors: list[Tensor] = []
        self._whole: list[Tensor] = []  # stacks, and from what those are made that nobody has made yet
        self._stacks: list[tuple[list[Tensor], Tensor]] = []
        for length, stack in runs:
            begin = len(self._tensors)
            if stack is None:
                numel = length * grads[begin].numel()
                stack, memory = memory[:numel].view(length, *grads[begin].shape), memory[numel:]
                self._stacks.append((grads[begin : begin + length], stack))
            self._whole.append(stack)
            self._tensors += stack.unbind()
        self._lines = [x.view(-1) for x in grads[len(self._tensors) :]]
        sizes = list(map(Tensor.numel, self._lines))
        self._copies = torch.split_with_sizes(memory[: sum(sizes)], sizes)
        self._tensors += self._copies

    def scaled(self, coefficient: Tensor) -> list[Tensor]:
        """The copies, which are valid until another chunk's are made."""
        for grads, stack in self._stacks:
            torch.stack(grads, out=stack)
        for stack in self._whole:
            stack.mul_(coefficient)
        for line, copy in zip(self._lines, self._copies, strict=True):
            torch.mul(line, coefficient, out=copy)
        return self._tensors


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
    # Of a NaN and a number, the fused step may take either for the larger one.
    if "max_exp_avg_sq" in chunk and not all_finite(chunk["exp_avg_sq"]):
        torch._foreach_maximum_(chunk["max_exp_avg_sq"], chunk["exp_avg_sq"])
        for param, largest in zip(chunk["param"], chunk["max_exp_avg_sq"], strict=True):
            param.view(-1).masked_fill_(largest.view(-1).isnan(), math.nan)
