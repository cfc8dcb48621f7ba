"""The norm of an optimizer's gradients where one call of a kernel cannot take it: on several devices or ranks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .adapters import StepControl, StepResult
from .plain import all_plain
from .ranks import ComingNorm, NormGroup, begin_norm, group_name, group_named, norms_over_ranks
from .tables import replicated


class JointNorm(NamedTuple):
    """The norm of the unscaled gradients."""

    control: StepControl  # which knows it, unrounded
    total_norm: Tensor
    norms: Tensor | None  # of each parameter that has a gradient

    def result(self, of_update: StepResult) -> StepResult:
        """The result of a step that was given the norm."""
        return StepResult(self.total_norm, self.norms, of_update.skipped)


class TakesJointNorm(torch.optim.Optimizer):
    """An optimizer with a ``norm_group``, which may be given the norm, too."""

    backend: str | None
    _norm_group: str | None

    @property
    def norm_group(self) -> Any:
        """The process group over which the norm of the gradients is taken; may be changed between steps.

        Its name while ``torch.distributed`` has not been initialized.
        """
        is_ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        return group_named(self._norm_group) if self._norm_group is not None and is_ready else self._norm_group

    @norm_group.setter
    def norm_group(self, norm_group: NormGroup) -> None:
        self._norm_group = group_name(norm_group)

    def _is_spread(self) -> bool:
        """Whether there are DTensors, or subclasses whose norm their operations take, or a group of other ranks."""
        return self._norm_group is not None or not all(all_plain(group["params"]) for group in self.param_groups)

    def _begin_joint_norm(self, control: StepControl) -> ComingNorm | None:
        """Begin to measure what lies on other ranks, too, if that can go on while rows are collected."""
        if not control.measures or self._norm_group is not None or not self._is_spread():
            return None
        return begin_norm(self.param_groups, self.backend)

    def _joint_norm(
        self, control: StepControl, grads: Mapping[int, Tensor] | None = None, coming: ComingNorm | None = None
    ) -> JointNorm:
        """Measure, on all ranks at once, also those that have no gradients.

        ``grads``: by the ``id`` of their parameter, placed as it is. Default: the parameters' own. ``coming``: what
        was begun of the same.
        """
        if coming is not None:
            total_norm, norms, dtype = coming.finish()
            total_norm, norms = _unscaled(total_norm, control), _unscaled(norms, control)
            return JointNorm(_knowing(control, total_norm), total_norm.to(dtype), norms.to(dtype))
        params = [p for group in self.param_groups for p in group["params"]]
        measured = [p.grad for p in params] if grads is None else [grads.get(id(p)) for p in params]
        total_norm, norms, dtype = norms_over_ranks(measured, params, 2.0, self._norm_group, self.backend)
        if any(x is None for x in measured):
            found = [norms.select(0, i) for i, x in enumerate(measured) if x is not None]
            norms = torch.stack(found) if found else norms[:0]
        total_norm, norms = _unscaled(total_norm, control), _unscaled(norms, control)
        return JointNorm(_knowing(control, total_norm), total_norm.to(dtype), norms.to(dtype))


def known_norm(control: StepControl, total_norm: float | Tensor, device: torch.device) -> JointNorm:
    """A norm that the caller has measured, of gradients that are still scaled."""
    given = replicated(total_norm.detach()) if isinstance(total_norm, Tensor) else torch.tensor(float(total_norm))
    norm = _unscaled(reference.scalar(given.reshape(()), device), control)
    return JointNorm(_knowing(control, norm), norm.to(given.dtype), None)


def _unscaled(norms: Tensor, control: StepControl) -> Tensor:
    """Norms of gradients without a GradScaler's scale."""
    return norms if control.grad_scale is None else norms / reference.scalar(control.grad_scale, norms.device)


def _knowing(control: StepControl, total_norm: Tensor) -> StepControl:
    """The control of a step that knows its norm.

    What a GradScaler has found in a rank's own shards, or in another optimizer's gradients, all see in the norm.
    """
    skip_nonfinite = control.skip_nonfinite or control.found_inf is not None
    return replace(control, total_norm=total_norm, skip_nonfinite=skip_nonfinite)
