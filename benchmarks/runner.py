"""How things are timed: interleaved rounds of all providers, warm-up left out, medians with p20 and p80.

A round calls each provider some times in a row. With one call, what a small step finds in the cache is what the other
providers left there; with several, it is what its own last step left.
"""

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


def interleave(
    providers: dict[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    warmup: int = 3,
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time every provider once per round, over ``calls`` calls; each round begins with another one.

    ``synchronize`` waits for a device to finish what it was given, before and after the calls.
    """
    names = list(providers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with Progress(transient=True) as progress:
        for i in progress.track(range(warmup + rounds), description="timing"):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    providers[name]()
                synchronize()
                elapsed = (time.perf_counter() - start) / calls
                if i >= warmup:
                    samples[name].append(elapsed)
    return {name: summarise(values) for name, values in samples.items()}


def summarise(values: list[float]) -> Timing:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(values, n=5)
    return Timing(statistics.median(values), fifths[0], fifths[3])
