"""The ``cuda`` backend: CUDA C++ for NVIDIA GPUs (``csrc/cuda``)."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..device_table import Recent, uploaded
from ..tensor_table import Column, describe, regular_table
from ._build import load
from ._device_step import hand_back, on, settings_words, there
from ._drop_path import operations as drop_path_operations
from ._ema import operations as ema_operations
from ._interface import AdamWGroup, Backend, StepControl, StepResult

_cuda, _reason = load("_cuda", "cuda")
if _cuda is not None:
    _cuda.configure(
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), describe, (torch.Tensor, torch.nn.Parameter)
    )

_NORMS = {1.0: "l1", 2.0: "l2", float("inf"): "inf"}
_GRADS = AdamWGroup.COLUMNS.index("grads")


def probe() -> Backend:
    """Available where the extension was built and loads, and there is a driver and a device."""
    if _cuda is None:
        return Backend(available=False, reason=_reason)
    count, error, name = _cuda.devices()
    if count == 0:
        return Backend(available=False, reason=f"{error or 'no NVIDIA GPU'} (built with {_reason})")
    return Backend(available=True, details=f"{_reason}; {name}")


def serves(device_type: str) -> bool:
    """CUDA tensors."""
    return _cuda is not None and device_type == _cuda.DEVICE_TYPE


def _table(columns: Sequence[Column], scalars: Column | None = None, group_rows: Sequence[int] = ()) -> Any:
    return _cuda.TensorTable(columns, scalars, 0 if scalars is None else _GRADS, group_rows)


class _Queue(NamedTuple):
    """A device and its current stream."""

    device: torch.device
    stream: int

    @property
    def captures(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _queue(device: torch.device) -> _Queue:
    return _Queue(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


def _device_of(table: Any) -> torch.device:
    is_cuda = _cuda.DEVICE_TYPE == "cuda"
    return torch.device("cuda", table.device_index) if is_cuda else torch.device(_cuda.DEVICE_TYPE)


# The last words of each size: equal ones are replaced by them, whose hash is known.
_last_words: dict[int, bytes] = {}

# What cuts rows of such sizes into chunks.
_chunk_words: Recent[bytes] = Recent(32)


def _upload(table: Any, queue: _Queue) -> tuple[Tensor, Tensor]:
    """The table's words in the memory of the device."""
    sizes = _known(table.numels)
    chunks = _chunk_words.recall(sizes) or _chunk_words.remember(sizes, table.chunk_words)
    return uploaded(_known(table.row_words), queue.device), uploaded(chunks, queue.device)


def _addresses(words: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return words[0].data_ptr(), words[1].data_ptr()


def _known(words: bytes) -> bytes:
    last = _last_words.get(len(words))
    if last == words:
        return last
    _last_words[len(words)] = words
    return words


# For each stream, and each thread that launches on it: a counter of blocks, which every kernel leaves at 0, the norm,
# and room for partial sums.
_scratches: Recent[Tensor] = Recent(32)
_captured: list[Tensor] = []
_COUNTER, _NORM, _PARTIALS = (8 * i for i in range(3))


def _scratch(queue: _Queue, chunk_count: int) -> Tensor:
    size = 2 + chunk_count
    if queue.captures:
        _captured.append(torch.zeros(size, dtype=torch.float64, device=queue.device))
        return _captured[-1]
    key = queue, threading.get_ident()
    scratch = _scratches.recall(key)
    if scratch is None or len(scratch) < size:
        scratch = _scratches.remember(key, torch.zeros(2 * size, dtype=torch.float64, device=queue.device))
    return scratch


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def grad_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> tuple[Tensor, Tensor]:
    """See :func:`trainops.reference.grad_norms`. Norms of other orders than 1, 2 and inf are left to it."""
    if norm_type not in _NORMS or (norm_type != 2.0 and any(x.is_complex() for x in tensors)):
        return reference.grad_norms(tensors, norm_type)
    with regular_table(_table, [list(tensors)], written=[False]) as table, on(_device_of(table)):
        queue = _queue(_device_of(table))
        scratch = _scratch(queue, table.chunk_count)
        return _measure(table, _upload(table, queue), scratch.data_ptr(), queue, 0, _NORMS[norm_type])


def _measure(
    table: Any,
    words: tuple[Tensor, Tensor],
    scratch: int,
    queue: _Queue,
    column: int,
    norm: str,
    grad_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of a column and of its rows; the first is left in the scratch memory as float64, too."""
    dtype = torch.float64 if table.has_float64 else torch.float32
    total_norm = torch.empty((), dtype=dtype, device=queue.device)
    norms = torch.empty(table.rows, dtype=dtype, device=queue.device)
    _cuda.norms(
        table,
        _addresses(words),
        column,
        norm,
        _address(grad_scale),
        scratch + _COUNTER,
        scratch + _PARTIALS,
        scratch + _NORM,
        total_norm.data_ptr(),
        norms.data_ptr(),
        queue.stream,
    )
    return total_norm, norms


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. A coefficient of 1 leaves the tensors unread."""
    with regular_table(_table, [list(tensors)], written=[True]) as table, on(_device_of(table)):
        queue = _queue(_device_of(table))
        dtype = torch.float32 if coefficient.dtype == torch.float32 else torch.float64
        factor = coefficient.to(queue.device, dtype)
        words = _upload(table, queue)
        _cuda.scale(table, _addresses(words), factor.data_ptr(), dtype == torch.float64, queue.stream)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    with regular_table(_table, [list(tensors)], written=[True]) as table, on(_device_of(table)):
        queue = _queue(_device_of(table))
        words = _upload(table, queue)
        _cuda.clamp(table, _addresses(words), bound, queue.stream)


def _ema(table: Any, decay: float, skip: Tensor | None) -> None:
    with on(_device_of(table)):
        queue = _queue(_device_of(table))
        skip = None if skip is None else skip.to(queue.device, torch.bool)
        words = _upload(table, queue)
        _cuda.ema(table, _addresses(words), decay, _address(skip), queue.stream)


ema_, try_ema_ = ema_operations(_table, _ema)


def collect(param_groups: list[dict[str, Any]], state: dict[Tensor, Any], averages: dict[int, Tensor]) -> Any:
    """See :class:`trainops.backends._interface.Kernels`."""
    table = _cuda.AdamWTable(param_groups, state, averages)
    return table if table.regular and table.rows > 0 else None


def adamw_step(
    groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float, collected: Any = None
) -> StepResult:
    """See :class:`trainops.backends._interface.Kernels`. All groups are one table, in two launches or one."""
    if collected is not None:
        with on(_device_of(collected)):
            return _adamw_step(collected, groups, control, ema_decay)
    *columns, steps = ([x for group in groups for x in getattr(group, name)] for name in AdamWGroup.COLUMNS)
    build = partial(_table, group_rows=[group.rows for group in groups])
    with regular_table(build, columns, [True, False, True, True, True, True], steps) as table, on(_device_of(table)):
        return _adamw_step(table, groups, control, ema_decay)


def _adamw_step(table: Any, groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float) -> StepResult:
    device = _device_of(table)
    queue = _queue(device)
    words = _upload(table, queue)
    grad_scale, found_inf = (there(x, device, torch.float32) for x in (control.grad_scale, control.found_inf))
    total_norm, norms = control.total_norm, None
    # Both kernels use the same scratch memory: the second finds the norm there.
    scratch_memory = _scratch(queue, table.chunk_count)
    scratch = scratch_memory.data_ptr()
    known_norm = there(total_norm, device, torch.float64)
    if control.measures:
        total_norm, norms = _measure(table, words, scratch, queue, _GRADS, "l2", grad_scale)
    skip = torch.empty((), dtype=torch.bool, device=device) if control.may_skip else None
    counter = None if skip is None else there(control.skipped_steps, device)
    settings = settings_words(groups, control, ema_decay, device)
    in_memory = uploaded(settings, device) if len(settings) > _cuda.INLINE_SETTINGS else None
    _cuda.adamw(
        table,
        _addresses(words),
        settings if in_memory is None else in_memory.data_ptr(),
        scratch + _NORM if control.measures else _address(known_norm),
        _address(grad_scale),
        _address(found_inf),
        control.max_norm is not None,
        control.skip_nonfinite,
        _address(skip),
        _address(counter),
        scratch + _COUNTER,
        queue.stream,
    )
    hand_back(counter, control)
    return StepResult(total_norm, norms, skip)


def _launch_drop_path(out: Tensor, *args: Any) -> None:
    *tensors, rows, samples, sample_numel, channels = args
    with on(out.device):
        stream = _queue(out.device).stream
        _cuda.drop_path(out, *tensors, _address(rows), samples, sample_numel, channels, stream)


def _launch_drop_path_backward(of_branch: Tensor, *args: Any) -> None:
    *tensors, rows, samples, sample_numel, channels = args
    sizes = samples, sample_numel, channels
    size = _cuda.drop_path_partials(*sizes)
    partials = torch.empty(size, dtype=torch.float64, device=of_branch.device)
    with on(of_branch.device):
        stream = _queue(of_branch.device).stream
        _cuda.drop_path_backward(of_branch, *tensors, _address(rows), *sizes, partials.data_ptr(), stream)


drop_path, drop_path_backward = drop_path_operations(_launch_drop_path, _launch_drop_path_backward)
