"""The C++ that PTX becomes, and the machine, under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import cuda_shim
import pytest
import torch
from ptx_fixtures import backend
from targets import thorough

if cuda_shim.compiler() is None or torch.cuda.is_available():
    pytest.skip("no C++ compiler, or there is a GPU", allow_module_level=True)

pytestmark = thorough(lambda **_: True)

# nvcc does not bear what is loaded before it.
START = """
import os, sys
del os.environ["LD_PRELOAD"]
sys.path.insert(0, {tests!r})
import torch
"""
KERNELS = """
import test_cuda
from contract import DTYPES
from ptx_fixtures import backend

cuda = backend()
with cuda.active(), cuda.machine.schedule(resident=4, seed=1, races=True):
    for dtype in DTYPES:
        test_cuda.everything(dtype, lambda x, role: test_cuda.at_offset(x, (3 + role) % 9))
print("done")
"""
# A kernel that reads the last 16 bytes of a tensor, as C++ that may be changed to read what is after them.
ONE_KERNEL = """
from ptx import Machine, build, translate

PTX = \"\"\".version 7.8
.target sm_80
// to read at {offset}
.visible .entry k(.param .u64 data)
{{
.reg .b64 %x; .reg .b32 %r<4>;
ld.param.u64 %x, [data];
ld.global.v4.u32 {{%r0, %r1, %r2, %r3}}, [%x+48];
st.global.u32 [%x], %r3;
}}\"\"\"
machine, translated = Machine(), translate.translate
assert "(m + 12)" in translated(PTX)
translate.translate = lambda ptx: translated(ptx).replace("(m + 12)", "(m + {offset})")
build.kernels(PTX)
with machine.memory():
    x = torch.arange(16, dtype=torch.int32)
machine.run("k", 1, 1, x)
assert x[0] == 15
print("done")
"""


def run(program, **texts):
    found = subprocess.run([*cuda_shim.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    library = found.stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("the compiler has no libasan.so")
    options = {"PTX_SANITIZERS": "address,undefined", "ASAN_OPTIONS": "detect_leaks=0", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-c", (START + program).format(tests=str(Path(__file__).parent), **texts)],
        env={**os.environ, **options, "LD_PRELOAD": library},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_cuda_kernels():
    backend()  # or the test is skipped
    done = run(KERNELS)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "done\n"
    assert "AddressSanitizer" not in done.stderr
    assert "ASan" not in done.stderr


@pytest.mark.parametrize("offset", [12, 16])
def test_an_access_that_the_machine_does_not_know_of(offset):
    done = run(ONE_KERNEL, offset=offset)
    if offset == 12:
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-4000:]
    else:
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
