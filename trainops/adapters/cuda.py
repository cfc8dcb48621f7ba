"""The ``cuda`` backend: CUDA C++ for NVIDIA GPUs (``csrc/cuda``)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .. import core
from ..reference_statistics import BINS, ROW
from ..tables import staged_table
from ..uploads import uploaded
from ._cuda_memory import Scratch, queue_of, scratch_for
from ._device import copy_back, device_guard, stage, step_settings, to_device
from ._drop_path import operations as drop_path_operations
from ._tables import ema_operations, step_operations
from .interface import Backend, Group, StepControl, StepResult

_cuda, _reason = core.load_kernels("_cuda", "cuda")


def probe() -> Backend:
    """Available where the extension was built and loads, and there is a driver and a device."""
    if _cuda is None:
        return Backend(available=False, reason=_reason)
    names, error = _cuda.devices()
    if not names:
        return Backend(available=False, reason=f"{error or 'no NVIDIA GPU'} (built with {_reason})")
    return Backend(available=True, details=f"{_reason}; {', '.join(dict.fromkeys(names))}")


def refusal(device: torch.device) -> str:
    """CUDA tensors are taken, on devices that this build has code for.

    The first question about a device makes CUDA's context there, as the first tensor does.
    """
    if _cuda is None or device.type != _device_type():
        return f"it takes {'CUDA' if _cuda is None else _device_type().upper()} tensors"
    index = torch.cuda.current_device() if device.index is None and device.type == "cuda" else device.index or 0
    return str(_cuda.refusal(device=index))


def _device_type() -> str:
    return str(_cuda.DEVICE_TYPE)


def _device_of(table: Any) -> torch.device:
    is_cuda = _device_type() == "cuda"
    return torch.device("cuda", table.device_index) if is_cuda else torch.device(_device_type())


class _Staged:
    """A table whose words lie on its device, and where to launch."""

    def __init__(self, table: Any) -> None:
        self.queue = queue_of(_device_of(table))
        words = stage(table, self.queue.device, _cuda.CHUNK_NUMEL, by_kind=False)
        self.rows, self.chunk_count = table.rows, words.chunk_count
        self.table = _cuda.StagedTable(
            table,
            words=words,
            rows=words.rows.data_ptr(),
            chunks=words.chunks.data_ptr(),
            chunk_count=self.chunk_count,
            all_chunks=words.all_chunks,
            stream=self.queue.stream,
        )


@contextmanager
def _staged(kind: str, tensors: Sequence[Tensor], unrounded: bool = False) -> Iterator[tuple[Any, _Staged]]:
    """A table of one column, regular and on its device, which is current meanwhile."""
    with staged_table(kind, {"tensor": list(tensors)}, _device_type()) as table, device_guard(_device_of(table)):
        table.has_float64 |= unrounded
        yield table, _Staged(table)


def _scratch(staged: _Staged, statistic: str | None = None) -> Scratch:
    counters = 2 + (staged.rows if statistic else 0)
    numbers = 1 + (staged.chunk_count * _cuda.STATE_WORDS[statistic] if statistic else 0)
    return scratch_for(staged.queue, counters, numbers)


def reduce(statistic: str, tensors: Sequence[Tensor], unrounded: bool = False) -> tuple[Tensor, Tensor]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    with _staged("reduce", tensors, unrounded) as (table, staged):
        return _reduce(table, staged, _scratch(staged, statistic), statistic)


def statistics(tensors: Sequence[Tensor], histogram: bool) -> tuple[Tensor, Tensor | None]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    with _staged("reduce", tensors, unrounded=True) as (table, staged):
        device = staged.queue.device
        rows = torch.empty(table.rows, len(ROW), dtype=torch.float64, device=device)
        bins = torch.zeros(table.rows, BINS, dtype=torch.int64, device=device) if histogram else None
        _launch_reduce(staged, _scratch(staged, "moments"), "moments", None, rows, histogram=bins)
    return rows, bins


def _reduce(
    table: Any,
    staged: _Staged,
    scratch: Scratch,
    statistic: str,
    grad_scale: Tensor | None = None,
    guard: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A statistic of a column and of its rows. Leaves the first in the scratch memory as well, as float64."""
    dtype = torch.float64 if table.has_float64 else torch.float32
    total = torch.empty((), dtype=dtype, device=staged.queue.device)
    rows = torch.empty(table.rows, dtype=dtype, device=staged.queue.device)
    _launch_reduce(staged, scratch, statistic, total, rows, grad_scale=grad_scale, guard=guard, found_inf=found_inf)
    return total, rows


def _launch_reduce(
    staged: _Staged,
    scratch: Scratch,
    statistic: str,
    total: Tensor | None,
    rows: Tensor,
    *,
    grad_scale: Tensor | None = None,
    **more: Tensor | None,
) -> None:
    """``total`` may be None for a statistic that gathers packs; ``more``: as the binding names them."""
    _cuda.reduce(
        staged.table,
        statistic=statistic,
        grad_scale=core.address(grad_scale),
        counters=scratch.counters,
        partials=scratch.partials,
        total=scratch.norm,
        total_out=core.address(total),
        rows_out=rows.data_ptr(),
        **{name: core.address(x) for name, x in more.items()},
    )


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. A coefficient of 1 leaves the tensors unread."""
    with _staged("transform", tensors) as (_, staged):
        dtype = torch.float32 if coefficient.dtype == torch.float32 else torch.float64
        factor = coefficient.to(staged.queue.device, dtype)
        scratch = _scratch(staged)
        _cuda.scale(
            staged.table,
            coefficient=factor.data_ptr(),
            is_float64=dtype == torch.float64,
            counters=scratch.counters,
        )


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    with _staged("transform", tensors) as (_, staged):
        scratch = _scratch(staged)
        _cuda.clamp(staged.table, bound=bound, counters=scratch.counters)


def _ema(table: Any, decay: float, skip: Tensor | None, seed: int) -> None:
    with device_guard(_device_of(table)):
        staged = _Staged(table)
        skip = None if skip is None else skip.to(staged.queue.device, torch.bool)
        scratch = _scratch(staged)
        _cuda.ema(
            staged.table,
            decay=decay,
            seed=seed,
            skip=core.address(skip),
            counters=scratch.counters,
        )


ema_, try_ema_ = ema_operations(_device_type, _ema)


def _update(
    table: Any, rule: str, groups: Sequence[Group], control: StepControl, ema_decays: Sequence[float]
) -> StepResult:
    device = _device_of(table)
    staged = _Staged(table)
    grad_scale, found_inf = (to_device(x, device, torch.float32) for x in (control.grad_scale, control.found_inf))
    total_norm, norms = control.total_norm, None
    # Both kernels use the same scratch memory: the second finds the norm there.
    scratch = _scratch(staged, "l2_norm")
    known_norm = to_device(total_norm, device, torch.float64)
    if control.measures:
        total_norm, norms = _reduce(table, staged, scratch, "l2_norm", grad_scale, control.guard, found_inf)
    elif control.guard is not None:
        _cuda.judge(
            staged.table,
            guard=core.address(control.guard),
            norm=core.address(known_norm),
            found_inf=core.address(found_inf),
        )
    skip = torch.empty((), dtype=torch.bool, device=device) if control.may_skip else None
    counter = None if skip is None else to_device(control.skipped_steps, device)
    words, held = step_settings(rule, groups, control, ema_decays, device)
    in_memory = uploaded(words, device) if len(words) > _cuda.INLINE_BYTES else None
    _cuda.update(
        staged.table,
        words=words if in_memory is None else in_memory.data_ptr(),
        norm=scratch.norm if control.measures else core.address(known_norm),
        grad_scale=core.address(grad_scale),
        found_inf=core.address(found_inf),
        clips=control.max_norm is not None,
        skip_nonfinite=control.skip_nonfinite,
        guard=core.address(control.guard),
        skip=core.address(skip),
        skipped_steps=core.address(counter),
        counters=scratch.counters,
    )
    del held
    copy_back(counter, control)
    return StepResult(total_norm, norms, skip)


def _guarded_update(table: Any, *args: Any) -> StepResult:
    with device_guard(_device_of(table)):
        return _update(table, *args)


collect, update = step_operations(_device_type, _guarded_update)


def _launch_drop_path(**operands: Any) -> None:
    device = operands["out"].device
    with device_guard(device):
        _cuda.drop_path(core.drop_path(device_type=_device_type(), **operands), stream=queue_of(device).stream)


def _launch_drop_path_backward(**operands: Any) -> None:
    device = operands["of_branch"].device
    size = _cuda.drop_path_partials(**{name: operands[name] for name in ("samples", "sample_numel", "channels")})
    partials = torch.empty(size, dtype=torch.float64, device=device)
    with device_guard(device):
        _cuda.drop_path_backward(
            core.drop_path_backward(device_type=_device_type(), **operands),
            partials=partials.data_ptr(),
            stream=queue_of(device).stream,
        )


drop_path, drop_path_backward = drop_path_operations(_launch_drop_path, _launch_drop_path_backward)
