"""The averaged module, what it holds of its model, and the updates that another thread does."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .background import Later
from .ema_policy import AveragePolicy
from .ema_schedule import DecaySchedule
from .ema_update import replace_all
from .model_pairs import Matched
from .model_slots import Slot, renew_views, slots


class HasModule(DecaySchedule):
    """An average with a module, which may still be moving."""

    model: nn.Module
    policy: AveragePolicy
    _module: nn.Module
    _pending: Later | None = None  # the last update, where another thread does it

    @property
    def module(self) -> nn.Module:
        """The averaged model. Waits for the last update, where another thread does it."""
        self.synchronize()
        return self._module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.synchronize()
        self._module = module

    @property
    def average_buffers(self) -> bool | str | Mapping[Any, str]:
        """The argument of that name."""
        return self.policy.average_buffers

    def synchronize(self) -> None:
        """Wait for the last update, where another thread does it: of an average on the CPU of a GPU's model.

        Raises:
            Exception: what the update has raised.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.finish()

    def _settle(self, matched: Matched, skip: Any = None) -> None:
        """Let the module hold what the model holds."""
        if matched.settle(self.policy.shared):
            renew_views(self._module)
        replace_all(matched.replaced, self.policy, skip)

    def _shared(self) -> dict[str, Slot]:
        """The slots of the module that hold the model's own parameters, by name."""
        own = set(map(id, self.model.parameters()))
        return {name: slot for name, (slot, x) in slots(self._module).items() if id(x) in own}
