"""Takes a GradScaler's loss scale out of the gradients: in the scaler, or in the optimizer's ``step()``.

A GradScaler asks the optimizer for ``_step_supports_amp_scaling``. Where that is false, the scaler divides the
gradients and leaves out steps with infinities, as with PyTorch's default AdamW. Where it is true, the scaler hands
its scale over in the attributes ``grad_scale`` and ``found_inf``, and ``step()`` does both, as with PyTorch's fused
AdamW.
"""

from typing import Any

import torch
from torch import Tensor

from .spike_guard import SpikeGuard


class UnscalesInStep(torch.optim.Optimizer):
    """An optimizer whose settings say whether ``step()`` unscales.

    With PyTorch's arguments alone, it does what PyTorch's class does with these.
    """

    max_grad_norm: float | Tensor | None
    skip_nonfinite: bool
    _spike_guard: SpikeGuard | None
    _unscaling_by_hand: bool | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``step()`` unscales: with ``fused`` or a setting that measures the norm."""
        if self._unscaling_by_hand is not None:
            return self._unscaling_by_hand
        return not self.defaults["differentiable"] and (bool(self.defaults["fused"]) or self._measures)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._unscaling_by_hand = value

    @property
    def _measures(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite or self._spike_guard is not None

    def _unscale_as_fused(self) -> None:
        """After a step that unscaled: leave unscaled gradients behind where PyTorch's fused step would."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is not None and self.defaults["fused"] and not self._measures:
            unscale_(self.param_groups, scale, getattr(self, "found_inf", None))


def unscale_(param_groups: list[dict[str, Any]], scale: Tensor, found_inf: Tensor | None) -> None:
    """Divide all gradients by the scale, unless an infinity was found. Does not wait for the device."""
    grads = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
    for device in dict.fromkeys(grad.device for grad in grads):
        divisor = scale.to(device, torch.float32).reshape(())
        if isinstance(found_inf, Tensor):  # a number where there are no gradients
            divisor = torch.where(found_inf.to(device).reshape(()) != 0, 1.0, divisor)
        torch._foreach_div_([grad for grad in grads if grad.device == device], divisor)
