"""Every compilation of the Triton kernels: each type and option that their machine code depends on."""

from collections.abc import Iterator
from typing import Any, NamedTuple

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


def block_numel(dtypes: tuple[str, ...]) -> int:
    """Elements of a block of a kernel that streams tensors of such types."""
    from trainops.triton_kernels import _common

    return int(_common.block_numel(*(SIZES[dtype] for dtype in dtypes)))
