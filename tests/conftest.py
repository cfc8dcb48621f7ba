"""The one contract that every op is held to, and what every test module is run over.

The contract: measured against an evaluation in extended precision, the error of a backend is at most twice that of
PyTorch's own implementation in the same dtype, plus one unit in the last place.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import trainops

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


TARGETS = [Target("reference", "cpu"), Target("cpu", "cpu"), Target("reference", "cuda")]


@pytest.fixture(params=TARGETS, ids="-".join)
def target(request):
    """Each backend on each device that it serves; skipped, saying why, where it is not there."""
    backend, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not (found := trainops.backends()[backend]).available:
        pytest.skip(f"backend {backend}: {found.reason}")
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture(params=SHAPES)
def shapes(request):
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
