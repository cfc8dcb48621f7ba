"""An average and the optimizer whose steps move it."""

import weakref
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from . import advice, ema_advice
from .ema_policy import is_dense
from .ema_start import KnowsStart
from .ema_update import check_step
from .tables import local
from .wrappers import find_average_holder

# So many weights, and elements of each, tell whether a model is where it began.
REMEMBERED = 16


class HasOptimizer(KnowsStart):
    """An average that one optimizer has at a time."""

    _step = 0
    _optimizer: "weakref.ref[Any] | None" = None
    _held_from = 0  # the count of updates at which the optimizer got it, or a state was loaded
    _last_source: tuple[Tensor, int] | None = None  # a weight as the optimizer's last step left it, and its version
    _beginning: list[Tensor] | None = None  # some elements of weights, before the optimizer's first step
    _set_back: str | None = None  # the optimizer has loaded a state since: "fresh" or "older"

    @property
    def step(self) -> int:
        """How many updates there were."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        check_step(step)
        self._step = step

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer whose steps move the average: the last one that it was given to."""
        return None if self._optimizer is None else self._optimizer()

    def attach(self, optimizer: Any) -> torch.optim.Optimizer:
        """Let the steps of an optimizer move the average, and those of no other.

        It comes beside the averages that the optimizer has; ``optimizer.ema = ema`` replaces these. And it finds the
        optimizer inside the wrappers of Accelerate, Lightning, Fabric, DeepSpeed and PyTorch, and in a Trainer.
        (Accelerate's would keep ``ema`` to itself.) If there are several optimizers, attach it to the one that steps
        last.

        Args:
            optimizer: an optimizer of trainops, or what has one.

        Returns:
            The optimizer of trainops.

        Raises:
            TypeError: there is no optimizer of trainops inside.
            ValueError: the optimizer has no parameter of the model that the average follows.
        """
        found = find_average_holder(optimizer)
        if found is None:
            raise TypeError(
                f"there is no optimizer of trainops in this {type(optimizer).__name__}: call ema.update() after its "
                "step()"
            )
        if all(x is not self for x in found.averages):
            found.ema = (*found.averages, self)
        return found  # type: ignore[no-any-return]

    def attach_to(self, optimizer: Any) -> None:
        """Be held by an optimizer: what ``optimizer.ema = ema`` calls."""
        if (holder := self.optimizer) is not optimizer:
            self.detach()
            self._optimizer = weakref.ref(optimizer)
            self._held_from = self.step
            if holder is not None:
                advice.average_taken(holder)

    def detach(self) -> None:
        """Take the average from its optimizer, which goes on without: :meth:`update` moves it again."""
        optimizer: Any = self.optimizer
        self._optimizer = self._last_source = self._set_back = None
        if optimizer is not None:
            optimizer.drop_average(self)

    def optimizer_loaded(self, *, is_fresh: bool) -> None:
        """The optimizer that has the average has loaded a state: ``is_fresh`` if it is one from before any step."""
        if self.step > self._held_from:
            self._set_back = "fresh" if is_fresh else "older"

    def _remember_step(self, sources: list[Tensor]) -> None:
        """An update is done; if by the optimizer, what it has left shows later whether others have written since."""
        if self._optimizer is not None and sources and not sources[0].is_inference():
            self._last_source = (sources[0], sources[0]._version)

    def overlook_writes(self) -> Callable[[], None]:
        """What to call when others have changed the model's weights and put them back: nobody has written then."""
        source, version = self._last_source or (None, 0)
        return partial(self._overlook, None if source is None or source._version != version else source)

    def _overlook(self, source: Tensor | None) -> None:
        """The model was written, which is no training. With a ``source``, it is as the last step has left it."""
        advice.model_written(self)
        if source is not None:
            self._remember_step([source])

    def _remember_beginning(self) -> None:
        """Before the optimizer's first step: enough of the weights to know them again."""
        if self._beginning is None and self.step == self._held_from == 0:
            self._beginning = self._elements()

    def _elements(self) -> list[Tensor]:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return []
        trained = (p.detach() for p in self.model.parameters() if p.requires_grad and is_dense(p))
        weights = [local(p).reshape(-1) for p in islice(trained, REMEMBERED)]
        return [x.narrow(0, 0, min(REMEMBERED, x.numel())).clone() for x in weights]

    def _is_at_its_beginning(self) -> bool:
        """Whether the model has the weights again that it had before the optimizer's first step."""
        pairs = list(zip(self._elements(), self._beginning or (), strict=False))
        return bool(pairs) and all(x.shape == y.shape and torch.equal(x, y.to(x)) for x, y in pairs)

    def _now_has(self, step: int | None) -> None:
        """Weights were loaded, of which somebody has counted the updates, or nobody."""
        self._continues = step is None and not self._has_moved
        if step is not None:
            self.step, self._has_moved = step, step > 0
        self._held_from, self._set_back, self._beginning = self.step, None, None
        self._remember_weights()

    def _look_back(self) -> None:
        """Begin anew if model and optimizer were set back to where they began, as learning rate finders do.

        Where they were set back to later than that, the average cannot follow: a warning says so, once.
        """
        if self._set_back is None:
            return
        set_back, self._set_back = self._set_back, None
        if self._last_source is None or (seen := self._last_source)[0]._version == seen[1]:
            return  # the model goes on with its weights
        if set_back == "fresh" and self._held_from == 0 and self._is_at_its_beginning():
            self._now_has(0)
        else:
            ema_advice.average_left_behind(self, self.step - self._held_from)

    def _check_holder(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Raise where an optimizer other than this one has the average: two updates a step are too many."""
        if self.optimizer in (None, optimizer):
            return
        if optimizer is None:
            raise RuntimeError(
                "the optimizer's step() updates this average already: leave out ema.update(), or take the average "
                "from it with ema.detach()"
            )
        raise RuntimeError("another optimizer has this average: set `optimizer.ema = ema` to take it from that one")
