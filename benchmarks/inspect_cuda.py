"""What nvcc made of the CUDA kernels, for GPUs that need not be there.

    python -m benchmarks.inspect_cuda

Reads the machine code in the built module: registers, stack, local and static shared memory, the accesses to global
memory of 16 bytes, and the loops around them (`inspect_loops.py`). Exits with 1 where a kernel uses stack or local
memory, where a streaming kernel lacks 16-byte accesses, or where its loop for float32 and 16 bits has instructions of
float64. Needs cuobjdump, which the CUDA toolkit has, and Triton's wheel. What was found in a module is kept.
"""

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import inspect_loops
from .inspect_cache import key_of, remembered

# 16-byte reads and writes that each streaming kernel needs: for each tensor, one for every half of a pack of float32
# and, in kernels that serve both, one for a pack of float64. (The special kernels of a step take that one by one.) A
# step reads for further averages the average, the parameter and, of float32, the master; and for copies of buffers 16
# bytes.
FURTHER_READS, FURTHER_WRITES = 3 * 2 + 2 + 1, 2 + 1 + 1
LEAST = {
    "reduce_kernel": (2 + 1, 0),
    "scale_kernel": (2 + 1, 2 + 1),
    "clamp_kernel": (2 + 1, 2 + 1),
    "ema_kernel": (2 * (2 + 1), 2 + 1),
    **{
        f"update_kernel<{rule}, {is_special}>": (
            tensors * packs + FURTHER_READS,
            (tensors - 1) * packs + FURTHER_WRITES,
        )
        for rule, tensors in (("AdamW", 6), ("Adam", 6), ("SGD", 4))
        for is_special, packs in (("false", 2 + 1), ("true", 2))
    },
    "drop_path_kernel<float>": (3 * 2, 2),
    "drop_path_kernel<double>": (3, 1),
    "backward_kernel<float, true>": (3 * 2, 2),
    "backward_kernel<double, true>": (3, 1),
}
# Loops around these that may compute in float64: of kernels for all types, that of float64 tensors, and in a step
# that of their further averages. (A sum looks at a chunk of others a second time in float64, but at single elements.)
FLOAT64_LOOPS = {"<float": 0, "<double": None, "update_kernel": 2}
TEMPLATE_ARGUMENTS = {"f": "float", "d": "double", "Lb0E": "false", "Lb1E": "true"}


class Kernel(NamedTuple):
    """What the machine code of a kernel shows."""

    registers: int
    stack: int  # bytes for each thread, as are local ones
    local: int
    shared: int
    loads: int = 0  # instructions of 16 bytes
    stores: int = 0
    float64_loops: int = 0  # around such loads, with instructions of float64
    other_loops: int = 0


def cuobjdump() -> str | None:
    """The program, from the toolkit or from Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def name_of(symbol: str) -> str | None:
    """A kernel's name and template arguments; None for functions that it calls."""
    match = re.match(r"[^$]*\d([a-z_]+_kernel)(?:I(.*?)EEv|E)", symbol)
    if match is None:
        return None
    arguments = template_arguments(match[2] or "")
    return match[1] + (f"<{', '.join(arguments)}>" if arguments else "")


def template_arguments(mangled: str) -> list[str]:
    """Types, truth values, and classes of trainops."""
    found = []
    while match := re.match(r"NS\d?_(\d+)|Lb[01]E|[fd]", mangled):
        mangled = mangled[match.end() :]
        if match[1] is None:
            found.append(TEMPLATE_ARGUMENTS[match[0]])
        else:
            length = int(match[1])
            found.append(mangled[:length])
            mangled = mangled[length + 1 :]
    return found


def read(program: str, module: str) -> dict[tuple[str, str], Kernel]:
    """Every kernel of the module, by name and architecture."""

    def output(*options: str) -> list[str]:
        command = [program, *options, module]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    kernels: dict[tuple[str, str], Kernel] = {}
    architecture = name = None
    for line in output("-res-usage"):
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = name_of(match[1])
        elif name and architecture and (found := dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line))):
            numbers = (int(found[key]) for key in ("REG", "STACK", "LOCAL", "SHARED"))
            kernels[name, architecture] = Kernel(*numbers)
    architectures = sorted({architecture for _, architecture in kernels})
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # it takes two seconds for each
        listings = list(pool.map(lambda architecture: output("-sass", "-arch", architecture), architectures))
    code: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in itertools.chain(*listings):
        if match := re.match(r"arch = (\w+)", line.strip()):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = name_of(match[1])
        elif name and architecture:
            code[name, architecture].append(line)
    for key, lines in code.items():
        loads, stores = (sum(bool(re.search(rf"\b{x}\.E\S*\.128\b", line)) for line in lines) for x in ("LDG", "STG"))
        loops = inspect_loops.inspect(inspect_loops.of_sass(lines))
        kernels[key] = Kernel(*kernels[key][:4], loads, stores, *loops)
    return kernels


def find(program: str, module: str) -> dict[tuple[str, str], Kernel]:
    """As ``read``, or what it found before in the same module."""

    def listed() -> list[Any]:
        return [[*key, *kernel] for key, kernel in read(program, module).items()]

    rows = remembered(key_of(Path(program), Path(module), Path(__file__), Path(inspect_loops.__file__)), listed)
    return {(name, architecture): Kernel(*numbers) for name, architecture, *numbers in rows}


def fault(name: str, kernel: Kernel) -> str:
    """What is wrong with a kernel; empty if nothing is."""
    loads, stores = LEAST.get(name, LEAST.get(name.partition("<")[0], (0, 0)))
    faults = ["uses stack"] * (kernel.stack > 0) + ["uses local memory"] * (kernel.local > 0)
    faults += ["narrow loads"] * (kernel.loads < loads) + ["narrow stores"] * (kernel.stores < stores)
    allowed = next((count for part, count in FLOAT64_LOOPS.items() if part in name), 1)
    if loads and allowed is not None and (kernel.float64_loops > allowed or kernel.other_loops == 0):
        faults.append("float64 in an inner loop")
    return ", ".join(faults)


def main() -> int:
    """Print the table; 1 if a kernel is not as it should be."""
    spec = importlib.util.find_spec("trainops._cuda")
    program = cuobjdump()
    if spec is None or spec.origin is None or program is None:
        print("nothing to inspect: " + ("there is no cuobjdump" if spec else "the cuda backend was not built"))
        return 0
    table = Table("kernel", "target", "registers", "stack", "local", "shared", "16-byte loads", "stores")
    for column in ("float64 loops", "others", "fault"):
        table.add_column(column)
    kernels = find(program, spec.origin)
    faults = {key: fault(key[0], kernel) for key, kernel in kernels.items()}
    for key, kernel in sorted(kernels.items()):
        table.add_row(*key, *map(str, kernel), faults[key])
    Console(width=160).print(table)
    missing = [name for name in LEAST if not any(key[0].startswith(name) for key in kernels)]
    print(f"{len(kernels)} kernels, {sum(map(bool, faults.values()))} with a fault; not found: {missing or 'none'}")
    return int(any(faults.values()) or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
