"""Builds the compiled backends. Everything declarative is in pyproject.toml.

A backend that cannot be built is left out, never fatal: the reason goes into ``trainops/_build.json``, where
``python -m trainops`` shows it. No torch is needed to build, and the binaries serve every torch version.

Environment:
    TRAINOPS_SKIP=cpu              backends not to build, separated by commas
    TRAINOPS_REQUIRE=cpu,cuda      backends whose failure is an error, separated by commas
    MAX_JOBS=8                     compiler processes at a time
    CUDA_HOME=/usr/local/cuda      where bin/nvcc is (or CUDA_PATH); else it is looked for on PATH
    TORCH_CUDA_ARCH_LIST=8.0;9.0+PTX   GPUs to compile for
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BACKENDS = {"trainops._cpu": "cpu", "trainops._cuda": "cuda"}
ARCHITECTURES = ["8.0", "9.0", "10.0"]


def listed(variable: str) -> set[str]:
    names = {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}
    if unknown := names - set(BACKENDS.values()):
        raise SystemExit(f"{variable} names {sorted(unknown)}; there are {sorted(BACKENDS.values())}")
    return names


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def cpu_extension() -> Pybind11Extension:
    # Contraction to fused multiply-add is off so that every instruction set gives the same bits.
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    return Pybind11Extension(
        "trainops._cpu",
        sources("csrc/bindings_cpu.cpp", "csrc/cpu/*.cpp"),
        depends=sources("csrc/*.h", "csrc/cpu/*.h", "csrc/math/*.h"),
        cxx_std=17,
        extra_compile_args=flags + openmp,
        extra_link_args=openmp,
    )


def cuda_extension() -> Pybind11Extension:
    # nvcc compiles the kernels in CompileCuda; what is left is C++.
    return Pybind11Extension(
        "trainops._cuda",
        ["csrc/bindings_cuda.cpp"],
        depends=sources("csrc/*.h", "csrc/cuda/*", "csrc/math/*.h"),
        cxx_std=17,
        extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall"],
    )


class Nvcc:
    """CUDA's compiler: where it is, and what it makes of kernels."""

    # Contraction to fused multiply-add is off so that the CPU and every GPU give the same bits.
    FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")

    def __init__(self) -> None:
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        candidates = [str(Path(home, "bin", "nvcc")) for home in homes] or ["nvcc"]
        self.path = next((found for found in map(shutil.which, candidates) if found), None)

    def version(self) -> str:
        """Its release; empty if there is none that works."""
        try:
            answer = subprocess.run([str(self.path), "--version"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        found = re.search(r"release [\d.]+, V([\d.]+)", answer.stdout)
        return f"nvcc {found[1]}" if found else ""

    def architectures(self) -> list[str]:
        """As torch writes them: 9.0, or 9.0+PTX for later GPUs as well. By default those that this nvcc knows."""
        if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            return listed.replace(";", " ").replace(",", " ").split()
        answer = subprocess.run([str(self.path), "--list-gpu-arch"], capture_output=True, text=True, check=True)
        known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in answer.stdout.split()]
        return [*known[:-1], f"{known[-1]}+PTX"] if known else ARCHITECTURES

    def compile(self, source: str, target: Path) -> Path:
        code = []
        for architecture in self.architectures():
            number = architecture.removesuffix("+PTX").replace(".", "")
            kinds = ("sm", "compute") if architecture.endswith("+PTX") else ("sm",)
            code += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([str(self.path), *self.FLAGS, *code, "-c", source, "-o", str(target)], check=True)
        return target

    def library_folders(self) -> list[str]:
        """Where the CUDA runtime is, in the words of nvcc, which may be a script that knows."""
        command = [str(self.path), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.search(r"^#\$ LIBRARIES=(.*)$", answer.stdout + answer.stderr, re.MULTILINE)
        return [flag.removeprefix("-L") for flag in shlex.split(found[1] if found else "")]

    def add_to(self, ext: Pybind11Extension, scratch: Path) -> None:
        """Compile the kernels, and link them and the CUDA runtime into the extension."""
        if not self.version():
            raise FileNotFoundError("there is no nvcc")
        kernels = sources("csrc/cuda/*.cu")
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
            targets = pool.map(self.compile, kernels, [scratch / f"{kernel}.o" for kernel in kernels])
            ext.extra_objects = [str(target) for target in targets]
        # Static, so that the module loads where there is no CUDA, and beside any version that torch brings.
        ext.library_dirs = self.library_folders()
        ext.extra_link_args = ["-l:libcudart_static.a", "-lrt", "-ldl", "-lpthread"]


class BuildBackends(build_ext):
    """``build_ext`` that records what became of every backend."""

    def run(self) -> None:
        self.record: dict[str, dict[str, str]] = {}
        super().run()
        inplace = ROOT if self.inplace else Path(self.build_lib)
        target = inplace / "trainops" / "_build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.record, indent=2) + "\n")

    def build_extension(self, ext: Pybind11Extension) -> None:
        name = BACKENDS[ext.name]
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # never leave a stale binary behind
        if name in listed("TRAINOPS_SKIP"):
            self.record[name] = {"reason": "skipped by TRAINOPS_SKIP when trainops was built"}
            return
        nvcc = Nvcc() if name == "cuda" else None
        compiler, cxx = nvcc.version() if nvcc else "", self.compiler_version()
        try:
            if nvcc:
                nvcc.add_to(ext, Path(self.build_temp))
            super().build_extension(ext)
        except Exception as error:
            if name in listed("TRAINOPS_REQUIRE"):
                raise
            if nvcc and not compiler:
                reason = "there was no nvcc when trainops was built"
            elif not cxx:
                reason = f"there was no working C++ compiler when trainops was built ({self.cxx()})"
            else:
                reason = f"{compiler or cxx} failed; `pip install -v .` in the source tree shows its output"
            self.record[name] = {"reason": reason}
            if not nvcc or compiler:
                self.warn(f"trainops is built without its {name} backend: {reason}: {error}")
        else:
            gpus = f" for {', '.join(nvcc.architectures())}" if nvcc else ""
            self.record[name] = {"built_with": (compiler or cxx or self.cxx()) + gpus}

    def cxx(self) -> str:
        candidates = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        return os.environ.get("CXX") or candidates[0]

    def compiler_version(self) -> str:
        """The first line of what the compiler says of itself; empty if there is none that works."""
        try:
            answer = subprocess.run(
                [*shlex.split(self.cxx()), "--version"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        return answer.stdout.partition("\n")[0]

    def built(self) -> list[Pybind11Extension]:
        return [ext for ext in self.extensions if "built_with" in self.record[BACKENDS[ext.name]]]

    def get_outputs(self) -> list[str]:
        self.extensions = self.built()  # one that was not built leaves no file to install
        return super().get_outputs()

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            Path(ROOT, *ext.name.split(".")[:-1], Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        self.extensions = self.built()
        super().copy_extensions_to_source()


ParallelCompile("MAX_JOBS", default=os.cpu_count() or 1, needs_recompile=lambda *_: True).install()
setup(ext_modules=[cpu_extension(), cuda_extension()], cmdclass={"build_ext": BuildBackends})
