"""Tests of the ops once more, with the CUDA backend's compiled kernels executed on the CPU."""

import pytest
import test_cuda
import test_ends
import torch
from ptx_fixtures import CUDA, OPS, backend, once_more
from targets import thorough

INF = float("inf")

OF_CUDA = {test_cuda: ["a_step_is_that_of_the_cpu_backend", "norms_of_long_rows", "a_learning_rate_in_memory"]}
globals().update(once_more(OPS, OF_CUDA))


def is_no_sample(dtype=None, dtypes=None, steps=1, shapes="mixed", max_norm=0.5, chunks=9, decay=0.9, **params):
    """One step of the types that PTX treats differently, and shapes that take every path of the kernels."""
    return (
        dtype in (torch.float64, torch.float16)
        or dtypes is not None
        or (steps, max_norm, decay) != (1, 0.5, 0.9)
        or shapes not in ("mixed", "chunks")
        or chunks not in (1, 9, 2049)
        or (params.get("bad", -INF), params.get("how", "both")) != (-INF, "both")
        or (params.get("norm_type", 2.0) != 2.0 and (chunks > 9 or shapes == "mixed"))
        or not params.get("scale_by_keep", True)
    )


pytestmark = [
    thorough(is_no_sample),
    pytest.mark.usefixtures("active"),
]


@pytest.fixture
def active():
    with backend().active():
        yield


@pytest.fixture(params=[CUDA], ids=["cuda-ptx"])
def target(request):
    return request.param


@pytest.mark.parametrize("op", test_ends.OPS)
@pytest.mark.parametrize("offset", [test_ends.MARGIN, 1 + test_ends.MARGIN], ids=["aligned", "unaligned"])
def test_what_is_beyond_the_ends_is_left_alone(op, offset, dtype):
    test_ends.check_ends(CUDA, dtype, op, offset)
