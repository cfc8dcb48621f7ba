"""Finds Triton's kernels, and launches them over the sections of a table's chunks."""

import importlib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import core
from ._device import Section, stage

# Types of columns that PyTorch has no name for (``csrc/core/table.h``), and those in which their elements lie.
STOCHASTIC = "stochastic"  # rounded stochastically
CODES = {"signed_codes": torch.int8, "unsigned_codes": torch.uint8}
OF_ELEMENTS: dict[Any, torch.dtype] = {STOCHASTIC: torch.bfloat16, **CODES}


def interpreted() -> bool:
    """Whether Triton's interpreter is on."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def kernels() -> Any:
    """The kernels, imported when they are first wanted."""
    return importlib.import_module("trainops.triton_kernels")


@cache
def type_of(dtype: torch.dtype | str | None) -> Any:
    """Triton's name for the type of elements."""
    import triton.language

    name = str(OF_ELEMENTS.get(dtype, dtype)).removeprefix("torch.")
    return None if dtype is None else getattr(triton.language, name)


@cache
def warps() -> int:
    """Warps per program."""
    threads: int = kernels()._common.THREADS
    if interpreted():
        return threads // 32
    import triton

    warp_size: int = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, threads // warp_size)


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel.

    Contraction to fused multiply-add is off so that results do not depend on how the kernel was compiled.
    """
    kernel[(programs,)](*args, **constants, num_warps=warps(), enable_fp_fusion=False)


class Staged:
    """A table whose words lie on its device, for kernels that take chunks."""

    def __init__(self, kind: str, table: Any, device: torch.device, averages: int = 1) -> None:
        self.words = stage(table, device, kernels()._common.CHUNK, by_kind=True)
        is_buffers = [section.first_chunk >= self.words.chunk_count for section in self.words.sections]
        self.sections = [x for x, is_buffer in zip(self.words.sections, is_buffers, strict=True) if not is_buffer]
        self.of_buffers = [x for x, is_buffer in zip(self.words.sections, is_buffers, strict=True) if is_buffer]
        self.device, self.row_count, self.has_float64 = device, table.rows, table.has_float64
        self.columns = core.schema(kind, averages).places
        self._row_words = len(core.words("row")) + len(self.columns)

    def constants(self, block: int) -> dict[str, int]:
        """The constants of every kernel; ``block``: how many elements a program takes at a time."""
        return {"WORDS": self._row_words, "CHUNK": kernels()._common.CHUNK, "BLOCK": block}

    def reduction_constants(self) -> dict[str, int]:
        """The constants of a kernel that joins partial results."""
        return self.constants(kernels()._common.REDUCTION_BLOCK)

    def over_chunks(
        self,
        kernel: Any,
        *args: Any,
        types: dict[str, str],
        wide: dict[str, tuple[str, ...]],
        rounded: Sequence[str] = (),
        coded: Sequence[str] = (),
        itemsize: int | None = None,
        sections: Sequence[Section] | None = None,
        **constants: Any,
    ) -> None:
        """Launch a kernel for each section of chunks; without ``sections``, for all but those of buffers.

        ``types``: constants that name the type of a column. ``wide``: constants that name the type of arithmetic on
        the columns of some of the former. ``rounded``: columns that may be rounded
        stochastically; the constant ``STOCHASTIC`` has a bit for each. ``coded``: columns that may be codes; the
        constant ``CODES`` says whether one is. ``itemsize``: bytes by which blocks are divided, if not those of the
        types.
        """
        for section in self.sections if sections is None else sections:
            dtypes = {constant: section.kind[self.columns[column]] for constant, column in types.items()}
            sizes = [_itemsize(dtype) for dtype in dtypes.values() if dtype] if itemsize is None else [itemsize]
            launch(
                kernel,
                section.chunk_count,
                self.words.rows,
                self.words.chunks,
                section.first_chunk,
                *args,
                **{constant: type_of(dtype) for constant, dtype in dtypes.items()},
                **{constant: type_of(wide_type(*(dtypes[x] for x in among))) for constant, among in wide.items()},
                **({"STOCHASTIC": self.stochastic(section, rounded)} if rounded else {}),
                **({"CODES": any(section.kind[self.columns[x]] in CODES for x in coded)} if coded else {}),
                **constants,
                **self.constants(kernels()._common.block_numel(*sizes)),
            )

    def stochastic(self, section: Section, columns: Sequence[str]) -> int:
        """A bit for each of these columns, the first being the lowest: whether it is rounded stochastically."""
        kinds = (section.kind[self.columns[x]] if x in self.columns else None for x in columns)
        return sum((kind == STOCHASTIC) << i for i, kind in enumerate(kinds))

    def results(self) -> tuple[Tensor, Tensor]:
        """Room for a statistic of everything and of each row."""
        dtype = torch.float64 if self.has_float64 else torch.float32
        rows = torch.empty(self.row_count, dtype=dtype, device=self.device)
        return torch.empty((), dtype=dtype, device=self.device), rows

    def partial_results(self, statistic: str, column: str) -> Tensor:
        """The unfinished statistic of each chunk."""
        size = self.words.chunk_count, kernels().statistics.NUMBERS[statistic]
        partials = torch.empty(size, dtype=torch.float64, device=self.device)
        self.over_chunks(
            kernels().reduce.partial_results,
            partials,
            types={"DTYPE": column},
            wide={"WIDE": ("DTYPE",)},
            itemsize=kernels()._common.SMALLEST,
            STATISTIC=statistic,
            COLUMN=self.columns[column],
        )
        return partials


@cache
def _itemsize(dtype: str) -> int:
    """Bytes by which blocks are divided. Codes count as 16 bits: with 16 elements, threads run out of registers."""
    if dtype in CODES:
        return int(kernels()._common.SMALLEST)
    return int((OF_ELEMENTS.get(dtype) or getattr(torch, dtype)).itemsize)


def wide_type(*dtypes: str | None) -> str:
    """The type of arithmetic on such types."""
    return "float64" if "float64" in dtypes else "float32"
