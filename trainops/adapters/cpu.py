"""The ``cpu`` backend: C++ with OpenMP and run-time SIMD selection (``csrc/cpu``)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import core
from ..reference_statistics import BINS, ROW
from ..tables import staged_table
from ._drop_path import operations as drop_path_operations
from ._tables import ema_operations, step_operations
from .interface import Backend, Group, StepControl, StepResult

_cpu, _reason = core.load_kernels("_cpu", "cpu")


def probe() -> Backend:
    """Available where the extension was built and loads."""
    if _cpu is None:
        return Backend(available=False, reason=_reason)
    return Backend(available=True, details=f"{_reason}; {_cpu.instruction_set()}, {_cpu.threads()} threads")


def refusal(device: torch.device) -> str:
    """CPU tensors are taken."""
    return "" if device.type == "cpu" else "it takes CPU tensors"


def reduce(statistic: str, tensors: Sequence[Tensor], unrounded: bool = False) -> tuple[Tensor, Tensor]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    with staged_table("reduce", {"tensor": list(tensors)}, "cpu") as table:
        table.has_float64 |= unrounded
        rows = _empty_rows(table)
        total = _cpu.reduce(table, statistic=statistic, rows_out=rows.data_ptr())
    return torch.tensor(total, dtype=rows.dtype, device="cpu"), rows


def statistics(tensors: Sequence[Tensor], histogram: bool) -> tuple[Tensor, Tensor | None]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    with staged_table("reduce", {"tensor": list(tensors)}, "cpu") as table:
        table.has_float64 = True
        rows = torch.empty(table.rows, len(ROW), dtype=torch.float64, device="cpu")
        _cpu.reduce(table, statistic="moments", rows_out=rows.data_ptr())
        bins = torch.zeros(table.rows, BINS, dtype=torch.int64, device="cpu") if histogram else None
        if bins is not None:
            _cpu.count_exponents(table, counts=bins.data_ptr())
    return rows, bins


def _empty_rows(table: Any) -> Tensor:
    return torch.empty(table.rows, dtype=torch.float64 if table.has_float64 else torch.float32, device="cpu")


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. A coefficient of 1 leaves the tensors unread."""
    factor = coefficient.item()
    if factor == 1.0:
        return
    with staged_table("transform", {"tensor": list(tensors)}, "cpu") as table:
        _cpu.scale(table, coefficient=factor)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    with staged_table("transform", {"tensor": list(tensors)}, "cpu") as table:
        _cpu.clamp(table, bound=bound)


def _ema(table: Any, decay: float, skip: Tensor | None, seed: int) -> None:
    if skip is None or not skip.item():
        _cpu.ema(table, decay=decay, seed=seed)


ema_, try_ema_ = ema_operations(lambda: "cpu", _ema)


def _update(
    table: Any, rule: str, groups: Sequence[Group], control: StepControl, ema_decays: Sequence[float]
) -> StepResult:
    norms = _empty_rows(table) if control.measures else None
    names = core.schemas[rule].settings
    total_norm, skipped = _cpu.update(
        table,
        settings=[[float(group.settings[name]) for name in names] for group in groups],
        max_norm=None if control.max_norm is None else float(control.max_norm),
        skip_nonfinite=control.skip_nonfinite,
        grad_scale=1.0 if control.grad_scale is None else control.grad_scale.item(),
        found_inf=control.found_inf is not None and control.found_inf.item() != 0,
        total_norm=None if control.total_norm is None else control.total_norm.item(),
        ema_decays=ema_decays,
        seeds=core.seeds(*control.seeds),
        norms_out=0 if norms is None else norms.data_ptr(),
        guard=core.address(control.guard),
    )
    if skipped and control.skipped_steps is not None:
        control.skipped_steps.add_(1)
    return StepResult(
        control.total_norm if norms is None else torch.tensor(total_norm, dtype=norms.dtype, device="cpu"),
        norms,
        torch.tensor(skipped, device="cpu") if control.may_skip else None,
    )


collect, update = step_operations(lambda: "cpu", _update)


def _launch_drop_path(**operands: Any) -> None:
    _cpu.drop_path(core.drop_path(device_type="cpu", **operands))


def _launch_drop_path_backward(**operands: Any) -> None:
    _cpu.drop_path_backward(core.drop_path_backward(device_type="cpu", **operands))


drop_path, drop_path_backward = drop_path_operations(_launch_drop_path, _launch_drop_path_backward)

# Only for small tensors: see ..drop_path_small.
scale_kept: Any = getattr(_cpu, "scale_kept", None)
restore_dropped: Any = getattr(_cpu, "restore_dropped", None)
drop_path_small: Any = getattr(_cpu, "drop_path_small", None)
drop_path_small_backward: Any = getattr(_cpu, "drop_path_small_backward", None)
