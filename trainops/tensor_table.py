"""What stands between lists of tensors and a kernel's table of addresses.

A kernel takes a table: one row per parameter, one column per role, all cells of a row in the same memory order.
The compiled modules build it themselves from lists of tensors (``csrc/tensor_table_from_python.h``). Here is what
they leave to Python: how a tensor describes itself where torch is too old to do it, and how rows are made regular
that kernels cannot take as they are, such as complex numbers, gradients with other strides than their parameter,
slices with gaps, and the local shards of a DTensor.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

Column = Sequence[Tensor | None]

# How DLPack names dtypes and devices: (code, bits) and a number.
_DTYPE_CODES = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
}
_DEVICE_CODES = {"cpu": 1, "cuda": 2}


def describe(x: Tensor) -> tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """Address, dtype code, bits, device code and index, shape, strides; None for what no kernel takes as it is."""
    if x.layout is not torch.strided or x.dtype not in _DTYPE_CODES or x.device.type not in _DEVICE_CODES:
        return None
    device = _DEVICE_CODES[x.device.type], x.device.index or 0
    return (x.data_ptr(), *_DTYPE_CODES[x.dtype], *device, tuple(x.shape), x.stride())


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, as a plain tensor that shares its memory; other tensors as they are."""
    return x.to_local() if hasattr(x, "to_local") else x


def aligned(x: Tensor, param: Tensor) -> Tensor:
    """``x`` placed on the mesh as ``param`` is, where both are DTensors: their local parts then belong together."""
    placements = getattr(param, "placements", None)
    if placements is None or getattr(x, "placements", placements) == placements:
        return x
    redistributed: Tensor = cast(Any, x).redistribute(cast(Any, param).device_mesh, placements)
    return redistributed


# Subclasses give operations another meaning; these do not.
PLAIN = frozenset((Tensor, torch.nn.Parameter))


def all_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether none is of a subclass that gives operations another meaning."""
    return PLAIN.issuperset(map(type, tensors))


class Table(Protocol):
    """A table as the compiled modules build it."""

    @property
    def irregular(self) -> list[int]:
        """The rows that kernels cannot take as they are."""


T = TypeVar("T", bound=Table)


@contextmanager
def regular_table(
    build: Callable[[Sequence[Column], Column | None], T],
    columns: Sequence[Column],
    written: Sequence[bool],
    scalars: Column | None = None,
) -> Iterator[T]:
    """A table of ``columns`` in which every row is regular; ``scalars`` (one float32 per row) are written as well.

    The rows that are not are staged: their tensors are viewed as real numbers where they are complex, and copied
    into the strides of the row's first tensor where they have others. What the kernel writes into such copies
    (the columns that are ``written``) is copied back at the end.
    """
    table = build(columns, scalars)
    if not table.irregular:
        yield table
        return
    staged = [list(column) for column in columns]
    staged_scalars = None if scalars is None else list(scalars)
    copies: list[tuple[Tensor, Tensor]] = []
    for row in table.irregular:
        layout: Tensor | None = None
        for column, is_written in zip(staged, written, strict=True):
            original = column[row]
            if original is None:
                continue
            source = local(original)
            original = as_real(source)
            if is_written and source.is_conj():  # was resolved into a copy
                copies.append((source, torch.view_as_complex(original)))
            if layout is None:
                layout = torch.empty_like(original)
            regular = _with_layout_of(layout, original)
            if is_written and regular is not original:
                check_no_overlap(original)
                copies.append((original, regular))
            column[row] = regular
        if staged_scalars is not None and (scalar := staged_scalars[row]) is not None and layout is not None:
            staged_scalars[row] = regular = scalar.to(device=layout.device, dtype=torch.float32).reshape(())
            if regular.data_ptr() != scalar.data_ptr():
                copies.append((scalar, regular))
    table = build(staged, staged_scalars)
    if table.irregular:
        _raise_unsupported([column[table.irregular[0]] for column in columns])
    yield table
    for original, regular in reversed(copies):
        original.copy_(regular)


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
