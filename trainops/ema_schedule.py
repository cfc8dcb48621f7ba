"""How much of an average stays at each update."""

from numbers import Integral, Real

from .ema_update import check_type, check_unit_interval


class DecaySchedule:
    """The schedule of timm's ``ModelEmaV3`` (timm/utils/model_ema.py). :class:`trainops.EMA` tells the arguments."""

    def __init__(
        self,
        decay: float,
        *,
        warmup: bool,
        warmup_gamma: float,
        warmup_power: float,
        min_decay: float,
        update_after_step: int,
        update_every: int,
    ) -> None:
        check_unit_interval("decay", decay)
        check_unit_interval("min_decay", min_decay)
        check_type("warmup", warmup, bool, "True or False")
        check_type("warmup_gamma", warmup_gamma, Real, "a number")
        check_type("warmup_power", warmup_power, Real, "a number")
        check_type("update_after_step", update_after_step, Integral, "an integer")
        check_type("update_every", update_every, Integral, "an integer")
        if not warmup_gamma > 0.0:
            raise ValueError(f"warmup_gamma must be positive, got {warmup_gamma}")
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, got {update_every}")
        self.decay = decay
        self.warmup = warmup
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self.min_decay = min_decay
        self.update_after_step = update_after_step
        self.update_every = update_every

    def decay_at(self, step: int) -> float:
        """The decay at update number ``step``, counted from 1: timm's ``ModelEmaV3.get_decay(step)``.

        0 (a plain copy) up to and including update ``update_after_step + 1``; then ``decay``, approached from below
        with ``warmup``.
        """
        step = max(0, step - self.update_after_step - 1)
        if step == 0:
            return 0.0
        if not self.warmup:
            return self.decay
        warm: float = 1 - (1 + step / self.warmup_gamma) ** -self.warmup_power
        return max(min(warm, self.decay), self.min_decay)
