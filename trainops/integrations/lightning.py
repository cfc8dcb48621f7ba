"""Lightning: ``gradient_clip_val`` inside the optimizer's step, and an average as a callback.

``trainops.AdamW(..., max_grad_norm=1.0)`` in ``configure_optimizers`` clips inside in every precision and needs
nothing from here. A module whose ``gradient_clip_val`` is to be applied inside derives from :class:`ClipInStep`.
"""

from contextlib import ExitStack
from typing import Any

from torch.optim import Optimizer

from ..ema import EMA
from ._unwrap import framework, fused

framework("lightning")
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402 (after the clear error)
from lightning.pytorch.strategies import FSDPStrategy  # noqa: E402


class ClipInStep(LightningModule):
    """A base for modules: the Trainer's ``gradient_clip_val`` is the ``max_grad_norm`` of an optimizer of trainops.

    Equivalent to::

        Trainer(gradient_clip_val=1.0)

    with one pass over the gradients less, in every precision. Clipping by value, other optimizers, and the FSDP
    strategy, where an optimizer knows the norm of its own rank alone, are left to Lightning.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's hook before each step."""
        inside = fused(optimizer)
        by_norm = gradient_clip_algorithm in (None, "norm")
        if inside is None or not by_norm or isinstance(self.trainer.strategy, FSDPStrategy):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            inside.max_grad_norm = gradient_clip_val


class EMACallback(Callback):
    """An average of the module's weights, which every optimizer step moves.

    Equivalent to::

        lightning.pytorch.callbacks.EMAWeightAveraging(decay=decay)

    but the step of an optimizer of trainops moves it in the same pass over memory. Learning rate finders do not move
    it, though they step the optimizer. The module ends the training with its own weights. With several optimizers,
    or those of others, it moves after each batch that made a step.

    Args:
        decay: how much of the average stays at each step, in [0, 1].
        evaluate: validate, test and predict with the averaged weights.
        options: of :class:`trainops.EMA`.

    Attributes:
        ema: the :class:`trainops.EMA`, from the start of a fit, or of a test with a checkpoint, on. ``ema.module`` is
            the averaged module. Checkpoints hold it, beside the module's own weights.
    """

    def __init__(self, decay: float = 0.9999, *, evaluate: bool = True, **options: Any) -> None:
        super().__init__()
        self.decay, self.evaluate, self.options = decay, evaluate, options
        self.ema: EMA | None = None
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, before there is an average
        self._swapped = ExitStack()
        self._steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module is on its device now, with the weights of a checkpoint."""
        self._make(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Where the steps are counted from."""
        self._steps = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The step that follows moves the average. Finders run without callbacks, and do not come here."""
        inside = fused(optimizer)
        if inside is not None and len(trainer.optimizers) == 1:
            inside.ema = self.ema

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average, unless the optimizer has; it keeps it no longer than for its step."""
        if self.ema is None:
            return
        if self.ema.optimizer is not None:
            self.ema.detach()
        elif trainer.global_step > self._steps:
            self.ema.update()

    def state_dict(self) -> dict[str, Any]:
        """The average, for a checkpoint."""
        return self.ema.state_dict() if self.ema is not None else self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The average of a checkpoint; kept until there is a module for it."""
        if self.ema is None:
            self._loaded = state_dict
        elif state_dict:
            self.ema.load_state_dict(state_dict)

    def _make(self, pl_module: LightningModule) -> None:
        if self.ema is None or self.ema.model is not pl_module:
            self.ema = EMA(pl_module, self.decay, **self.options)
        if self._loaded:
            self.ema.load_state_dict(self._loaded)
        self._loaded = None

    def _swap(self, pl_module: LightningModule) -> None:
        if self.ema is None and self._loaded:
            self._make(pl_module)
        if self.ema is not None and self.evaluate:
            self._swapped.enter_context(self.ema.swap())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The averaged weights."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module's own weights again, before a checkpoint is written."""
        self._swapped.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The module's own weights again, and no step that moves the average."""
        self._swapped.close()
        if self.ema is not None:
            self.ema.detach()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end
