"""A sample of Triton's kernels as compiled for sm_80, executed on the CPU: the contract, and no races."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import cuda_shim
import pytest
import torch
from targets import thorough

if cuda_shim.compiler() is None or importlib.util.find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("no C++ compiler, no Triton, or there is a GPU", allow_module_level=True)

pytestmark = thorough(lambda **_: True)  # for now: they take half a minute of one core

# In a process of its own, whose Triton does not interpret.
PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
import torch
import test_adamw, test_clip_grad, test_drop_path_gradients, test_ema, training
from ptx.triton_driver import through_ptx
from targets import Target

target, shapes = Target("triton", "cpu"), ((33, 31), (127,))
dtypes = [getattr(torch, name) for name in {dtypes!r}]
with through_ptx() as (machine, launched), machine.schedule(resident=4, seed={seed}, races=True):
    for dtype in dtypes:
        for check, *args in [
            (training.check_steps, shapes, {{"lr": 0.05, "amsgrad": True}}, 1, 0.5),
            (test_ema.test_matches_exact_for_all_shapes, [(1025,), (3, 4001), ()]),
            (test_adamw.test_a_skipped_step_changes_no_bit, float("nan"), "both"),
            (test_clip_grad.test_matches_exact_for_all_max_norms, 0.5),
            (test_clip_grad.test_clip_grad_value_is_torchs_for_all_values, 0.5),
            (test_drop_path_gradients.test_gradients_of_layer_scale, {shape!r}),
        ]:
            torch.manual_seed(0)
            check(target, dtype, *args)
print(*sorted(set(launched)))
"""
KERNELS = ["drop_path", "drop_path_backward", "ema", "finish_layer_scale", "finish_rows", "partial_results", "plan"]
KERNELS += ["transform", "update"]


def run(program):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )


def program(dtypes, seed=0):
    return PROGRAM.format(tests=str(Path(__file__).parent), dtypes=dtypes, seed=seed, shape=(4, 5, 64))


@thorough(lambda dtype, seed: (dtype, seed) not in [("float32", 0), ("bfloat16", 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_contract_without_a_race(dtype, seed):
    done = run(program([dtype], seed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == KERNELS


# Without the barrier, a thread could read the count that another has stored.
WITHOUT = """
import sys
sys.path.insert(0, {tests!r})
import re
from ptx import build
from ptx.triton_driver import through_ptx
from targets import Target
import test_adamw, torch

kernels = build.kernels
def without_barriers(ptx):
    before_count = re.compile(r"bar\\.sync\\s+0;(?=[^@]*(?:@\\S+\\s+)?st\\.global\\.b64)")
    return kernels(before_count.sub("", ptx) if ".entry plan" in ptx else ptx)
build.kernels = without_barriers
with through_ptx() as (machine, launched), machine.schedule(resident=4, races=True):
    test_adamw.test_a_skipped_step_changes_no_bit(Target("triton", "cpu"), torch.float32, float("nan"), "both")
"""


def test_a_barrier_taken_out_is_noticed():
    done = run(WITHOUT.format(tests=str(Path(__file__).parent)))
    assert done.returncode != 0
    assert "RuntimeError: plan: race in" in done.stderr, done.stderr[-3000:]
