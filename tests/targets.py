"""The backends and devices that tests are run over: those that are there, and why the others are not."""

import os
import sys
from typing import NamedTuple

import pytest
import torch

# Without a GPU, the Triton kernels are run by Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cuda_shim

# Nor can the CUDA kernels run: they are compiled for the CPU, as the module that the backend finds.
SHIM = None
if not torch.cuda.is_available() and cuda_shim.compiler():
    # An access of 16 bytes at an odd address is an error on a GPU; here it is one as well, by an illegal instruction.
    strict = "-fsanitize=alignment -fsanitize-undefined-trap-on-error"
    path = cuda_shim.build(*os.environ.get("TRAINOPS_SHIM_FLAGS", strict).split())
    sys.modules["trainops._cuda"] = cuda_shim.load(path)
    SHIM = cuda_shim.Shim(path)

import trainops  # noqa: E402 (finds what has been chosen)
from trainops.adapters import _triton  # noqa: E402


class Target(NamedTuple):
    """A backend, and the device that its tensors are on."""

    backend: str
    device: str


REFERENCE = Target("reference", "cpu")
FOREACH = Target("foreach", "cpu")
INTERPRETER = Target("triton", "cpu")
EVERY = [
    REFERENCE,
    FOREACH,
    Target("cpu", "cpu"),
    Target("cuda", "cpu"),
    INTERPRETER,
    Target("reference", "cuda"),
    Target("foreach", "cuda"),
    Target("cuda", "cuda"),
    Target("triton", "cuda"),
]


def absence(target):
    """Why a target is not there; empty where it is."""
    backend, device = target
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if not (found := trainops.backends()[backend]).available:
        return f"backend {backend}: {found.reason}"
    if target == Target("cuda", "cpu") and SHIM is None:
        return "the CUDA kernels are not compiled for the CPU: there is a CUDA device, or no C++ compiler"
    if target == INTERPRETER and not _triton.interpreted():
        return "the interpreter is off, because there is a CUDA device"
    return ""


TARGETS = [target for target in EVERY if not absence(target)]
CPU_TARGETS = [target for target in TARGETS if target.device == "cpu"]
KERNELS = [target for target in TARGETS if target.backend not in ("reference", "foreach")]

over_kernels = pytest.mark.parametrize("target", KERNELS, indirect=True, ids="-".join)
over_gpu_kernels = pytest.mark.parametrize(
    "target",
    [target for target in KERNELS if target.device == "cuda"]
    or [pytest.param(None, marks=pytest.mark.skip("no GPU"))],
    ids=str,
    indirect=True,
)
over_cpu_targets = pytest.mark.parametrize("target", CPU_TARGETS, indirect=True, ids="-".join)


def over(name, table):
    return pytest.mark.parametrize(name, table.values(), ids=table.keys())


def interpreted(when):
    """Leave cases of Triton's interpreter, which is slow, to `make test-all`, unless ``when(**params)`` is true."""
    return thorough(lambda target, **params: target == INTERPRETER and not when(**params))


def thorough(when):
    """Leave cases for which ``when(**params)`` is true to `make test-all`."""
    return pytest.mark.thorough.with_args(when)
