"""Builds the CUDA backend for the CPU: the kernels of ``csrc/cuda`` as C++, run by ``cuda_shim.cpp``."""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]


def compiler():
    """The C++ compiler as a command, or None where there is none."""
    command = shlex.split(os.environ.get("CXX", "g++"))
    return command if shutil.which(command[0]) else None


def build(*flags):
    """The extension module ``_cuda`` for CPU tensors; what was built before of the same sources is used again."""
    sources = [
        ROOT / "csrc" / "bindings_cuda.cpp",
        *sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        HERE / "cuda_shim.cpp",
    ]
    headers = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), HERE / "cuda_runtime.h"]
    command = [*compiler(), *FLAGS, "-DTRAINOPS_DEVICE_TYPE=1", *flags]
    content = repr((command, sys.version, pybind11.__version__)).encode()
    content += b"".join(path.read_bytes() for path in [*sources, *sorted(headers)])
    folder = ROOT / "build" / "cuda_shim" / hashlib.sha256(content).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes, one builds
        if not module.exists():
            with tempfile.TemporaryDirectory() as scratch:
                built = Path(scratch) / module.name
                compile_all(command, sources, Path(scratch), built)
                shutil.move(built, module)
    return module


def compile_all(command, sources, scratch, module):
    include = [f"-I{path}" for path in (HERE, pybind11.get_include(), sysconfig.get_path("include"))]
    objects = [scratch / f"{source.name}.o" for source in sources]
    jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    pending = [
        [*command, *include, "-x", "c++", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    for first in range(0, len(pending), jobs):
        running = [subprocess.Popen(part) for part in pending[first : first + jobs]]
        if any([process.wait() for process in running]):  # noqa: C419 (waits for all)
            raise RuntimeError("the CUDA sources do not compile as C++")
    subprocess.run([*command, "-shared", *map(str, objects), "-o", str(module)], check=True)


def load(path, name="trainops._cuda"):
    """Import a module that was built, as the package's own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Shim:
    """What tests may see and choose."""

    def __init__(self, path):
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

    def fail(self, launch):
        """Let the n-th launch from now on fail."""
        self.library.shim_fail(ctypes.c_int(launch))
