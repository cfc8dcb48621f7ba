"""What Triton makes of the kernels, for GPUs that need not be there.

    TRITON_INTERPRET=0 python -m benchmarks.inspect_triton [--quick]

Compiles every kernel for every type and option offline, and reads what comes out: registers, spills, the accesses of
16 bytes, and the loops. Exits with 1 where a kernel spills, where a streaming kernel reads or writes whole blocks in
narrower accesses, or where a loop over float32 or 16 bits has instructions of float64. For NVIDIA's GPUs the accesses
are counted in PTX, where there must be exactly as many as the kernel has in its source, or a multiple where a loop is
unrolled; so are the loops (`inspect_loops.py`).

What was found is kept, and a kernel is compiled again when it has changed. ``--quick`` compiles each variant for one
GPU instead of all: each kernel for NVIDIA's and AMD's.
"""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

from trainops import core

from . import inspect_loops
from .inspect_cache import keep, key_of, recall
from .triton_variants import SIZES, Variant, variants

TARGETS = {
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "sm_80": ("cuda", 80, 32),
    "sm_100": ("cuda", 100, 32),
}


class Found(NamedTuple):
    """What the code of a variant shows."""

    registers: int
    spilled: int  # bytes of memory per thread
    wide_loads: int  # instructions of 16 bytes
    wide_stores: int
    narrow_stores: int | None = None
    float64_loops: int | None = None  # that read memory, with instructions of float64
    other_loops: int | None = None


class Task(NamedTuple):
    """A variant to compile for a target."""

    variant: Variant
    target: str


CAPTION = (
    "registers per thread; bytes spilled per thread; accesses of 16 bytes that the code has, and how many it must "
    "have in its loops over whole blocks, or a multiple where they are unrolled (codes are accessed by 8 bytes)"
)


def every_task() -> list[Task]:
    """All variants for all targets."""
    return [Task(variant, target) for variant in variants() for target in TARGETS]


def sample() -> list[Task]:
    """Each variant for one target: of each kernel the first for the first target, the next for the next one."""
    seen: dict[tuple[str, str], int] = defaultdict(int)
    tasks = []
    for variant in variants():
        kernel = variant.module, variant.kernel
        tasks.append(Task(variant, list(TARGETS)[seen[kernel] % len(TARGETS)]))
        seen[kernel] += 1
    return tasks


def constants_of(variant: Variant) -> dict[str, Any]:
    """A variant's constants, and the sizes that its kernel takes."""
    from trainops.triton_kernels import _common

    return {"CHUNK": _common.CHUNK, "BLOCK": variant.block or _common.REDUCTION_BLOCK} | variant.constants


def threads() -> int:
    """Of a program."""
    from trainops.triton_kernels import _common

    return int(_common.THREADS)


def kernel_of(variant: Variant) -> Any:
    """The kernel itself."""
    return function_of(f"@{variant.module}.{variant.kernel}")


def is_function(value: Any) -> bool:
    """Whether a constant stands for a function of Triton's."""
    return isinstance(value, str) and value.startswith("@")


def function_of(name: str) -> Any:
    """A kernel, or a function that one of them takes as a constant, by ``@module.function``."""
    module, _, function = name.removeprefix("@").partition(".")
    return getattr(importlib.import_module(f"trainops.triton_kernels.{module}"), function)


def constant(value: Any) -> Any:
    """What a constant of a variant is to Triton."""
    import triton.language as tl

    if is_function(value):
        return function_of(value)
    return getattr(tl, value[1:]) if isinstance(value, str) and value.startswith(":") else value


def key(task: Task) -> str:
    """Of all that is found depends on. Triton hashes a kernel with the functions and the constants that it uses."""
    import triton

    variant, target = task
    constants = constants_of(variant)
    functions = [function_of(value).cache_key for value in constants.values() if is_function(value)]
    source = kernel_of(variant).cache_key, functions, variant, constants, threads()
    return key_of(triton.__version__, source, TARGETS[target], Path(__file__), Path(inspect_loops.__file__))


def compile_task(task: Task) -> Found:
    """Compile for a target, without a device, and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    variant, target = task
    kernel = kernel_of(variant)
    constants = {name: constant(x) for name, x in constants_of(variant).items() if name in kernel.arg_names}
    signature = {name: variant.arguments.get(name, "constexpr") for name in kernel.arg_names}
    gpu = GPUTarget(*TARGETS[target])
    # At run time Triton sees that PyTorch's memory is aligned.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name][0] == "*"}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=gpu,
        options={"num_warps": threads() // gpu.warp_size, "enable_fp_fusion": False},
    )
    if gpu.backend == "hip":
        return read_amdgcn(compiled.asm["amdgcn"])
    return read_cuda(compiled.asm["ptx"], compiled.asm["cubin"])


def read_cuda(ptx: str, cubin: bytes) -> Found:
    """Accesses from the PTX, registers and local memory from the resource table."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(tools / "cuobjdump", "-res-usage", file.name)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads, stores = (len(re.findall(rf"\b{x}\.global\S*\.v(?:4\.b32|2\.b64)\b", ptx)) for x in ("ld", "st"))
    narrow_stores = len(re.findall(r"\bst\.global\b", ptx)) - stores
    loops = inspect_loops.inspect(inspect_loops.of_ptx(ptx))
    return Found(resources["REG"], resources["STACK"] + resources["LOCAL"], loads, stores, narrow_stores, *loops)


def read_amdgcn(assembly: str) -> Found:
    """The same from AMD's assembly, which carries its resources as metadata."""

    def field(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)))

    loads, stores = (
        len(re.findall(rf"\b(?:global|buffer)_{name}_dwordx4\b", assembly)) for name in ("load", "store")
    )
    return Found(field("vgpr_count"), field("private_segment_fixed_size"), loads, stores)


def run(*command: object) -> str:
    """What a program prints."""
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def wide_accesses(variant: Variant, dtypes: tuple[str, ...]) -> int:
    """How many accesses of 16 bytes a thread makes for one block of each of these tensors."""
    return sum(variant.block // threads() * SIZES[dtype] // 16 for dtype in dtypes)


def expected(variant: Variant) -> tuple[int, int]:
    """How many accesses of 16 bytes there must be in all loops over whole blocks: loads and stores."""
    loads, stores = (variant.bodies * wide_accesses(variant, dtypes) for dtypes in (variant.reads, variant.writes))
    return loads, stores


def fault(variant: Variant, found: Found) -> str:
    """What is wrong with the code of a variant; empty if nothing is."""
    faults = ["spills"] * (found.spilled > 0)
    for what, count, least in zip(
        ("loads", "stores"), (found.wide_loads, found.wide_stores), expected(variant), strict=True
    ):
        is_exact = bool(variant.reads) and found.narrow_stores is not None and variant.narrow_stores is None
        faults += [f"{what} are not all wide"] * (count < least or (is_exact and count % max(least, 1) != 0))
    if variant.narrow_stores is not None and found.narrow_stores is not None:
        faults += ["narrow stores"] * (found.narrow_stores > variant.narrow_stores)
    if variant.float64_loops is not None and found.float64_loops is not None:
        is_fault = found.float64_loops > variant.float64_loops or found.other_loops == 0
        faults += ["float64 in an inner loop"] * is_fault
    return ", ".join(faults)


def find(tasks: list[Task]) -> Iterator[tuple[Task, Found]]:
    """What was found before, and what is not known yet from as many processes as there are cores."""
    keys = {i: key(task) for i, task in enumerate(tasks)}
    known = {i: recall(keys[i]) for i in keys}
    unknown = [i for i in keys if known[i] is None]
    if unknown:
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(compile_task, [tasks[i] for i in unknown], chunksize=4)
            for i, found in zip(unknown, track(results, "compiling", len(unknown), transient=True), strict=True):
                keep(keys[i], found)
                known[i] = found
    for i, task in enumerate(tasks):
        yield task, Found(*known[i])


def main(quick: bool = False) -> int:
    """Print the table; 1 if a kernel spills or is narrower than it should be."""
    if importlib.util.find_spec("triton") is None or not core.available:
        print("nothing to inspect: " + ("the core was not built" if not core.available else "there is no Triton"))
        return 0
    tasks = sample() if quick else every_task()
    columns = "kernel", "variant", "target", "registers", "spilled", "loads", "stores", "fault"
    table = Table(*columns, caption=CAPTION)
    faults = []
    for (variant, target), found in find(tasks):
        loads, stores = (
            f"{count} ({least})" if variant.reads else ""
            for count, least in zip((found.wide_loads, found.wide_stores), expected(variant), strict=True)
        )
        name, wrong = f"{variant.module}.{variant.kernel}", fault(variant, found)
        table.add_row(name, variant.label, target, str(found.registers), str(found.spilled), loads, stores, wrong)
        if wrong:
            faults.append(f"{name} ({variant.label}) for {target}: {wrong}")
    Console(width=160).print(table)
    print(f"{len(tasks)} compilations, {len(faults)} with a fault", *faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main("--quick" in sys.argv[1:]))
