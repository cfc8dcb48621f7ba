"""Tests of the ops once more, with the CUDA backend's compiled kernels executed on the CPU."""

import pytest
import test_adamw
import test_clip_grad
import test_cuda
import test_drop_path
import test_drop_path_gradients
import test_ema
import test_ends
import torch
from ptx_fixtures import CUDA, backend
from targets import thorough

INF = float("inf")

AGAIN = {
    test_adamw: [
        "matches_exact_for_all_options",
        "matches_exact_for_all_shapes",
        "clipping_matches_exact",
        "averages_match_exact",
        "a_skipped_step_changes_no_bit",
        "grad_scaler",
    ],
    test_clip_grad: [
        "matches_exact_for_all_shapes",
        "matches_exact_for_all_max_norms",
        "matches_exact_for_mixed_dtypes",
        "norm_is_invariant_under_splitting",
        "clip_grad_value_is_torchs_for_all_shapes",
    ],
    test_cuda: [
        "a_step_is_that_of_the_cpu_backend",
        "norms_of_long_rows",
        "a_learning_rate_in_memory",
    ],
    test_drop_path: [
        "drop_path_add_is_timms",
        "mixed_dtypes_are_promoted_as_by_pytorch",
        "odd_shapes",
    ],
    test_drop_path_gradients: [
        "gradients",
        "gradients_of_layer_scale",
    ],
    test_ema: [
        "matches_exact_for_all_shapes",
        "matches_exact_for_all_decays_and_dtypes",
    ],
}
for module, names in AGAIN.items():
    for name in names:
        globals()[f"test_{module.__name__.removeprefix('test_')}_{name}"] = getattr(module, f"test_{name}")


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
