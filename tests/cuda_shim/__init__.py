"""Builds the CUDA backend for the CPU: the kernels of ``csrc/cuda`` as C++, run by ``cuda_shim.cpp``."""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]


def load(path, name="trainops._cuda"):
    """Import a module that was built, as the package's own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ninja_build = load(ROOT / "csrc" / "ninja_build.py", "ninja_build")


def compiler():
    """The C++ compiler as a command, or None where there is none."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if shutil.which(command[0]) else None


def build(*flags):
    """The extension module ``_cuda`` for CPU tensors; only what changed since the last time is compiled."""
    sources = [ROOT / "csrc" / "cuda" / "module.cpp", *(ROOT / "csrc" / "cuda").glob("*.cu"), HERE / "cuda_shim.cpp"]
    relative = sorted(path.relative_to(ROOT).as_posix() for path in sources)
    command = [*compiler(), *FLAGS, "-DTRAINOPS_DEVICE_TYPE=1", *flags]
    folders = (HERE.relative_to(ROOT), pybind11.get_include(), sysconfig.get_path("include"))
    cxx = [*command, *(f"-I{folder}" for folder in folders), "-x", "c++"]
    name = hashlib.sha256(repr((command, sys.version)).encode()).hexdigest()[:16]
    module = Path("build", "cuda_shim", name, f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}")
    (ROOT / module.parent).mkdir(parents=True, exist_ok=True)
    with open(ROOT / module.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes, one builds
        version = ninja_build.command_output(*compiler(), "--version").partition("\n")[0]
        compilers = {".cpp": cxx, ".cu": cxx}
        ninja_build.build_module(module, relative, compilers, [*command, "-shared"], [], version, quiet=True)
    return ROOT / module


class Shim:
    """What tests may see and choose."""

    def __init__(self, path):
        self.path = path
        self.library = ctypes.CDLL(str(path))

    def launches(self):
        """The names of the kernels that were launched since it was last asked."""
        names = ctypes.create_string_buffer(1 << 20)
        self.library.shim_launches(names, ctypes.c_size_t(len(names)))
        return names.value.decode().split()

    @contextmanager
    def blocks(self, limit=2**32 - 1, order=0):
        """Launch at most so many blocks; run them forwards (0), backwards (1), or in an order of that seed."""
        self.library.shim_blocks(ctypes.c_uint(limit))
        self.library.shim_order(ctypes.c_uint(order))
        try:
            yield
        finally:
            self.library.shim_blocks(ctypes.c_uint(2**32 - 1))
            self.library.shim_order(ctypes.c_uint(0))

    @contextmanager
    def held(self):
        """Let launches wait: one that nobody lets go within 20 seconds ends the process."""
        self.library.shim_hold(ctypes.c_int(1))
        try:
            yield
        finally:
            self.library.shim_hold(ctypes.c_int(0))

    def waiting(self):
        """How many launches wait."""
        return self.library.shim_waiting()

    def fail(self, launch):
        """Let the n-th launch from now on fail."""
        self.library.shim_fail(ctypes.c_int(launch))
