"""Rows of tensors for PyTorch's multi-tensor operations: what they hold, and chunks of a bounded size.

An operation works on a chunk of many small tensors, or of a piece of a large one. So the copies that it needs are
small: they stay in a CPU's cache, and in the memory of a GPU they are few.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..plain import all_plain

WIDE = (torch.float32, torch.float64)  # what is stored as it is computed

# On tensors of at least so many elements, an operation takes longer than its call.
LARGE = 4096

# Of fewer small tensors that share a shape, a stack does not pay.
FEW = 4

Columns = dict[str, list[Tensor]]  # by name, one tensor per row


def on_host(device: torch.device) -> bool:
    """Whether a number on the device can be read without waiting for it."""
    return device.type == "cpu"


def chunk_numel(device: torch.device) -> int:
    """Elements of a chunk: on a CPU as few as pay for the calls of its operations."""
    return (1 << 18) * torch.get_num_threads() if device.type == "cpu" else 1 << 22


def copied_numel(device: torch.device, dtype: torch.dtype) -> int:
    """Elements of gradients that are copied at a time, on a CPU: few of a step's seven columns are read twice."""
    return chunk_numel(device) * 10 // dtype.itemsize


def flat(x: Tensor) -> Tensor | None:
    """The elements in the order of memory, as a view; None where there are gaps between them."""
    if x.is_contiguous():
        return x.view(-1)
    if torch.empty_like(x, device="meta").stride() != x.stride():
        return None
    return x.as_strided((x.numel(),), (1,))


def flat_alike(row: Sequence[Tensor]) -> list[Tensor] | None:
    """Views of a row's tensors in one and the same order of their elements, if there are such."""
    first = row[0]
    if any(x.shape != first.shape for x in row):
        return None
    if not all(map(Tensor.is_contiguous, row)) and any(x.stride() != first.stride() for x in row):
        return None
    views = list(map(flat, row))
    return None if any(x is None for x in views) else views  # type: ignore[return-value]


def kinds(columns: Columns) -> Iterator[tuple[tuple[torch.dtype, ...], Columns]]:
    """The rows in parts that have the same types, with these types in the order of the columns."""
    types = [{x.dtype for x in column} for column in columns.values()]
    if all(len(its) == 1 for its in types):
        yield tuple(dtype for its in types for dtype in its), columns
        return
    parts: dict[tuple[torch.dtype, ...], list[int]] = {}
    for i, row in enumerate(zip(*columns.values(), strict=True)):
        parts.setdefault(tuple(x.dtype for x in row), []).append(i)
    for types_of_part, rows in parts.items():
        yield types_of_part, rows_of(columns, rows)


def chunks(columns: Columns, limit: int) -> Iterator[Columns]:
    """The rows in parts of at most ``limit`` elements; a row whose elements have gaps is never taken apart.

    A column ``step`` has one number per row, which comes with each of its pieces.
    """
    sizes = list(map(Tensor.numel, next(x for name, x in columns.items() if name != "step")))
    begin, size = 0, 0
    for i, numel in enumerate(sizes):
        if i > begin and size + numel > limit:
            yield {name: column[begin:i] for name, column in columns.items()}
            begin, size = i, 0
        size += numel
        if numel > limit:
            yield from _pieces({name: column[i] for name, column in columns.items()}, limit)
            begin, size = i + 1, 0
    if begin < len(sizes):
        yield {name: column[begin:] for name, column in columns.items()}


def _pieces(row: dict[str, Tensor], limit: int) -> Iterator[Columns]:
    """A large row in parts."""
    tensors = [x for name, x in row.items() if name != "step"]
    views = flat_alike(tensors)
    if views is None:
        yield {name: [x] for name, x in row.items()}
        return
    numel, count = views[0].numel(), -(-views[0].numel() // limit)
    ends = [numel * i // count for i in range(count + 1)]  # a small rest would cost as many calls
    sizes = [end - begin for begin, end in pairwise(ends)]
    for pieces in zip(*(torch.split_with_sizes(x, sizes) for x in views), strict=True):
        own = iter(pieces)
        yield {name: [x if name == "step" else next(own)] for name, x in row.items()}


@dataclass
class Alike:
    """The indices of small tensors that share their shape and type, together, and those of all others.

    One operation on a stack of alike tensors costs less than a call for each of them, and so does the copy.
    """

    stacked: list[list[int]]
    single: list[int]
    stacks: list[Tensor] = field(default_factory=list)  # those of ``stacked``, where somebody has left them


def alike(tensors: Sequence[Tensor], of_one_type: bool = False) -> Alike:
    """Find out which are. ``of_one_type``: whether it is known that all have the same."""
    by_kind: dict[Any, list[int]] = {}
    for i, kind in enumerate([x.shape if of_one_type else (x.dtype, x.shape) for x in tensors]):
        if kind in by_kind:
            by_kind[kind].append(i)
        else:
            by_kind[kind] = [i]
    found = Alike([], [])
    for rows in by_kind.values():
        if len(rows) < FEW or tensors[rows[0]].numel() >= LARGE:
            found.single.extend(rows)
        else:
            found.stacked.append(rows)
    return found


class Run(NamedTuple):
    """Rows that follow each other, and are alike; and the stack of them, if there is one."""

    length: int
    stack: Tensor | None


def batches(columns: Columns, found: Alike, limit: int) -> Iterator[tuple[Columns, list[Run]]]:
    """Like :func:`chunks`, but each begins with runs of alike rows, if there are any left."""
    numels = next(x for name, x in columns.items() if name != "step")
    runs: list[Run] = []
    order: list[int] = []
    single = list(found.single)
    for i, rows in enumerate(found.stacked):
        if numels[rows[0]].numel() > limit:
            single += rows
            continue
        order += rows
        runs.append(Run(len(rows), found.stacks[i] if found.stacks else None))
    runs.reverse()
    for chunk in chunks(rows_of(columns, [*order, *single]), limit):
        own: list[Run] = []
        left = len(next(iter(chunk.values())))
        while runs and left > 0:
            length, stack = runs.pop()
            taken = min(length, left)
            own.append(Run(taken, None if stack is None else stack[:taken]))
            left -= taken
            if taken < length:
                runs.append(Run(length - taken, None if stack is None else stack[taken:]))
        yield chunk, own


def rows_of(columns: Columns, rows: Sequence[int]) -> Columns:
    return {name: [column[i] for i in rows] for name, column in columns.items()}


class Gathered:
    """A chunk whose columns lie in memory in one piece each, so that one operation does for all rows.

    A chunk of one tensor is worked on where it lies.
    """

    def __init__(self, chunk: Columns) -> None:
        self._chunk = chunk
        self._sizes = [x.numel() for x in next(iter(chunk.values()))]
        self._lies_there = len(self._sizes) == 1 and all(map(Tensor.is_contiguous, (x[0] for x in chunk.values())))
        if self._lies_there:
            self.columns = {name: column[0].view(-1) for name, column in chunk.items()}
        else:
            self.columns = {name: torch.cat([x.reshape(-1) for x in column]) for name, column in chunk.items()}

    def scatter(self, *names: str) -> None:
        """Write columns back to where they came from."""
        if self._lies_there:
            return
        for name in names:
            targets = self._chunk[name]
            values = zip(targets, torch.split(self.columns[name], self._sizes), strict=True)
            torch._foreach_copy_(targets, [x.view(target.shape) for target, x in values])

    def spread(self, x: Tensor | float) -> Tensor | float:
        """A number per row, repeated for the elements of the row, in the type that arithmetic is done in."""
        if not isinstance(x, Tensor):
            return x
        dtype = torch.float64 if next(iter(self.columns.values())).dtype == torch.float64 else torch.float32
        rows = x.to(dtype).unbind()
        if len(rows) == 1:
            return rows[0]
        return torch.cat([row.expand(size) for row, size in zip(rows, self._sizes, strict=True)])


def are_regular(averages: Sequence[Tensor], tensors: Sequence[Tensor]) -> bool:
    """Whether rows of an average are plain floating-point tensors on one device, and no average is there twice."""
    every = [*averages, *tensors]
    if not all_plain(every) or {x.layout for x in every} != {torch.strided} or len({x.device for x in every}) != 1:
        return False
    if not all(dtype.is_floating_point for dtype in {x.dtype for x in every}) or any(map(Tensor.is_neg, every)):
        return False
    if [x.shape for x in averages] != [x.shape for x in tensors]:
        return False
    addresses = [x.data_ptr() for x in averages if x.numel() > 0]
    return len(set(addresses)) == len(addresses) and not any(map(shares_memory, averages))


def shares_memory(x: Tensor) -> bool:
    """Whether elements of ``x`` are known to share memory, as those of an expanded tensor do."""
    return not x.is_contiguous() and torch._debug_has_internal_overlap(x) == 1


def is_odd(x: Tensor) -> bool:
    """Whether it cannot be written as it lies: lazily conjugated or negated, or with elements that share memory."""
    return x.is_conj() or x.is_neg() or shares_memory(x)


def all_finite(tensors: Sequence[Tensor], runs: Sequence[Run] = ()) -> bool:
    """Whether no element is infinite or NaN. Also false where sums overflow. It reads the tensors once.

    ``runs``: of the first tensors, which are mostly alike.
    """
    total, begin = 0.0, 0
    for run in runs:
        total += _sum_of_small(tensors[begin : begin + run.length], stacks=True)
        begin += run.length
    rest = tensors[begin:]
    small = [x for x in rest if x.numel() < LARGE]
    total += _sum_of_small(small) if small else 0.0
    return math.isfinite(total + sum([x.sum().item() for x in rest if x.numel() >= LARGE]))


def _sum_of_small(tensors: Sequence[Tensor], stacks: bool = False) -> float:
    """One copy costs less than a sum of each."""
    if stacks:
        with suppress(RuntimeError):  # parameters need not have the shapes of gradients that do
            return torch.stack(list(tensors)).sum().item()
    line: Tensor = torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return line.sum().item()
