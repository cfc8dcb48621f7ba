"""Moving averages by PyTorch's multi-tensor operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import advice, reference
from . import pytorch as specification
from ._foreach_rows import (
    WIDE,
    Gathered,
    alike,
    all_finite,
    are_regular,
    batches,
    chunk_numel,
    chunks,
    kinds,
    on_host,
)
from .interface import NEAREST, AverageRounding


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
        move(columns["average"], columns["tensor"], types, decay, skip)
    return True


def move(
    averages: list[Tensor], tensors: list[Tensor], types: Sequence[torch.dtype], decay: float, skip: Tensor | None
) -> None:
    """Move averages of the same types."""
    device, is_wide = averages[0].device, types[0] == types[1] and types[0] in WIDE
    columns, limit = {"average": averages, "tensor": tensors}, chunk_numel(device)
    if is_wide and skip is None and 0.0 < decay < 1.0 and on_host(device):
        for chunk, runs in list(batches(columns, alike(tensors), limit)):
            move_chunk(chunk["average"], chunk["tensor"], decay, all_finite(chunk["tensor"], runs))
        return
    for chunk in chunks(columns, limit):
        _compose(chunk["average"], chunk["tensor"], decay, skip)


def move_chunk(averages: list[Tensor], tensors: list[Tensor], decay: float, is_finite: bool) -> None:
    """Move averages of one wide type. PyTorch's own operation makes NaN of an infinity that meets its equal."""
    if is_finite and 0.0 < decay < 1.0:
        torch._foreach_lerp_(averages, tensors, 1 - decay)
    else:
        _compose(averages, tensors, decay)


def _compose(averages: list[Tensor], tensors: list[Tensor], decay: float, skip: Tensor | None = None) -> None:
    """The specification on a chunk."""
    gathered = Gathered({"average": averages, "tensor": tensors})
    reference.ema_([gathered.columns["average"]], [gathered.columns["tensor"]], decay, skip)
    gathered.scatter("average")
