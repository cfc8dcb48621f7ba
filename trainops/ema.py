"""Exponential moving average of a model's weights."""

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports no compiler until it is called

from . import advice
from .adapters import check, select
from .background import Later
from .ema_policy import AveragePolicy, Patterns
from .ema_schedule import DecaySchedule
from .ema_update import check_type, replace_all, update_pairs
from .model_match import match
from .model_pairs import Matched, Pair
from .model_slots import Slot, averaged_module, lifted, load_weights, slots, write_into


class Update(NamedTuple):
    """An update of an average that is about to happen."""

    matched: Matched
    decay: float | None  # None: the average does not move

    @property
    def fusable(self) -> dict[int, Tensor]:
        """The averages that an optimizer's kernel can update, by ``id`` of the model's parameter."""
        return {} if self.decay is None else self.matched.fusable


class EMA(DecaySchedule):
    """A copy of ``model`` whose weights follow those of ``model`` slowly.

    Equivalent to::

        ema = timm.utils.ModelEmaV3(model, decay, ...)      # ema.update(model, step) after every step
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )

    Call :meth:`update` after every optimizer step, or give the object to ``trainops.AdamW(..., ema=ema)`` and the
    step updates the average in the same pass over memory. One optimizer has an average at a time: giving it to a
    second one takes it from the first. An average that is swapped in, copied or saved after its model was trained
    without it gives a warning, once. The decay is that of timm's ``ModelEmaV3`` with a ``step``: the first update
    copies (see :meth:`decay_at`). Without a ``step``, timm's class has the full decay from its first update on.

    Args:
        model: the model to follow. It is kept and read at every update.
        decay: how much of the average stays at each update, in [0, 1].
        warmup: let the decay grow as ``1 - (1 + n / warmup_gamma) ** -warmup_power`` up to ``decay``.
        warmup_gamma: time scale of the warm-up, in updates.
        warmup_power: exponent of the warm-up.
        min_decay: lower limit of the decay during warm-up, in [0, 1].
        update_after_step: the average is a plain copy up to and including update ``update_after_step + 1``.
        update_every: move the average only at every ``update_every``-th update. The others are counted, too.
        dtype: dtype of the average's floating-point weights; default: the model's. Use ``torch.float32`` for a
            16-bit model: there, ``(1 - decay) * (weight - average)`` is mostly below the last place and is lost.
            Given to an optimizer with a ``master``, it follows the weights in full; :meth:`update` alone sees the 16
            bits that the model has.
            ``module`` then takes inputs of that dtype, while :meth:`swap` keeps the model's.
        device: where the average lives; default: where the model does. For an average of a GPU's model on the CPU,
            each update waits for the GPU once.
        average_buffers: average floating-point buffers as well; otherwise they are copied. Other buffers are
            always copied.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Attributes:
        module: the averaged model, in eval mode, without gradients. Call this one: an ``EMA`` is no module.
        step: number of updates so far: calls of :meth:`update`, and steps of the optimizer that has the average.
            Skipped steps count, and so do updates that ``update_every`` leaves out.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        *,
        warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        update_every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        average_buffers: bool | str | Mapping[str, str] = True,
        trainable_only: bool = False,
        include: Patterns | None = None,
        exclude: Patterns | None = None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        super().__init__(
            decay,
            warmup=warmup,
            warmup_gamma=warmup_gamma,
            warmup_power=warmup_power,
            min_decay=min_decay,
            update_after_step=update_after_step,
            update_every=update_every,
        )
        check_type("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        check(backend)
        self.policy = AveragePolicy(
            model,
            dtype=dtype,
            device=device,
            average_buffers=average_buffers,
            trainable_only=trainable_only,
            include=include,
            exclude=exclude,
        )
        self.model = model
        self._pending: Later | None = None  # an update that another thread does
        self._module = averaged_module(model, self.policy)
        self.backend = backend
        self.step = 0
        self._own_weights: list[tuple[Tensor, Tensor]] | None = None  # the model's, while it has the averaged ones
        self._matched: Matched | None = None
        self._optimizer: weakref.ref[Any] | None = None
        advice.average_made(self)

    @_disable_dynamo  # compiled code calls it, by one graph break, and holds none of its numbers
    @torch.no_grad()
    def update(self, *args: NoReturn, **kwargs: NoReturn) -> None:
        """Move the average towards the model that the constructor was given. Takes no arguments.

        Raises:
            TypeError: there is an argument, such as the model or the step that timm's and torch's classes take.
            ValueError: the model's weights no longer match the average's. Nothing has been changed.
            RuntimeError: called inside :meth:`swap`, or an optimizer has the average: its steps update it.
        """
        if args or kwargs:
            raise TypeError("update() takes no arguments: the model was given to EMA(model), which counts the steps")
        update = self.plan_update()
        try:
            self.finish_update(update)
        except RuntimeError:
            self.check_model()
            raise

    def plan_update(self, optimizer: torch.optim.Optimizer | None = None) -> "Update":
        """Plan the next update, within the step of an ``optimizer`` or alone. Changes nothing.

        Raises:
            ValueError: the model's weights no longer match the average's.
            RuntimeError: called inside :meth:`swap`, or another optimizer has the average.
        """
        self._check_not_swapped("update()")
        self._check_holder(optimizer)
        matched, step = self._match(), self.step + 1
        decay = self.decay_at(step) if step % self.update_every == 0 else None
        if decay is not None:
            self._check_can_move(matched)
        return Update(matched, decay)

    def finish_update(self, update: "Update", done: Collection[int] = (), skip: Tensor | None = None) -> None:
        """Count the update; move what is not ``done`` (by ``id`` of the model's tensor), unless ``skip`` is true."""
        pairs, decay = update.matched.pairs, update.decay
        if decay is not None:
            self.synchronize()
            update.matched.settle(self.policy.shared)
            replace_all(update.matched.replaced, self.policy, skip)
            if len(done) < len(pairs):
                matched = update.matched.without(done) if done else update.matched
                self._pending = update_pairs(matched, self._weights(matched.sources), decay, skip, self.backend)
        self.step += 1

    @property
    def module(self) -> nn.Module:
        """The averaged model. Waits until the last update is done."""
        self.synchronize()
        return self._module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self.synchronize()
        self._module = module

    def synchronize(self) -> None:
        """Wait for the last update, where another thread does it: of an average on the host of a model on a GPU.

        Raises:
            Exception: what the update raised.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.finish()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer whose steps move the average: the last one that it was given to."""
        return None if self._optimizer is None else self._optimizer()

    def attach_to(self, optimizer: Any) -> None:
        """Let the steps of an optimizer move the average, and those of no other: ``optimizer.ema = ema``."""
        if (holder := self.optimizer) is not optimizer:
            self.detach()
            self._optimizer = weakref.ref(optimizer)
            if holder is not None:
                advice.average_taken(holder)

    def detach(self) -> None:
        """Take the average from its optimizer, which goes on without: :meth:`update` moves it again."""
        optimizer: Any = self.optimizer
        self._optimizer = None
        if optimizer is not None and optimizer.ema is self:
            optimizer.ema = None

    def check_model(self) -> Matched:
        """Look at every tensor of the model anew; ValueError naming the first that its average does not match."""
        self._matched = match(self._module, self.model, self.policy)
        return self._matched

    def check_rest(self, done: Collection[int]) -> None:
        """Before an optimizer's step: ValueError where an average that the kernel does not move does not fit."""
        if self._matched is not None and not self._matched.fits_without(done):
            self.check_model()

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the ``with`` block, the model has the averaged weights; afterwards its own again, bit for bit.

        The model's tensors stay where they are; their values are exchanged, and what is written into them within the
        block is lost. Needs memory for one more copy of the model meanwhile. A copy of the model that is made within
        the block has the averaged weights; a copy or pickle of the ``EMA`` has the model's own, and is not swapped.

        Raises:
            RuntimeError: already swapped.
        """
        self._check_not_swapped("swap()")
        advice.average_used(self)
        pairs = self.check_model().pairs
        saved = [pair.source.detach().clone() for pair in pairs]
        self._own_weights = [(pair.source, weight) for pair, weight in zip(pairs, saved, strict=True)]
        try:
            with torch.no_grad():
                for pair in pairs:
                    write_into(pair.source, pair.average)
            yield
        finally:
            self._own_weights = None
            self._give_back(pairs, saved)
            advice.model_written(self)

    @torch.no_grad()
    def _give_back(self, before: list[Pair], own: list[Tensor]) -> None:
        """Copy the model's own weights into the tensors that it has now. Raises after that if some do not fit."""
        changed: ValueError | None = None
        try:
            pairs = self.check_model().pairs
        except ValueError as error:
            pairs, changed = before, error
        for pair, weight in zip(pairs, own, strict=True):
            if pair.source.shape == weight.shape:
                write_into(pair.source, weight)
        if changed is not None:
            raise changed

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averaged weights and buffers into ``model``.

        Raises:
            ValueError: ``model`` has other weights than the average. Nothing has been changed.
        """
        matched = match(self.module, model, self.policy, follows=model is self.model)
        advice.average_used(self)
        for pair in matched.pairs:
            if pair.source is not pair.average:  # which is shared with both models
                write_into(pair.source, pair.average)
        for replaced in matched.replaced:
            for slot in replaced.slots_of_model if replaced.average is not None else ():
                slot.container[slot.key] = replaced.average.detach().clone()
        if model is self.model:
            advice.model_written(self)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and ``step``. The settings are constructor arguments and not saved."""
        advice.average_used(self)
        module = self.module
        with lifted(self._shared().values()):
            return {"module": module.state_dict(), "step": self.step}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` returned.

        Raises:
            ValueError: keys are missing or unexpected, or a shape differs. Nothing has been changed.
        """
        if missing := {"module", "step"} - state_dict.keys():
            keys = " and ".join(map(repr, sorted(missing)))
            what = f"keys {keys} are" if len(missing) > 1 else f"key {keys} is"
            raise ValueError(f"this is not a state_dict of trainops.EMA: {what} missing")
        if not isinstance(state_dict["step"], int):
            raise ValueError(f"step must be a number of updates, got {state_dict['step']!r}")  # noqa: TRY004
        load_weights(self.module, state_dict["module"], self._shared())
        self.step = state_dict["step"]
        advice.average_loaded(self)

    def __repr__(self) -> str:
        names = ("decay", "warmup", "update_after_step", "update_every", "step")
        settings = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"{type(self).__name__}({type(self.model).__name__}{settings})"

    def __getstate__(self) -> dict[str, Any]:
        # A copy starts unmatched and without an optimizer.
        self.synchronize()
        return {**self.__dict__, "_matched": None, "_optimizer": None}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy made within swap() starts with the model's own weights.
        self.__dict__.update(state, _own_weights=None)
        for copied, weight in state.get("_own_weights") or ():
            copied.copy_(weight)

    def __copy__(self) -> "EMA":
        # It shares the model, whose weights are to stay what they are.
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__getstate__(), _own_weights=None)
        return twin

    def _weights(self, sources: list[Tensor]) -> list[Tensor]:
        """Weights of the model as the optimizer knows them that has the average: in full, if there are masters."""
        optimizer: Any = self.optimizer
        return sources if optimizer is None or optimizer.master is None else [*map(optimizer.float32_weight, sources)]

    def _match(self) -> Matched:
        """Pair every tensor of the model with its average, again if one was replaced: frameworks do that at will."""
        if self._matched is None or not self._matched.is_current():
            return self.check_model()
        return self._matched

    def _shared(self) -> dict[str, Slot]:
        """The places of the averaged module where the model's own parameters are, by name."""
        own = set(map(id, self.model.parameters()))
        return {name: slot for name, (slot, x) in slots(self._module).items() if id(x) in own}

    def _check_can_move(self, matched: Matched) -> None:
        """Raise where the update could not be done."""
        for device in matched.devices:
            select(self.backend, device)
        if matched.waits and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph cannot hold the update of an average on the host: see EMA(device=)")

    def _check_not_swapped(self, what: str) -> None:
        if self._own_weights is not None:
            raise RuntimeError(f"{what} inside `with ema.swap()`: the model holds the averaged weights")

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
