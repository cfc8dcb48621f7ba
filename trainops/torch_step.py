"""PyTorch's own step, for whom that is the right one, and what compilers see of a step."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo

from .amp import UnscalesInStep
from .plain import all_in_memory
from .storage import StateDtype


class KnowsTorchStep(UnscalesInStep):
    """An optimizer that can take the step of the class of PyTorch behind it."""

    state_dtype: StateDtype
    master: str | None
    stochastic_rounding: bool
    takes_sparse: ClassVar[bool] = False  # whether PyTorch's step does

    def _torch_step(self, closure: Callable[[], float] | None = None) -> float | None:
        """PyTorch's own step, without the wrapper that runs the step hooks: they run around ours already."""
        step: Any = super().step
        wrapped = step.__func__.__wrapped__ if getattr(step, "hooked", False) else step.__func__
        loss: float | None = wrapped(self, closure)
        return loss

    def _is_left_to_torch(self) -> bool:
        """Whether there are tensor subclasses, which are to meet the operations that PyTorch's class has for them.

        Where a setting asks for more than PyTorch's class can do, they meet those of ``trainops.reference``.
        """
        if self._measures or self.state_dtype is not None or self.master is not None or self.stochastic_rounding:
            return False
        if getattr(self, "grad_scale", None) is not None:
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.takes_sparse and any(p.grad.layout is not torch.strided for p in params):
            return True
        return not all_in_memory(x for p in params for x in (p, p.grad))

    def _patch_step_function(self) -> None:
        """PyTorch wraps the step of a class in its hooks. Compiled code is to call all that, by one graph break.

        Traced, a step would be compiled anew for every learning rate, and at every call of a kernel.
        """
        super()._patch_step_function()
        cls: Any = type(self)
        if not hasattr(cls.step, "runs_eagerly"):
            cls.step = _disable_dynamo(cls.step)
            cls.step.runs_eagerly = True
