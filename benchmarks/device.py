"""What differs between a CPU and a GPU: the clock, the cache, the memory, and what shows its bandwidth."""

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import trainops
from trainops.adapters import serving

Step = Callable[[], object]

LIMIT_NUMEL = 2**26  # elements of the tensors that show the bandwidth: far more than any cache holds
PROFILED_TENSORS = 512  # with more, the profiler takes longer than everything else


class Sample(NamedTuple):
    """Seconds that the steps took, and the host to issue them where that is not the same.

    ``held_up``: the device was ready before the host was, so that its times are the host's in part.
    """

    times: list[float]
    host: float | None = None
    held_up: bool = False


# How the profiler calls what puts work on a device.
LAUNCHES = tuple(
    f"cu{api}{call}"
    for api in ("", "da")
    for call in ("LaunchKernel", "LaunchCooperativeKernel", "GraphLaunch", "Memset", "Memcpy")
)
SLEEP_HERTZ = 2e9  # about the rate of the clock by which a GPU sleeps


class Cpu:
    """Wall-clock time. Memory is counted by PyTorch's profiler, since a process's own size follows its allocator."""

    type = "cpu"
    limit, limit_bytes = "a.add_(b)", 12  # bytes per float32 element

    def __init__(self) -> None:
        self._other = torch.zeros(2 * last_level_cache() // 4)

    def limit_step(self, a: torch.Tensor, b: torch.Tensor) -> Step:
        """An in-place update, which is what an optimizer is: its lines are in the cache when they are written."""
        return lambda: a.add_(b)

    def flush(self) -> None:
        """Fill the cache with something else, by reading: lines that were written would have to be written back."""
        self._other.sum()

    def time(self, steps: list[Step], calls: int, host: float) -> Sample:
        """Seconds per call of each step, one after the other."""
        seconds = []
        for step in steps:
            start = time.perf_counter()
            for _ in range(calls):
                step()
            seconds.append((time.perf_counter() - start) / calls)
        return Sample(seconds)

    def free_bytes(self) -> int:
        """Memory that can be had; without Linux to ask, as much as anybody wants."""
        found = [2**62]
        with contextlib.suppress(OSError):
            lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
            found.append(1024 * int(lines["MemAvailable"].split()[0]))
        with contextlib.suppress(OSError, ValueError):  # the limit of a container may read "max"
            group = Path("/sys/fs/cgroup")
            limit = int((group / "memory.max").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
            found.append(limit - used)
        return min(found)

    def extra_bytes(self, step: Step, tensors: int) -> int | None:
        """The most of PyTorch's memory that a step holds beyond what was there before it."""
        if tensors > PROFILED_TENSORS:
            return None
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            step()
        assert profiler.profiler is not None
        events = profiler.profiler.kineto_results.events()
        allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        held = most = 0
        for _, size in allocations:
            held += size
            most = max(most, held)
        return most

    def launches(self, step: Step, tensors: int) -> int | None:
        """There are none to count."""
        return None


class Cuda:
    """Events on the stream, and beside them the time until the host has issued everything."""

    type = "cuda"
    limit, limit_bytes = "a.copy_(b)", 8

    def __init__(self) -> None:
        size = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
        self._other = torch.zeros(max(2 * size, 2**28) // 4, device="cuda")

    def limit_step(self, a: torch.Tensor, b: torch.Tensor) -> Step:
        """What a GPU's memory does best."""
        return lambda: a.copy_(b)

    def flush(self) -> None:
        """Fill the L2 cache with something else, by reading, as on the CPU."""
        self._other.sum()

    def time(self, steps: list[Step], calls: int, host: float) -> Sample:
        """Seconds per call of each step between events, and the host's for all of them.

        The device sleeps until the host, which takes ``host`` seconds, should have issued everything, as it would be
        busy with a long backward pass: what is measured is its own time. That fails where a step waits for the device
        or launches more than its queue holds.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        torch.cuda.synchronize()  # what came before takes no place in the queue
        torch.cuda._sleep(int(SLEEP_HERTZ * min(1.0, 1.5 * host)))
        start = time.perf_counter()
        events[0].record()
        for step, event in zip(steps, events[1:], strict=True):
            for _ in range(calls):
                step()
            event.record()
        taken, held_up = time.perf_counter() - start, events[0].query()
        torch.cuda.synchronize()
        return Sample([a.elapsed_time(b) / 1e3 / calls for a, b in pairwise(events)], taken / calls, held_up)

    def free_bytes(self) -> int:
        """Memory that can be had, that of PyTorch's own pool included."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def extra_bytes(self, step: Step, tensors: int) -> int | None:
        """The most of PyTorch's memory that a step holds beyond what was there before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, step: Step, tensors: int) -> int | None:
        """Kernels, fills and copies that a step launches, by whichever interface; a replayed graph counts as one."""
        if torch.version.hip is not None or tensors > PROFILED_TENSORS:
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
            step()
            torch.cuda.synchronize()
        count = sum(e.count for e in profiler.key_averages() if e.key.startswith(LAUNCHES))
        return count or None  # where nobody may look


Device = Cpu | Cuda


def open_device(name: str) -> Device:
    """The device of that name."""
    return Cuda() if name == "cuda" else Cpu()


def last_level_cache() -> int:
    """Bytes of the largest caches, all of them together; 64 MiB where nobody says."""
    caches: dict[tuple[str, str], int] = {}
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        with contextlib.suppress(OSError, ValueError):
            level, shared, size = ((path / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            caches[level, shared] = 1024 * int(size.removesuffix("K"))
    last = max((level for level, _ in caches), default="")
    return sum(size for (level, _), size in caches.items() if level == last) or 2**26


PEERS = ("timm", "torch-optimi", "torchao", "flashoptim", "deepspeed", "bitsandbytes", "apex")


def environment(device: str) -> dict[str, object]:
    """What the figures depend on."""
    git = said_by("git", "describe", "--always", "--dirty")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    cpu = cpu or platform.processor() or platform.machine()
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    backend = serving(device)
    found: dict[str, object] = {
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "type": device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "huge pages": pages.read_text().partition("[")[2].partition("]")[0] if pages.exists() else "",
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", ""),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "trainops": trainops.__version__,
        "commit": git,
        "backend": f"{backend}: {trainops.backends()[backend].details}",
        "peers": ", ".join(f"{name} {version}" for name in PEERS if (version := version_of(name))),
    }
    if device == "cuda":
        found["driver"] = said_by("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader")
    return found


def said_by(*command: str) -> str:
    """A program's answer; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        return ""


def version_of(distribution: str) -> str:
    """Of what is installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""
