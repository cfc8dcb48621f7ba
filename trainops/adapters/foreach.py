"""The ``foreach`` backend: PyTorch's own multi-tensor and fused operations, for devices without kernels.

A step of AdamW in float32 or float64 is PyTorch's fused one. It would rewrite gradients that it scales, so clipped
ones are copies, of a chunk at a time. Everything else is the specification (:mod:`trainops.reference`) on chunks that
are gathered and scattered by multi-tensor operations. On a CPU, numbers can be looked at (``on_host``): a step is
skipped, or clips nothing, without arithmetic. On other devices, nothing waits for the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import advice, reference
from ..reference import drop_path, drop_path_backward
from ..reference_codes import CODES
from ..reference_statistics import rows_of as statistics
from ..tables import as_real, local
from . import _foreach_norm
from . import pytorch as specification
from ._control import decide
from ._foreach_rows import (
    WIDE,
    Collected,
    Columns,
    Gathered,
    all_finite,
    are_regular,
    chunk_numel,
    chunks,
    collect,
    flat_alike,
    kinds,
    on_host,
    shares_memory,
)
from .interface import AVERAGES, NEAREST, AverageRounding, Backend, Group, StepControl, StepResult

__all__ = [
    "clamp_",
    "collect",
    "drop_path",
    "drop_path_backward",
    "ema_",
    "probe",
    "reduce",
    "refusal",
    "scale_",
    "statistics",
    "try_ema_",
    "update",
]

# The types of device that have PyTorch's fused step.
FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

# In 1 - beta ** step, as PyTorch's fused step has it, more than this cancels too many digits of float64.
LARGEST_BETA = 0.9999


def probe() -> Backend:
    """PyTorch's operations are always there."""
    return Backend(available=True, details=f"multi-tensor operations of PyTorch {torch.__version__}")


def refusal(device: torch.device) -> str:
    """Every device that computes."""
    return "it takes tensors on devices that compute" if device.type == "meta" else ""


def reduce(statistic: str, tensors: Sequence[Tensor], unrounded: bool = False) -> tuple[Tensor, Tensor]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    total, norms = _foreach_norm.sum_norms(list(map(local, tensors)), specification.ORDERS[statistic])
    if unrounded:
        return total, norms
    dtype = reference.norm_dtype(tensors)
    return total.to(dtype), norms.to(dtype)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. On a CPU, a coefficient of 1 leaves the tensors unread."""
    device = tensors[0].device
    coefficient = coefficient.to(device)
    if on_host(device) and coefficient.item() == 1.0:
        return
    for types, columns in kinds({"tensor": _written(tensors, lambda rest: specification.scale_(rest, coefficient))}):
        if types[0] in WIDE:
            torch._foreach_mul_(columns["tensor"], coefficient.to(types[0]))
            continue
        for chunk in chunks(columns, chunk_numel(device)):
            gathered = Gathered(chunk)
            reference.scale_(list(gathered.columns.values()), coefficient)
            gathered.scatter("tensor")


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    for _, columns in kinds({"tensor": _written(tensors, lambda rest: specification.clamp_(rest, bound))}):
        torch._foreach_clamp_min_(columns["tensor"], -bound)
        torch._foreach_clamp_max_(columns["tensor"], bound)


def _written(tensors: Sequence[Tensor], serve_rest: Callable[[list[Tensor]], None]) -> list[Tensor]:
    """The tensors as real numbers, for operations that write them; the specification serves those that are odd."""
    rest = list(filter(_is_odd, tensors))
    if rest:
        advice.left_to_reference(rest[0].device)
        serve_rest(rest)
        tensors = [x for x in tensors if not _is_odd(x)]
    return [as_real(x, written=True) for x in tensors if x.numel() > 0]


def _is_odd(x: Tensor) -> bool:
    """Whether it cannot be written as it lies: lazily conjugated or negated, or with elements that share memory."""
    return x.is_conj() or x.is_neg() or shares_memory(x)


def ema_(
    averages: Sequence[Tensor],
    tensors: Sequence[Tensor],
    decay: float,
    skip: Tensor | None = None,
    rounding: AverageRounding = NEAREST,
) -> None:
    """See :func:`trainops.reference.ema_`."""
    if averages and not try_ema_(averages, tensors, decay, skip, rounding):
        if not rounding.places:
            advice.left_to_reference(averages[0].device)
        specification.ema_(averages, tensors, decay, skip, rounding)


def try_ema_(
    averages: Sequence[Tensor],
    tensors: Sequence[Tensor],
    decay: float,
    skip: Tensor | None = None,
    rounding: AverageRounding = NEAREST,
) -> bool:
    """See :class:`trainops.adapters.interface.Kernels`."""
    if not averages or rounding.places or not are_regular(averages, tensors):
        return False
    device = averages[0].device
    if skip is not None and on_host(device):
        if skip.item():
            return True
        skip = None
    for types, columns in kinds({"average": list(averages), "tensor": list(tensors)}):
        _move(columns["average"], columns["tensor"], types, decay, skip)
    return True


def _move(
    averages: list[Tensor], tensors: list[Tensor], types: Sequence[torch.dtype], decay: float, skip: Tensor | None
) -> None:
    """Move averages. PyTorch's own operation makes NaN of an infinity that meets its equal: then it is not used."""
    device, is_wide = averages[0].device, types[0] == types[1] and types[0] in WIDE
    if is_wide and skip is None and 0.0 < decay < 1.0 and on_host(device) and all_finite(tensors):
        torch._foreach_lerp_(averages, tensors, 1 - decay)
        return
    for chunk in chunks({"average": averages, "tensor": tensors}, chunk_numel(device)):
        gathered = Gathered(chunk)
        reference.ema_([gathered.columns["average"]], [gathered.columns["tensor"]], decay, skip)
        gathered.scatter("average")


def update(
    rule: str,
    groups: Sequence[Group],
    control: StepControl,
    ema_decays: Sequence[float],
    collected: Collected | None = None,
) -> StepResult:
    """See :class:`trainops.adapters.interface.Kernels`."""
    if collected is not None:
        groups = [replace(group, columns=own) for group, own in zip(groups, collected.columns, strict=True)]
    grads = [grad for group in groups for grad in group.columns.get("grad", ())]
    if collected is None:
        grads = [as_real(local(grad)) for grad in grads]
    device = grads[0].device
    decision = decide(grads, control, _foreach_norm.sum_norms)
    coefficient, skip = decision.coefficient, decision.skipped
    if on_host(device):
        if skip is not None and skip.item():
            return decision.result
        skip = None
        coefficient = 1.0 if isinstance(coefficient, Tensor) and coefficient.item() == 1.0 else coefficient
    averaged: list[Columns] = [{"average": [], "param": []} for _ in ema_decays]
    for group in groups:
        is_regular = collected is not None
        parts = [group.columns] if is_regular else _parts(rule, group, coefficient, skip, ema_decays, control)
        for part in parts:
            if "averaged" in part:
                weights = part.pop("averaged")
                for name, its in zip(AVERAGES, averaged, strict=False):
                    if name in part:
                        its["average"] += part.pop(name)
                        its["param"] += weights
            for types, columns in kinds(part):
                _step(rule, columns, types, group.settings, coefficient, skip, ema_decays)
    for decay, its in zip(ema_decays, averaged, strict=True):
        for types, columns in kinds(its):
            _move(columns["average"], columns["param"], types, decay, skip)
    return decision.result


def _parts(
    rule: str,
    group: Group,
    coefficient: Tensor | float,
    skip: Tensor | None,
    ema_decays: Sequence[float],
    control: StepControl,
) -> list[Columns]:
    """The rows of a group as real numbers, in parts that have the same columns; the specification serves odd ones."""
    parts: dict[tuple[str, ...], Columns] = {}
    for i in range(group.rows):
        row = {name: local(column[i]) for name, column in group.columns.items() if column[i] is not None}
        written = [x for name, x in row.items() if name not in ("grad", "step")]
        is_odd = any(map(_is_odd, written))
        is_random = bool(group.places) and any(x.dtype in (torch.bfloat16, CODES) for x in written)
        if is_odd or is_random or "master" in row:  # for the latter two there is no multi-tensor operation
            if is_odd:
                advice.left_to_reference(row["param"].device)
            specification.Row(group, i).update(rule, coefficient, skip, ema_decays, control.seeds)
            continue
        step, averages = row.pop("step"), {name: as_real(row.pop(name)) for name in AVERAGES if name in row}
        real = {name: as_real(x).resolve_neg() for name, x in row.items()}
        apart = {**averages, "averaged": real["param"]} if averages else {}
        views = flat_alike(list(real.values()))
        if views is not None:
            real = dict(zip(real, views, strict=True))
        real |= {"step": step.reshape(()), **apart}
        part = parts.setdefault((*real, "flat" if views is not None else ""), {name: [] for name in real})
        for name, x in real.items():
            part[name].append(x)
    return list(parts.values())


def _step(
    rule: str,
    columns: Columns,
    types: Sequence[torch.dtype],
    settings: Mapping[str, float | Tensor],
    coefficient: Tensor | float,
    skip: Tensor | None,
    ema_decays: Sequence[float],
) -> None:
    """A step of rows whose columns have the same types. Averages move while their chunk is in the cache."""
    types_of = dict(zip(columns, types, strict=True))
    step_type = types_of.pop("step")
    device, dtype = columns["param"][0].device, types_of["param"]
    is_fused = (
        rule == "adamw"
        and skip is None
        and step_type == torch.float32
        and dtype in WIDE
        and set(types_of.values()) == {dtype}
        and (dtype == torch.float32 or max(settings["beta1"], settings["beta2"]) <= LARGEST_BETA)
        and device.type in FUSED_DEVICES
        and (on_host(device) or not isinstance(settings["lr"], Tensor))
        and all(all(map(Tensor.is_contiguous, columns[name])) for name in types_of)
    )
    steps = columns["step"]
    if is_fused:
        torch._foreach_add_(steps, torch.ones(()), alpha=1.0)
    else:  # every piece of a row needs the count before the step
        columns = {**columns, "step": list(torch.stack(steps).unbind())}
    for chunk in chunks(columns, chunk_numel(device)):
        averages = [chunk.pop(name, None) for name in AVERAGES]
        if is_fused:
            _fused_adamw(chunk, settings, coefficient)
        else:
            _composed(rule, chunk, settings, coefficient, skip)
        for name, its, decay in zip(AVERAGES, averages, ema_decays, strict=False):
            if its is not None:
                _move(its, chunk["param"], (types_of[name], dtype), decay, skip)
    if not is_fused:
        taken = torch.ones((), device=device) if skip is None else ~skip.to(device)
        torch._foreach_add_(steps, taken.to(step_type))


def _fused_adamw(chunk: Columns, settings: Mapping[str, Any], coefficient: Tensor | float) -> None:
    """PyTorch's fused step. It would write gradients that it scales, so it is given copies that are scaled."""
    grads = chunk["grad"]
    if isinstance(coefficient, Tensor):
        grads = list(torch._foreach_mul(grads, coefficient.to(grads[0].dtype)))
    lr = settings["lr"]
    torch._fused_adamw_(
        chunk["param"],
        grads,
        chunk["exp_avg"],
        chunk["exp_avg_sq"],
        chunk.get("max_exp_avg_sq", []),
        chunk["step"],
        lr=float(lr),
        beta1=settings["beta1"],
        beta2=settings["beta2"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
        amsgrad="max_exp_avg_sq" in chunk,
        maximize=bool(settings["maximize"]),
    )


def _composed(
    rule: str,
    chunk: Columns,
    settings: Mapping[str, float | Tensor],
    coefficient: Tensor | float,
    skip: Tensor | None,
) -> None:
    """The specification on a chunk."""
    step = torch.stack(chunk.pop("step"))
    gathered = Gathered(chunk)
    device = step.device
    formula = getattr(reference, f"{rule}_")
    formula(
        **gathered.columns,
        step=step,
        **settings,
        coefficient=coefficient.to(device) if isinstance(coefficient, Tensor) else coefficient,
        skip=skip,
        spread=gathered.spread,
    )
    gathered.scatter(*(name for name in chunk if name != "grad"))
