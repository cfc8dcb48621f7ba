"""Accelerate: schedulers see the steps that an optimizer of trainops has skipped itself.

With PyTorch's arguments alone, a script needs nothing from here: ``accelerator.clip_grad_norm_``, skipped steps and
``accelerator.register_for_checkpointing(ema)`` work as with PyTorch's class. With ``max_grad_norm`` or
``skip_nonfinite`` the optimizer decides inside ``step()``, where Accelerate does not look::

    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    see_skipped_steps(accelerator)
"""

from typing import Any

from torch import Tensor

from ..ema import EMA
from ._unwrap import framework, fused

framework("accelerate")
from accelerate import Accelerator  # noqa: E402 (after the clear error)
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402


class _SeesSkippedSteps(AcceleratedOptimizer):
    """Accelerate's wrapper around an optimizer of trainops."""

    _before: Tensor | None = None  # the optimizer's count of skipped steps before its last step, and after
    _after: Tensor | None = None

    @property
    def step_was_skipped(self) -> bool:
        if super().step_was_skipped:  # the scaler left the step out
            return True
        return self._before is not None and self._after is not None and bool(self._before != self._after)

    @property
    def ema(self) -> EMA | None:
        """The average of the optimizer inside: a plain wrapper keeps what it is given to itself."""
        optimizer: Any = fused(self)
        return optimizer.ema  # type: ignore[no-any-return]

    @ema.setter
    def ema(self, ema: EMA | None) -> None:
        optimizer: Any = fused(self)
        optimizer.ema = ema

    # Hooks, since a scheduler has put the wrapper's step() into the wrapper: one of this class would not be called.
    def _watch(self) -> None:
        optimizer: Any = fused(self)
        optimizer.register_step_pre_hook(lambda *_: setattr(self, "_before", optimizer.skipped_steps.clone()))
        optimizer.register_step_post_hook(lambda *_: setattr(self, "_after", optimizer.skipped_steps.clone()))


def see_skipped_steps(accelerator: Accelerator) -> None:
    """Let ``step_was_skipped`` and prepared schedulers see the steps that ``step()`` has skipped.

    Call it after ``accelerator.prepare``. Reading ``step_was_skipped`` then waits for the device, and a prepared
    scheduler reads it at every step. Other optimizers are left alone.

    Args:
        accelerator: whose prepared optimizers are meant.
    """
    for optimizer in accelerator._optimizers:
        if type(optimizer) is AcceleratedOptimizer and fused(optimizer) is not None:
            optimizer.__class__ = _SeesSkippedSteps
            optimizer._watch()
