"""Exponential moving average of a model's weights."""

import copy
import gc
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .adapters import check, select
from .model_pairs import Matched, check_pair, kind, match
from .reference import write
from .tables import all_plain, as_real


@torch.no_grad()
def ema_update_(
    ema_tensors: Iterable[Tensor], tensors: Iterable[Tensor], decay: float, *, backend: str | None = None
) -> None:
    """Move every tensor of ``ema_tensors`` towards its counterpart, in place.

    Equivalent to::

        torch._foreach_lerp_(ema_tensors, tensors, 1 - decay)

    but the two lists may differ in dtype (a float32 average of bfloat16 weights), and the arithmetic is in the
    average's precision, float32 at least.

    Args:
        ema_tensors: the averages.
        tensors: what is averaged, of the same shapes and on the same devices.
        decay: how much of the average stays, in [0, 1].
        backend: see :func:`trainops.backends`; by default it follows the device.

    Raises:
        TypeError: ``decay`` is no number.
        ValueError: ``decay`` is out of range, or two tensors differ in shape or device, or are not floating-point.
            Nothing has been changed.
    """
    check(backend)
    _check_unit_interval("decay", decay)
    averages, tensors = list(ema_tensors), list(tensors)
    if len(averages) != len(tensors):
        raise ValueError(f"{len(averages)} averages for {len(tensors)} tensors")
    for i, (average, tensor) in enumerate(zip(averages, tensors, strict=True)):
        check_pair(f"tensor {i}", average, tensor)
        if kind(average) == "other":
            raise ValueError(f"tensor {i} is {tensor.dtype}; averages are of floating-point numbers")
        if average.device != tensor.device:
            raise ValueError(f"tensor {i} is on {tensor.device}, but its average on {average.device}")
    update_averages(averages, tensors, decay, None, backend)


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Sequence[Tensor], Sequence[Tensor], Any], None]:
    """The averaging function for :class:`torch.optim.swa_utils.AveragedModel`.

    Equivalent to::

        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)

    Args:
        decay: how much of the average stays at each update, in [0, 1].

    Raises:
        TypeError: ``decay`` is no number.
        ValueError: ``decay`` is out of range.
    """
    _check_unit_interval("decay", decay)

    @torch.no_grad()
    def ema_update(ema_params: Sequence[Tensor], params: Sequence[Tensor], _: Any) -> None:
        if ema_params and kind(ema_params[0]) != "other":
            ema_update_(ema_params, params, decay)
        else:
            for average, param in zip(ema_params, params, strict=True):
                average.copy_(average * decay + param * (1 - decay))

    return ema_update


class EMA:
    """A copy of ``model`` whose weights follow those of ``model`` slowly.

    Equivalent to::

        ema = timm.utils.ModelEmaV3(model, decay, ...)      # ema.update(model, step) after every step
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )

    Call :meth:`update` after every optimizer step, or give the object to ``trainops.AdamW(..., ema=ema)`` and the
    step updates the average in the same pass over memory. The decay follows timm's ``ModelEmaV3`` and begins with
    a copy: see :meth:`decay_at`.

    Args:
        model: the model to follow. It is kept and read at every update.
        decay: how much of the average stays at each update, in [0, 1].
        warmup: let the decay grow as ``1 - (1 + n / warmup_gamma) ** -warmup_power`` up to ``decay``.
        warmup_gamma: number of updates after which the warm-up begins to bite.
        warmup_power: exponent of the warm-up.
        min_decay: lower limit of the decay during warm-up, in [0, 1].
        update_after_step: number of updates during which the average is a plain copy.
        update_every: move the average at every so many calls of :meth:`update`.
        dtype: dtype of the average's floating-point weights; default: the model's. Use ``torch.float32`` for a
            16-bit model: there, ``(1 - decay) * (weight - average)`` is mostly below the last place and is lost.
        device: where the average lives; default: where the model does.
        average_buffers: average floating-point buffers as well; otherwise they are copied. Other buffers are
            always copied.
        backend: see :func:`trainops.backends`; by default it follows the device.

    Attributes:
        module: the averaged model, in eval mode, without gradients.
        step: number of calls of :meth:`update` so far.

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
        average_buffers: bool = True,
        backend: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _check_unit_interval("decay", decay)
        _check_unit_interval("min_decay", min_decay)
        _check_type("warmup", warmup, bool, "True or False")
        _check_type("warmup_gamma", warmup_gamma, Real, "a number")
        _check_type("warmup_power", warmup_power, Real, "a number")
        _check_type("update_after_step", update_after_step, Integral, "an integer")
        _check_type("update_every", update_every, Integral, "an integer")
        _check_type("dtype", dtype, (torch.dtype, type(None)), "a torch.dtype")
        if not warmup_gamma > 0.0:
            raise ValueError(f"warmup_gamma must be positive, got {warmup_gamma}")
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, got {update_every}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, got {dtype}")
        check(backend)
        self.model = model
        self.module = _cast(copy.deepcopy(model).eval().requires_grad_(False), device, dtype)
        self.decay = decay
        self.warmup = warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.update_every = update_every
        self.average_buffers = average_buffers
        self.backend = backend
        self.step = 0
        self._swapped = False
        self._matched: Matched | None = None
        self._updaters: list[weakref.ref[Any]] = []  # optimizers that have updated the average, the last one last
        self._updates = 0  # of the last one, in a row

    def decay_at(self, step: int) -> float:
        """The decay at call number ``step`` of :meth:`update`, from 1: timm's ``ModelEmaV3.get_decay(step)``.

        0 (a plain copy) up to and including call ``update_after_step + 1``; then ``decay``, approached from below
        with ``warmup``.
        """
        step = max(0, step - self.update_after_step - 1)
        if step == 0:
            return 0.0
        if not self.warmup:
            return self.decay
        warm: float = 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(warm, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, *args: NoReturn, **kwargs: NoReturn) -> None:
        """Move the average towards the model that the constructor was given. Takes no arguments.

        Raises:
            TypeError: there is an argument, such as the model or the step that timm's and torch's classes take.
            ValueError: the model's weights no longer match the average's. Nothing has been changed.
            RuntimeError: called inside :meth:`swap`, or an optimizer has the average and its step updates it.
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
        """What the next update does, as a part of the step of an ``optimizer`` or by itself. Changes nothing.

        Raises:
            ValueError: the model's weights no longer match the average's.
            RuntimeError: called inside :meth:`swap`, or another one updates the average already.
        """
        self._check_not_swapped("update()")
        self._check_updater(optimizer)
        matched, step = self._match(), self.step + 1
        return Update(matched, self.decay_at(step) if step % self.update_every == 0 else None, optimizer)

    def finish_update(self, update: "Update", done: Collection[int] = (), skip: Tensor | None = None) -> None:
        """Count the update; move what is not ``done`` (by ``id`` of the model's tensor), unless ``skip`` is true."""
        pairs, decay = update.matched.pairs, update.decay
        if decay is not None and len(done) < len(pairs):
            matched = update.matched.without(done) if done else update.matched
            update_averages(matched.averages, matched.sources, decay, skip, self.backend)
            for pair in matched.copied:
                write(pair.average, pair.source.to(pair.average.device), skip)
        self.step += 1
        if (optimizer := update.optimizer) is not None:
            self._updates = self._updates + 1 if self._holder() is optimizer else 1
            if self._updates == 1:
                others = [ref for ref in self._updaters if ref() not in (None, optimizer)]
                self._updaters = [*others, weakref.ref(optimizer)]

    def check_model(self) -> Matched:
        """Look at every tensor of the model anew; ValueError naming the first that its average does not match."""
        self._matched = match(self.module, self.model, self.average_buffers)
        return self._matched

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within the ``with`` block, the model has the averaged weights; afterwards its own again, bit for bit.

        The model's tensors stay where they are; their values are exchanged, and what is written into them within the
        block is lost. Needs memory for one more copy of the model meanwhile.

        Raises:
            RuntimeError: already swapped.
        """
        self._check_not_swapped("swap()")
        pairs = self.check_model().pairs
        saved = [pair.source.detach().clone() for pair in pairs]
        self._swapped = True
        try:
            with torch.no_grad():
                for pair in pairs:
                    pair.source.copy_(pair.average)
            yield
        finally:
            with torch.no_grad():
                for pair, own in zip(pairs, saved, strict=True):
                    pair.source.copy_(own)
            self._swapped = False

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Copy the averaged weights and buffers into ``model``.

        Raises:
            ValueError: ``model`` has other weights than the average. Nothing has been changed.
        """
        for pair in match(self.module, model, self.average_buffers).pairs:
            pair.source.copy_(pair.average)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates; the settings are the constructor's."""
        return {"module": self.module.state_dict(), "step": self.step}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` returned.

        Raises:
            ValueError: keys are missing or unexpected, or a shape differs. Nothing has been changed.
        """
        if missing := {"module", "step"} - state_dict.keys():
            raise ValueError(f"the checkpoint of an EMA has no {sorted(missing)}")
        own, loaded = self.module.state_dict(), state_dict["module"]
        if own.keys() != loaded.keys():
            absent, unexpected = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
            raise ValueError(f"the checkpoint does not fit the model: missing {absent}, unexpected {unexpected}")
        for name, value in loaded.items():
            if isinstance(own[name], Tensor) and not isinstance(value, Tensor):
                raise ValueError(f"{name} is no tensor but {value!r}")  # noqa: TRY004
            if isinstance(value, Tensor) and value.shape != own[name].shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}")
        if not isinstance(state_dict["step"], int):
            raise ValueError(f"step must be a number of updates, got {state_dict['step']!r}")  # noqa: TRY004
        self.module.load_state_dict(loaded)
        self.step = state_dict["step"]

    def __repr__(self) -> str:
        names = ("decay", "warmup", "update_after_step", "update_every", "step")
        settings = "".join(f", {name}={getattr(self, name)}" for name in names)
        return f"{type(self).__name__}({type(self.model).__name__}{settings})"

    def __getstate__(self) -> dict[str, Any]:
        # What is only of this average, and not of a copy.
        return {**self.__dict__, "_swapped": False, "_matched": None, "_updaters": [], "_updates": 0}

    def _match(self) -> Matched:
        """Every tensor of the model with its average, as they are now: frameworks replace parameters at will."""
        if self._matched is None or not self._matched.is_current():
            return self.check_model()
        return self._matched

    def _check_not_swapped(self, what: str) -> None:
        if self._swapped:
            raise RuntimeError(f"{what} inside `with ema.swap()`: the model holds the averaged weights")

    def _check_updater(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Raise where another one has the average, too: two updates a step are too many.

        An optimizer may take it over from another one that is done, but not take turns with it.
        """
        if self._holder() in (None, optimizer):
            return
        is_new = all(ref() is not optimizer for ref in self._updaters)
        if optimizer is not None and (is_new or self._updates > 1):
            return
        gc.collect()  # perhaps it is only waiting for that
        if self._holder() is None:
            return
        if optimizer is None:
            raise RuntimeError(
                "the optimizer's step() updates this average already: leave out ema.update(), or take the average "
                "from it with `optimizer.ema = None`"
            )
        raise RuntimeError(
            "another optimizer updates this average in turn with this one: set `optimizer.ema = None` for all but "
            "the one that steps last, or for all and call ema.update()"
        )

    def _holder(self) -> torch.optim.Optimizer | None:
        """The last optimizer to have updated the average, where it has it still."""
        optimizer = self._updaters[-1]() if self._updaters else None
        return optimizer if optimizer is not None and optimizer.ema is self else None


def update_averages(
    averages: Sequence[Tensor], sources: Sequence[Tensor], decay: float, skip: Tensor | None, backend: str | None
) -> None:
    """Move averages towards sources that may lie on other devices, unless ``skip`` is true."""
    if averages and select(backend, averages[0].device.type).try_ema_(averages, sources, decay, skip):
        torch.autograd.graph.increment_version(averages)
        return
    if any(average.shape != source.shape for average, source in zip(averages, sources, strict=True)):
        raise RuntimeError("averages and their sources differ in shape")
    parts: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
    for average, source in zip(averages, sources, strict=True):
        if average.numel() == 0:
            continue
        if average.is_conj():
            resolved = average.resolve_conj()
            update_averages([resolved], [source], decay, skip, backend)
            average.copy_(resolved)
            continue
        part = parts.setdefault(average.device, ([], []))
        part[0].append(as_real(average, written=True))
        part[1].append(as_real(source.to(average.device)))
    torch.autograd.graph.increment_version(averages)
    for device, (device_averages, device_sources) in parts.items():
        plain = all_plain(device_averages) and all_plain(device_sources)
        kernels = select(backend if plain else "reference", device.type)
        kernels.ema_(device_averages, device_sources, decay, skip)


def _cast(module: nn.Module, device: torch.device | str | int | None, dtype: torch.dtype | None) -> nn.Module:
    """Move a module, and its floating-point tensors to a dtype. Tied tensors stay tied."""
    done: dict[int, tuple[Tensor, Tensor]] = {}

    def cast_once(x: Tensor) -> Tensor:
        if id(x) not in done:
            done[id(x)] = (x, x.to(device=device, dtype=dtype if x.is_floating_point() else None))
        return done[id(x)][1]

    return module._apply(cast_once)  # type: ignore[no-untyped-call, no-any-return]


class Update(NamedTuple):
    """An update of an average that is about to happen."""

    matched: Matched
    decay: float | None  # None: this one is passed over
    optimizer: torch.optim.Optimizer | None = None  # whose step it is a part of

    @property
    def fusable(self) -> dict[int, Tensor]:
        """The averages that an optimizer's kernel can update, by ``id`` of the model's parameter."""
        return {} if self.decay is None else self.matched.fusable


def _check_type(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise TypeError(f"{name} must be {what}, got {value!r:.60}")


def _check_unit_interval(name: str, value: float) -> None:
    _check_type(name, value, (Real, torch.SymFloat), "a number")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
