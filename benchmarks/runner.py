"""The method: verify, then time in interleaved rounds, and say what came out. It knows no op.

Every provider of a case first does its work from the same start and is compared with the same in float64; one that
is wrong is listed as wrong and never timed. Then all take turns, in rounds that each begin with another one, with
the caches full of something else before each call, as they are after a backward pass. trainops takes part twice: the
difference between the two is the noise. So does the operation that shows the bandwidth of the memory.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .device import LIMIT_NUMEL, Device, Step
from .saved import AGAIN, OURS

WARMUP = 2
PROFILED_TENSORS = 512  # with more, the profiler takes longer than everything else
LARGE = 2**31  # bytes: what is left of a provider is freed at once, which takes a third of a second


class NotHere(Exception):  # noqa: N818 (nothing is wrong where it is raised)
    """Why a provider takes no part: it is not installed, or not for such a device or work."""


class Options(NamedTuple):
    """What the caller wants measured. ``models`` None: what suits the device. ``compiles``: use `torch.compile`."""

    device: str = "cpu"
    models: list[str] | None = None
    dtypes: list[str] | None = None
    quick: bool = False
    compiles: bool = False


@dataclass
class Provider:
    """One way to do a case's work: the calls that are timed, and the tensors that they leave.

    ``results`` gives these by role. ``owned`` gives the tensors that it keeps between calls, which all providers may
    share once they are verified; empty if it keeps their addresses.
    """

    steps: dict[str, Step]
    results: Callable[[], dict[str, Any]] = dict
    owned: Callable[[], list[list[torch.Tensor]]] = list

    def step(self) -> None:
        """All of it, once."""
        for step in self.steps.values():
            step()


class Bench(Protocol):
    """The tensors of a case, and those who work on them."""

    def admit(self, name: str) -> tuple[Provider, float]:
        """Make a provider and verify it: its largest error, as a multiple of the tolerance."""


@dataclass
class Case:
    """One measurement: what it is, what it needs, and how to set it up."""

    op: str
    name: str
    names: list[str]  # of all providers
    open: Callable[[], Bench]
    group: str = "models"
    dtype: str = "float32"
    tensors: int = 0
    numel: int = 0
    bytes: int | None = None  # that the best possible implementation moves; None where memory is not the limit
    need: int = 0  # bytes of memory
    cold: bool = True  # whether the caches hold something else before each call
    calls: int = 1  # in a row per sample, for short warm ones

    def describe(self) -> dict[str, Any]:
        """What the results say of it."""
        names = ("op", "name", "group", "dtype", "tensors", "numel", "bytes", "need", "cold", "calls")
        return {name: getattr(self, name) for name in names}


def measure(case: Case, device: Device, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """Verify and time a case, in about so many ``seconds`` of timing and at least and at most so many ``rounds``."""
    gc.collect()
    result = case.describe()
    if (free := device.free_bytes()) < case.need:
        return result | {"skipped": f"needs {case.need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"}
    bench = case.open()
    result["providers"] = found = {}
    admitted: dict[str, Provider] = {}
    for name in case.names:
        found[name] = admit(bench, name, admitted)
        if case.need > LARGE:
            gc.collect()  # optimizers are full of cycles
    if OURS in admitted:
        found[AGAIN] = admit(bench, OURS, admitted, AGAIN)
    steps = {name: list(provider.steps.values()) for name, provider in admitted.items()}
    if case.bytes is not None:
        a, b = (torch.ones(min(LIMIT_NUMEL, -(-case.bytes // device.limit_bytes)), device=device.type) for _ in "ab")
        steps[device.limit] = [device.limit_step(a, b)]
    samples = interleave(steps, case, device, seconds, rounds)
    if case.bytes is not None:
        limit = summarise([total for (total,), _ in samples.pop(device.limit)])
        speed = a.numel() * device.limit_bytes / limit["median"]
        result["limit"] = {"name": device.limit, "seconds": limit, "bytes_per_second": speed}
    for name, taken in samples.items():
        found[name] |= statistics_of(taken, list(admitted[name].steps), case.bytes)
        counted = case.tensors <= PROFILED_TENSORS
        found[name]["extra_bytes"] = device.extra_bytes(admitted[name].step) if counted else None
        found[name]["launches"] = device.launches(admitted[name].step)
    return result


def admit(bench: Bench, name: str, admitted: dict[str, Provider], alias: str | None = None) -> dict[str, Any]:
    """Make and verify one provider; what became of it. Only a right one is put with the ``admitted``."""
    try:
        provider, error = bench.admit(name)
    except NotHere as reason:
        return {"status": "not here", "reason": str(reason)}
    except Exception as reason:
        return {"status": "failed", "reason": f"{type(reason).__name__}: {reason}".splitlines()[0]}
    if not error <= 1.0:  # nor if it is NaN
        return {"status": "wrong", "reason": f"its error is {error:.2g} times what is allowed", "error": error}
    admitted[alias or name] = provider
    return {"status": "ok", "error": error}


Sample = tuple[list[float], float | None]


def interleave(
    steps: dict[str, list[Step]], case: Case, device: Device, seconds: float, rounds: tuple[int, int]
) -> dict[str, list[Sample]]:
    """Time every provider once per round; each round begins with another one."""
    names = list(steps)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    count = i = 0
    while i < WARMUP + count:
        taken, start = {}, time.perf_counter()
        for name in names[i % len(names) :] + names[: i % len(names)] if names else ():
            if case.cold:
                device.flush()
            taken[name] = device.time(steps[name], case.calls)
        i += 1
        if i == WARMUP:
            count = max(rounds[0], min(rounds[1], int(seconds / (time.perf_counter() - start))))
        elif i > WARMUP:
            for name in names:
                samples[name].append(taken[name])
    return samples


def statistics_of(samples: list[Sample], labels: list[str], moved: int | None) -> dict[str, Any]:
    """Of all samples of a provider: the time, that of its parts, the host's, and the bandwidth."""
    seconds = summarise([sum(times) for times, _ in samples])
    result: dict[str, Any] = {"seconds": seconds, "rounds": len(samples)}
    if len(labels) > 1:
        parts = zip(*(times for times, _ in samples), strict=True)
        result["parts"] = {label: summarise(list(part)) for label, part in zip(labels, parts, strict=True)}
    host = [host for _, host in samples if host is not None]
    if host:
        result["host_seconds"] = summarise(host)
    if moved is not None:
        result["bytes_per_second"] = moved / seconds["median"]
    return result


def summarise(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}
