"""``python -m trainops verify``: every op of every backend of this machine, held to the specification.

An op runs on tensors of awkward sizes and layouts, and once more by ``reference`` on the same numbers in float64. A
result may differ by its own rounding, and by what arithmetic in float32 (float64 for float64) loses. What is skipped,
and what DropPath rounds as PyTorch does, must be the same bits.
"""

import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .. import __version__
from ..adapters import NAMES, backends, check, select
from ..reference import scalar_dtype
from .capture import CAPTURES, is_captured
from .checks import CHECKS, Check, serves
from .compare import Place, problem_with

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Finding(NamedTuple):
    """How an op did: its largest error in units of what is allowed, and what was wrong, if anything was."""

    op: str
    place: Place
    worst: float
    problem: str = ""


def checks_of(place: Place) -> dict[str, Check]:
    """What a backend is held to on a device, by name."""
    every = CHECKS | (CAPTURES if is_captured(place) else {})
    return {op: check for op, check in every.items() if serves(op, place)}


def run(op: str, place: Place) -> Finding:
    """One op in one place."""
    worst = 0.0
    try:
        with torch.no_grad():
            for compared in (CHECKS | CAPTURES)[op](place, torch.Generator().manual_seed(0)):
                its, problem = problem_with(compared)
                if problem:
                    return Finding(op, place, its, problem)
                worst = max(worst, its)
    except Exception as error:
        return Finding(op, place, float("inf"), f"{type(error).__name__}: {error}")
    return Finding(op, place, worst)


def places(device: str | None = None, backend: str | None = None) -> Iterator[Place]:
    """Every backend that is available, on every type of device that it serves."""
    accelerators = [torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else []
    devices = [torch.device(device)] if device else [torch.device("cpu"), *filter(None, accelerators)]
    for name, found in backends().items():
        if not found.available or (backend and name != backend):
            continue
        for at in devices:
            try:
                select(name, at)
            except RuntimeError:  # serves other devices
                continue
            for dtype in DTYPES:
                if dtype != torch.float64 or scalar_dtype(at) == torch.float64:  # Apple's GPUs have none
                    yield Place(name, at, dtype)


def cell_of(finding: Finding | None) -> str:
    """What the table says of it."""
    if finding is None:
        return "-"
    return "WRONG" if finding.problem else f"{finding.worst:.2f}"


def environment() -> str:
    """What a bug report needs to say."""
    lines = [f"trainops {__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    lines += [f"{platform.system()} {platform.machine()}"]
    if torch.cuda.is_available():
        lines[-1] += f", {torch.cuda.get_device_name()}"
    found = backends()
    return "\n".join([*lines, *(f"{name}: {found[name].details or found[name].reason}" for name in NAMES)])


def verify(device: str | None = None, backend: str | None = None, show: Callable[[str], None] = print) -> bool:
    """Run every check, show a table and a verdict; whether all is well.

    Args:
        device: such as ``"cuda"`` or ``"cuda:1"``; by default the CPU, and the current GPU if there is one.
        backend: one alone; by default all that are available.
        show: what lines are given to.

    Raises:
        ValueError: there is no such backend, or none that serves the device.
        RuntimeError: the backend is not available, or there is no such type of device.
    """
    check(backend)
    chosen = list(places(device, backend))
    if not chosen:
        asked = " and ".join(f"{x!r}" for x in (backend, device) if x) or "any"
        raise ValueError(f"there is no backend to verify ({asked}); python -m trainops says which are available")
    titles = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    show("errors in units of what is allowed; 0: the same bits\n")
    show(f"{'':52} {' '.join(f'{title:>9}' for title in titles)}")
    findings: list[Finding] = []
    for name, at in dict.fromkeys((place.backend, place.device) for place in chosen):
        here = [x for x in chosen if (x.backend, x.device) == (name, at)]
        for op in dict.fromkeys(op for x in here for op in checks_of(x)):
            row = {x.dtype: run(op, x) for x in here if op in checks_of(x)}
            findings += row.values()
            cells = " ".join(f"{cell_of(row.get(dtype)):>9}" for dtype in DTYPES)
            show(f"{f'{name} on {at}: {op}':52} {cells}")
    wrong = [x for x in findings if x.problem]
    if not wrong:
        show("\nall as specified")
        return True
    show(f"\n{len(wrong)} of {len(findings)} are WRONG. For a bug report:\n\n{environment()}\n")
    for x in wrong:
        show(f"{x.place.backend} on {x.place.device}, {x.place.dtype}, {x.op}: {x.problem}")
    return False
