"""The ``triton`` backend: Triton kernels (``triton_kernels``) for NVIDIA and AMD GPUs.

Under Triton's interpreter (``TRITON_INTERPRET=1`` in the environment before Python starts) it takes CPU tensors
instead: slow, and meant for tests.
"""

import importlib
import importlib.util
import math
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..device_table import DeviceTable, Groups, uploaded
from ..tensor_table import PLAIN, Column, regular_table
from ._device_step import hand_back, on, settings_words, there
from ._drop_path import operations
from ._interface import AdamWGroup, Backend, StepControl, StepResult
from .reference import try_ema_ as try_ema_

_NORMS = {1.0: 1, 2.0: 2, float("inf"): 0}
_GRADS = AdamWGroup.COLUMNS.index("grads")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def probe() -> Backend:
    """Available where Triton is installed and can launch on a GPU, or its interpreter is on."""
    if not _is_installed():
        return Backend(available=False, reason="Triton is not installed")
    if not _interpreted() and not torch.cuda.is_available():
        return Backend(available=False, reason="PyTorch finds no GPU")
    try:
        import triton

        _kernels()
        if not _interpreted():
            _ = triton.runtime.driver.active.utils  # is built when first wanted, for which it needs a C compiler
    except Exception as error:
        reason = f"Triton is installed but does not work: {error}"
        warnings.warn(f"trainops runs without its triton backend: {reason}", RuntimeWarning, stacklevel=2)
        return Backend(available=False, reason=reason)
    where = "interpreted, on CPU tensors" if _interpreted() else torch.cuda.get_device_name()
    return Backend(available=True, details=f"Triton {triton.__version__}; {where}")


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module without a specification stands in its place
        return False


def serves(device_type: str) -> bool:
    """CUDA and ROCm tensors; CPU tensors under the interpreter."""
    return device_type == ("cpu" if _interpreted() else "cuda")


@cache
def _kernels() -> Any:
    """The kernels, imported when they are first wanted."""
    return importlib.import_module("trainops.triton_kernels")


@cache
def _type(dtype: torch.dtype | None) -> Any:
    """Triton's name for a dtype."""
    import triton.language

    return None if dtype is None else getattr(triton.language, str(dtype).removeprefix("torch."))


@cache
def _warps() -> int:
    """How many a program has."""
    threads: int = _kernels()._common.THREADS
    if _interpreted():
        return threads // 32
    import triton

    warp_size: int = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, threads // warp_size)


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Contraction to fused multiply-add is off so that results do not depend on how a kernel was compiled."""
    kernel[(programs,)](*args, **constants, num_warps=_warps(), enable_fp_fusion=False)


def _constants(table: DeviceTable, *dtypes: torch.dtype | None) -> dict[str, int]:
    """What the kernels that take chunks must know of a table, and of the types of their tensors."""
    common = _kernels()._common
    block = common.block_numel(*(dtype.itemsize for dtype in dtypes if dtype is not None))
    return {"WORDS": table.row_words, "CHUNK": common.CHUNK, "BLOCK": block}


def _reduction_constants(table: DeviceTable) -> dict[str, int]:
    common = _kernels()._common
    return {"WORDS": table.row_words, "CHUNK": common.CHUNK, "BLOCK": common.REDUCTION_BLOCK}


def _wide(*dtypes: torch.dtype | None) -> torch.dtype:
    """The type of arithmetic on tensors of such types."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _build(columns: Sequence[Column], scalars: Column | None = None, groups: Groups | None = None) -> DeviceTable:
    return DeviceTable(columns, scalars, _kernels()._common.CHUNK, groups)


def grad_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> tuple[Tensor, Tensor]:
    """See :func:`trainops.reference.grad_norms`. Norms of other orders than 1, 2 and inf are left to it."""
    if norm_type not in _NORMS or (norm_type != 2.0 and any(x.is_complex() for x in tensors)):
        return reference.grad_norms(tensors, norm_type)
    with regular_table(_build, [list(tensors)], written=[False]) as table, on(table.device):
        rows, chunks = table.upload()
        total_norm, norms = _empty_norms(table, 0)
        _launch(
            _kernels().clip_grad_norm.finish_norms,
            1 + table.row_count,
            rows,
            _partial_norms(table, rows, chunks, 0, _NORMS[norm_type]),
            table.chunk_count,
            total_norm,
            norms,
            NORM=_NORMS[norm_type],
            **_reduction_constants(table),
        )
    return total_norm, norms


def _partial_norms(table: DeviceTable, rows: Tensor, chunks: Tensor, column: int, norm: int) -> Tensor:
    partials = torch.empty(table.chunk_count, dtype=torch.float64, device=table.device)
    for section in table.sections:
        dtype = section.kind.dtypes[column]
        _launch(
            _kernels().clip_grad_norm.partial_norms,
            section.chunk_count,
            rows,
            chunks,
            section.first_chunk,
            partials,
            COLUMN=column,
            DTYPE=_type(dtype),
            WIDE=_type(_wide(dtype)),
            NORM=norm,
            **_constants(table, dtype),
        )
    return partials


def _empty_norms(table: DeviceTable, column: int) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if table.has_float64(column) else torch.float32
    norms = torch.empty(table.row_count, dtype=dtype, device=table.device)
    return torch.empty((), dtype=dtype, device=table.device), norms


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. A coefficient of 1 leaves the tensors unread."""
    _update_in_place(tensors, coefficient.to(tensors[0].device), clamp=False)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    device = tensors[0].device
    with on(device):
        operand = uploaded(struct.pack("d", bound), device).view(torch.float64)
    _update_in_place(tensors, operand, clamp=True)


def _update_in_place(tensors: Sequence[Tensor], operand: Tensor, clamp: bool) -> None:
    with regular_table(_build, [list(tensors)], written=[True]) as table, on(table.device):
        rows, chunks = table.upload()
        for section in table.sections:
            (dtype,) = section.kind.dtypes
            _launch(
                _kernels().clip_grad_norm.update_in_place,
                section.chunk_count,
                rows,
                chunks,
                section.first_chunk,
                operand,
                DTYPE=_type(dtype),
                WIDE=_type(_wide(dtype)),
                CLAMP=clamp,
                **_constants(table, dtype),
            )


def ema_(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None) -> None:
    """See :func:`trainops.reference.ema_`."""
    if not averages:
        return
    with regular_table(_build, [list(averages), list(tensors)], [True, False]) as table, on(table.device):
        rows, chunks = table.upload()
        decay_word = uploaded(struct.pack("d", decay), table.device)
        for section in table.sections:
            average, param = section.kind.dtypes
            _launch(
                _kernels().ema.ema,
                section.chunk_count,
                rows,
                chunks,
                section.first_chunk,
                decay_word,
                None if skip is None else skip.to(table.device),
                AVERAGE=_type(average),
                PARAM=_type(param),
                WIDE=_type(_wide(average, param)),
                **_constants(table, average, param),
            )


@dataclass
class _Collected:
    """See :class:`trainops.backends._interface.Collected`."""

    table: DeviceTable
    params: list[Tensor]
    group_rows: list[int]
    averaged: int


_PLAIN = PLAIN | {type(None)}


def collect(
    param_groups: list[dict[str, Any]], state: dict[Tensor, Any], averages: dict[int, Tensor]
) -> _Collected | None:
    """See :class:`trainops.backends._interface.Kernels`."""
    columns: list[list[Any]] = [[] for _ in AdamWGroup.COLUMNS]
    group_rows = []
    try:
        for group in param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            states: list[Any] = list(map(state.get, params))
            if not all(states):
                return None
            largest = "max_exp_avg_sq" if group["amsgrad"] else None
            columns[0] += params
            columns[1] += [param.grad for param in params]
            columns[2] += [own["exp_avg"] for own in states]
            columns[3] += [own["exp_avg_sq"] for own in states]
            columns[4] += [own[largest] for own in states] if largest else [None] * len(params)
            columns[5] += map(averages.get, map(id, params)) if averages else [None] * len(params)
            columns[6] += [own["step"] for own in states]
            group_rows.append(len(params))
        if not columns[0] or not set().union(*(map(type, column) for column in columns)) <= _PLAIN:
            return None
        table = _build(columns[:-1], columns[-1], Groups(group_rows, [group["maximize"] for group in param_groups]))
    except (AttributeError, KeyError, RuntimeError):  # what is wrong is said on the general path
        return None
    if table.irregular:
        return None
    averaged = sum(x is not None for x in columns[5]) if averages else 0
    return _Collected(table, columns[0], group_rows, averaged)


def adamw_step(
    groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float, collected: _Collected | None = None
) -> StepResult:
    """See :class:`trainops.backends._interface.Kernels`. All groups are one table, in three launches or two."""
    if collected is not None:
        return _adamw_step(collected.table, groups, control, ema_decay)
    *columns, steps = ([x for group in groups for x in getattr(group, name)] for name in AdamWGroup.COLUMNS)
    build = partial(_build, groups=Groups([g.rows for g in groups], [g.maximize for g in groups]))
    with regular_table(build, columns, [True, False, True, True, True, True], steps) as table:
        return _adamw_step(table, groups, control, ema_decay)


def _adamw_step(
    table: DeviceTable, groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float
) -> StepResult:
    adamw, device = _kernels().adamw, table.device
    with on(device):
        rows, chunks = table.upload()
        settings = uploaded(settings_words(groups, control, ema_decay, device), device)
        scalars = torch.empty(table.row_count, adamw.SCALARS.value, dtype=torch.float64, device=device)
        coefficient = torch.empty((), dtype=torch.float64, device=device)
        skip = torch.empty((), dtype=torch.bool, device=device) if control.may_skip else None
        counter = None if skip is None else there(control.skipped_steps, device)
        partials = _partial_norms(table, rows, chunks, _GRADS, 2) if control.measures else None
        total_norm, norms = (None, None) if partials is None else _empty_norms(table, _GRADS)
        _launch(
            adamw.plan,
            1 + table.row_count,
            rows,
            settings,
            partials,
            table.chunk_count,
            there(control.grad_scale, device),
            there(control.found_inf, device),
            there(control.total_norm, device),
            total_norm,
            norms,
            coefficient,
            skip,
            counter,
            scalars,
            CLIP=control.max_norm is not None,
            SKIP_NONFINITE=control.skip_nonfinite,
            **_reduction_constants(table),
        )
        for section in table.sections:
            param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, average = section.kind.dtypes
            _launch(
                adamw.update,
                section.chunk_count,
                rows,
                chunks,
                section.first_chunk,
                settings,
                scalars,
                coefficient,
                skip,
                PARAM_TYPE=_type(param),
                GRAD_TYPE=_type(grad),
                EXP_AVG_TYPE=_type(exp_avg),
                EXP_AVG_SQ_TYPE=_type(exp_avg_sq),
                MAX_EXP_AVG_SQ_TYPE=_type(max_exp_avg_sq),
                AVERAGE_TYPE=_type(average),
                WIDE=_type(_wide(param)),
                AVERAGE_WIDE=_type(_wide(param, average)),
                MAXIMIZE=section.kind.flag,
                **_constants(table, *section.kind.dtypes),
            )
    hand_back(counter, control)
    return StepResult(control.total_norm if total_norm is None else total_norm, norms, skip)


def _launch_drop_path(
    out: Tensor,
    residual: Tensor | None,
    branch: Tensor,
    layer_scale: Tensor | None,
    mask: Tensor,
    rows: Tensor | None,
    samples: int,
    sample_numel: int,
    channels: int,
) -> None:
    common = _kernels()._common
    unit = _unit(sample_numel if layer_scale is None else channels)
    with on(out.device):
        _launch(
            _kernels().drop_path.drop_path,
            -(-out.numel() // common.CHUNK),
            out,
            residual,
            branch,
            layer_scale,
            mask,
            rows,
            out.numel() // unit,
            sample_numel // unit,
            channels // unit,
            UNIT=unit,
            INDEX=_index(sample_numel // unit),
            PRODUCT=_type(mask.dtype),
            WIDE=_type(_wide(mask.dtype)),
            CHUNK=common.CHUNK,
            BLOCK=_block(out, residual, branch),
        )


def _launch_drop_path_backward(
    of_branch: Tensor,
    of_layer_scale: Tensor,
    grad: Tensor,
    branch: Tensor,
    layer_scale: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    samples: int,
    sample_numel: int,
    channels: int,
) -> None:
    common, kernels = _kernels()._common, _kernels().drop_path
    positions, unit = branch.numel() // channels, _unit(channels)
    block = _block(grad, branch)
    columns = min(block // 8, max(8, 1 << (channels - 1).bit_length()))
    program_positions = max(common.CHUNK // columns, -(-positions // kernels.PARTIALS))
    programs = -(-positions // program_positions)
    finish_rows = 8 if programs <= 8 else 64
    partials = torch.empty(programs, channels, dtype=torch.float64, device=grad.device)
    with on(grad.device):
        _launch(
            kernels.drop_path_backward,
            programs * -(-channels // columns),
            of_branch,
            partials,
            grad,
            branch,
            layer_scale,
            mask,
            rows,
            positions,
            sample_numel // channels,
            program_positions,
            channels // unit,
            UNIT=unit,
            INDEX=_index(sample_numel // channels + program_positions),
            PRODUCT=_type(mask.dtype),
            WIDE=_type(_wide(mask.dtype)),
            COLUMNS=columns,
            BLOCK=block,
        )
        _launch(
            kernels.finish_layer_scale,
            -(-channels // (common.REDUCTION_BLOCK // finish_rows)),
            of_layer_scale,
            partials,
            programs,
            channels,
            ROWS=finish_rows,
            BLOCK=common.REDUCTION_BLOCK,
        )


drop_path, drop_path_backward = operations(_launch_drop_path, _launch_drop_path_backward)


def _block(*tensors: Tensor | None) -> int:
    return int(_kernels()._common.block_numel(*(x.itemsize for x in tensors if x is not None)))


def _unit(numel: int) -> int:
    """How many consecutive elements the DropPath kernels take as one."""
    return math.gcd(numel, _kernels().drop_path.UNIT)


def _index(largest: int) -> Any:
    """The type of an index up to ``largest``, and some chunks more."""
    return _type(torch.uint32 if largest < 2**31 else torch.uint64)
