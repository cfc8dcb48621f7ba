"""The rows of an ordinary step, straight from an optimizer's containers."""

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plain import PLAIN
from ..tables import have_common_memory
from ._foreach_rows import WIDE, Columns
from .interface import AVERAGES, TO_NEAREST, Rounding


class Collected(NamedTuple):
    """The rows of a step whose tensors need no second look: see :class:`trainops.adapters.interface.Collected`."""

    columns: list[Columns]  # of each group
    params: list[Tensor]
    group_rows: list[int]
    averaged: list[int]
    left: list[list[int]]  # buffers have operations of their own
    has_shards: bool = False


def collect(
    rule: str,
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    averages: list[dict[int, Tensor]],
    buffers: list[list[Any]],
    states: list[tuple[str, ...]],
    rounding: Rounding = TO_NEAREST,
) -> Collected | None:
    """The rows straight from an optimizer's containers, if all are plain, contiguous and of one wide type."""
    groups: list[Columns] = []
    every: list[Tensor] = []
    averaged = [0] * len(averages)
    for group, names in zip(param_groups, states, strict=True):
        params, grads = group["params"], [p.grad for p in group["params"]]
        if None.__class__ in map(type, grads):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        own = _states_of(params, state)
        if not all(own):
            return None
        try:
            columns: Columns = {name: [its[name] for its in own] for name in ("step", *names)}
        except KeyError:
            return None
        columns |= {"param": params, "grad": grads}
        for i, its in enumerate(averages):
            found = [x for x in map(its.get, map(id, params)) if x is not None]
            if len(found) not in (0, len(params)):
                return None
            averaged[i] += len(found)
            columns |= {AVERAGES[i]: found} if found else {}
        groups.append(columns)
        every += params
    if not every or not all(_regular(columns, every[0]) for columns in groups) or have_common_memory(every):
        return None
    left = [[id(pair[1]) for pair in pairs] for pairs in buffers]
    return Collected(groups, every, [len(columns["param"]) for columns in groups], averaged, left)


def _states_of(params: list[Tensor], state: dict[Tensor, Any]) -> list[Any]:
    """The state of each parameter; mostly in the order of the parameters, where no tensor has to be hashed."""
    if len(params) == len(state) and all(map(is_, params, state)):
        return list(state.values())
    return [state.get(p) for p in params]


def _regular(columns: Columns, like: Tensor) -> bool:
    if not columns["param"]:
        return True
    sizes = [x.nbytes for x in columns["param"]]
    for name, column in columns.items():
        if not PLAIN.issuperset(map(type, column)) or not _are_on(like.device, column):
            return False
        dtypes = {x.dtype for x in column}
        if name == "step":
            if dtypes != {torch.float32} or {x.ndim for x in column} != {0}:
                return False
            continue
        if dtypes != {like.dtype} or like.dtype not in WIDE or {x.layout for x in column} != {torch.strided}:
            return False
        if [x.nbytes for x in column] != sizes:  # of tensors in one piece: their shape does not matter
            return False
        if not all(map(Tensor.is_contiguous, column)) or any(map(Tensor.is_neg, column)):
            return False
    return True


def _are_on(device: torch.device, column: list[Tensor]) -> bool:
    if device.type == "cpu":  # which is told without an object for each device
        return {x.is_cpu for x in column} == {True}
    return {x.device for x in column} == {device}
