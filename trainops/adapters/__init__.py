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
from .interface import Backend, Group, Kernels, StepControl, StepResult

__all__ = ["Backend", "Group", "Kernels", "StepControl", "StepResult", "backends", "check", "select"]

NAMES = ("reference", "cpu", "cuda", "triton")

# The backends for a type of device, best first. The reference serves other devices.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


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


def select(backend: str | None, device_type: str, in_memory: bool = True) -> Kernels:
    """The kernels for tensors on a type of device.

    ``backend`` decides if given, else the environment variable ``TRAINOPS_BACKEND``, else the device. But the
    reference serves tensors that are not ``in_memory`` (see :mod:`trainops.plain`), and whoever wants to see
    operations.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: it is not available, or does not take tensors on such a device.
    """
    if not in_memory or is_transformed():
        return _pytorch
    return _select(backend, os.environ.get("TRAINOPS_BACKEND"), device_type)


@cache
def _select(backend: str | None, from_environment: str | None, device_type: str) -> Kernels:
    name = backend or from_environment or _preferred(device_type)
    check(name, "" if backend or not from_environment else " (from TRAINOPS_BACKEND)")
    kernels = _kernels(name)
    if not kernels.serves(device_type):
        raise RuntimeError(f"backend {name!r} does not take tensors on {device_type!r} devices")
    return kernels


def serving(device_type: str) -> str:
    """The name of the backend that serves a type of device where a caller asks for none."""
    return os.environ.get("TRAINOPS_BACKEND") or _preferred(device_type)


def _preferred(device_type: str) -> str:
    candidates = PREFERENCE.get(device_type, ("reference",))
    return next(name for name in candidates if _probe(name).available and _kernels(name).serves(device_type))
