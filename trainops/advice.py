"""Warnings about what is most likely a mistake: each is given once, and says what to write instead.

They cost an ordinary step less than a microsecond and never wait for a device: they do not see what only that knows.
"""

import math
import sys
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# What has been said already, by the optimizer or average that it was about.
_said: "weakref.WeakKeyDictionary[object, set[str]]" = weakref.WeakKeyDictionary()
_NOT_THE_USERS = ("trainops", "torch", "contextlib")


def advise(about: object, topic: str, message: str) -> None:
    """Warn once of this topic, and of this optimizer or average."""
    topics = _said.setdefault(about, set())
    if topic not in topics:
        topics.add(topic)
        _warn(message)


def _warn(message: str) -> None:
    """Warn at the line that called trainops, through whatever decorators."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USERS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


# Clipping, around the clipping inside step(). Once for each optimizer.

_clipping_inside: "weakref.WeakSet[Any]" = weakref.WeakSet()
_clipped_outside: "weakref.WeakSet[Any]" = weakref.WeakSet()


def clips_inside(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer was given a ``max_grad_norm``."""
    _clipping_inside.add(optimizer)


def clips_outside(parameters: Sequence[Tensor], max_norm: float) -> None:
    """Gradients are about to be clipped by norm. An infinite ``max_norm`` only measures them."""
    if not _clipping_inside or math.isinf(max_norm):
        return
    first = next(p for p in parameters if p.grad is not None)
    for optimizer in list(_clipping_inside):
        if any(first is p for group in optimizer.param_groups for p in group["params"]):
            _clipping_inside.discard(optimizer)
            _clipped_outside.add(optimizer)


def _warn_of_second_clip(optimizer: Any) -> None:
    _clipped_outside.discard(optimizer)
    if optimizer.max_grad_norm is not None:
        name = type(optimizer).__name__
        advise(
            optimizer,
            "second clip",
            f"gradients were clipped by trainops.clip_grad_norm_ and are clipped again inside step(): leave out the "
            f"call ({name}.grad_norm has the norm that it returned), or make the optimizer without max_grad_norm",
        )


# A scheduler that advances although the step was skipped. On a CPU alone: a GPU would have to be waited for. Once for
# each optimizer.


class _Schedule:
    """What the last step of an optimizer saw."""

    lrs: Sequence[float] = ()
    skipped_steps = 0
    moves = False  # whether the learning rate had changed since the step before

    def advances_on_skipped(self, optimizer: Any) -> bool:
        """Whether the learning rate moves at every step, and has after one that was skipped."""
        lrs = [group["lr"] for group in optimizer.param_groups]
        lrs = [lr for lr in lrs if not isinstance(lr, Tensor)]  # which change in place, and perhaps on a device
        moves = bool(self.lrs) and lrs != self.lrs
        skipped_steps = int(optimizer.skipped_steps)
        found = moves and self.moves and skipped_steps > self.skipped_steps
        self.lrs, self.moves, self.skipped_steps = lrs, moves, skipped_steps
        return found


_schedules: "weakref.WeakKeyDictionary[Any, _Schedule]" = weakref.WeakKeyDictionary()


def before_step(optimizer: Any) -> None:
    """A step is about to change things."""
    if _without_average and optimizer in _without_average:
        _warn_of_lost_average(optimizer)
    if not optimizer._measures:
        return
    if _clipped_outside and optimizer in _clipped_outside:
        _warn_of_second_clip(optimizer)
    # PyTorch's schedulers set this, for a warning of their own.
    if "_opt_called" in optimizer.__dict__ and optimizer.skipped_steps.device.type == "cpu":
        if (schedule := _schedules.get(optimizer)) is None:
            schedule = _schedules[optimizer] = _Schedule()
        if schedule.advances_on_skipped(optimizer):
            advise(
                optimizer,
                "schedule",
                "the learning rate's scheduler advanced after a step that was skipped: call `scheduler.step()` only "
                "where `optimizer.skipped_steps` has not grown since the step before",
            )


# An average that was given to two optimizers, both of which take steps. Once for each optimizer.

_without_average: "weakref.WeakSet[Any]" = weakref.WeakSet()


def average_taken(optimizer: Any) -> None:
    """Another optimizer was given the average that this one had."""
    _without_average.add(optimizer)


def _warn_of_lost_average(optimizer: Any) -> None:
    _without_average.discard(optimizer)
    if optimizer.ema is None:
        advise(
            optimizer,
            "lost average",
            "this optimizer's average was given to another optimizer, whose steps alone move it now: give it only to "
            "the one that steps last",
        )


# An average that nothing moves. Once for each average.


# How often a weight is written before its model counts as trained. Each step writes once or more; loading, tying,
# initialising and broadcasting write a few times.
WRITES_OF_TRAINING = 20

# The version counters of weights, by their ``id``, when an average was made and its model was not trained. (A weak
# reference to a DTensor would keep modules from moving it to another device or out of meta.)
_untrained: "weakref.WeakKeyDictionary[Any, dict[int, int]]" = weakref.WeakKeyDictionary()


def average_made(ema: Any) -> None:
    """An average equals its model."""
    _untrained[ema] = _versions(ema)


def average_loaded(ema: Any) -> None:
    """An average comes from elsewhere."""
    _untrained.pop(ema, None)


def model_written(ema: Any) -> None:
    """The average itself has written its model's weights, which is no training."""
    if ema in _untrained:
        average_made(ema)


def average_used(ema: Any) -> None:
    """An average is evaluated or saved: if its model has been trained, the average should have been updated."""
    if ema.step > 0:
        return
    before = _untrained.get(ema)
    if not before or all(now - before.get(key, now) < WRITES_OF_TRAINING for key, now in _versions(ema).items()):
        return
    if (optimizer := ema.optimizer) is None:
        cause = "no optimizer has it, and nobody calls `ema.update()`"
    else:
        cause = f"the {type(optimizer).__name__} that has it has taken no step"
    advise(
        ema,
        "never moved",
        f"this average was never updated, but its model has been trained: {cause}. Write `AdamW(..., ema=ema)`, or "
        "`optimizer.ema = ema` on the optimizer itself: a framework's wrapper would keep the attribute to itself",
    )


def _versions(ema: Any) -> dict[int, int]:
    return {id(p): p._version for p in ema.model.parameters() if not p.is_inference()}


# Stochastic depth that drops nothing. Once for the process.

CALLS_WITHOUT_A_DROP = 1000
_calls = 0


def kept_everything(batch: int, rate: float) -> None:
    """A call in mode "fixed" whose batch is too small to drop a sample of."""
    global _calls
    if torch.compiler.is_compiling():
        return
    _calls += 1
    if _calls == CALLS_WITHOUT_A_DROP:
        _warn(
            f"stochastic_depth has dropped nothing in {_calls} calls: in mode 'fixed' it keeps "
            f"max(1, round(batch * (1 - drop_prob))) samples, which is all of {batch} at drop_prob={rate}. Write "
            f"mode='bernoulli', or take batches of at least {max(2, int(0.5 / rate) + 1)}"
        )


def dropped_something() -> None:
    """A call in mode "fixed" that drops samples."""
    global _calls
    if _calls < CALLS_WITHOUT_A_DROP and not torch.compiler.is_compiling():
        _calls = 0


# Tensors that only the specification takes, where no kernels are. Once for the process.

_left_to_reference = False


def left_to_reference(device: torch.device) -> None:
    """The ``foreach`` backend was given tensors that multi-tensor operations cannot write as they lie."""
    global _left_to_reference
    if not _left_to_reference:
        _left_to_reference = True
        _warn(
            f"a tensor that is lazily conjugated or negated or whose elements share memory (here on {device}) is "
            "served by the specification, by itself and slowly: call resolve_conj(), resolve_neg() or clone() on it"
        )
