"""Tables in a device's memory, for kernels that run there.

Layout, in 64-bit words:

- ``rows``: for each row its number of elements, its first chunk, its group, the dtypes of its columns (four bits for
  each, the first column's lowest), and an address per column (0 where the row has no tensor in that role); last the
  address of its scalar, where the table has scalars.
- ``chunks``: for each chunk its row and its first element there. A chunk is up to ``chunk_numel`` elements of one
  row; a row without elements has one empty chunk. The chunks of a row follow each other, and so do those of all rows
  of one kind (a section): a section's tensors have the same types, column by column, so that one launch serves it.

CUDA's kernels take the same words (``csrc/device_table.h`` writes them), in one section: to them, dtypes are data.

What is uploaded is never written again, and is found by its content: a table is made or looked up anew at every step,
from the addresses of the tensors as they are then, so nothing stale can be used.
"""

import functools
import itertools
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


class Layout:
    """All of a table that does not depend on addresses: what kernels can be launched, and how rows are cut.

    Attributes:
        irregular: the rows that kernels cannot take as they are.
        sections: of the table's chunks.
        leading_words: columns of the words that precede the addresses.
        chunk_words: row and first element of every chunk.
    """

    def __init__(
        self, columns: Sequence[Column], scalars: Column | None, chunk_numel: int, groups: Groups | None
    ) -> None:
        row_counts, flags = groups or Groups([len(columns[0])], [False])
        groups_of_rows = [group for group, count in enumerate(row_counts) for _ in range(count)]
        device = next(x.device for column in columns for x in column if x is not None)
        rows = [_describe_row(row, device) for row in zip(*columns, strict=True)]
        is_regular = [_is_scalar(x, device) for x in scalars] if scalars is not None else [True] * len(rows)
        self.irregular = [i for i, row in enumerate(rows) if row is None or not is_regular[i]]
        self.sections: list[Section] = []
        numels = [0 if row is None else row.numel for row in rows]
        first_chunks = [0] * len(rows)
        self.chunk_count = 0
        by_kind: dict[Kind, list[int]] = {}
        for i, row in enumerate(rows):
            if row is not None:
                by_kind.setdefault(Kind(row.dtypes, flags[groups_of_rows[i]]), []).append(i)
        counts = [max(1, -(-numel // chunk_numel)) for numel in numels]
        for kind, members in by_kind.items():
            first = self.chunk_count
            for i in members:
                first_chunks[i] = self.chunk_count
                self.chunk_count += counts[i]
            self.sections.append(Section(kind, first, self.chunk_count - first))
        dtype_words = [0 if row is None else _dtype_word(row.dtypes) for row in rows]
        self.leading_words = numels, first_chunks, groups_of_rows, dtype_words
        order = [i for members in by_kind.values() for i in members]
        self.chunk_words = b"" if self.irregular else _chunk_words(order, counts, chunk_numel)


_layouts: Recent[Layout] = Recent(32)


class DeviceTable:
    """Rows of tensors, described for kernels on their device.

    Args:
        columns: lists of equal length, one tensor (or None) per row, all on one device.
        scalars: a one-element float32 tensor per row, there too.
        chunk_numel: elements per chunk.
        groups: default: all rows are of one group, without its flag.

    Attributes:
        irregular: the rows that kernels cannot take as they are; if there is one, there is nothing to upload.
    """

    def __init__(
        self, columns: Sequence[Column], scalars: Column | None, chunk_numel: int, groups: Groups | None = None
    ) -> None:
        self.device = next(x.device for column in columns for x in column if x is not None)
        self.row_count = len(columns[0])
        every = columns if scalars is None else [*columns, scalars]
        nothing = _nothing(self.device)
        self.row_words = 4 + len(every)
        tensors = [[nothing if x is None else x for x in column] for column in every]
        fingerprints = (_fingerprint(column, self.device) for column in tensors)
        key = (self.device, chunk_numel, groups and tuple(map(tuple, groups)), len(columns), *fingerprints)
        self._layout = _layouts.recall(key) or Layout(columns, scalars, chunk_numel, groups)
        self.irregular = self._layout.irregular
        if self.irregular:
            return
        _layouts.remember(key, self._layout)
        self.sections, self.chunk_count = self._layout.sections, self._layout.chunk_count
        addresses = [map(Tensor.data_ptr, column) for column in tensors]
        rows = zip(*self._layout.leading_words, *addresses, strict=True)
        self._words = array("q", itertools.chain.from_iterable(rows)).tobytes()

    def upload(self) -> tuple[Tensor, Tensor]:
        """``rows`` and ``chunks`` in the memory of the device."""
        return uploaded(self._words, self.device), uploaded(self._layout.chunk_words, self.device)

    def has_float64(self, column: int) -> bool:
        """Whether a tensor of the column is float64."""
        return any(section.kind.dtypes[column] is torch.float64 for section in self.sections)


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.bool, device=device)  # no tensor of a table is of this type


_dtype, _device = operator.attrgetter("dtype"), operator.attrgetter("device")


def _fingerprint(column: Sequence[Tensor], device: torch.device) -> tuple[object, ...]:
    """All that a layout knows of a column, and what decides whether kernels can take it as it is.

    Only with one element can a lazily negated tensor look like another.
    """
    sizes = tuple(map(Tensor.numel, column))
    contiguous = all(map(Tensor.is_contiguous, column))
    return (
        sizes,
        tuple(map(type, column)),
        tuple(map(_dtype, column)),
        None if contiguous else tuple(map(Tensor.size, column)) + tuple(map(Tensor.stride, column)),
        1 in sizes and any(map(Tensor.is_neg, column)),
        set(map(_device, column)) <= {device},
    )


# As csrc/tensor_table.h numbers them.
_DTYPES: tuple[torch.dtype | None, ...] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _dtype_word(dtypes: Sequence[torch.dtype | None]) -> int:
    codes = (0 if dtype is None else _DTYPES.index(dtype) for dtype in dtypes)
    return sum(code << (4 * column) for column, code in enumerate(codes))


class _Row(NamedTuple):
    numel: int
    dtypes: tuple[torch.dtype | None, ...]


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
    return _Row(0 if first is None else first[1], dtypes)


def _is_dense(order: list[tuple[int, int]]) -> bool:
    expected = 1
    for size, step in sorted(order, key=lambda dim: dim[1]):
        if step != expected:
            return False
        expected *= size
    return True


def _is_scalar(x: Tensor | None, device: torch.device) -> bool:
    """Whether it can be the scalar of a row."""
    return x is not None and x.device == device and x.dtype == torch.float32 and x.numel() == 1 and all_plain([x])


def _chunk_words(order: list[int], counts: list[int], chunk_numel: int) -> bytes:
    """Row and first element of every chunk."""
    counts_in_order = torch.tensor(counts, device="cpu")[order]
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
_SPARES = 4  # of each size


def uploaded(words: bytes, device: torch.device) -> Tensor:
    """64-bit words in the device's memory, without waiting for it. Not to be written."""
    if device.type == "cpu":
        return torch.frombuffer(bytearray(words), dtype=torch.int64)
    key = (words, device, torch.cuda.current_stream(device).cuda_stream)
    found = _uploads.recall(key)
    if torch.cuda.is_current_stream_capturing():
        if found is None:
            return _upload_in_capture(words, device)
        _captured.append(found)
        return found
    spares = _spares.setdefault(len(words), [])
    while len(spares) < _SPARES:
        spares.append(_pinned(len(words) // 8))
    if found is not None:
        return found
    host = torch.frombuffer(bytearray(words), dtype=torch.int64).pin_memory()
    return _uploads.remember(key, host.to(device, non_blocking=True))


def _pinned(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int64, pin_memory=True)


def _upload_in_capture(words: bytes, device: torch.device) -> Tensor:
    """The copy becomes part of the graph, and is made whenever it is replayed: nothing is there before."""
    spares = _spares.get(len(words))
    if not spares:
        raise RuntimeError(
            "there is no pinned memory ready for this table: take a step on tensors of these sizes outside of a CUDA "
            f"graph before every capture, and capture at most {_SPARES} steps at a time"
        )
    host = spares.pop()
    host.copy_(torch.frombuffer(bytearray(words), dtype=torch.int64))
    _captured.append(host)
    return host.to(device, non_blocking=True)
