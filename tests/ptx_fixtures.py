"""The CUDA backend with its compiled kernels executed on the CPU, for the tests about it."""

import functools

import pytest
from targets import SHIM, Target

CUDA = Target("cuda", "cpu")


ARCHITECTURES = [80, 75, 90, 100]  # the first in `make test`


@functools.cache
def backend(architecture=ARCHITECTURES[0]):
    """Built when first asked for; the tests are skipped where it cannot be."""
    if SHIM is None:
        pytest.skip("there is a CUDA device, or no C++ compiler")
    from ptx.backend import CudaBackend, build

    if not build.nvcc.path:
        pytest.skip("no nvcc, which makes the PTX of the CUDA kernels")
    return CudaBackend(architecture)
