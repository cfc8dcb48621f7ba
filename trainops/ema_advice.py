"""Warnings about averages that move while their models do not train: each is given once."""

import weakref
from typing import Any

import torch
from torch import Tensor

from .advice import advise


def average_left_behind(ema: Any, updates: int) -> None:
    """Model and optimizer have loaded another state, the average has not."""
    advise(
        ema,
        "left behind",
        "the model and its optimizer have loaded another state, but their average has not, and keeps its last "
        f"{updates} updates: load its state as well, or call ema.reset(). If a learning rate finder did that, give "
        "the average to the optimizer after it",
    )


# How many updates are looked at together; if half of them find the weights of the update before, something is amiss.
UPDATES_LOOKED_AT = 100


class _Watch:
    """A weight that is trained, how often an update found it as the update before did, and what it held then."""

    def __init__(self, param: Tensor | None) -> None:
        self.param = param  # None: there is nothing to look at
        self.version = -1 if param is None else param._version
        self.updates = self.idle = 0
        self.before: tuple[Tensor, list[int]] | None = None


_watched: "weakref.WeakKeyDictionary[Any, _Watch]" = weakref.WeakKeyDictionary()


def updated_by_hand(ema: Any) -> None:
    """Somebody called ``ema.update()``. This looks at one version counter, and at more only where it stands still."""
    if (watch := _watched.get(ema)) is None:
        watch = _watched[ema] = _Watch(next(iter(_trained(ema)), None))
    if watch.param is None:
        return
    is_idle, watch.version = watch.param._version == watch.version, watch.param._version
    watch.updates += 1
    watch.idle += is_idle
    if watch.updates < UPDATES_LOOKED_AT:
        return
    if 2 * watch.idle < UPDATES_LOOKED_AT:
        _watched[ema] = _Watch(watch.param)
    elif watch.before is None or not is_idle:
        watch.before = (watch.param.detach().clone(), [p._version for p in _trained(ema)])
    else:
        _judge(ema, watch.param, *watch.before)


def _judge(ema: Any, param: Tensor, value: Tensor, versions: list[int]) -> None:
    """Two updates have found a weight with the same version: did all keep it, and is it the same weight?"""
    others = [p for p, version in zip(_trained(ema), versions, strict=False) if p._version != version]
    _watched[ema] = _Watch(others[0] if others else None)
    if not others and torch.equal(param.detach(), value):  # who writes into `p.data` changes no version
        advise(
            ema,
            "idle updates",
            f"in half or more of {UPDATES_LOOKED_AT} updates of this average, its model had the weights of the "
            "update before: call ema.update() once after each optimizer.step(), not after each batch of an "
            "accumulated gradient",
        )


def _trained(ema: Any) -> list[Tensor]:
    return [p for p in ema.model.parameters() if p.requires_grad and not p.is_inference()]


def average_stalls(ema: Any, averages: list[Tensor]) -> None:
    """An average was made whose updates are mostly lost by rounding: it has 16 bits, and a large decay."""
    dtype = next((x.dtype for x in averages if x.dtype in (torch.bfloat16, torch.float16)), None)
    if dtype is None or callable(ema.decay) or not 0.0 < 1.0 - ema.decay < torch.finfo(dtype).eps / 2:
        return
    other = ", or EMA(..., stochastic_rounding=True)" if dtype == torch.bfloat16 else ""
    advise(
        ema,
        "stalls",
        f"an average in {str(dtype).removeprefix('torch.')} with decay {ema.decay} stalls: an update moves it by "
        "(1 - decay) * (weight - average), which is mostly less than half of the last place and lost. Write "
        f"EMA(..., dtype=torch.float32){other}",
    )
