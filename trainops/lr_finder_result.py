"""What a sweep over learning rates has found."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LRFinderResult:
    """The losses of a sweep over learning rates.

    Attributes:
        lrs: the learning rate of each step: that of the group with the largest one.
        losses: the loss of each step, before the update with that learning rate; means over accumulated batches and
            over ranks.
        smoothed: the same as an exponential moving average without bias.
        diverged: whether the sweep ended early, because the loss grew.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged: bool

    @property
    def steepest(self) -> float | None:
        """The learning rate where the smoothed loss falls fastest against log10(lr), before its minimum.

        None where it never falls.
        """
        end = self._minimum
        x = [math.log10(lr) for lr in self.lrs]
        slopes = [((self.smoothed[i + 1] - self.smoothed[i - 1]) / (x[i + 1] - x[i - 1]), i) for i in range(1, end)]
        slope, place = min(slopes, default=(0.0, 0))
        return self.lrs[place] if slope < 0.0 else None

    @property
    def tenth_of_minimum(self) -> float | None:
        """A tenth of the learning rate where the smoothed loss is least; None where that is the first one."""
        return self.lrs[self._minimum] / 10 if self._minimum > 0 else None

    @property
    def _minimum(self) -> int:
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    def plot(self) -> "Figure":
        """The losses against the learning rates, with both suggestions. ``plot().savefig("lr.png")`` saves it."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.lrs, self.losses, color="0.75", linewidth=1.0, label="loss of a step")
        axes.plot(self.lrs, self.smoothed, color="tab:blue", label="smoothed")
        for lr, color, name in (
            (self.steepest, "tab:orange", "steepest descent"),
            (self.tenth_of_minimum, "tab:green", "a tenth of the minimum's"),
        ):
            if lr is not None:
                axes.axvline(lr, color=color, linestyle="--", label=f"{name}: {lr:.1e}")
        before = [x for losses in (self.losses, self.smoothed) for x in losses[: self._minimum + 1]]
        low, high = min(before), max(before)  # what diverges leaves the picture
        if high > low:
            axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.legend()
        return figure
