"""Norms by PyTorch's multi-tensor operations, joined in float64 where there is such."""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from .. import reference
from ..reference import scalar_dtype, vector_norm
from ..reference_storage import wide
from ..tables import as_real
from ._foreach_rows import Alike, alike, copied_numel, flat, on_host

# On a CPU, PyTorch's float32 norm of a long tensor is off (by 6e-4 at 2**24 elements), and its float64 norm takes
# three times as long. So a long tensor is taken as rows, whose norms are joined in float64. A row of equal elements
# is off by 3e-7 of its norm; errors of random ones cancel, and 2**24 of them are off by 1e-10.
ROW = 256
LONG = 1024

# Stacks of so many chunks' elements are kept for the step.
KEPT = 4

# Squares of a smaller norm's elements may vanish in float32.
SMALLEST = 2.0**-30


def sum_norms(tensors: Sequence[Tensor], norm_type: float = 2.0, found: Alike | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`trainops.reference.sum_norms`. Complex tensors: the norm of order 2 alone.

    ``found``: which of the tensors are alike, where all are real and contiguous.
    """
    device = tensors[0].device
    if norm_type == 1.0 and on_host(device):
        return reference.sum_norms(tensors, norm_type)  # PyTorch's own adds up in fewer lanes
    dtype = scalar_dtype(device)
    if found is not None and on_host(device):
        norms = torch.tensor(_values(tensors, norm_type, found), dtype=dtype, device=device)
        return vector_norm(norms, norm_type), norms
    rows = [i for i, x in enumerate(tensors) if x.numel() > 0]
    if not rows:
        norms = torch.zeros(len(tensors), dtype=dtype, device=device)
        return norms.sum(), norms
    present = [tensors[i] for i in rows]
    if any(map(Tensor.is_complex, present)) or not all(map(Tensor.is_contiguous, present)):
        present = [_line(as_real(x)) for x in present]
    if on_host(device):
        values = [0.0] * len(tensors)
        for i, x in zip(rows, _values(present, norm_type, alike(present)), strict=True):
            values[i] = x
        norms = torch.tensor(values, dtype=dtype, device=device)
    else:
        by_row = dict(zip(rows, _norms(present, norm_type, dtype), strict=True))
        zero = by_row[rows[0]].new_zeros(())
        norms = torch.stack([by_row.get(i, zero) for i in range(len(tensors))])
    return vector_norm(norms, norm_type), norms


def _line(x: Tensor) -> Tensor:
    """The elements in a row of memory, where sums go the same way whatever the layout was."""
    if x.is_contiguous():
        return x
    line = flat(x)
    return x.reshape(-1) if line is None else line


def _norms(tensors: list[Tensor], norm_type: float, dtype: torch.dtype) -> list[Tensor]:
    """Of each tensor, summed and returned in ``dtype``: by one operation for all of a type."""
    types = list(dict.fromkeys(x.dtype for x in tensors))
    if len(types) > 1:
        found = {t: iter(_norms([x for x in tensors if x.dtype == t], norm_type, dtype)) for t in types}
        return [next(found[x.dtype]) for x in tensors]
    return list(torch._foreach_norm(tensors, norm_type, torch.promote_types(dtype, types[0]))) if tensors else []


def _values(tensors: Sequence[Tensor], norm_type: float, found: Alike) -> list[float]:
    """The same as numbers of Python, where they can be looked at."""
    if norm_type == math.inf:  # which is no sum
        return _numbers(_norms(list(map(wide, tensors)), norm_type, torch.float32))
    values = [math.nan] * len(tensors)  # each is looked at again unless it is found here
    if norm_type == 2.0:
        stacked = found.stacked
        single = [i for i in found.single if tensors[i].numel() >= LONG]
        stacks = [torch.stack([tensors[i] for i in rows]) for rows in stacked]
        if sum(map(Tensor.numel, stacks)) <= KEPT * copied_numel(tensors[0].device, tensors[0].dtype):
            found.stacks = stacks
        parts = [_norms_of_lines(x, x.numel() // len(x)) for x in stacks]
        rows = [_rows(x, x.numel()).view(-1) for x in map(tensors.__getitem__, single)]
        parts += [_norms_of(torch.stack(list(its))) for _, its in groupby(rows, len)]
        order = [i for rows in (*stacked, single) for i in rows]
        for i, value in zip(order, torch.cat(parts).tolist() if parts else (), strict=True):
            values[i] = value
    again = [i for i, x in enumerate(values) if not SMALLEST <= x < math.inf]
    for i, value in zip(again, _numbers(_norms([tensors[i] for i in again], norm_type, torch.float64)), strict=True):
        values[i] = value
    return values


def _norms_of_lines(x: Tensor, numel: int) -> Tensor:
    """Of each ``numel`` elements, in float64."""
    return _norms_of(_rows(x, numel).view(len(x), -1) if numel >= LONG else x.view(len(x), numel))


def _norms_of(lines: Tensor) -> Tensor:
    return vector_norm(lines, 2.0, 1, dtype=torch.float64)


def _rows(x: Tensor, numel: int) -> Tensor:
    """The norms of rows of each ``numel`` elements, and of what is left of them."""
    if numel % ROW == 0:
        return vector_norm(wide(x).view(-1, ROW), 2.0, 1)
    lines, whole = x.view(-1, numel), numel // ROW * ROW
    norms = vector_norm(wide(lines[:, :whole]).view(len(lines), -1, ROW), 2.0, 2)
    return torch.cat([norms, vector_norm(wide(lines[:, whole:]), 2.0, 1, keepdim=True)], 1)


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    found: list[float] = torch.stack(list(tensors)).tolist() if tensors else []
    return found
