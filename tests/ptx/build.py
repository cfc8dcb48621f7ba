"""Builds what runs PTX: the machine, kernels from PTX, and the CUDA backend's module ``_cuda`` for CPU tensors.

What has not changed is not built again: ninja sees to the sources, and kernels are kept under the hash of their PTX.
"""

import ctypes
import fcntl
import hashlib
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import cuda_shim
import pybind11
import torch

from . import translate

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SANITIZERS = os.environ.get("PTX_SANITIZERS", "")  # such as address,undefined
FROM_NVCC = Path("build", "ptx", "cuda")  # within ROOT
FOLDER = Path("build", "-".join(["ptx", *SANITIZERS.split(",")]) if SANITIZERS else "ptx")
FLAGS = ["-std=gnu++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
FLAGS += ["-fwrapv", "-ffp-contract=off"]  # integers wrap, and every operation rounds
if SANITIZERS:
    FLAGS += ["-O0", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]  # optimizing takes an hour
POISON = "-ftrivial-auto-var-init=pattern"  # what registers hold that were never written

ninja_build = cuda_shim.ninja_build
sys.modules.setdefault("ninja_build", ninja_build)  # as nvcc.py, which setup.py imports, calls it
nvcc = cuda_shim.load(ROOT / "csrc" / "nvcc.py", "nvcc").Nvcc()


@contextmanager
def alone():
    """Of several test processes, one builds."""
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    with open(ROOT / FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compiler_version():
    return ninja_build.command_output(*cuda_shim.compiler(), "--version").partition("\n")[0]


def sources(*names):
    return [(HERE / name).relative_to(ROOT).as_posix() for name in names]


def machine():
    """The machine, as a shared library."""
    torchs = Path(torch.__file__).parent
    command = [*cuda_shim.compiler(), *FLAGS, "-Wall"]
    compiler = [*command, "-isystem", str(torchs / "include")]
    path = FOLDER / "machine" / "libptx_machine.so"
    linker = [*command, "-shared", f"-Wl,-soname,{path.name}"]
    libraries = [f"-L{torchs / 'lib'}", "-lc10"]
    files = sources("machine.cpp", "thread.cpp", "races.cpp", "memory.cpp", "cuda_runtime.cpp")
    with alone():
        ninja_build.build_module(path, files, {".cpp": compiler}, linker, libraries, compiler_version(), quiet=True)
    return ctypes.CDLL(str(ROOT / path))


def kernels(ptx):
    """Compile the kernels of PTX, and make them known to the machine in place of others of their names."""
    parts = [
        (HERE / name).read_text()
        for name in ("translate.py", "instructions.py", "forms.py", "arithmetic.h", "floats.h", "machine.h")
    ]
    key = hashlib.sha256("\n".join([ptx, *parts, compiler_version(), *FLAGS, POISON]).encode()).hexdigest()[:24]
    library = ROOT / FOLDER / "kernels" / f"{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        draft = library.with_suffix(f".{os.getpid()}")
        source = library.with_suffix(f".{os.getpid()}.cpp")
        source.write_text(translate.translate(ptx))
        command = [*cuda_shim.compiler(), *FLAGS, POISON, "-shared", f"-I{HERE}", str(source), "-o", str(draft)]
        subprocess.run([*command, str(ROOT / FOLDER / "machine" / "libptx_machine.so")], check=True)
        draft.replace(library)
        source.unlink()
    loaded = ctypes.CDLL(str(library))
    loaded.add()
    return loaded


def cuda_module(architecture):
    """The path of ``_cuda``, whose launches go to the machine; the PTX of each of its sources by name; their kernels.

    ``architecture``: what nvcc makes the PTX for, such as 80.
    """
    relative = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    from_nvcc, folder = FROM_NVCC / str(architecture), FOLDER / f"cuda_{architecture}"
    keep = from_nvcc / "kept"
    (ROOT / keep).mkdir(parents=True, exist_ok=True)
    gencode = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    device_type = "-DTRAINOPS_DEVICE_TYPE=1"
    cu = [nvcc.path, *nvcc.FLAGS, gencode, "-lineinfo", device_type, "--keep", "--keep-dir", str(keep)]
    host = from_nvcc / "host.o"
    command = [*cuda_shim.compiler(), *FLAGS]
    joined = [*cuda_shim.compiler(), "-r", "-nostdlib"]
    with alone():
        ninja_build.build_module(host, relative, {".cu": cu}, joined, [], f"{nvcc.version}", quiet=True)
        folders = (pybind11.get_include(), sysconfig.get_path("include"))
        cxx = [*command, device_type, *(f"-I{folder}" for folder in folders)]
        module = folder / "module" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        library = FOLDER / "machine" / "libptx_machine.so"
        version = f"{compiler_version()} {hashlib.sha256((ROOT / host).read_bytes()).hexdigest()}"
        linker = [*command, "-shared", "-Wl,-rpath,$ORIGIN/../../machine"]
        bindings = ["csrc/cuda/module.cpp"]
        ninja_build.build_module(
            module, bindings, {".cpp": cxx}, linker, [str(host), str(library)], version, quiet=True
        )
        texts = {
            Path(name).stem: (ROOT / keep / Path(name).with_suffix(".ptx").name).read_text() for name in relative
        }
        texts = {name: text for name, text in texts.items() if ".entry" in text}
        with ThreadPoolExecutor(ninja_build.max_jobs()) as pool:
            libraries = list(pool.map(kernels, texts.values()))
    return ROOT / module, texts, libraries
