"""The ``reference`` backend: the specification itself, on any device and dtype."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..reference import drop_path, drop_path_backward
from ..tables import as_real, check_no_overlap, local
from .interface import Backend, Collected, Group, StepControl, StepResult

__all__ = [
    "clamp_",
    "collect",
    "drop_path",
    "drop_path_backward",
    "ema_",
    "probe",
    "reduce",
    "scale_",
    "serves",
    "try_ema_",
    "update",
]


def probe() -> Backend:
    """The reference is always available."""
    return Backend(available=True, details=f"plain PyTorch {torch.__version__}")


def serves(device_type: str) -> bool:
    """Every device."""
    return True


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`."""
    resolved: list[tuple[Tensor, Tensor]] = []
    # As real numbers: a product of complex ones makes NaN of what stands beside an infinity.
    reference.scale_([_writable(x, resolved) for x in tensors], coefficient)
    for original, copy in resolved:
        original.copy_(copy)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    _check_writable(tensors)
    reference.clamp_(tensors, bound)


def ema_(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None) -> None:
    """See :func:`trainops.reference.ema_`."""
    _check_writable(averages)
    reference.ema_(averages, tensors, decay, skip)


def try_ema_(averages: Sequence[Tensor], tensors: Sequence[Tensor], decay: float, skip: Tensor | None = None) -> bool:
    """Always False: the caller then uses :func:`ema_`."""
    return False


def collect(*containers: Any) -> None:
    """Always None: the specification takes lists of tensors, not tables."""


_ORDERS = {"l1_norm": 1.0, "l2_norm": 2.0, "inf_norm": math.inf}


def reduce(statistic: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See :func:`trainops.reference.grad_norms`."""
    return reference.grad_norms(tensors, _ORDERS[statistic])


def update(
    rule: str,
    groups: Sequence[Group],
    control: StepControl,
    ema_decay: float,
    collected: Collected | None = None,
) -> StepResult:
    """See :class:`trainops.adapters.interface.Kernels`."""
    rows = [_Row(group, i) for group in groups for i in range(group.rows)]
    grads = [row.grad for row in rows]
    device = grads[0].device
    grad_scale = None if control.grad_scale is None else reference.scalar(control.grad_scale, device)
    total_norm = None if control.total_norm is None else reference.scalar(control.total_norm, device)
    norms: Tensor | None = None
    if control.measures:
        total_norm, norms = reference.sum_norms(grads)
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
    for row in rows:
        row.update(rule, coefficient, skipped, ema_decay)
    if total_norm is None or norms is None:
        return StepResult(control.total_norm, None, skipped)
    dtype = reference.norm_dtype(grads)
    return StepResult(total_norm.to(dtype), norms.to(dtype), skipped)


class _Row:
    """One parameter with all that belongs to it, as real numbers."""

    def __init__(self, group: Group, index: int) -> None:
        columns = {name: column[index] for name, column in group.columns.items()}
        self.settings = group.settings
        self.grad = as_real(columns.pop("grad"))
        self.step = columns.pop("step").reshape(())
        self._resolved: list[tuple[Tensor, Tensor]] = []
        written = {name: _writable(x, self._resolved) for name, x in columns.items()}
        self.param, self.average = written.pop("param"), written.pop("average", None)
        self.master = written.pop("master", None)
        self.state = written

    def update(self, rule: str, coefficient: Tensor | float, skipped: Tensor | None, ema_decay: float) -> None:
        device = self.param.device
        weight = self.param if self.master is None else reference.join(self.param, self.master)
        formula = getattr(reference, f"{rule}_")
        formula(
            weight,
            self.grad,
            **self.state,
            step=self.step,
            **self.settings,
            coefficient=coefficient.to(device) if isinstance(coefficient, Tensor) else coefficient,
            skip=skipped,
        )
        if self.master is not None:
            reference.write_weight(self.param, self.master, weight, skipped)
        if self.average is not None:
            reference.ema_([self.average], [weight], ema_decay, skipped)
        for original, copy in self._resolved:
            original.copy_(copy)


def _check_writable(tensors: Sequence[Tensor]) -> None:
    """Raise before anything is written where a tensor cannot be."""
    for x in tensors:
        check_no_overlap(local(x))


def _writable(x: Any, resolved: list[tuple[Tensor, Tensor]]) -> Any:
    """``x`` as real numbers; where it is lazily conjugated, a copy of it, which is to be copied back."""
    if x is None:
        return None
    _check_writable([x])
    if x.is_conj():
        resolved.append((x, x.resolve_conj()))
        x = resolved[-1][1]
    return as_real(x, written=True)
