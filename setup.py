"""Builds the compiled backends. Everything declarative is in pyproject.toml.

A backend that cannot be built is left out, never fatal: the reason goes into ``trainops/_build.json``, where
``python -m trainops`` shows it. No torch is needed to build, and the binaries serve every torch version.

Environment:
    TRAINOPS_SKIP=cpu        backends not to build, separated by commas
    TRAINOPS_REQUIRE=cpu     backends whose failure is an error, separated by commas
    MAX_JOBS=8               compiler processes at a time
"""

import json
import os
import platform
import shlex
import subprocess
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BACKENDS = {"trainops._cpu": "cpu"}


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
        compiler = self.compiler_version()
        try:
            super().build_extension(ext)
        except Exception as error:
            if name in listed("TRAINOPS_REQUIRE"):
                raise
            broken = f"{compiler} failed; `pip install -v .` in the source tree shows its output"
            reason = (
                broken if compiler else f"there was no working C++ compiler when trainops was built ({self.cxx()})"
            )
            self.record[name] = {"reason": reason}
            self.warn(f"trainops is built without its {name} backend: {reason}: {error}")
        else:
            self.record[name] = {"built_with": compiler or self.cxx()}

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
setup(ext_modules=[cpu_extension()], cmdclass={"build_ext": BuildBackends})
