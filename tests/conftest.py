"""The one contract that every op is held to, and what every test module is run over.

The contract: measured against an evaluation in extended precision, the error of a backend is at most twice that of
PyTorch's own implementation in the same dtype, plus one unit in the last place.
"""

import dataclasses
import gc
import importlib
import inspect
import os
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch

# Without a GPU, the Triton kernels are run by Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cuda_shim

# Nor can the CUDA kernels run: they are compiled for the CPU, as the module that the backend finds.
SHIM = None
if not torch.cuda.is_available() and cuda_shim.compiler():
    path = cuda_shim.build(*os.environ.get("TRAINOPS_SHIM_FLAGS", "").split())
    sys.modules["trainops._cuda"] = cuda_shim.load(path)
    SHIM = cuda_shim.Shim(path)

import trainops  # noqa: E402 (finds what has been chosen)
from trainops.backends import triton as triton_backend  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# One unit in the last place, relative to the largest element.
ULP = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}

# Shapes that have broken kernels before: scalars, nothing, one element, vector tails, several chunks, many tensors.
SHAPES = {
    "scalar": [()],
    "empty": [(0,), (3, 0, 2)],
    "one": [(1,)],
    "tail": [(127,)],
    "odd": [(1025,)],
    "chunks": [(3, 70001)],
    "mixed": [(), (0,), (1,), (7,), (64, 3), (127,), (33, 31), (1025,), (2, 3, 5, 7), (70001,)],
    "many": [(5,)] * 300,
}


class Target(NamedTuple):
    """A backend, and the device that its tensors are on."""

    backend: str
    device: str


TARGETS = [
    Target("reference", "cpu"),
    Target("cpu", "cpu"),
    Target("cuda", "cpu"),
    Target("triton", "cpu"),
    Target("reference", "cuda"),
    Target("cuda", "cuda"),
    Target("triton", "cuda"),
]


@pytest.fixture(params=TARGETS, ids="-".join)
def target(request):
    """Each backend on each device that it serves; skipped, saying why, where it is not there."""
    backend, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not (found := trainops.backends()[backend]).available:
        pytest.skip(f"backend {backend}: {found.reason}")
    if (backend, device) == ("cuda", "cpu") and SHIM is None:
        pytest.skip("the CUDA kernels are not compiled for the CPU: there is a CUDA device, or no C++ compiler")
    if (backend, device) == ("triton", "cpu") and not triton_backend._interpreted():
        pytest.skip("the interpreter is off, because there is a CUDA device")
    return request.param


def mend_interpreter():
    """Make Triton's interpreter round to bfloat16 as GPUs do, where it truncates; and make it a lot faster."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert_float, patch_lang, patched = interpreter._convert_float, interpreter._patch_lang, set()

    def convert(x, source, target, rounding_mode):
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = x.view(np.uint32)
            to_nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(x), (bits >> 16) | 0x40, to_nearest_even).astype(np.uint16)
        return convert_float(x, source, target, rounding_mode)

    def patch_once(function):
        # It replaces the functions of the language by its own, at each call of a device function anew.
        visible = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        seen = tuple(any(module is language for module in visible) for language in (tl, tl.core))
        if seen not in patched:
            patched.add(seen)
            patch_lang(function)
        return interpreter._LangPatchScope()

    interpreter._convert_float, interpreter._patch_lang = convert, patch_once
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    interpreter.GridExecutor.__call__ = np.errstate(all="ignore")(interpreter.GridExecutor.__call__)  # as on GPUs
    kernels = importlib.import_module("trainops.triton_kernels")
    kernels._common.block_numel = lambda *_: 4096  # its time goes with the number of blocks


if triton_backend._interpreted() and trainops.backends()["triton"].available:
    mend_interpreter()
    gc.set_threshold(100_000)  # the interpreter makes thousands of small objects a step


def spare_the_interpreter(target, unless):
    """Skip a test of a thousand kernel programs, which the interpreter takes seconds for, where others cover it."""
    if target == Target("triton", "cpu") and not unless:
        pytest.skip("a thousand programs: interpreted with fewer types and options")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=SHAPES)
def shapes(request, target):
    if request.param == "many" and target == Target("triton", "cpu"):
        return SHAPES["many"][:40]  # the interpreter takes some hundredths of a second for each
    return SHAPES[request.param]


@pytest.fixture(autouse=True)
def _seed():
    torch.default_generator.manual_seed(0)  # torch.manual_seed asks every accelerator first, for a millisecond


def exact(x):
    """``x`` in extended precision."""
    return x.detach().double().cpu().numpy().astype(np.longdouble)


def assert_contract(ours, torchs, true, what=""):
    """Hold ``ours`` to the contract: a tensor, PyTorch's tensor for the same, and the truth in extended precision."""
    assert ours.dtype == torchs.dtype, what
    assert ours.shape == torchs.shape, what
    if ours.numel() == 0:
        return
    ulp = ULP[ours.dtype] * np.abs(true).max()
    allowed = 2 * np.abs(exact(torchs) - true).max() + ulp
    error = np.abs(exact(ours) - true).max()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def same_bits(a, b):
    """Whether two tensors agree bit for bit, signs of zero and NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_bytes = [x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return torch.equal(*as_bytes)
