"""What the tests of compiled GPU code share: the CUDA backend on the CPU, and the tests of ops that run once more."""

import functools

import pytest
import test_adamw
import test_clip_grad
import test_drop_path
import test_drop_path_gradients
import test_ema
import test_master_state
import test_masters
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


# The tests of both compiled backends, by module, without their "test_".
OPS = {
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
    test_drop_path: ["drop_path_add_is_timms", "mixed_dtypes_are_promoted_as_by_pytorch", "odd_shapes"],
    test_drop_path_gradients: ["gradients", "gradients_of_layer_scale"],
    test_ema: ["matches_exact_for_all_shapes", "matches_exact_for_all_decays_and_dtypes"],
    test_masters: ["delicate_weights_survive", "nan_stays_nan", "gradients_of_another_type"],
    test_master_state: ["a_parameter_that_was_overwritten_wins", "remainders_that_cannot_belong_are_left_out"],
}


def once_more(*tests):
    """These tests under names that have their module's in them, for pytest to find."""
    names = [(module, name) for by_module in tests for module, its in by_module.items() for name in its]
    return {f"{module.__name__}_{name}": getattr(module, f"test_{name}") for module, name in names}
