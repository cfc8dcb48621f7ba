"""What a step's control decides, in PyTorch's operations: for ``reference`` and ``foreach`` alike."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from .interface import StepControl, StepResult

LEAST_DEVIATION = 0.05  # as csrc/math/guard.h has it

SumNorms = Callable[[Sequence[Tensor]], tuple[Tensor, Tensor]]


class Decision(NamedTuple):
    """What gradients are multiplied with, whether the step is skipped (None: it cannot be), and what it returns."""

    coefficient: Tensor | float
    skipped: Tensor | None
    result: StepResult


def judge(guard: Tensor, norm: Tensor, skips: Tensor | None) -> Tensor:
    """Whether a step is a spike, by the numbers of a guard, which are updated (``csrc/math/guard.h``).

    ``skips``: whether others skip the step, so that it is not learned.
    """
    mean, variance, count, spikes, _, max_norm, deviations, decay, warmup, patience = guard.unbind()
    norm = norm.to(guard)
    skips = torch.zeros_like(norm, dtype=torch.bool) if skips is None else skips.to(guard.device)
    finite = norm.isfinite()
    seen = finite & (norm > 0)
    d = torch.where(seen, norm, 1.0).log() - mean
    is_far = (count >= warmup) & (d > deviations * variance.sqrt().clamp(min=LEAST_DEVIATION))
    spike = ~finite | (norm > max_norm) | (seen & is_far)
    further = spikes + 1
    forgets = seen & spike & (further >= patience)
    learns = seen & ~spike & ~skips
    rate = torch.maximum(1 - decay, 1 / (count + 1))
    learned = torch.stack([mean + rate * d, (1 - rate) * (variance + rate * d * d), count + 1, spikes * 0])
    known = torch.stack([mean, variance, count, torch.where(seen & spike, further, spikes)])
    guard[:4] = torch.where(learns, learned, torch.where(forgets, 0.0, known))
    guard[4] = spike.to(guard)
    return spike


def skips(control: StepControl, total_norm: Tensor | None) -> Tensor | None:
    """Whether a step of this norm is skipped; None where nothing can skip it. A guard learns the norm."""
    skipped = None if control.found_inf is None else control.found_inf != 0
    if control.skip_nonfinite and total_norm is not None:
        non_finite = ~torch.isfinite(total_norm)
        skipped = non_finite if skipped is None else non_finite | skipped.to(non_finite.device)
    if control.guard is not None and total_norm is not None:
        spike = judge(control.guard, total_norm, skipped)
        skipped = spike if skipped is None else spike | skipped.to(spike.device)
    return skipped


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
    skipped = skips(control, total_norm)
    if skipped is not None and control.skipped_steps is not None:
        control.skipped_steps.add_(skipped.to(control.skipped_steps.device))
    if total_norm is None or norms is None:
        return Decision(coefficient, skipped, StepResult(control.total_norm, None, skipped))
    dtype = reference.norm_dtype(grads)
    return Decision(coefficient, skipped, StepResult(total_norm.to(dtype), norms.to(dtype), skipped))
