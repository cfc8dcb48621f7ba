"""How much of an average stays at each update."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

from .ema_update import check_type, check_unit_interval

Decay = float | Callable[[int], float | None]


class DecaySchedule:
    """The schedule of timm's ``ModelEmaV3`` (timm/utils/model_ema.py). :class:`trainops.EMA` tells the arguments."""

    decay: Decay

    def __init__(
        self,
        decay: Decay | None,
        *,
        halflife_steps: float | None,
        warmup: bool,
        warmup_gamma: float,
        warmup_power: float,
        min_decay: float,
        update_after_step: int,
        update_every: int,
    ) -> None:
        check_unit_interval("min_decay", min_decay)
        check_type("warmup", warmup, bool, "True or False")
        check_type("warmup_gamma", warmup_gamma, Real, "a number")
        check_type("warmup_power", warmup_power, Real, "a number")
        check_type("update_after_step", update_after_step, Integral, "an integer")
        check_type("update_every", update_every, Integral, "an integer")
        if not math.isfinite(warmup_power):
            raise ValueError(f"warmup_power must be finite, got {warmup_power}")
        if not warmup_gamma > 0.0:
            raise ValueError(f"warmup_gamma must be positive, got {warmup_gamma}")
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, got {update_every}")
        self.decay = _chosen(decay, halflife_steps, update_every)
        if callable(self.decay) and (warmup or min_decay or update_after_step):
            raise ValueError("decay is a function: it takes the place of warmup, min_decay and update_after_step")
        self.warmup = warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.update_every = update_every

    def decay_at(self, step: int) -> float | None:
        """The decay at update number ``step``, counted from 1: timm's ``ModelEmaV3.get_decay(step)``.

        0 (a plain copy) up to and including update ``update_after_step + 1``, or with ``update_every`` the first one
        from there on that moves the average; then ``decay``, approached from below with ``warmup``. None: a function
        that was given as ``decay`` leaves this update out.

        Raises:
            TypeError, ValueError: that function returned something else.
        """
        if callable(self.decay):
            value = self.decay(step)
            if value is not None:
                check_unit_interval(f"decay({step})", value)
            return value
        copies_until = -(-(self.update_after_step + 1) // self.update_every) * self.update_every
        if step <= copies_until:
            return 0.0
        check_unit_interval("decay", self.decay)  # which may change
        if not self.warmup:
            return self.decay
        warm: float = 1 - (1 + (step - self.update_after_step - 1) / self.warmup_gamma) ** -self.warmup_power
        return max(min(warm, self.decay), self.min_decay)

    @property
    def depends_on_step(self) -> bool:
        """Whether the decay goes on changing after the copies of the beginning."""
        return self.warmup or callable(self.decay)


def _chosen(decay: Decay | None, halflife_steps: float | None, update_every: int) -> Decay:
    """The decay that one of two arguments names; the default where neither is given."""
    if halflife_steps is None:
        if not callable(decay):
            check_unit_interval("decay", decay := 0.9999 if decay is None else decay)
        return decay
    check_type("halflife_steps", halflife_steps, Real, "a number")
    if decay is not None:
        raise ValueError("decay and halflife_steps say the same: give one of them")
    if not halflife_steps > 0.0:
        raise ValueError(f"halflife_steps must be positive, got {halflife_steps}")
    result: float = 0.5 ** (update_every / halflife_steps)
    return result


@dataclass(frozen=True)
class DiffusersDecay:
    """The schedule of diffusers' ``EMAModel``, with its arguments, for ``EMA(model, DiffusersDecay())``.

    A copy up to and including update ``update_after_step + 1``; then ``(1 + n) / (10 + n)``, or with
    ``use_ema_warmup`` timm's ``1 - (1 + n / inv_gamma) ** -power``, up to ``decay`` and not below ``min_decay``.
    ``n`` is the number of updates since. (diffusers/training_utils.py)
    """

    decay: float = 0.9999
    min_decay: float = 0.0
    update_after_step: int = 0
    use_ema_warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __call__(self, step: int) -> float:
        """The decay at update number ``step``, counted from 1."""
        n = max(0, step - self.update_after_step - 1)
        if n == 0:
            return 0.0
        warm = 1 - (1 + n / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + n) / (10 + n)
        return max(min(warm, self.decay), self.min_decay)


@dataclass(frozen=True)
class EMAPytorchDecay:
    """The schedule of ema-pytorch's ``EMA``, with its arguments, for ``EMA(model, EMAPytorchDecay())``.

    It moves the average at updates 1, ``update_every + 1``, ``2 * update_every + 1`` and so on, and copies up to and
    including update ``update_after_step + 1``. Then the decay is ``1 - (1 + n / inv_gamma) ** -power``, between
    ``min_value`` and ``beta``, where ``n`` counts from update ``update_after_step + 1``. (ema_pytorch/ema_pytorch.py)
    """

    beta: float = 0.9999
    update_after_step: int = 100
    update_every: int = 10
    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_value: float = 0.0

    def __call__(self, step: int) -> float | None:
        """The decay at update number ``step``, counted from 1; None where the average stays."""
        n = step - self.update_after_step - 1
        if step > 1 and (step - 1) % self.update_every != 0:
            return None
        if step <= 1 or n <= 0:
            return 0.0
        warm: float = 1 - (1 + n / self.inv_gamma) ** -self.power
        return None if self.beta == 1.0 else min(max(warm, self.min_value), self.beta)
