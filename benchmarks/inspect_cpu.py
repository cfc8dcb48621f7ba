"""What the compiler made of the CPU kernels: the widest registers that each version of each loop computes with.

    python -m benchmarks.inspect_cpu

Exits with 1 where a loop was not vectorised for an instruction set that it was compiled for. Needs objdump.
"""

import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainops.adapters.cpu import _cpu

from .inspect_cache import key_of, remembered

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


def widest_registers(path: str) -> dict[str, dict[str, int]]:
    """Bytes of the widest register with packed arithmetic, by loop and instruction set."""
    listing = subprocess.run(
        ["objdump", "-dC", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    )
    widest: dict[str, dict[str, int]] = defaultdict(dict)
    versions: dict[str, int] = {}
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            match = FUNCTION.match(line)
            versions = widest[match[1] + ")"] if match and match[2] in CLONES else {}
            isa = CLONES.get(match[2], "") if match else ""
        elif PACKED.search(line):
            versions[isa] = max(versions.get(isa, 0), *(WIDTHS[name] for name in re.findall("[xyz]mm", line)))
    return {name: found for name, found in widest.items() if found.keys() - {"default"}}  # not what has one version


def find(module: str) -> dict[str, dict[str, int]]:
    """As ``widest_registers``, or what it found before in the same module."""
    version = subprocess.run(["objdump", "--version"], capture_output=True, text=True, check=True).stdout
    key = key_of(version, Path(module), Path(__file__))
    widest: dict[str, dict[str, int]] = remembered(key, lambda: widest_registers(module))
    return widest


def main() -> int:
    """Print the table; 1 if a loop is narrower than it should be."""
    if _cpu is None or shutil.which("objdump") is None:
        print("nothing to inspect: " + ("there is no objdump" if _cpu else "the cpu backend was not built"))
        return 0
    table = Table("loop", *LEAST, title="widest registers, bytes")
    narrow = False
    for name, found in sorted(find(_cpu.__file__).items()):
        table.add_row(name, *(str(found.get(isa, "-")) for isa in LEAST))
        narrow |= any(found.get(isa, least) < least for isa, least in LEAST.items())
    Console(width=160).print(table)
    return int(narrow or table.row_count == 0)


if __name__ == "__main__":
    sys.exit(main())
