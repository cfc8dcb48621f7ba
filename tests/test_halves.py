"""float16 by the instructions of processors gives the bits of the portable conversions (csrc/cpu/halves.h)."""

import ctypes
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch
from contract import same_bits
from cuda_shim import ROOT, compiler, ninja_build
from targets import TARGETS, thorough
from torch import nn

import trainops

INFO = Path("/proc/cpuinfo")
FLAGS = set(INFO.read_text().partition("flags")[2].partition("\n")[0].split()) if INFO.exists() else set()
NEEDS = {"AVX2": {"avx2", "f16c"}, "AVX512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}}
COMPILES = (
    platform.machine() == "x86_64"
    and compiler() is not None
    and "Free Software Foundation" in ninja_build.command_output(*compiler(), "--version")
)

HERE = [
    pytest.param(isa, marks=pytest.mark.skipif(not (COMPILES and needs <= FLAGS), reason=f"needs GCC and {isa}"))
    for isa, needs in NEEDS.items()
]


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """Functions that count numbers whose bits differ."""
    library = tmp_path_factory.mktemp("halves") / "halves.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([*compiler(), *flags, str(ROOT / "tests" / "halves.cpp"), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))

    def count(name, *arguments):
        function = getattr(loaded, name)
        function.restype = ctypes.c_int64
        return function(*(ctypes.c_uint64(x) for x in arguments))

    return count


@pytest.mark.parametrize("isa", HERE)
def test_every_half_is_widened_to_the_same_bits(faults, isa):
    assert faults(f"widen_faults_{isa}") == 0


# A half has 13 bits less: every tie, its neighbours, numbers all over with NaNs among them, and every number.
@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("first", "stride"), [(0, 0x1000), (1, 0x1000), (0xFFF, 0x1000), (0, 251), (0, 1)])
@thorough(lambda stride, **_: stride == 1)
def test_floats_are_narrowed_to_the_same_bits(faults, isa, first, stride):
    assert faults(f"narrow_faults_{isa}", first, stride) == 0


@pytest.mark.skipif(not COMPILES, reason="needs GCC")
@pytest.mark.parametrize("source", ["convert", "ema", "transform", "update"])
def test_loops_compile_where_there_are_no_such_instructions(tmp_path, source):
    """As with Clang and on ARM, where parallel.h defines no versions."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc" / "cpu" / "parallel.h"
    text = header.read_text()
    versions = "#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)"
    assert versions in text
    header.write_text(text.replace(versions, "#if 0"))
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    path = str(tmp_path / "csrc" / "cpu" / f"{source}.cpp")
    subprocess.run([*compiler(), *flags, *include, path], check=True)


def special(count):
    """float16 numbers of every size, infinities and NaNs among them."""
    patterns = torch.randint(-(2**15), 2**15, (count,), dtype=torch.int16)
    return patterns.view(torch.float16)


@pytest.mark.skipif(all(target.backend != "cpu" for target in TARGETS), reason="the cpu backend was not built")
@pytest.mark.parametrize("average", [torch.float16, torch.float32])
@pytest.mark.parametrize("master", [None, "float32"])
def test_a_step_does_not_depend_on_how_elements_are_cut(monkeypatch, average, master):
    monkeypatch.setenv("TRAINOPS_BACKEND", "cpu")
    weights, grads = special(5000), [special(5000) for _ in range(3)]

    def train(pieces):
        """Tensors of fewer than 8 elements have no block."""
        module = nn.Module()
        module.weights = nn.ParameterList(nn.Parameter(x.clone()) for x in weights.tensor_split(pieces))
        ema = trainops.EMA(module, 0.6, dtype=average, update_after_step=-2)
        optimizer = trainops.AdamW(module.parameters(), lr=1e-2, ema=ema, master=master)
        for grad in grads:
            for p, piece in zip(module.weights, grad.tensor_split(pieces), strict=True):
                p.grad = piece.clone()
            optimizer.step()
        states = [optimizer.state[p] for p in module.weights]
        moments = [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")]
        columns = [list(module.weights), list(ema.module.weights), *moments]
        return [torch.cat([x.detach() for x in column]) for column in columns]

    for whole, cut in zip(train(1), train(700), strict=True):
        nan = whole.isnan()  # which of two NaNs an operation gives is the compiler's choice
        assert same_bits(whole[~nan], cut[~nan])
        assert cut[nan].isnan().all()
