"""How things are timed: interleaved rounds of all providers, warm-up left out, medians with p20 and p80."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from rich.progress import Progress


class Timing(NamedTuple):
    """Seconds per call over all rounds."""

    median: float
    p20: float
    p80: float


def interleave(providers: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """Call every provider once per round, each round beginning with another one, and time every call."""
    names = list(providers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with Progress(transient=True) as progress:
        for i in progress.track(range(warmup + rounds), description="timing"):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                start = time.perf_counter()
                providers[name]()
                elapsed = time.perf_counter() - start
                if i >= warmup:
                    samples[name].append(elapsed)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(values: list[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5)
    return Timing(statistics.median(values), fifths[0], fifths[3])
