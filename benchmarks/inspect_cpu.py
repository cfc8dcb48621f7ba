"""What the compiler made of the CPU kernels: the widest registers that each version of each function computes with.

    python -m benchmarks.inspect_cpu

A function may have several loops, one for each formula. Exits with 1 where one of them was not vectorised for an
instruction set that it was compiled for. Needs objdump.
"""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from trainops.adapters.cpu import _cpu

from . import inspect_loops
from .inspect_cache import key_of, remembered
from .inspect_loops import loops_over_blocks, of_x86

WIDTHS = {"zmm": 64, "ymm": 32, "xmm": 16}
LEAST = {"avx512": 32, "avx2": 32, "default": 16}  # GCC may choose 32 bytes where it could have 64
CLONES = {  # parallel.h, halves.h
    "arch_x86_64_v4": "avx512",
    "avx512f": "avx512",
    "avx2": "avx2",
    "avx2_f16c": "avx2",
    "default": "default",
    None: "default",
}

FUNCTION = re.compile(
    r"^[0-9a-f]+ <trainops::cpu::(?:\(anonymous namespace\)::)?(.+?)\)(?: \[clone \.(\w+?)(?:\.\d+)?\])?>:"
)
# Packed floating-point or integer arithmetic, not scalars in the same registers.
PACKED = re.compile(
    r"\bv?(?:(?:add|sub|mul|div|sqrt|min|max|cmp\w*|and|or|cvt\w*)p[sd]|p(?:add|and|or|sub|s[lr]l))\w*"
    r"\s.*%[xyz]mm"
)


class Version(NamedTuple):
    """A function for an instruction set: bytes of the widest register with packed arithmetic, and its loops."""

    widest: int
    loops: int = 0  # over blocks of elements
    single: int = 0  # those of them that compute element by element


def versions_in(listing: str) -> dict[str, dict[str, Version]]:
    """What is in objdump's listing, by function and instruction set."""
    found: dict[str, dict[str, Version]] = defaultdict(dict)
    for text in re.split(r"\n(?=[0-9a-f]+ <)", listing):
        head, *lines = text.splitlines()
        match = FUNCTION.match(head)
        if match and match[2] in CLONES:
            packed = [line for line in lines if PACKED.search(line)]
            widths = [WIDTHS[name] for line in packed for name in re.findall("[xyz]mm", line)]
            found[match[1] + ")"][CLONES[match[2]]] = Version(
                max(widths, default=0), *loops_over_blocks(of_x86(lines))
            )
    return {name: its for name, its in found.items() if its.keys() - {"default"}}  # not what has one version


def find(module: str) -> dict[str, dict[str, Version]]:
    """As ``versions_in``, of a module, or what was found before in the same."""
    version = subprocess.run(["objdump", "--version"], capture_output=True, text=True, check=True).stdout
    key = key_of(version, Path(module), Path(__file__), Path(inspect_loops.__file__))

    def look() -> dict[str, dict[str, Version]]:
        command = ["objdump", "-dC", "--no-show-raw-insn", module]
        return versions_in(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return {
        name: {isa: Version(*version) for isa, version in its.items()} for name, its in remembered(key, look).items()
    }


def fault(name: str, isa: str, version: Version) -> str:
    """What is wrong with a function for an instruction set; nothing if all is right."""
    if version.widest < LEAST[isa]:
        return "narrow"
    if name.startswith("update_tile") and version.loops == 0:
        return "no loop found"
    return f"{version.single} not vectorised" if version.single else ""


def main() -> int:
    """Print the table; 1 if a loop is narrower than it should be."""
    if _cpu is None or shutil.which("objdump") is None:
        print("nothing to inspect: " + ("there is no objdump" if _cpu else "the cpu backend was not built"))
        return 0
    table = Table("function", *LEAST, title="widest registers, bytes, and what is wrong")
    faults = 0
    for name, its in sorted(find(_cpu.__file__).items()):
        wrong = {isa: fault(name, isa, version) for isa, version in its.items()}
        faults += sum(map(bool, wrong.values()))
        table.add_row(name, *(f"{its[isa].widest} {wrong[isa]}" if isa in its else "-" for isa in LEAST))
    Console(width=160).print(table)
    return int(faults > 0 or table.row_count == 0)


if __name__ == "__main__":
    sys.exit(main())
