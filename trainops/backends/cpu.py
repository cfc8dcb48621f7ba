"""The ``cpu`` backend: C++ with OpenMP and run-time SIMD selection (``csrc/cpu``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..tensor_table import Column, describe, regular_table
from ._build import load
from ._drop_path import operations as drop_path_operations
from ._ema import operations as ema_operations
from ._interface import AdamWGroup, Backend, StepControl, StepResult

_cpu, _reason = load("_cpu", "cpu")
if _cpu is not None:
    _cpu.configure(
        getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), describe, (torch.Tensor, torch.nn.Parameter)
    )

_NORMS = {1.0: "l1", 2.0: "l2", float("inf"): "inf"}


def probe() -> Backend:
    """Available where the extension was built and loads."""
    if _cpu is None:
        return Backend(available=False, reason=_reason)
    return Backend(available=True, details=f"{_reason}; {_cpu.instruction_set()}, {_cpu.threads()} threads")


def serves(device_type: str) -> bool:
    """CPU tensors."""
    return device_type == "cpu"


def _table(columns: Sequence[Column], scalars: Column | None = None) -> Any:
    measured = 0 if scalars is None else AdamWGroup.COLUMNS.index("grads")
    return _cpu.TensorTable(columns, scalars, measured)


def grad_norms(tensors: Sequence[Tensor], norm_type: float = 2.0) -> tuple[Tensor, Tensor]:
    """See :func:`trainops.reference.grad_norms`. Norms of other orders than 1, 2 and inf are left to it."""
    complex_parts = norm_type != 2.0 and any(x.is_complex() for x in tensors)
    if norm_type not in _NORMS or complex_parts:
        return reference.grad_norms(tensors, norm_type)
    with regular_table(_table, [list(tensors)], written=[False]) as table:
        norms = torch.empty(len(tensors), dtype=_norm_dtype(table), device="cpu")
        total = _cpu.norms(table, _NORMS[norm_type], norms)
    return torch.tensor(total, dtype=norms.dtype, device="cpu"), norms


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. A coefficient of 1 leaves the tensors unread."""
    factor = coefficient.item()
    if factor == 1.0:
        return
    with regular_table(_table, [list(tensors)], written=[True]) as table:
        _cpu.scale(table, factor)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    with regular_table(_table, [list(tensors)], written=[True]) as table:
        _cpu.clamp(table, bound)


def _ema(table: Any, decay: float, skip: Tensor | None) -> None:
    if skip is None or not skip.item():
        _cpu.ema(table, decay)


ema_, try_ema_ = ema_operations(_table, _ema)


def collect(param_groups: list[dict[str, Any]], state: dict[Tensor, Any], averages: dict[int, Tensor]) -> Any:
    """See :class:`trainops.backends._interface.Kernels`."""
    table = _cpu.AdamWTable(param_groups, state, averages)
    return table if table.regular and table.rows > 0 else None


def adamw_step(
    groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float, collected: Any = None
) -> StepResult:
    """See :class:`trainops.backends._interface.Kernels`. All groups are one table: two passes over memory."""
    if collected is not None:
        return _adamw_step(collected, groups, control, ema_decay)
    *columns, steps = ([x for group in groups for x in getattr(group, name)] for name in AdamWGroup.COLUMNS)
    with regular_table(_table, columns, [True, False, True, True, True, True], steps) as table:
        return _adamw_step(table, groups, control, ema_decay)


def _adamw_step(table: Any, groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float) -> StepResult:
    norms = torch.empty(table.rows, dtype=_norm_dtype(table), device="cpu") if control.measures else None
    total_norm, skipped = _cpu.adamw_step(
        table,
        [(g.rows, float(g.lr), g.beta1, g.beta2, g.eps, g.weight_decay, g.maximize) for g in groups],
        control.max_norm,
        control.skip_nonfinite,
        1.0 if control.grad_scale is None else control.grad_scale.item(),
        control.found_inf is not None and control.found_inf.item() != 0,
        None if control.total_norm is None else control.total_norm.item(),
        ema_decay,
        norms,
    )
    if skipped and control.skipped_steps is not None:
        control.skipped_steps.add_(1)
    return StepResult(
        control.total_norm if norms is None else torch.tensor(total_norm, dtype=norms.dtype, device="cpu"),
        norms,
        torch.tensor(skipped, device="cpu") if control.may_skip else None,
    )


if _cpu is not None:
    drop_path, drop_path_backward = drop_path_operations(_cpu.drop_path, _cpu.drop_path_backward)


def _norm_dtype(table: Any) -> torch.dtype:
    return torch.float64 if table.has_float64 else torch.float32
