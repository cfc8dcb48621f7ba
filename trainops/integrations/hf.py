"""HF Trainer: clipping inside the optimizer's step, its norm in the logs, and an average.

::

    from trainops.integrations.hf import EMACallback, Trainer

    trainer = Trainer(model, args, train_dataset=data, callbacks=[EMACallback(0.999)])  # args as before
"""

import os
import warnings
from typing import Any

import torch
from torch import nn

from ..adamw import AdamW
from ..ema import EMA
from ..optimizer import FusedOptimizer
from ._unwrap import framework, fused

framework("transformers")
import transformers  # noqa: E402 (after the clear error)
from accelerate.utils import DistributedType  # noqa: E402

from .accelerate import see_skipped_steps  # noqa: E402

EMA_FILE = "ema.pt"


class TrainerMixin(transformers.Trainer):
    """Stands before a Trainer among the bases of a class: ``class Mine(TrainerMixin, Seq2SeqTrainer)``.

    Where the arguments ask for PyTorch's AdamW, it is :class:`trainops.AdamW`. An optimizer of trainops clips to
    ``args.max_grad_norm`` inside its step, and its ``grad_norm`` is what is logged: nobody else reads the gradients.
    Skipped steps hold back the schedule. Evaluation uses the average of an :class:`EMACallback`.

    Other optimizers, DeepSpeed, FSDP1 and models whose gradients lie on several device meshes are clipped as ever.
    """

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        """As in Trainer, with trainops' AdamW in the place of PyTorch's."""
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        return (AdamW if kind is torch.optim.AdamW else kind), options

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        for callback in self._averages():
            callback.trainer_evaluates = True
        prepared = super()._prepare_for_training(*args, **kwargs)
        see_skipped_steps(self.accelerator)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        for callback in self._averages():
            callback.resume_from = callback.resume_from or checkpoint

    def _clipping(self, model: nn.Module) -> FusedOptimizer | None:
        """The optimizer, if it clips inside its step."""
        kind = self.accelerator.distributed_type
        fsdp1 = kind == DistributedType.FSDP and not self.accelerator.is_fsdp2
        if kind == DistributedType.DEEPSPEED or fsdp1 or self._has_mixed_mesh_grads(model):
            return None
        return fused(self.optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self._clipping(model) is not None else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        optimizer = self._clipping(model)
        if optimizer is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        # Trainer logs the norm without clipping, too.
        optimizer.max_grad_norm = self.args.max_grad_norm or float("inf")
        return None  # the step measures it

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        optimizer = fused(self.optimizer)
        if grad_norm is None and optimizer is not None:
            grad_norm = optimizer.grad_norm
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, with the averaged weights."""
        for callback in self._averages():
            if callback.evaluate and callback.ema is not None:
                with callback.ema.swap():
                    return super().evaluation_loop(*args, **kwargs)
        return super().evaluation_loop(*args, **kwargs)

    def _averages(self) -> "list[EMACallback]":
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EMACallback)]


class Trainer(TrainerMixin):
    """:class:`transformers.Trainer` with :class:`TrainerMixin`."""


class EMACallback(transformers.TrainerCallback):
    """An average of the model's weights: updated at every step, saved and resumed with checkpoints, exported.

    With an optimizer of trainops, the step moves it in the same pass over memory.

    Args:
        decay: how much of the average stays at each step, in [0, 1].
        evaluate: evaluate and predict with the averaged weights. It takes a Trainer with :class:`TrainerMixin`.
        resume_from: the checkpoint from which training resumes. With :class:`TrainerMixin` it is known; else it is
            looked for in ``args.output_dir``.
        options: of :class:`trainops.EMA`.

    Attributes:
        ema: the :class:`trainops.EMA`, from the start of training on. ``ema.module`` is the averaged model.
    """

    def __init__(
        self, decay: float = 0.9999, *, evaluate: bool = True, resume_from: str | None = None, **options: Any
    ) -> None:
        self.decay, self.evaluate, self.resume_from, self.options = decay, evaluate, resume_from, options
        self.ema: EMA | None = None
        self.trainer_evaluates = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the average, and load it where training is resumed."""
        model = kwargs["model"]
        if self.ema is None or self.ema.model is not model:
            self.ema = EMA(model, self.decay, **self.options)
        if self.evaluate and not self.trainer_evaluates:
            warnings.warn(
                "transformers.Trainer evaluates the model's own weights: use trainops.integrations.hf.Trainer, or "
                "pass evaluate=False",
                stacklevel=2,
            )
        if state.global_step > 0:
            self._load(self.resume_from or _checkpoint(args, state))
        self.resume_from = None
        if (optimizer := fused(kwargs["optimizer"])) is not None:
            optimizer.ema = self.ema

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the average, where the step of another optimizer has not."""
        optimizer = kwargs["optimizer"]
        if self.ema is not None and fused(optimizer) is None and not getattr(optimizer, "step_was_skipped", False):
            self.ema.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the average beside the model's own weights."""
        if self.ema is not None and args.should_save:
            torch.save(self.ema.state_dict(), os.path.join(_checkpoint(args, state), EMA_FILE))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The average of the best checkpoint, where its weights are loaded."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(state.best_model_checkpoint)

    def export(self, directory: str) -> None:
        """Save the averaged model for ``from_pretrained(directory)``, in the dtype of the average.

        Raises:
            RuntimeError: there has been no training.
        """
        if self.ema is None:
            raise RuntimeError("there is no average before training")
        module: Any = self.ema.module
        module.save_pretrained(directory)

    def _load(self, checkpoint: str) -> None:
        path = os.path.join(checkpoint, EMA_FILE)
        if self.ema is None or not os.path.exists(path):
            warnings.warn(f"there is no {path}: the average begins anew, with the weights as they are", stacklevel=3)
            return
        self.ema.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def _checkpoint(args: Any, state: Any) -> str:
    """Where Trainer saves at this step."""
    return os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
