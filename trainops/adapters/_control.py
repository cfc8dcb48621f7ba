"""What a step's control decides, in PyTorch's operations: for ``reference`` and ``foreach`` alike."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .interface import StepControl, StepResult

SumNorms = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


class Decision(NamedTuple):
    """What gradients are multiplied with, whether the step is skipped (None: it cannot be), and what it returns."""

    coefficient: Tensor | float
    skipped: Tensor | None
    result: StepResult


def decide(grads: Sequence[Tensor], control: StepControl, sum_norms: SumNorms) -> Decision:
    """Measure, clip, and decide whether to skip. Counts a step that is skipped. Waits for no device.

    ``sum_norms`` measures: see :func:`trainops.reference.sum_norms`.
    """
    device = grads[0].device
    grad_scale = None if control.grad_scale is None else reference.scalar(control.grad_scale, device)
    total_norm = None if control.total_norm is None else reference.scalar(control.total_norm, device)
    norms: Tensor | None = None
    if control.measures:
        total_norm, norms = sum_norms(grads)
        if grad_scale is not None:
            total_norm, norms = total_norm / grad_scale, norms / grad_scale
    coefficient: Tensor | float = 1.0
    if control.max_norm is not None and total_norm is not None:
        coefficient = reference.clip_coefficient(total_norm, control.max_norm)
    if grad_scale is not None:
        coefficient = coefficient / grad_scale
    skipped = None if control.found_inf is None else control.found_inf != 0
    if control.skip_nonfinite and total_norm is not None:
        non_finite = ~torch.isfinite(total_norm)
        skipped = non_finite if skipped is None else non_finite | skipped.to(non_finite.device)
    if skipped is not None and control.skipped_steps is not None:
        control.skipped_steps.add_(skipped.to(control.skipped_steps.device))
    if total_norm is None or norms is None:
        return Decision(coefficient, skipped, StepResult(control.total_norm, None, skipped))
    dtype = reference.norm_dtype(grads)
    return Decision(coefficient, skipped, StepResult(total_norm.to(dtype), norms.to(dtype), skipped))
