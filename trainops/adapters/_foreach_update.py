"""Steps of any rule by PyTorch's operations: the fused one where there is such, else the specification on chunks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import advice, reference
from ..reference_codes import CODES
from ..tables import as_real, local
from . import _foreach_fused as fused
from . import pytorch as specification
from ._control import decide
from ._foreach_average import move
from ._foreach_collect import Collected
from ._foreach_norm import sum_norms
from ._foreach_rows import Alike, Columns, Gathered, alike, chunk_numel, chunks, flat_alike, is_odd, kinds, on_host
from .interface import AVERAGES, Group, StepControl, StepResult


def update(
    rule: str,
    groups: Sequence[Group],
    control: StepControl,
    ema_decays: Sequence[float],
    collected: Collected | None = None,
) -> StepResult:
    """See :class:`trainops.adapters.interface.Kernels`."""
    alikes: list[Alike | None] = [None] * len(groups)
    if collected is None:
        grads = [as_real(local(grad)) for group in groups for grad in group.columns["grad"]]
    else:
        groups = [replace(group, columns=own) for group, own in zip(groups, collected.columns, strict=True)]
        grads = [grad for group in groups for grad in group.columns["grad"]]
        if control.measures or ema_decays:
            alikes = [alike(group.columns["grad"], of_one_type=True) for group in groups]
    device = grads[0].device
    decision = decide(grads, control, partial(sum_norms, found=alikes[0] if len(groups) == 1 else None))
    coefficient, skip = decision.coefficient, decision.skipped
    if on_host(device):
        if skip is not None and skip.item():
            return decision.result
        skip = None
        coefficient = 1.0 if isinstance(coefficient, Tensor) and coefficient.item() == 1.0 else coefficient
    if collected is not None:
        for group, found in zip(groups, alikes, strict=True):
            if group.rows:
                types_of = {name: column[0].dtype for name, column in group.columns.items()}
                _step(rule, group.columns, types_of, group.settings, coefficient, skip, ema_decays, True, found)
        return decision.result
    averaged: list[Columns] = [{"average": [], "param": []} for _ in ema_decays]
    for group in groups:
        for part in _parts(rule, group, coefficient, skip, ema_decays, control):
            if "averaged" in part:
                weights = part.pop("averaged")
                for name, its in zip(AVERAGES, averaged, strict=False):
                    if name in part:
                        its["average"] += part.pop(name)
                        its["param"] += weights
            for types, columns in kinds(part):
                types_of = dict(zip(columns, types, strict=True))
                _step(rule, columns, types_of, group.settings, coefficient, skip, ema_decays)
    for decay, its in zip(ema_decays, averaged, strict=True):
        for types, columns in kinds(its):
            move(columns["average"], columns["param"], types, decay, skip)
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
        odd = any(map(is_odd, written))
        is_random = bool(group.places) and any(x.dtype in (torch.bfloat16, CODES) for x in written)
        if odd or is_random or "master" in row:  # for the latter two there is no multi-tensor operation
            if odd:
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
    types_of: Mapping[str, torch.dtype],
    settings: Mapping[str, float | Tensor],
    coefficient: Tensor | float,
    skip: Tensor | None,
    ema_decays: Sequence[float],
    are_contiguous: bool = False,
    found: Alike | None = None,
) -> None:
    """A step of rows whose columns have the same types.

    ``are_contiguous``: whether it is known that all are. ``found``: which gradients are alike, if that is known.
    """
    if skip is None and fused.takes(rule, columns, types_of, settings) and (are_contiguous or _in_one_piece(columns)):
        fused.step(columns, settings, coefficient, ema_decays, found)
        return
    steps, device = columns["step"], columns["param"][0].device
    columns = {**columns, "step": list(torch.stack(steps).unbind())}  # each piece needs the count before the step
    for chunk in chunks(columns, chunk_numel(device)):
        averages = [chunk.pop(name, None) for name in AVERAGES]
        _composed(rule, chunk, settings, coefficient, skip)
        for name, its, decay in zip(AVERAGES, averages, ema_decays, strict=False):
            if its is not None:
                move(its, chunk["param"], (types_of[name], types_of["param"]), decay, skip)
    taken = torch.ones((), device=device) if skip is None else ~skip.to(device)
    torch._foreach_add_(steps, taken.to(types_of["step"]))


def _in_one_piece(columns: Columns) -> bool:
    return all(all(map(Tensor.is_contiguous, column)) for column in columns.values())


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
