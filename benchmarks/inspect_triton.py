"""What Triton makes of the kernels, for GPUs that need not be there.

    TRITON_INTERPRET=0 python -m benchmarks.inspect_triton

Compiles every kernel for every type and option offline, and reads what comes out: registers, spills, and the accesses
of 16 bytes. Exits with 1 where a kernel spills, or where a streaming kernel reads or writes whole blocks in narrower
accesses. For NVIDIA's GPUs the accesses are counted in PTX, where there must be exactly as many as the kernel has in
its source, or a multiple where a loop is unrolled.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track
from rich.table import Table

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
POINTERS = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64"}
DTYPES = list(SIZES)


class Variant(NamedTuple):
    """One compilation of a kernel."""

    module: str
    kernel: str
    label: str
    arguments: dict[str, str]  # type of each argument that is not a constant
    constants: dict[str, Any]  # types as strings, prefixed with a colon
    reads: tuple[str, ...] = ()  # types of the tensors that are read in whole blocks, and written
    writes: tuple[str, ...] = ()
    bodies: int = 1  # loops over whole blocks
    narrow_stores: int | None = None  # of a kernel whose masked accesses are wide, too: how many others it makes


class Found(NamedTuple):
    """What the code of a variant shows."""

    registers: int
    spilled: int  # bytes of memory per thread
    wide_loads: int  # instructions of 16 bytes
    wide_stores: int
    narrow_stores: int | None = None


CAPTION = (
    "registers per thread; bytes spilled per thread; accesses of 16 bytes that the code has, and how many it must "
    "have in its loops over whole blocks, or a multiple where they are unrolled"
)
TABLE = {"rows": "*i64", "chunks": "*i64", "first_chunk": "i32"}
NORMS = {"partials": "*fp64", "chunk_count": "i32", "total_norm": "*fp32", "norms": "*fp32"}


def wide(*dtypes: str) -> str:
    """The type of arithmetic."""
    return "float64" if "float64" in dtypes else "float32"


def variants() -> Iterator[Variant]:
    """Every kernel, with every type and option that its machine code depends on."""
    for dtype in DTYPES:
        for norm, order in (("l1", 1), ("l2", 2), ("inf", 0)):
            constants = {"WORDS": 5, "COLUMN": 0, "DTYPE": f":{dtype}", "WIDE": f":{wide(dtype)}", "NORM": order}
            arguments = {**TABLE, "partials": "*fp64"}
            bodies = 1 if order == 0 or dtype == "float64" else 2  # once more where float32 overflows
            label = f"{norm} {dtype}"
            yield Variant("clip_grad_norm", "partial_norms", label, arguments, constants, (dtype,), bodies=bodies)
        for name, operand in (("scale", "*fp32"), ("clamp", "*fp64")):
            constants = {"WORDS": 5, "DTYPE": f":{dtype}", "WIDE": f":{wide(dtype)}", "CLAMP": name == "clamp"}
            yield Variant(
                "clip_grad_norm",
                "update_in_place",
                f"{name} {dtype}",
                {**TABLE, "operand": operand},
                constants,
                (dtype,),
                (dtype,),
            )
    for norm, order in (("l1", 1), ("l2", 2), ("inf", 0)):
        arguments = {
            "rows": "*i64",
            "partials": "*fp64",
            "chunk_count": "i32",
            "total_norm": "*fp32",
            "norms": "*fp32",
        }
        yield Variant("clip_grad_norm", "finish_norms", norm, arguments, {"WORDS": 5, "NORM": order})
    for average, param in [*zip(DTYPES, DTYPES, strict=True), ("float32", "bfloat16"), ("float32", "float16")]:
        types = {"AVERAGE": f":{average}", "PARAM": f":{param}", "WIDE": f":{wide(average, param)}"}
        yield Variant(
            "ema",
            "ema",
            f"{average} of {param}",
            {**TABLE, "decay": "*i64", "skip": "*i1"},
            {"WORDS": 6, **types},
            (average, param),
            (average,),
        )
    yield from adamw_variants()
    yield from drop_path_variants()


def adamw_variants() -> Iterator[Variant]:
    """The plan of a step with and without a norm, and the update."""
    for measures in (True, False):
        arguments = {"rows": "*i64", "settings": "*i64", "coefficient": "*fp64", "scalars": "*fp64"}
        arguments |= {"grad_scale": "*fp32", "found_inf": "*fp32", "skip": "*i1", "skipped_steps": "*i64"}
        absent: dict[str, Any] = {"known_norm": None}
        if not measures:
            absent |= dict.fromkeys(NORMS)
        label = "with norm" if measures else "without norm"
        yield Variant(
            "adamw",
            "plan",
            label,
            arguments | (NORMS if measures else {}),
            {"WORDS": 11, "CLIP": True, "SKIP_NONFINITE": measures, **absent},
        )
    states = [(dtype, dtype) for dtype in DTYPES] + [("bfloat16", "float32"), ("float16", "float32")]
    for param, state in states:
        for amsgrad in (False, True):
            for average in dict.fromkeys([None, param, "float32"]):
                for maximize in (False, True) if (param, amsgrad, average) == ("float32", False, None) else (False,):
                    yield update_variant(param, state, state if amsgrad else None, average, maximize)


def update_variant(param: str, state: str, largest: str | None, average: str | None, maximize: bool) -> Variant:
    """The update for one combination of types and options."""
    types = {
        "PARAM_TYPE": param,
        "GRAD_TYPE": param,
        "EXP_AVG_TYPE": state,
        "EXP_AVG_SQ_TYPE": state,
        "MAX_EXP_AVG_SQ_TYPE": largest,
        "AVERAGE_TYPE": average,
        "WIDE": wide(param),
        "AVERAGE_WIDE": wide(param, average or param),
    }
    options = [f"{state} state"] * (state != param) + ["amsgrad"] * (largest is not None)
    options += [f"{average} ema"] * (average is not None) + ["maximize"] * maximize
    writes = tuple(dtype for dtype in (param, state, state, largest, average) if dtype is not None)
    return Variant(
        "adamw",
        "update",
        ", ".join([param, *options]),
        {**TABLE, "settings": "*i64", "scalars": "*fp64", "coefficient": "*fp64", "skip": "*i1"},
        {"WORDS": 11, "MAXIMIZE": maximize} | {k: None if v is None else f":{v}" for k, v in types.items()},
        (param, *writes),
        writes,
    )


def drop_path_variants() -> Iterator[Variant]:
    """Forward (which is backward without layer scale, too), backward, and the sum of layer scale's gradient."""
    optional = ("residual", "layer_scale", "rows")
    for dtype in DTYPES:
        for options in ((), optional[:1], optional[:2], optional[2:], optional):
            operands = {name: "int64" if name == "rows" else dtype for name in ("out", "branch", "mask", *options)}
            absent: dict[str, Any] = {name: None for name in optional if name not in options}
            yield Variant(
                "drop_path",
                "drop_path",
                ", ".join([dtype, *options]),
                tensors(operands) | dict.fromkeys(("units", "sample_units", "channel_units"), "i32"),
                {"UNIT": 8, "INDEX": ":uint32", "PRODUCT": f":{dtype}", "WIDE": f":{wide(dtype)}", **absent},
                (dtype, *(dtype for name in options if name == "residual")),
                (dtype,),
                bodies=2,
                narrow_stores=0,
            )
    for grad, branch in [*zip(DTYPES, DTYPES, strict=True), ("float32", "bfloat16")]:
        for rows in (False, True):
            operands = {"of_branch": branch, "grad": grad, "branch": branch, "layer_scale": grad, "mask": grad}
            operands |= {"rows": "int64"} if rows else {}
            sizes = dict.fromkeys(("positions", "sample_positions", "program_positions", "channel_units"), "i32")
            constants = {"UNIT": 8, "INDEX": ":uint32", "PRODUCT": f":{grad}", "WIDE": f":{wide(grad)}"}
            columns = block_numel((grad, branch)) // 8
            yield Variant(
                "drop_path",
                "drop_path_backward",
                f"{grad} of {branch}" + ", rows" * rows,
                {**tensors(operands), "partials": "*fp64", **sizes},
                {**constants, "COLUMNS": columns, **({} if rows else {"rows": None})},
                (grad, branch),
                (branch,),
                narrow_stores=1,  # of a partial sum
            )
    for dtype in ("float32", "float64"):
        arguments = {**tensors({"of_layer_scale": dtype}), "partials": "*fp64", "count": "i32", "channels": "i32"}
        yield Variant("drop_path", "finish_layer_scale", dtype, arguments, {"ROWS": 64})


def tensors(dtypes: dict[str, str]) -> dict[str, str]:
    """The types of pointers to tensors of such types."""
    return {name: POINTERS[dtype] for name, dtype in dtypes.items()}


def compile_variant(variant: Variant, target: str) -> Found:
    """Compile for a target, without a device, and read the machine code."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from trainops import triton_kernels

    kernel = getattr(getattr(triton_kernels, variant.module), variant.kernel)
    constants = {
        name: getattr(tl, value[1:]) if isinstance(value, str) else value for name, value in variant.constants.items()
    }
    common = triton_kernels._common
    streamed = variant.reads + variant.writes
    block = block_numel(streamed) if streamed else common.REDUCTION_BLOCK
    constants |= {"CHUNK": common.CHUNK, "BLOCK": block}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: variant.arguments.get(name, "constexpr") for name in kernel.arg_names}
    gpu = GPUTarget(*TARGETS[target])
    # At run time Triton sees that PyTorch's memory is aligned.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name][0] == "*"}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=gpu,
        options={"num_warps": common.THREADS // gpu.warp_size, "enable_fp_fusion": False},
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
    return Found(resources["REG"], resources["STACK"] + resources["LOCAL"], loads, stores, narrow_stores)


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


def block_numel(dtypes: tuple[str, ...]) -> int:
    """Elements of a block of a kernel that streams tensors of such types."""
    from trainops.triton_kernels import _common

    return int(_common.block_numel(*(SIZES[dtype] for dtype in dtypes)))


def wide_accesses(variant: Variant, dtypes: tuple[str, ...]) -> int:
    """How many accesses of 16 bytes a thread makes for one block of each of these tensors."""
    from trainops.triton_kernels._common import THREADS

    return sum(block_numel(variant.reads + variant.writes) // THREADS * SIZES[dtype] // 16 for dtype in dtypes)


def expected(variant: Variant) -> tuple[int, int]:
    """How many accesses of 16 bytes there must be in all loops over whole blocks: loads and stores."""
    loads, stores = (variant.bodies * wide_accesses(variant, dtypes) for dtypes in (variant.reads, variant.writes))
    return loads, stores


def inspect(task: tuple[Variant, str]) -> tuple[Variant, str, Found, str]:
    """Compile one variant, and say what is wrong with it."""
    variant, target = task
    found = compile_variant(variant, target)
    faults = ["spills"] * (found.spilled > 0)
    for what, count, least in zip(
        ("loads", "stores"), (found.wide_loads, found.wide_stores), expected(variant), strict=True
    ):
        is_exact = bool(variant.reads) and found.narrow_stores is not None and variant.narrow_stores is None
        faults += [f"{what} are not all wide"] * (count < least or (is_exact and count % max(least, 1) != 0))
    if variant.narrow_stores is not None and found.narrow_stores is not None:
        faults += ["narrow stores"] * (found.narrow_stores > variant.narrow_stores)
    return variant, target, found, ", ".join(faults)


def main() -> int:
    """Print the table; 1 if a kernel spills or is narrower than it should be."""
    if importlib.util.find_spec("triton") is None:
        print("nothing to inspect: Triton is not installed")
        return 0
    tasks = [(variant, target) for variant in variants() for target in TARGETS]
    columns = "kernel", "variant", "target", "registers", "spilled", "loads", "stores", "fault"
    table = Table(*columns, caption=CAPTION)
    faults = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for variant, target, found, fault in track(
            pool.map(inspect, tasks, chunksize=4), total=len(tasks), description="compiling", transient=True
        ):
            loads, stores = (
                f"{count} ({least})" if variant.reads else ""
                for count, least in zip((found.wide_loads, found.wide_stores), expected(variant), strict=True)
            )
            name = f"{variant.module}.{variant.kernel}"
            table.add_row(name, variant.label, target, str(found.registers), str(found.spilled), loads, stores, fault)
            if fault:
                faults.append(f"{name} ({variant.label}) for {target}: {fault}")
    Console(width=160).print(table)
    print(f"{len(tasks)} compilations, {len(faults)} with a fault", *faults, sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
