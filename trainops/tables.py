"""Tables for rows that kernels cannot take as they are.

``csrc/core`` (``trainops.core``) builds tables of regular rows. This file makes the other rows regular: complex
numbers, gradients with other strides than their parameter, slices with gaps, and the local shards of a DTensor.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import add, gt
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import core
from .core import OptionalTensor
from .plain import PLAIN, all_plain
from .reference_codes import CODES

Columns = Mapping[str, Sequence[Tensor | None]]


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, as a plain tensor that shares its memory; other tensors as they are."""
    if type(x) in PLAIN:
        return x
    if type(shard := getattr(x, "_local_tensor", None)) in PLAIN:  # to_local() makes a view of it
        return cast(Tensor, shard)
    return x.to_local() if hasattr(x, "to_local") else x


def origin(x: Tensor) -> int:
    """The index of a shard's first element in the whole DTensor, in the order of memory; 0 for other tensors.

    Raises:
        RuntimeError: the shard's elements do not follow each other there.
    """
    if type(x) in PLAIN or not hasattr(x, "placements"):
        return 0
    shard, begin, rows = cast(Any, x), 0, x.shape[0] if x.ndim else 1
    coordinate = shard.device_mesh.get_coordinate() or [0] * len(shard.placements)
    for ranks, rank, placement in zip(shard.device_mesh.shape, coordinate, shard.placements, strict=True):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or placement.dim != 0 or not local(x).is_contiguous():
            raise RuntimeError(
                f"stochastic rounding takes DTensors that are sharded by their first dimension, got {placement}"
            )
        size = -(-rows // ranks)
        first = min(size * rank, rows)
        begin, rows = begin + first, min(size, rows - first)
    return begin * math.prod(x.shape[1:])


def all_local(column: Sequence[OptionalTensor]) -> list[OptionalTensor]:
    """This rank's memory of tensors, some of which may be None."""
    found = None if is_compiling() else core.local_tensors(list(column))  # compilers do not look into C++
    return [x if x is None else local(x) for x in column] if found is None else found


def aligned(x: Tensor, param: Tensor) -> Tensor:
    """``x`` placed on the mesh as ``param`` is, where both are DTensors: their local parts then belong together."""
    placements = getattr(param, "placements", None)
    if placements is None or getattr(x, "placements", placements) == placements:
        return x
    redistributed: Tensor = cast(Any, x).redistribute(cast(Any, param).device_mesh, placements)
    return redistributed


def summed(x: Tensor) -> Tensor:
    """``x``, with copies on all ranks in place of what is still to be summed over ranks, where it is a DTensor."""
    placements = getattr(x, "placements", ())
    if not any(p.is_partial() for p in placements):
        return x
    copies = importlib.import_module("torch.distributed.tensor").Replicate()
    redistributed: Tensor = cast(Any, x).redistribute(
        placements=[copies if p.is_partial() else p for p in placements]
    )
    return redistributed


def replicated(x: Tensor) -> Tensor:
    """All of a DTensor, on every rank, as a plain tensor; other tensors as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def count_writes(tensors: list[Tensor], has_shards: bool = True) -> None:
    """Have autograd notice that kernels write tensors, and their shards, if it ``has_shards``."""
    shards = [x for x in all_local(tensors) if type(x) in PLAIN] if has_shards and not all_plain(tensors) else []
    torch.autograd.graph.increment_version([*tensors, *shards])


def have_common_memory(params: Sequence[Tensor]) -> bool:
    """Whether a parameter is there twice, as PyTorch allows within a group, or shares elements with another one."""
    if len(set(map(id, params))) < len(params):
        return True
    shards = params if all_plain(params) else [x for x in map(local, params) if type(x) in PLAIN]
    sizes = [x.nbytes if x.is_contiguous() else _extent(x) for x in shards]
    spans = [
        span for span in zip(map(Tensor.data_ptr, shards), sizes, strict=True) if all(span)
    ]  # others lie nowhere
    size_at = dict(spans)
    begins = sorted(size_at)
    ends = map(add, begins, map(size_at.__getitem__, begins))
    return len(size_at) < len(spans) or any(map(gt, ends, begins[1:]))


def _extent(x: Tensor) -> int:
    """How many bytes lie from the first element to the last one. ``x`` has elements."""
    return x.itemsize * (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)))


@contextmanager
def staged_table(
    kind: str,
    columns: Columns,
    device_type: str,
    group_rows: Sequence[int] = (),
    places: Sequence[tuple[int, Sequence[int], int, bool]] = (),
) -> Iterator[Any]:
    """A table of ``columns`` in which every row is regular.

    The rows that are not are staged: their tensors are viewed as real numbers where they are complex, and copied
    into the strides of the row's first tensor where they have others. What the kernel writes into such copies
    is copied back at the end.
    """
    columns = {name: all_local(column) for name, column in columns.items()}
    table = core.table(kind, columns, device_type, group_rows, places)
    if not table.irregular:
        yield table
        return
    staged = {name: list(column) for name, column in columns.items()}
    copies: list[tuple[Tensor, Tensor]] = []
    for row in table.irregular:
        _stage_row(kind, staged, row, copies)
    table = core.table(kind, staged, device_type, group_rows, places)
    if table.irregular:
        _raise_unsupported([column[table.irregular[0]] for column in columns.values()])
    yield table
    for original, regular in reversed(copies):
        original.copy_(regular)


def _stage_row(
    kind: str, columns: dict[str, list[Tensor | None]], row: int, copies: list[tuple[Tensor, Tensor]]
) -> None:
    """Put regular tensors into a row; note the ``copies`` whose content is to go back into their originals."""
    layout: Tensor | None = None
    scalars = []
    for column in core.schema(kind, 1 + sum(x.name in columns for x in core.further_averages)).columns:
        if (original := columns.get(column.name, [None] * (row + 1))[row]) is None:
            continue
        if column.one_per_row:
            scalars.append((column.name, original))
            continue
        if column.codes and original.dtype == CODES:
            continue
        source, original = original, as_real(original)
        if column.written and source.is_conj():  # was resolved into a copy
            copies.append((source, torch.view_as_complex(original)))
        if layout is None:
            layout = torch.empty_like(original)
        regular = _with_layout_of(layout, original)
        if column.written and regular is not original:
            check_no_overlap(original)
            copies.append((original, regular))
        columns[column.name][row] = regular
    if layout is None:
        return
    for name, scalar in scalars:
        columns[name][row] = regular = scalar.to(device=layout.device, dtype=torch.float32).reshape(())
        if regular.data_ptr() != scalar.data_ptr():
            copies.append((scalar, regular))


def check_no_overlap(x: Tensor) -> None:
    """Raise where elements of ``x`` share memory, as those of an expanded tensor do."""
    if torch._debug_has_internal_overlap(x) == 1:
        raise RuntimeError("a tensor whose elements share memory cannot be updated in place")


def as_real(x: Tensor, written: bool = False) -> Tensor:
    """Complex numbers as pairs of real ones in a last dimension, in the same memory if it is to be ``written``."""
    if not x.is_complex():
        return x
    if written and x.is_conj():
        raise RuntimeError("a lazily conjugated tensor cannot be updated in place; call resolve_conj() first")
    return torch.view_as_real(x.resolve_conj())


def _with_layout_of(layout: Tensor, x: Tensor) -> Tensor:
    if x.shape != layout.shape:
        raise RuntimeError(f"tensors of one parameter differ in shape: {tuple(layout.shape)} and {tuple(x.shape)}")
    if x.stride() == layout.stride() and not x.is_neg():
        return x
    return torch.empty_like(layout, dtype=x.dtype, device=x.device).copy_(x)


def _raise_unsupported(row: Sequence[Tensor | None]) -> None:
    described = ", ".join(f"{x.dtype} on {x.device} ({type(x).__name__})" for x in row if x is not None)
    raise RuntimeError(f"this backend takes floating-point tensors on one device of its own, got {described}")
