"""Every compilation of the Triton kernels: each type and option that their machine code depends on."""

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainops import core

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2, "int16": 2, "int8": 1, "uint8": 1}
POINTERS = {"float32": "*fp32", "float64": "*fp64", "bfloat16": "*bf16", "float16": "*fp16", "int64": "*i64"}
DTYPES = [dtype for dtype in SIZES if "int" not in dtype]
CODES = {"signed_codes": "int8", "unsigned_codes": "uint8"}
CODED = [("float32", None, None), ("float32", "float32", None), ("bfloat16", "float32", "int16")]  # with 8-bit state
MASTERS = [("bfloat16", "int16"), ("bfloat16", "float32"), ("float16", "float32")]
STATISTICS = ("l1_norm", "l2_norm", "inf_norm", "moments")


class Variant(NamedTuple):
    """One compilation of a kernel."""

    module: str
    kernel: str
    label: str
    arguments: dict[str, str]  # type of each argument that is not a constant
    constants: dict[str, Any]  # types prefixed with a colon; functions as "@module.function"
    reads: tuple[str, ...] = ()  # types of the tensors that are read in whole blocks, and written
    writes: tuple[str, ...] = ()
    bodies: int = 1  # loops over whole blocks
    narrow_stores: int | None = None  # of a kernel whose masked accesses are wide, too: how many others it makes
    divided_as: tuple[str, ...] = ()  # types by which blocks are divided, if not those of the tensors
    looks_again: bool = False  # in float64, at what float32 does not hold

    @property
    def block(self) -> int:
        """How many elements a program takes at a time; 0 where it streams no tensor."""
        streamed = self.divided_as or self.reads + self.writes
        return block_numel(streamed) if streamed else 0

    @property
    def float64_loops(self) -> int | None:
        """How many loops may compute in float64: a second look has one over whole blocks, and one with a mask.

        None: any number, because tensors are float64, or because what is read are results and settings.
        """
        if not self.reads or ":float64" in self.constants.values():
            return None
        return 2 if self.looks_again else 0


TABLE = {"rows": "*i64", "chunks": "*i64", "first_chunk": "i32"}
RESULTS = {"partials": "*fp64", "chunk_count": "i32"}


def wide(*dtypes: str) -> str:
    """The type of arithmetic."""
    return "float64" if "float64" in dtypes else "float32"


def columns_of(kind: str) -> list[Any]:
    """The columns of a kind of table."""
    return core.schemas[kind].columns


def words_of(kind: str) -> int:
    """How many words a row of such a table has."""
    return len(core.words("row")) + len(columns_of(kind))


def variants() -> Iterator[Variant]:
    """Every kernel, with every type and option that its machine code depends on."""
    for dtype in DTYPES:
        types = {"DTYPE": f":{dtype}", "WIDE": f":{wide(dtype)}"}
        for statistic in STATISTICS:
            constants = {"WORDS": words_of("reduce"), "COLUMN": 0, "STATISTIC": statistic, **types}
            arguments = {**TABLE, "partials": "*fp64"}
            looks_again = statistic != "inf_norm" and dtype != "float64"
            label = f"{statistic} {dtype}"
            yield Variant(
                "reduce",
                "partial_results",
                label,
                arguments,
                constants,
                (dtype,),
                bodies=1 + looks_again,
                divided_as=("bfloat16",),
                looks_again=looks_again,
            )
        yield Variant(
            "reduce",
            "count_exponents",
            dtype,
            {**TABLE, "counts": "*i64"},
            {"WORDS": words_of("reduce"), "COLUMN": 0, "BINS": 255, **types},
            (dtype,),
        )
        for name in ("scale", "clamp"):
            constants = {"WORDS": words_of("transform"), "CLAMP": name == "clamp", **types}
            arguments = {**TABLE, "operand": "*fp64"}
            yield Variant("transform", "transform", f"{name} {dtype}", arguments, constants, (dtype,), (dtype,))
    for statistic in STATISTICS:
        arguments = {"rows": "*i64", **RESULTS, "total": "*fp32", "results": "*fp32"}
        constants = {"WORDS": words_of("reduce"), "STATISTIC": statistic}
        if statistic == "moments":
            constants["BLOCK"] = 256  # MOMENTS_BLOCK
            del arguments["total"]
            constants["total"] = None
        yield Variant("reduce", "finish_rows", statistic, arguments, constants)
    mixed = [("float32", "bfloat16"), ("float32", "float16"), ("uint8", "uint8")]  # bytes are copied
    place = core.words("row")["first_place"]
    to_nearest = [(*x, None) for x in (*zip(DTYPES, DTYPES, strict=True), *mixed)]
    for average, tensor, seed in [*to_nearest, ("bfloat16", "bfloat16", 1), ("bfloat16", "float32", 1)]:
        types = {"AVERAGE_TYPE": f":{average}", "TENSOR_TYPE": f":{tensor}", "WIDE": f":{wide(average, tensor)}"}
        yield Variant(
            "ema",
            "ema",
            f"{average} of {tensor}" + ", stochastic" * (seed is not None),
            {**TABLE, "settings": "*i64", "skip": "*i1"},
            {"WORDS": words_of("ema"), "DECAY": 0, "SEED": seed, "PLACE": place, "AVERAGE": 0, "TENSOR": 1, **types},
            (tensor,) if tensor == "uint8" else (average, tensor),
            (average,),
        )
    for kind, schema in core.schemas.items():
        if schema.settings:
            yield from rule_variants(kind)
    yield from drop_path_variants()


def rule_variants(rule: str) -> Iterator[Variant]:
    """The plan of a step whose norm is measured, or known, or not wanted, and the update."""
    measured = {"partials": "*fp64", "total_norm": "*fp32", "norms": "*fp32"}
    norms = {"with norm": measured, "with known norm": {"known_norm": "*fp64"}, "without norm": {}}
    for label, of_norm in norms.items():
        arguments = {"rows": "*i64", "settings": "*i64", "coefficient": "*fp64", "scalars": "*fp64"}
        arguments |= {"chunk_count": "i32"}
        arguments |= {"grad_scale": "*fp32", "found_inf": "*fp32", "skip": "*i1", "skipped_steps": "*i64"}
        of_norm = of_norm | ({"guard": "*fp64"} if of_norm else {})
        constants = {"STORE_SCALARS": f"@{rule}.store_scalars", "SCALARS": scalars_of(rule)}
        constants |= {"WORDS": words_of(rule), "GROUP_WORDS": core.group_words(rule)}
        constants |= {"CLIP": bool(of_norm), "SKIP_NONFINITE": bool(of_norm)}
        absent = dict.fromkeys(name for name in (*measured, "known_norm", "guard") if name not in of_norm)
        yield Variant("update", "plan", f"{rule}, {label}", arguments | of_norm, constants | absent)
    optional = [column.name for column in state_of(rule) if column.optional]
    states = [(dtype, dtype) for dtype in DTYPES] + [("bfloat16", "float32"), ("float16", "float32")]
    for param, state in states:
        for used in range(len(optional) + 1):
            for average in dict.fromkeys([None, param, "float32"]):
                yield update_variant(rule, param, state, optional[:used], average)
    for state, average in (("bfloat16", None), ("float32", "float32"), ("bfloat16", "bfloat16")):
        yield update_variant(rule, "bfloat16", state, [], average, is_random=True)
    for param, master in MASTERS:
        for used in range(len(optional) + 1):
            yield update_variant(rule, param, "bfloat16", optional[:used], "float32", master)
            yield update_variant(rule, param, "bfloat16", optional[:used], "float32", master, (param, "float32"))
    for used in range(len(optional) + 1):
        if len(optional) == len(state_of(rule)) and used == 0:  # no state
            continue
        for param, average, master in CODED:
            yield update_variant(rule, param, "8-bit", optional[:used], average, master)
        yield update_variant(rule, "bfloat16", "8-bit", optional[:used], "bfloat16", is_random=True)
    if len(state_of(rule)) > 1:
        for state in (("8-bit", "bfloat16"), ("bfloat16", "8-bit")):
            yield update_variant(rule, "bfloat16", state, [], "float32", "int16")
    for param in DTYPES:
        yield update_variant(
            rule, param, param, [], param, further=("float32",) if param == "float32" else (param,) * 3
        )


def state_of(rule: str) -> list[Any]:
    """The columns that a rule adds to those of every step."""
    return columns_of(rule)[len(core.step_columns) :]


def scalars_of(rule: str) -> int:
    """How many scalars a rule has for each row."""
    return int(importlib.import_module(f"trainops.triton_kernels.{rule}").SCALARS)


def type_of_state(column: Any, dtype: str) -> str:
    """The type of the elements of a column of state. ``dtype``: ``"8-bit"``, or itself."""
    return CODES[column.codes] if dtype == "8-bit" else dtype


def update_variant(
    rule: str,
    param: str,
    state: str | tuple[str, str],
    used: list[str],
    average: str | None,
    master: str | None = None,
    further: tuple[str, ...] = (),
    is_random: bool = False,
) -> Variant:
    """The update for one combination of types, of the optional state that is ``used``, and of averages.

    ``state``: the type of all state, or that of the first moments and that of the second ones. ``is_random``:
    parameters and averages in bfloat16 are rounded stochastically.
    """
    from trainops.triton_kernels.update import update

    first, second = (state, state) if isinstance(state, str) else state
    of_state = [
        type_of_state(column, second if i > 0 else first) if not column.optional or column.name in used else None
        for i, column in enumerate(state_of(rule))
    ]
    slots = [name for name in update.arg_names if name.startswith("STATE")]
    types = dict.fromkeys(slots) | dict(zip(slots, of_state, strict=False))
    types |= {"PARAM_TYPE": param, "GRAD_TYPE": param, "AVERAGE_TYPE": average, "MASTER_TYPE": master}
    types |= {"WIDE": wide(param), **{f"AVERAGE{i + 2}_TYPE": x for i, x in enumerate(further)}}
    types |= dict.fromkeys(f"AVERAGE{i}_TYPE" for i in range(len(further) + 2, 5))
    own = first if first == second else f"{first} and {second}"
    options = [f"{own} state"] * (own != param) + used + [f"{average} average"] * (average is not None)
    options += [f"{dtype} average" for dtype in further] + [f"{master} master"] * (master is not None)
    options += ["stochastic"] * is_random
    rounded = sum((dtype == "bfloat16") << i for i, dtype in enumerate((param, average, *further)))
    writes = tuple(dtype for dtype in (param, *of_state, average, *further, master) if dtype is not None)
    has_codes = any(dtype in CODES.values() for dtype in of_state)
    functions = {"LOAD_SCALARS": f"@{rule}.load_scalars", "NEW_STATE": f"@{rule}.new_state"}
    functions["NEW_PARAM"] = f"@{rule}.new_param"
    return Variant(
        "update",
        "update",
        ", ".join([rule, param, *options]),
        {**TABLE, "settings": "*i64", "scalars": "*fp64", "coefficient": "*fp64", "skip": "*i1"},
        {"WORDS": words_of(rule) + len(further), "FURTHER": len(columns_of(rule)), "SCALARS": scalars_of(rule)}
        | {**functions, "STOCHASTIC": rounded if is_random else 0}
        | {"CODES": has_codes}
        | {k: None if v is None else f":{v}" for k, v in types.items()},
        (param, *writes),
        writes,
        divided_as=("bfloat16",) if has_codes else (),  # in 16 bytes of codes, threads run out of registers
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
            columns = block_numel(("bfloat16",)) // 8
            yield Variant(
                "drop_path",
                "drop_path_backward",
                f"{grad} of {branch}" + ", rows" * rows,
                {**tensors(operands), "partials": "*fp64", **sizes},
                {**constants, "COLUMNS": columns, **({} if rows else {"rows": None})},
                (grad, branch),
                (branch,),
                narrow_stores=1,  # of a partial sum
                divided_as=("bfloat16",),
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
