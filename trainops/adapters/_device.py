"""The arguments of kernels on a device, for ``cuda`` and ``triton`` alike."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import core
from ..uploads import Recent, known, uploaded
from .interface import Group, StepControl


def device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current: kernels are launched there, and captures are looked for there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def to_device(x: Tensor | None, device: torch.device, dtype: torch.dtype | None = None) -> Tensor | None:
    """``x`` on the device, in that dtype if one is given."""
    return None if x is None else x.to(device, dtype or x.dtype)


def copy_back(counter: Tensor | None, control: StepControl) -> None:
    """Copies ``counter`` back to ``control.skipped_steps`` if it is a copy on another device."""
    if counter is not None and counter is not control.skipped_steps and control.skipped_steps is not None:
        control.skipped_steps.copy_(counter)


class Section(NamedTuple):
    """Consecutive chunks of rows that have the same types."""

    kind: tuple[str | None, ...]  # the dtype of each column, by name; None if there is no tensor
    first_chunk: int
    chunk_count: int


class StagedWords(NamedTuple):
    """A table's words in the memory of a device."""

    rows: Tensor
    chunks: Tensor
    chunk_count: int
    all_chunks: int  # with those of buffers, which come last
    sections: list[Section]


# The chunks of tables, by the layout that they depend on.
_chunks: Recent[bytes] = Recent(32)


def stage(table: Any, device: torch.device, chunk_numel: int, by_kind: bool) -> StagedWords:
    """Bring a table's words to the device; ``by_kind``: in sections, for kernels that are compiled for types."""
    words = table.words(chunk_numel=chunk_numel, by_kind=by_kind)
    layout = known(words.layout)
    chunks = _chunks.recall(layout) or _chunks.remember(layout, words.chunks)
    sections = [Section(*section) for section in words.sections] if by_kind else []
    rows, counts = uploaded(known(words.rows), device), (words.chunk_count, words.all_chunks)
    return StagedWords(rows, uploaded(chunks, device), *counts, sections)


def step_settings(
    rule: str, groups: Sequence[Group], control: StepControl, ema_decays: Sequence[float], device: torch.device
) -> tuple[bytes, list[Tensor]]:
    """The settings of a step as words, and the tensors that these point to, to be held until the launch."""
    settings = [{name: _setting(x, device) for name, x in group.settings.items()} for group in groups]
    max_norm = None if control.max_norm is None else _setting(control.max_norm, device)
    in_memory = [x for x in (max_norm, *(x for its in settings for x in its.values())) if isinstance(x, Tensor)]
    return core.step_settings(rule, max_norm, ema_decays, settings, control.seeds), in_memory


def _setting(x: float | Tensor, device: torch.device) -> float | Tensor:
    """A number, or a number in the memory of the device, for which nobody waits."""
    if not isinstance(x, Tensor) or (x.device.type == "cpu" and device.type != "cpu"):
        return float(x)
    return x.to(device, x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float64, non_blocking=True)
