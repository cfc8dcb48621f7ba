"""The backends, and the one rule by which one of them is chosen."""

import importlib
import os
from functools import cache

import torch

from ..plain import is_transformed

# Imported at once, because it has to see every fork of the process (csrc/cpu/parallel.cpp). `cuda` and `triton` are
# imported when they are first asked for.
from . import cpu as _cpu  # noqa: F401
from . import pytorch as _pytorch
from ._control import skips
from .interface import (
    NEAREST,
    TO_NEAREST,
    AverageRounding,
    Backend,
    Group,
    Kernels,
    Places,
    Rounding,
    Seeds,
    StepControl,
    StepResult,
)

__all__ = [
    "NEAREST",
    "TO_NEAREST",
    "AverageRounding",
    "Backend",
    "Group",
    "Kernels",
    "Places",
    "Rounding",
    "Seeds",
    "StepControl",
    "StepResult",
    "backends",
    "check",
    "select",
    "skips",
]

NAMES = ("reference", "foreach", "cpu", "cuda", "triton")

# The backends for a type of device, best first, and those for any other.
PREFERENCE = {"cpu": ("cpu", "foreach", "reference"), "cuda": ("cuda", "triton", "foreach", "reference")}
OTHERS = ("foreach", "reference")


@cache
def _kernels(name: str) -> Kernels:
    module = "pytorch" if name == "reference" else name
    kernels: Kernels = importlib.import_module(f"{__name__}.{module}")
    return kernels


@cache
def _probe(name: str) -> Backend:
    return _kernels(name).probe()


def backends() -> dict[str, Backend]:
    """Every backend by name: whether it is available here, and why not.

    >>> trainops.backends()["reference"].available
    True
    """
    return {name: _kernels(name).probe() for name in NAMES}


def check(backend: str | None, origin: str = "") -> None:
    """Raise unless ``backend`` is None or can be used. ``origin`` says where the name comes from.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it is not available; the message says why.
    """
    if backend is None or torch.compiler.is_compiling():  # compiled code uses PyTorch's operations
        return
    if backend not in NAMES:
        raise ValueError(f"unknown backend {backend!r}{origin}; there are {', '.join(NAMES)}")
    if not (found := _probe(backend)).available:
        usable = ", ".join(name for name in NAMES if _probe(name).available)
        raise RuntimeError(f"backend {backend!r}{origin} is not available: {found.reason} (available: {usable})")


def select(backend: str | None, device: torch.device | str, in_memory: bool = True) -> Kernels:
    """The kernels for tensors on a device.

    ``backend`` decides if given, else the environment variable ``TRAINOPS_BACKEND``, else the device. But the
    reference serves tensors that are not ``in_memory`` (see :mod:`trainops.plain`), and whoever wants to see
    operations.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it is not available, or does not take tensors on such a device; the message says why.
    """
    if not in_memory or is_transformed():
        return _pytorch
    device = device if isinstance(device, torch.device) else torch.device(device)
    return _select(backend, os.environ.get("TRAINOPS_BACKEND"), device)


@cache
def _select(backend: str | None, from_environment: str | None, device: torch.device) -> Kernels:
    name = backend or from_environment or _preferred(device)
    check(name, "" if backend or not from_environment else " (from TRAINOPS_BACKEND)")
    kernels = _kernels(name)
    if why := kernels.refusal(device):
        raise RuntimeError(f"backend {name!r} does not take tensors on {str(device)!r}: {why}")
    return kernels


def serving(device: torch.device | str) -> str:
    """The name of the backend that serves a device where a caller asks for none."""
    return os.environ.get("TRAINOPS_BACKEND") or _preferred(torch.device(device))


def passed_over(device: torch.device | str) -> dict[str, str]:
    """The backends that would come before the one that serves a device, by name, and why they do not."""
    device, found = torch.device(device), {}
    for name in PREFERENCE.get(device.type, OTHERS):
        if not (why := _refusal(name, device)):
            break
        found[name] = why
    return found


def _preferred(device: torch.device) -> str:
    return next(name for name in PREFERENCE.get(device.type, OTHERS) if not _refusal(name, device))


def _refusal(name: str, device: torch.device) -> str:
    found = _probe(name)
    return _kernels(name).refusal(device) if found.available else found.reason
