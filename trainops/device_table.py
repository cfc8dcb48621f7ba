"""Tables in a device's memory, for kernels that run there.

Layout, in 64-bit words:

- ``rows``: for each row its number of elements, its first chunk, its group, and an address per column (0 where the
  row has no tensor in that role); last the address of its scalar, where the table has scalars.
- ``chunks``: for each chunk its row and its first element there. A chunk is up to ``chunk_numel`` elements of one
  row; a row without elements has one empty chunk. The chunks of a row follow each other, and so do those of all rows
  of one kind (a section): a section's tensors have the same types, column by column, so that one launch serves it.

What is uploaded is never written again, and is found by its content: a table is made or looked up anew at every step,
from the addresses of the tensors as they are then, so nothing stale can be used.
"""

import functools
import operator
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .tensor_table import Column, all_plain, describe

V = TypeVar("V")


class Recent(OrderedDict[Hashable, V]):
    """The entries that were used last, up to a number of them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def recall(self, key: Hashable) -> V | None:
        """The entry, if it is still there."""
        try:
            self.move_to_end(key)
            return self[key]
        except KeyError:  # another thread may just have dropped it
            return None

    def remember(self, key: Hashable, value: V) -> V:
        """Keep an entry in place of the one that was used longest ago."""
        self[key] = value
        while len(self) > self.size:
            self.popitem(last=False)
        return value


class Kind(NamedTuple):
    """What kernels must know of a row when they are compiled."""

    dtypes: tuple[torch.dtype | None, ...]  # by column; None: there is no tensor
    flag: bool  # of the row's group


class Section(NamedTuple):
    """Consecutive chunks whose rows are of one kind."""

    kind: Kind
    first_chunk: int
    chunk_count: int


class Groups(NamedTuple):
    """Consecutive rows that belong together: how many there are in each group, and a flag for each."""

    row_counts: Sequence[int]
    flags: Sequence[bool]


class DeviceTable:
    """Rows of tensors, described for kernels on their device.

    Args:
        columns: lists of equal length, one tensor (or None) per row, all on one device.
        scalars: a one-element float32 tensor per row, there too.
        chunk_numel: elements per chunk.
        groups: default: all rows are of one group, without its flag.

    Attributes:
        irregular: the rows that kernels cannot take as they are; if there is one, the table is not made.
    """

    def __init__(
        self, columns: Sequence[Column], scalars: Column | None, chunk_numel: int, groups: Groups | None = None
    ) -> None:
        self.device = next(x.device for column in columns for x in column if x is not None)
        self.row_count = len(columns[0])
        self.row_words = 3 + len(columns) + (scalars is not None)
        described = [_describe_row(row, self.device) for row in zip(*columns, strict=True)]
        scalar_addresses = [_scalar_address(x, self.device) for x in scalars or ()]
        self.irregular = [
            i for i, row in enumerate(described) if row is None or (scalar_addresses and scalar_addresses[i] is None)
        ]
        if self.irregular:
            return
        rows = [row for row in described if row is not None]
        row_counts, flags = groups or Groups([self.row_count], [False])
        group_of_row = [group for group, count in enumerate(row_counts) for _ in range(count)]
        by_kind: dict[Kind, list[int]] = {}
        for i, (row, group) in enumerate(zip(rows, group_of_row, strict=True)):
            by_kind.setdefault(Kind(row.dtypes, flags[group]), []).append(i)

        counts = [max(1, -(-row.numel // chunk_numel)) for row in rows]
        first_chunks = [0] * self.row_count
        self.sections: list[Section] = []
        self.chunk_count = 0
        for kind, members in by_kind.items():
            first = self.chunk_count
            for i in members:
                first_chunks[i] = self.chunk_count
                self.chunk_count += counts[i]
            self.sections.append(Section(kind, first, self.chunk_count - first))

        words = array("q")
        for i, row in enumerate(rows):
            words.extend((row.numel, first_chunks[i], group_of_row[i], *row.addresses))
            words.extend(x for x in scalar_addresses[i : i + 1] if x is not None)
        order = tuple(i for members in by_kind.values() for i in members)
        self._words = words.tobytes()
        self._chunk_words = _chunk_words(order, tuple(counts), chunk_numel)

    def upload(self) -> tuple[Tensor, Tensor]:
        """``rows`` and ``chunks`` in the memory of the device."""
        return uploaded(self._words, self.device), uploaded(self._chunk_words, self.device)

    def has_float64(self, column: int) -> bool:
        """Whether a tensor of the column is float64."""
        return any(section.kind.dtypes[column] is torch.float64 for section in self.sections)


_tables: Recent[DeviceTable] = Recent(32)


def device_table(
    columns: Sequence[Column], scalars: Column | None, chunk_numel: int, groups: Groups | None = None
) -> DeviceTable:
    """The :class:`DeviceTable` of these tensors: one that was made before, if it would be the same."""
    every = columns if scalars is None else [*columns, scalars]
    device = next(x.device for column in columns for x in column if x is not None)
    key = (device, chunk_numel, groups and tuple(map(tuple, groups)), len(columns), *map(_fingerprint, every))
    table = _tables.recall(key)
    if table is None:
        table = DeviceTable(columns, scalars, chunk_numel, groups)
        if not table.irregular:
            _tables.remember(key, table)
    return table


_NOTHING = torch.empty(0, dtype=torch.bool, device="cpu")  # no tensor of a table is of this type
_dtype = operator.attrgetter("dtype")


def _fingerprint(column: Column) -> tuple[object, ...]:
    """All that a table knows of a column, and what decides whether kernels can take it as it is.

    No two devices have the same addresses, but for that of nothing. Only with one element can a lazily negated
    tensor look like another.
    """
    tensors = [_NOTHING if x is None else x for x in column]
    sizes = tuple(map(Tensor.numel, tensors))
    return (
        sizes,
        tuple(map(type, tensors)),
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(_dtype, tensors)),
        None if all(map(Tensor.is_contiguous, tensors)) else tuple(map(Tensor.stride, tensors)),
        1 in sizes and any(map(Tensor.is_neg, tensors)),
    )


class _Row(NamedTuple):
    numel: int
    dtypes: tuple[torch.dtype | None, ...]
    addresses: tuple[int, ...]


def _describe_row(row: Sequence[Tensor | None], device: torch.device) -> _Row | None:
    """The row, if its tensors have the same elements in the same dense order, and lie on the device."""
    first: tuple[list[tuple[int, int]], int] | None = None
    for x in row:
        if x is None:
            continue
        if x.device != device or describe(x) is None or x.is_neg() or not all_plain([x]):
            return None
        # Dimensions of size 1 have no say in the order of elements, nor has any of an empty tensor.
        order = [
            (size, step if x.numel() else 0) for size, step in zip(x.shape, x.stride(), strict=True) if size != 1
        ]
        if first is None:
            first = order, x.numel()
            if x.numel() and not _is_dense(order):
                return None
        elif order != first[0]:
            return None
    dtypes = tuple(None if x is None else x.dtype for x in row)
    return _Row(0 if first is None else first[1], dtypes, tuple(0 if x is None else x.data_ptr() for x in row))


def _is_dense(order: list[tuple[int, int]]) -> bool:
    expected = 1
    for size, step in sorted(order, key=lambda dim: dim[1]):
        if step != expected:
            return False
        expected *= size
    return True


def _scalar_address(x: Tensor | None, device: torch.device) -> int | None:
    if x is None or x.device != device or x.dtype != torch.float32 or x.numel() != 1 or type(x) is not Tensor:
        return None
    return x.data_ptr()


@functools.lru_cache(maxsize=32)
def _chunk_words(order: tuple[int, ...], counts: tuple[int, ...], chunk_numel: int) -> bytes:
    """Row and first element of every chunk."""
    counts_in_order = torch.tensor(counts, device="cpu")[list(order)]
    rows = torch.repeat_interleave(torch.tensor(order, device="cpu"), counts_in_order)
    first = torch.repeat_interleave(counts_in_order.cumsum(0) - counts_in_order, counts_in_order)
    begins = (torch.arange(len(rows), device="cpu") - first) * chunk_numel
    return array("q", torch.stack((rows, begins), dim=1).flatten().tolist()).tobytes()


# What lies on devices, by its content, the device and the stream that it was copied on.
_uploads: Recent[Tensor] = Recent(128)

# For CUDA graphs: pinned buffers that stand ready, by size, because none may be allocated during capture; and what
# captured graphs read, which may be replayed at any time.
_spares: dict[int, list[Tensor]] = {}
_captured: list[Tensor] = []


def uploaded(words: bytes, device: torch.device) -> Tensor:
    """64-bit words in the device's memory, without waiting for it. Not to be written."""
    if device.type == "cpu":
        return torch.frombuffer(bytearray(words), dtype=torch.int64)
    key = (words, device, torch.cuda.current_stream(device).cuda_stream)
    found = _uploads.recall(key)
    if torch.cuda.is_current_stream_capturing():
        found = _upload_in_capture(words, device) if found is None else found
        _captured.append(found)
        return found
    if found is not None:
        return found
    host = torch.frombuffer(bytearray(words), dtype=torch.int64).pin_memory()
    spares = _spares.setdefault(len(words), [])
    if len(spares) < 4:
        spares.append(torch.empty_like(host, pin_memory=True))
    return _uploads.remember(key, host.to(device, non_blocking=True))


def _upload_in_capture(words: bytes, device: torch.device) -> Tensor:
    """The copy becomes part of the graph, and is made whenever it is replayed: nothing is there before."""
    spares = _spares.get(len(words))
    if not spares:
        raise RuntimeError("take this step on the same tensors, several times, before it is captured in a CUDA graph")
    host = spares.pop()
    host.copy_(torch.frombuffer(bytearray(words), dtype=torch.int64))
    _captured.append(host)
    return host.to(device, non_blocking=True)
