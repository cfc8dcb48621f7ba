"""Builds the compiled backends. Everything declarative is in pyproject.toml.

A backend that cannot be built is left out, never fatal: the reason goes into ``trainops/_build.json``, where
``python -m trainops`` shows it. No torch is needed to build, and the binaries serve every torch version.

Environment:
    TRAINOPS_SKIP=cpu              backends not to build, separated by commas; core, which all need, counts as one
    TRAINOPS_REQUIRE=cpu,cuda      backends whose failure is an error, separated by commas
    MAX_JOBS=8                     compiler processes at a time
    CUDA_HOME=/usr/local/cuda      where bin/nvcc is (or CUDA_PATH); else it is looked for on PATH
    TORCH_CUDA_ARCH_LIST=8.0;9.0+PTX   GPUs to compile for
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
from ninja_build import ROOT, build_module, command_output, max_jobs
from nvcc import Nvcc

BACKENDS = {"trainops._core": "core", "trainops._cpu": "cpu", "trainops._cuda": "cuda"}
DARWIN = platform.system() == "Darwin"


def listed(variable: str) -> set[str]:
    names = {name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()}
    if unknown := names - set(BACKENDS.values()):
        raise SystemExit(f"{variable} names {sorted(unknown)}; there are {sorted(BACKENDS.values())}")
    return names


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def core_extension() -> Pybind11Extension:
    return Pybind11Extension(
        "trainops._core",
        sources("csrc/core/*.cpp"),
        cxx_std=17,
        extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall"],
    )


def cpu_extension() -> Pybind11Extension:
    # Contraction to fused multiply-add is off so that every instruction set gives the same bits.
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
    openmp = [] if DARWIN else ["-fopenmp", "-pthread"]
    return Pybind11Extension(
        "trainops._cpu",
        sources("csrc/cpu/*.cpp"),
        cxx_std=17,
        extra_compile_args=flags + openmp,
        extra_link_args=[*openmp, *([] if DARWIN else ["-ldl"])],
    )


def cuda_extension() -> Pybind11Extension:
    return Pybind11Extension(
        "trainops._cuda",
        sources("csrc/cuda/module.cpp", "csrc/cuda/*.cu"),
        cxx_std=17,
        extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall"],
        # Static, so that the module loads where there is no CUDA, and beside any version that torch brings.
        extra_link_args=["-l:libcudart_static.a", "-lrt", "-ldl", "-lpthread"],
    )


class BuildBackends(build_ext):
    """``build_ext`` that compiles with ninja and records what became of every backend."""

    def run(self) -> None:
        self.skipped, self.required = listed("TRAINOPS_SKIP"), listed("TRAINOPS_REQUIRE")
        if both := self.skipped & self.required:
            raise SystemExit(f"TRAINOPS_SKIP and TRAINOPS_REQUIRE both name {sorted(both)}")
        if self.required and "core" in self.skipped:
            raise SystemExit("TRAINOPS_SKIP names core, which every backend that TRAINOPS_REQUIRE names needs")
        max_jobs()  # also an error before anything changes
        self.record: dict[str, dict[str, str]] = {}
        super().run()
        target = (ROOT if self.inplace else Path(self.build_lib)) / "trainops" / "_build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.record, indent=2) + "\n")

    def build_extensions(self) -> None:
        super().build_extensions()
        # A backend that was not built leaves no file to install.
        self.extensions = [ext for ext in self.extensions if "built_with" in self.record[BACKENDS[ext.name]]]

    def build_extension(self, ext: Pybind11Extension) -> None:
        name, target = BACKENDS[ext.name], Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # never leave a stale binary behind
        nvcc = Nvcc() if name == "cuda" else None
        cxx = command_output(*self.compiler.compiler_so_cxx, "--version").partition("\n")[0]
        if name in self.skipped:
            self.record[name] = {"reason": "skipped by TRAINOPS_SKIP when trainops was built"}
        elif nvcc and not nvcc.version:
            self.leave_out(name, "there was no nvcc when trainops was built", warn=False)
        elif not cxx:
            program = os.environ.get("CXX") or self.compiler.compiler_so_cxx[0]
            self.leave_out(name, f"there was no working C++ compiler when trainops was built ({program})")
        else:
            compiler = nvcc.version if nvcc else cxx
            try:
                module = self.compile(ext, nvcc, f"{compiler}, {cxx}")
            except subprocess.CalledProcessError:
                self.leave_out(name, f"{compiler} failed; `pip install -v .` in the source tree shows its output")
                return
            self.mkpath(str(target.parent))
            self.copy_file(str(module), str(target))
            gpus = f" for {', '.join(nvcc.architectures())}" if nvcc else ""
            self.record[name] = {"built_with": compiler + gpus}

    def compile(self, ext: Pybind11Extension, nvcc: Nvcc | None, version: str) -> Path:
        include = [f"-I{folder}" for folder in [*ext.include_dirs, *self.compiler.include_dirs]]
        cxx = self.compiler.compiler_so_cxx
        compilers = {".cpp": [*cxx, *include, *ext.extra_compile_args]} | ({".cu": nvcc.command()} if nvcc else {})
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if DARWIN else ["-shared"]
        libraries = [*(nvcc.library_folders() if nvcc else []), *ext.extra_link_args]
        libraries += shlex.split(os.environ.get("LDFLAGS", ""))
        # pip's own build folders are temporary; this one is not, and is named after the interpreter that it is for.
        name = Path(self.get_ext_filename(ext.name)).name
        module = Path("build", "ninja", Path(name).stem, name)
        if self.force:
            shutil.rmtree(ROOT / module.parent, ignore_errors=True)
        build_module(module, ext.sources, compilers, [*cxx, *shared], libraries, version)
        return ROOT / module

    def leave_out(self, name: str, reason: str, warn: bool = True) -> None:
        if name in self.required or (name == "core" and self.required):
            needed = name if name in self.required else f"{', '.join(sorted(self.required))}, which needs core"
            raise SystemExit(f"TRAINOPS_REQUIRE names {needed}, which cannot be built: {reason}")
        self.record[name] = {"reason": reason}
        if warn:
            self.warn(f"trainops is built without its {name} backend: {reason}")

    def copy_extensions_to_source(self) -> None:
        for name in BACKENDS:
            Path(ROOT, self.get_ext_filename(name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


setup(ext_modules=[core_extension(), cpu_extension(), cuda_extension()], cmdclass={"build_ext": BuildBackends})
