"""Triton's kernels as compiled for NVIDIA's GPUs, executed on the CPU: the contract, no races, and no idle barriers.

The cases are in ptx_triton_cases.py. They run in processes of their own, whose Triton does not interpret.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cuda_shim
import pytest
import torch
from targets import thorough

if cuda_shim.compiler() is None or importlib.util.find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("no C++ compiler, no Triton, or there is a GPU", allow_module_level=True)

CASES = Path(__file__).parent / "ptx_triton_cases.py"
ROOT = CASES.parent.parent
ARCHITECTURES = [80, 90]
over_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda number: f"sm_{number}")

KERNELS = ["drop_path", "drop_path_backward", "ema", "finish_layer_scale", "finish_rows", "partial_results", "plan"]
KERNELS += ["transform", "update"]

# Every kernel in float32, bfloat16 and float16, where barriers stand between rounds.
SAMPLE = """
    rounds_of_adamw and not any_types and not float64
    or rounds_of_codes and split
    or backends_have_the_same_codes
    or rounds_of_norms and not float64 and 2.0 or rounds_of_norms and float32
    or rounds_of_scaling and not float64
    or rounds_of_ema and not float64
    or rounds_of_drop_path and packs and True and (bfloat16 or rows and float32)
    or without_its_barrier
"""


class Redundant(NamedTuple):
    """Barriers of one kernel that make no difference. Triton's compiler has put them there."""

    architecture: int
    kernel: str
    variant: dict[str, str]  # types of arguments and constants
    line: str  # of the kernel's file, where it first stands
    count: int
    why: str

    def is_of(self, architecture, kernel, types, constants):
        known = types | constants
        return (self.architecture, self.kernel) == (architecture, kernel) and self.variant.items() <= known.items()

    def places(self):
        name = f"triton_kernels/{self.kernel}.py"
        lines = [line.strip() for line in (ROOT / name).read_text().splitlines()]
        number = 1 + lines.index(self.line)
        return [["bar.sync", f"{name}:{number}"]] * self.count


REDUNDANT = [
    Redundant(
        architecture=90,
        kernel="drop_path",
        variant={"out": "*fp32", "branch": "*bf16", "layer_scale": "*fp32", "rows": "None", "UNIT": "1"},
        line="tl.store(out + element, result, mask=inside)",
        count=2,
        why="each stands before a layout conversion, in one of two loops. A thread then writes to shared memory only "
        "where it alone has read, in the conversion before (of layer scale). The barrier after the writes is needed",
    )
]


def run(tmp_path, choice, architecture=80, seed=0, takes_out=False, every=False):
    """Run cases. Gives of each kernel that was launched what ptx_triton_cases.py reports."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    command += ["-k", " ".join(choice.split())] if choice else []
    command += ["--thorough"] if every else []
    settings = {"ARCHITECTURE": str(architecture), "SEED": str(seed), "REPORT": str(report)}
    settings |= {"BARRIERS": "1"} if takes_out else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "0", **{f"TRAINOPS_PTX_{name}": value for name, value in settings.items()}}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return json.loads(report.read_text())


def assert_explained(found, architecture):
    """The barriers of the table, and no others, made no difference."""
    for kernel, types, constants, unnoticed in found:
        listed = [x for x in REDUNDANT if x.is_of(architecture, kernel, types, constants)]
        assert sorted(unnoticed) == sorted(place for x in listed for place in x.places()), (kernel, types, constants)


def test_a_sample(tmp_path):
    """The contract, no races, and each barrier that is taken out is noticed."""
    found = run(tmp_path, SAMPLE, takes_out=True)
    assert sorted({kernel for kernel, *_ in found}) == KERNELS
    assert_explained(found, 80)


@thorough(lambda **_: True)
@over_architectures
def test_every_barrier_is_needed(tmp_path, architecture):
    found = run(tmp_path, "rounds", architecture, takes_out=True)
    assert sorted({kernel for kernel, *_ in found}) == KERNELS
    assert_explained(found, architecture)
    assert all(any(x.is_of(architecture, *launch[:3]) for launch in found)
               for x in REDUNDANT if x.architecture == architecture)  # fmt: skip


@thorough(lambda **_: True)
@pytest.mark.parametrize("seed", range(1, 9))
def test_any_interleaving(tmp_path, seed):
    run(tmp_path, SAMPLE, seed=seed)


NAMES = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16", "uint32": "uint32"}
SIZES = {"WORDS", "COLUMNS", "ROWS", "UNIT"}  # those of the tensors, not options


def is_a_launch_of(variant, found):
    """Whether a kernel was compiled with a variant's types and options."""
    kernel, types, constants, _ = found
    wanted = {
        name: NAMES[value[1:]] if isinstance(value, str) and value[0] == ":" else str(value)
        for name, value in variant.constants.items()
        if name not in SIZES and not str(value).startswith("@")
    }  # a function of a rule; fmt: skip
    pointers = {name: kind for name, kind in variant.arguments.items() if kind[0] == "*"}
    types = {name: "*i1" if kind == "*u1" else kind for name, kind in types.items()}  # as later Tritons name it
    return (
        kernel == variant.kernel
        and all(types.get(name) == kind for name, kind in pointers.items())
        and all(constants.get(name) == value for name, value in wanted.items())
    )


@thorough(lambda **_: True)
@over_architectures
def test_every_variant(tmp_path, architecture):
    """All that the library compiles meets the contract: every pair of types for one architecture."""
    from benchmarks.triton_variants import variants

    found = run(tmp_path, "", architecture, every=architecture == ARCHITECTURES[0])
    missing = [f"{variant.kernel} {variant.label}" for variant in variants()
               if not any(is_a_launch_of(variant, launch) for launch in found)]  # fmt: skip
    assert not missing


@thorough(lambda **_: True)
def test_a_failing_case_fails(tmp_path):
    with pytest.raises(AssertionError, match="deselected"):
        run(tmp_path, "no_case_has_this_name")
