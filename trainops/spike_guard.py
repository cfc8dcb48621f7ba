"""A guard against spikes of the gradients' norm: its settings, and what it has learned, which checkpoints keep."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .reference import scalar_dtype
from .seeds import OWN_STATE
from .wrappers import unwrap

# A guard's numbers in memory (csrc/math/guard.h): what it has learned, its verdict on the last step, its settings.
GUARD = ("mean", "variance", "count", "spikes", "verdict", "max_norm", "deviations", "decay", "warmup", "patience")
LEARNED = 4
KEY = "spike_guard"


@dataclass(frozen=True)
class SpikeGuard:
    """Which steps are spikes, and so are skipped: those whose gradients' norm is far above what it has been.

    A step is a spike if its norm is not finite, is larger than ``max_norm``, or if its logarithm is more than
    ``deviations`` standard deviations above the running mean of the logarithms. Spikes do not enter the mean. A
    deviation counts as at least 0.05, so that norms which hardly vary make no spikes of 1 percent.

    Args:
        deviations: how many; None: only ``max_norm`` counts.
        max_norm: the largest norm, in units of unscaled gradients; None: there is no limit.
        decay: of the running mean and variance for each step that is taken, in [0, 1). At first, both are those of
            all steps so far.
        warmup: how many steps the guard only looks at before it judges by ``deviations``; at least 2.
        patience: after so many spikes in a row, the guard forgets what it knows and begins anew with its warm-up:
            the way out where norms have risen for good. (``max_norm`` holds all the time.) Steps whose norm is not
            finite do not count.

    Raises:
        TypeError, ValueError: a setting is no number, or out of range.
    """

    deviations: float | None = 6.0
    max_norm: float | None = None
    decay: float = 0.98
    warmup: int = 50
    patience: int = 20

    def __post_init__(self) -> None:
        for name, least in (("deviations", 0.0), ("max_norm", 0.0), ("decay", 0.0), ("warmup", 2), ("patience", 1)):
            x: Any = getattr(self, name)
            if x is None and name in ("deviations", "max_norm"):
                continue
            kind: Any = int if name in ("warmup", "patience") else Real
            if not isinstance(x, kind) or isinstance(x, bool):
                raise TypeError(f"{name} of a SpikeGuard must be a number, got {x!r:.60}")
            if not x >= least or (name == "decay" and x >= 1.0):
                raise ValueError(f"{name} of a SpikeGuard is out of range: {x}")
        if self.deviations is None and self.max_norm is None:
            raise ValueError("a SpikeGuard needs deviations or max_norm")

    def numbers(self) -> list[float]:
        """The settings as they lie in memory."""
        limits = [math.inf if x is None else float(x) for x in (self.max_norm, self.deviations)]
        return [*limits, float(self.decay), float(self.warmup), float(self.patience)]


def as_guard(spike_guard: Any) -> SpikeGuard | None:
    """A number means so many deviations.

    Raises:
        TypeError: it is of another type.
    """
    if spike_guard is None or isinstance(spike_guard, SpikeGuard):
        return spike_guard
    if isinstance(spike_guard, Real) and not isinstance(spike_guard, bool):
        return SpikeGuard(float(spike_guard))
    raise TypeError(f"spike_guard must be a number, a SpikeGuard or None, got {spike_guard!r:.60}")


class HasSpikeGuard(torch.optim.Optimizer):
    """An optimizer that may have a guard. Its numbers are a tensor among what the first group keeps."""

    _spike_guard: SpikeGuard | None

    @property
    def spike_guard(self) -> SpikeGuard | None:
        """The guard against spikes; may be changed between steps, and keeps what it has learned."""
        return self._spike_guard

    @spike_guard.setter
    def spike_guard(self, spike_guard: SpikeGuard | float | None) -> None:
        guard = as_guard(spike_guard)
        if (inner := unwrap(self)) is not self:  # Lightning's and Fabric's wrappers imitate their optimizer's class
            inner.spike_guard = spike_guard
            return
        self._spike_guard = guard
        if guard is not None:
            self._guard_on(None)

    def _guard_on(self, device: torch.device | None) -> Tensor | None:
        """The guard's numbers, on the device if one is given; made where there are none, or others are loaded."""
        guard = self._spike_guard
        if guard is None:
            return None
        group = self.param_groups[0]
        found: Tensor | None = group.get(OWN_STATE, {}).get(KEY)
        device = device or next((p.device for g in self.param_groups for p in g["params"]), torch.device("cpu"))
        made_for = self.__dict__.get("_guard_made_for")
        if found is None or found.device != device or made_for != (guard, id(found)):
            numbers = torch.tensor([0.0] * (LEARNED + 1) + guard.numbers(), dtype=scalar_dtype(device))
            numbers = numbers.to(device)
            if found is not None:
                numbers[:LEARNED] = found[:LEARNED].to(numbers)
                if found.device == device and found.shape == numbers.shape and found.dtype == numbers.dtype:
                    numbers = found.copy_(numbers)  # captured steps know its address
            group[OWN_STATE] = {**group.get(OWN_STATE, {}), KEY: numbers}
            self._guard_made_for = guard, id(numbers)
            found = numbers
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state["param_groups"]
        loaded = groups[0].get(OWN_STATE, {}).get(KEY) if groups else None
        if loaded is not None and (not isinstance(loaded, Tensor) or loaded.numel() != len(GUARD)):
            raise ValueError(f"what a spike_guard has learned is {len(GUARD)} numbers, got {loaded!r:.60}")
        if loaded is not None and loaded[:LEARNED].isnan().any():
            raise ValueError("what a spike_guard has learned has a NaN: with it, the guard would see no spike")
        own = self.__dict__.get("param_groups")
        held = own[0].get(OWN_STATE, {}).get(KEY) if own else None
        super().__setstate__(state)
        if held is not None:  # the tensor stays, because captured steps know its address
            if loaded is None:  # saved without a guard: this one begins anew
                held[:LEARNED] = 0
            else:
                held[:LEARNED] = loaded[:LEARNED].to(held)
            group = self.param_groups[0]
            group[OWN_STATE] = {**group.get(OWN_STATE, {}), KEY: held}
