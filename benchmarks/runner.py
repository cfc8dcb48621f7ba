"""The method: verify, then time in interleaved rounds, and say what came out. It knows no op.

Every provider of a case first does its work from the same start and is compared with the same in float64; one that
is wrong is listed as wrong and never timed. Then all take turns, in rounds of ever another order, with the caches
full of something else before each call, as they are after a backward pass. Providers are compared within each round,
so that what slows the machine down for a while slows them all. trainops takes part twice: the difference between the
two is the noise. So does the operation that shows the bandwidth of the memory.
"""

import contextlib
import gc
import math
import random
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .device import LIMIT_NUMEL, Device, Sample, Step
from .saved import AGAIN, OURS

WARMUP = 2
LARGE = 2**31  # bytes of memory that a case needs for garbage to be collected after each provider


class NotHere(Exception):  # noqa: N818 (nothing is wrong where it is raised)
    """Why a provider takes no part: it is not installed, or not for such a device or work."""


class Options(NamedTuple):
    """What the caller wants measured. ``models`` None: what suits the device. ``compiles``: use `torch.compile`."""

    device: str = "cpu"
    models: list[str] | None = None
    dtypes: list[str] | None = None
    quick: bool = False
    compiles: bool = False


def nothing() -> None:
    """What most providers need before a call."""


@dataclass
class Provider:
    """One way to do a case's work: the calls that are timed, and the tensors that they leave.

    ``results`` gives these by role. ``owned`` gives the tensors that it keeps between calls by what they are, which
    all providers may share once they are verified; none if it keeps their addresses. ``before`` is called before each
    timed call, to put right what calls use up.
    """

    steps: dict[str, Step]
    results: Callable[[], dict[str, Any]] = dict
    owned: Callable[[], dict[str, list[torch.Tensor]]] = dict
    before: Step = nothing
    note: str = ""  # for the report
    inexact: float = 0.0  # what the storage of its state may be off by, as a share of what moves

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
    common: int = 0  # how many of the steps, the first ones, are the same work for all, and so are its times

    def describe(self) -> dict[str, Any]:
        """What the results say of it."""
        names = ("op", "name", "group", "dtype", "tensors", "numel", "bytes", "need", "cold", "calls")
        return {name: getattr(self, name) for name in names}


def measure(case: Case, device: Device, seconds: float, rounds: tuple[int, int]) -> dict[str, Any]:
    """Verify and time a case, in about so many ``seconds`` of timing and at least and at most so many ``rounds``."""
    gc.collect()
    result = case.describe()
    limit_numel = min(LIMIT_NUMEL, -(-(case.bytes or 0) // device.limit_bytes))
    need = case.need + 8 * limit_numel
    if (free := device.free_bytes()) < need:
        return result | {"skipped": f"needs {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"}
    try:
        bench = case.open()
        limit = device.limit_step(*(torch.ones(limit_numel, device=device.type) for _ in "ab"))
    except Exception as reason:
        return result | {"skipped": message(reason)}
    result["providers"] = found = {}
    admitted: dict[str, Provider] = {}
    for name in case.names:
        found[name] = admit(bench, name, admitted)
        if case.need > LARGE:
            gc.collect()  # optimizers are full of cycles
    if OURS in admitted:
        found[AGAIN] = admit(bench, OURS, admitted, AGAIN)
    timed = admitted if case.bytes is None else admitted | {device.limit: Provider({"limit": limit})}
    gc.disable()
    try:
        samples, failed = interleave(timed, case, device, seconds, rounds)
    finally:
        gc.enable()
    totals = {name: [sum(sample.times) for sample in taken] for name, taken in samples.items()}
    if samples.pop(device.limit, None):
        moved = limit_numel * device.limit_bytes
        result["limit"] = limit_of(device.limit, totals.pop(device.limit), moved, totals.get(OURS), case.bytes or 0)
    for name, taken in samples.items():
        found[name] |= statistics_of(taken, list(admitted[name].steps), case.bytes)
        if OURS in totals and name != OURS:
            found[name]["relative"] = relative(totals[name], totals[OURS])
        found[name] |= counted(admitted[name], device, case.tensors)
    return result | {"providers": found | failed}


def counted(provider: Provider, device: Device, tensors: int) -> dict[str, int | None]:
    """Of a step: the memory that it takes besides, and its launches. None where they cannot be told."""
    found: dict[str, int | None] = {"extra_bytes": None, "launches": None}
    for name in found:
        with contextlib.suppress(Exception):
            provider.before()
            found[name] = getattr(device, name)(provider.step, tensors)
    return found


def limit_of(name: str, times: list[float], moved: int, ours: list[float] | None, bytes_: int) -> dict[str, Any]:
    """What the memory can do, in the same rounds, and trainops' share of it."""
    result = {"name": name, "seconds": summarise(times), "bytes_per_second": moved / statistics.median(times)}
    return result if ours is None else result | {"share": relative([bytes_ / moved * x for x in times], ours)}


def admit(bench: Bench, name: str, admitted: dict[str, Provider], alias: str | None = None) -> dict[str, Any]:
    """Make and verify one provider; what became of it. Only a right one is put with the ``admitted``."""
    try:
        provider, error = bench.admit(name)
    except NotHere as reason:
        return {"status": "not here", "reason": message(reason)}
    except Exception as reason:
        return {"status": "failed", "reason": message(reason)}
    if not error <= 1.0:  # nor if it is NaN
        return {"status": "wrong", "reason": f"its error is {error:.2g} times what is allowed", "error": error}
    admitted[alias or name] = provider
    return {"status": "ok", "error": error} | ({"note": provider.note} if provider.note else {})


def message(reason: Exception) -> str:
    """An error in a line, without the places of files on this machine."""
    name = "" if isinstance(reason, NotHere) else f"{type(reason).__name__}: "
    return re.sub(r"(?<![\w/:])/\S+/", ".../", f"{name}{reason}".splitlines()[0])


def interleave(
    providers: dict[str, Provider], case: Case, device: Device, seconds: float, rounds: tuple[int, int]
) -> tuple[dict[str, list[Sample]], dict[str, dict[str, str]]]:
    """Time every provider once per round, in ever another order: nobody always follows the same one.

    Also returns who failed, and why; they have no samples.
    """
    order, generator = list(providers), random.Random(0)
    steps = {name: list(provider.steps.values()) for name, provider in providers.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in order}
    hosts: dict[str, float] = {}
    failed: dict[str, dict[str, str]] = {}
    count = i = 0
    while order and i < WARMUP + count:
        taken: dict[str, Sample] = {}
        start = time.perf_counter()
        generator.shuffle(order)
        for name in order:
            try:
                providers[name].before()
                if case.cold:
                    device.flush()
                taken[name] = device.time(steps[name], case.calls, hosts.get(name, 0.0))
            except Exception as reason:
                failed[name] = {"status": "failed", "reason": message(reason)}
                continue
            if (host := taken[name].host) is not None:
                hosts[name] = min(host * case.calls, hosts.get(name, math.inf))
        order = [name for name in order if name not in failed]
        i += 1
        if i == WARMUP:
            count = max(rounds[0], min(rounds[1], int(seconds / (time.perf_counter() - start))))
        elif i > WARMUP:
            average_common(taken, case.common)
            for name in order:
                samples[name].append(taken[name])
    return {name: samples[name] for name in order}, failed


def average_common(taken: dict[str, Sample], common: int) -> None:
    """Give all providers of a round the same times, the means, for the steps that are the same."""
    for step in range(common if taken else 0):
        mean = statistics.fmean(sample.times[step] for sample in taken.values())
        for sample in taken.values():
            sample.times[step] = mean


def statistics_of(samples: list[Sample], labels: list[str], moved: int | None) -> dict[str, Any]:
    """Of all samples of a provider: the time, that of its parts, the host's, and the bandwidth."""
    seconds = summarise([sum(sample.times) for sample in samples])
    result: dict[str, Any] = {"seconds": seconds, "rounds": len(samples)}
    if len(labels) > 1:
        parts = zip(*(sample.times for sample in samples), strict=True)
        result["parts"] = {label: summarise(list(part)) for label, part in zip(labels, parts, strict=True)}
    hosts = [sample.host for sample in samples if sample.host is not None and not sample.held_up]
    if hosts:
        result["host_seconds"] = summarise(hosts)
    if held_up := sum(sample.held_up for sample in samples):
        result["held_up"] = held_up
    if moved is not None:
        result["bytes_per_second"] = moved / seconds["median"]
    return result


def summarise(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return dict.fromkeys(("median", "p20", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def relative(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Times over those of the same rounds: their median, and the interval that holds it with 95% confidence.

    By order statistics: whether a value lies below the true median is a coin's toss. Of fewer than six values, all
    there is to say is the smallest and the largest.
    """
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    count, outside = len(ratios), 0.0
    for below in range(count):
        outside += 2 * math.comb(count, below) / 2**count
        if outside > 0.05:
            break
    ends = max(0, below - 1), count - max(1, below)
    return {"median": statistics.median(ratios), "low": ratios[ends[0]], "high": ratios[ends[1]]}
