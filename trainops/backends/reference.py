"""The ``reference`` backend: the specification itself, on any device and dtype."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import clamp_, drop_path, drop_path_backward, ema_, grad_norms, scale_
from ..tensor_table import as_real
from ._interface import AdamWGroup, Backend, Collected, StepControl, StepResult

__all__ = [
    "adamw_step",
    "clamp_",
    "collect",
    "drop_path",
    "drop_path_backward",
    "ema_",
    "grad_norms",
    "probe",
    "scale_",
    "serves",
    "try_ema_",
]


def probe() -> Backend:
    """It is always there."""
    return Backend(available=True, details=f"plain PyTorch {torch.__version__}")


def serves(device_type: str) -> bool:
    """Every device."""
    return True


def try_ema_(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None) -> bool:
    """There is no quick way to tell."""
    return False


def collect(param_groups: list[dict[str, Any]], state: dict[Tensor, Any], averages: dict[int, Tensor]) -> None:
    """The specification takes lists of tensors."""


def adamw_step(
    groups: Sequence[AdamWGroup], control: StepControl, ema_decay: float, collected: Collected | None = None
) -> StepResult:
    """See :class:`trainops.backends._interface.Kernels`."""
    total_norm, norms = control.total_norm, None
    if control.measures:
        total_norm, norms = grad_norms([as_real(g) for group in groups for g in group.grads])
        if control.grad_scale is not None:
            total_norm, norms = total_norm / control.grad_scale, norms / control.grad_scale
    coefficient: Tensor | float = 1.0
    if control.max_norm is not None and total_norm is not None:
        coefficient = reference.clip_coefficient(total_norm, control.max_norm)
    if control.grad_scale is not None:
        coefficient = coefficient / control.grad_scale
    skipped = None if control.found_inf is None else control.found_inf != 0
    if control.skip_nonfinite and total_norm is not None:
        non_finite = ~torch.isfinite(total_norm)
        skipped = non_finite if skipped is None else non_finite | skipped.to(non_finite.device)
    if skipped is not None and control.skipped_steps is not None:
        control.skipped_steps.add_(skipped.to(control.skipped_steps.device))
    for group in groups:
        _update_group(group, coefficient, skipped, ema_decay)
    return StepResult(total_norm, norms, skipped)


def _update_group(group: AdamWGroup, coefficient: Tensor | float, skipped: Tensor | None, ema_decay: float) -> None:
    for row, param in enumerate(group.params):
        max_exp_avg_sq, average = group.max_exp_avg_sqs[row], group.averages[row]
        reference.adamw_(
            as_real(param, written=True),
            as_real(group.grads[row]),
            as_real(group.exp_avgs[row]),
            as_real(group.exp_avg_sqs[row]),
            None if max_exp_avg_sq is None else as_real(max_exp_avg_sq),
            group.steps[row],
            lr=group.lr,
            beta1=group.beta1,
            beta2=group.beta2,
            eps=group.eps,
            weight_decay=group.weight_decay,
            maximize=group.maximize,
            coefficient=coefficient.to(param.device) if isinstance(coefficient, Tensor) else coefficient,
            skip=skipped,
        )
        if average is not None:
            ema_([as_real(average, written=True)], [as_real(param)], ema_decay, skipped)
