"""What of an average is saved, loaded, copied and pickled."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from . import advice
from .ema_checkpoints import gathered, read, written
from .ema_swap import LendsWeights
from .ema_update import check_step
from .model_slots import lifted, load_weights

if TYPE_CHECKING:
    from typing_extensions import Self


class KeepsState(LendsWeights):
    """An average that outlives the process, in a form of its own or of another library."""

    seed: int | None = None  # of stochastic rounding

    def state_dict(self, *, form: str | None = None) -> dict[str, Any]:
        """The averaged weights and ``step``. The settings are constructor arguments and not saved, but for ``seed``.

        Parameters that are shared with the model are left out, unless ``form`` asks for the state of another class.

        Args:
            form: ``"torch"``, ``"timm"`` or ``"diffusers"``: a state that ``AveragedModel``, ``ModelEmaV3`` or
                ``EMAModel`` loads. (timm's ``--resume`` reads ``ema.module.state_dict()`` as ``"state_dict_ema"``.)

        Raises:
            ValueError: ``form`` is none of these.
        """
        advice.average_used(self)
        self._be_the_model()
        module = self.module
        with lifted(self._shared().values() if form is None else ()):
            return written(module.state_dict(), module, self.step, self.seed, form)

    def full_state_dict(self) -> dict[str, Any]:
        """The averaged weights whole, in the host's memory of rank 0, for a model that is not sharded.

        Equivalent to::

            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            get_model_state_dict(averaged_model, options=options)

        of ``torch.distributed.checkpoint.state_dict``. It gathers one tensor after the other, so that all ranks have
        to call it. Parameters that are shared with the model are there, too.

        Returns:
            Copies by name, without what ``torch.compile``, DDP and checkpointing put into names. On ranks other than
            0, nothing.
        """
        advice.average_used(self)
        self._be_the_model()
        return gathered(self.module)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any], *, step: int | None = None) -> None:
        """Take over a state that :meth:`state_dict` returned, or one of another class.

        These are torch's ``AveragedModel``, timm's ``ModelEmaV3``, diffusers' ``EMAModel`` and ema-pytorch's ``EMA``,
        of which the settings are ignored, or a model's own ``state_dict``. What DDP (``module.``) and
        ``torch.compile`` (``_orig_mod.``) put into the keys makes no difference. The module's own hooks load the
        weights, extra state and older keys as in the model; parameters that are shared with the model are not
        written. A copy of the module without memory loads them first, to see that all fits. An average of shards
        takes its own of whole tensors.

        Args:
            state_dict: the state.
            step: how many updates there were, for a state that does not say it (timm's, a model's).

        Raises:
            TypeError: it is no dictionary.
            ValueError: keys are missing or unexpected, a shape differs, or ``step`` is missing and the decay depends
                on it. Nothing has been changed.
        """
        self._follow_shards()
        loaded = read(state_dict, self.module)
        if step is not None:
            check_step(step)
        step = loaded.step if step is None else step
        if step is None and self.step == 0 and self.depends_on_step:
            raise ValueError(
                "this state does not say how many updates there were: load_state_dict(state_dict, step=n)"
            )
        load_weights(self.module, loaded.weights, self._shared())
        if self.seed is not None and loaded.seed is not None:
            self.seed = loaded.seed
        self._now_has(step)
        advice.average_loaded(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts unmatched and without an optimizer.
        self.synchronize()
        state = {**self.__dict__, "_continues": self._was_written(), "_seen": None, "_last_source": None}
        return {
            **state,
            "_matched": None,
            "_matched_models": None,
            "_optimizer": None,
            "_set_back": None,
            "_beginning": None,
        }

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy made within swap() starts with the model's own weights.
        self.__dict__.update({"_has_moved": state["_step"] > 0, **state}, _own_weights=None)
        for copied, weight in state.get("_own_weights") or ():
            copied.copy_(weight)
        with suppress(AttributeError):  # a model that holds its average is not complete yet
            self._remember_weights()

    def __copy__(self) -> "Self":
        # It shares the model, whose weights are to stay what they are.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__getstate__(), _own_weights=None)
        twin._remember_weights()
        return twin
