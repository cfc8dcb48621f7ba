"""CUDA's compiler, for ``setup.py``."""

import os
import re
import shlex
import shutil
from pathlib import Path

from ninja_build import command_output

# From T4 to the cards of 2025, each with machine code of its own, which is compressed in the binary.
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


class Nvcc:
    """The compiler on this machine, if there is one."""

    # Contraction to fused multiply-add is off so that the CPU and every GPU give the same bits.
    FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall")

    def __init__(self) -> None:
        homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
        candidates = [str(Path(home, "bin", "nvcc")) for home in homes] or ["nvcc"]
        self.path = next((found for found in map(shutil.which, candidates) if found), "")
        found = re.search(r"release [\d.]+, V([\d.]+)", command_output(self.path, "--version"))
        self.version = f"nvcc {found[1]}" if found else ""

    def architectures(self) -> list[str]:
        """The GPUs to compile for, as torch writes them: 9.0, or 9.0+PTX for later GPUs as well.

        By default those of ``ARCHITECTURES`` that this nvcc knows.
        """
        if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
            return listed.replace(";", " ").replace(",", " ").split()
        listed_by_nvcc = command_output(self.path, "--list-gpu-arch").split()
        known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in listed_by_nvcc]
        return [*known[:-1], f"{known[-1]}+PTX"] if known else ARCHITECTURES

    def command(self) -> list[str]:
        """The command that compiles a kernel for every architecture. Without source and target."""
        code = []
        for architecture in self.architectures():
            number = architecture.removesuffix("+PTX").replace(".", "")
            kinds = ("sm", "compute") if architecture.endswith("+PTX") else ("sm",)
            code += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
        return [self.path, *self.FLAGS, "-Xfatbin=-compress-all", *code]

    def library_folders(self) -> list[str]:
        """The folders of the CUDA runtime, as linker flags. nvcc may be a wrapper script, so ask it."""
        dry_run = command_output(self.path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
        found = re.search(r"^#\$ LIBRARIES=(.*)$", dry_run, re.MULTILINE)
        return shlex.split(found[1] if found else "")
