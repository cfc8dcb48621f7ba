"""Tables of tensors for kernels, which C++ builds (``csrc/core``), and the order of their columns.

A table has one row per parameter and one column per role. Triton's kernels learn from here the place of a column, a
setting or a word.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ._extensions import load
from .plain import PLAIN

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)

_DTYPE_CODES = {  # as DLPack names them: (code, bits)
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int16: (0, 16),
    # These are copied.
    torch.int8: (0, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.bool: (6, 8),
}
_DEVICE_CODES = {"cpu": 1, "cuda": 2}


def describe(x: Tensor) -> tuple[int, int, int, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """Address, dtype code, bits, device code and index, shape, strides; None for a tensor that no kernel takes.

    C++ asks it where PyTorch is too old for a tensor to describe itself.
    """
    if x.layout is not torch.strided or x.dtype not in _DTYPE_CODES or x.device.type not in _DEVICE_CODES:
        return None
    device = _DEVICE_CODES[x.device.type], x.device.index or 0
    return (x.data_ptr(), *_DTYPE_CODES[x.dtype], *device, tuple(x.shape), x.stride())


class Column(NamedTuple):
    """The use of a column. Without a flag, every row has a tensor there, and kernels only read it."""

    name: str
    written: bool
    optional: bool
    one_per_row: bool  # a float32 for the row, not a number for each element
    of_param: bool  # a master: its type has to suit the parameter's
    codes: str | None  # the type of its codes, where it may be kept in 8 bits


class Schema(NamedTuple):
    """The columns of a kind of table, and of a rule its settings, in their order."""

    columns: list[Column]
    places: dict[str, int]  # of the columns, by name
    settings: list[str]
    measured: int  # the column whose norm is taken; of no use for `ema` and `transform`


_core, reason = load("_core", "core")
available = _core is not None
reader: Any = None
further_averages: list[Column] = []  # of a step with more than one average, behind the rule's state
step_columns: dict[str, int] = {}  # the places of the columns of every rule, by name; those of its state follow
GUARD: list[str] = []  # the numbers of a guard against spikes, in the order of memory
LEAST_DEVIATION = 0.0  # of a guard
RAISE_FLAG = 0  # the address of a function of C that takes a flag's
schemas: dict[str, Schema] = {}  # by the kind of table: a rule's name, ``ema``, ``reduce`` or ``transform``


def _columns(described: Sequence[Any]) -> list[Column]:
    return [Column(x.name, x.written, x.optional, x.one_per_row, x.of_param, x.codes) for x in described]


def _places(columns: Sequence[Column]) -> dict[str, int]:
    return {column.name: place for place, column in enumerate(columns)}


if available:
    for kind, its in _core.SCHEMAS.items():  # read once: each access to an object of C++ makes its lists anew
        columns = _columns(its.columns)
        schemas[kind] = Schema(columns, _places(columns), its.settings, its.measured)
    further_averages = _columns(_core.FURTHER_AVERAGES)
    step_columns = _core.STEP_COLUMNS
    RAISE_FLAG = _core.RAISE_FLAG
    GUARD, LEAST_DEVIATION = _core.GUARD, _core.LEAST_DEVIATION
    reader = _core.TensorReader()
    reader.configure(
        api=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
        describe=describe,
        plain_types=tuple(PLAIN),
    )


def load_kernels(module: str, name: str) -> tuple[Any, str]:
    """The extension with the kernels of a backend, and what it was built with; or None, and why it is missing."""
    return load(module, name) if available else (None, reason)


def address(x: Tensor | None) -> int:
    """The address of a tensor's elements; 0 for None."""
    return 0 if x is None else x.data_ptr()


def new_flag() -> int:
    """The address of a flag, for ``RAISE_FLAG`` to raise."""
    return cast(int, _core.new_flag())


def take_flag(flag: int) -> bool:
    """Whether a flag is raised. If so, it is deleted."""
    return cast(bool, _core.take_flag(flag))


@cache
def schema(kind: str, averages: int = 1) -> Schema:
    """A kind of table; of a rule, with so many averages."""
    if averages <= 1:
        return schemas[kind]
    columns = [*schemas[kind].columns, *further_averages[: averages - 1]]
    return schemas[kind]._replace(columns=columns, places=_places(columns))


def setting(rule: str, name: str) -> int:
    """The index of a setting among those of a rule."""
    return schemas[rule].settings.index(name)


def words(name: str) -> dict[str, int]:
    """The indices of words, or the values that a word may have, by name.

    ``row``: in front of a row's addresses. ``chunk``: of a chunk. ``step``: in front of the settings of a step.
    ``setting``: of one setting. ``form``: how a setting is given.
    """
    return cast(dict[str, int], _core.WORDS[name])


def group_words(rule: str) -> int:
    """The number of words for the settings of a group of parameters."""
    return len(words("setting")) * len(schemas[rule].settings)


def table(
    kind: str,
    columns: Mapping[str, Sequence[Tensor | None]],
    device_type: str,
    group_rows: Sequence[int] = (),
    places: Sequence[tuple[int, Sequence[int], int, bool]] = (),
) -> Any:
    """A table of lists of tensors. Its ``irregular`` rows are those that kernels cannot take as they are.

    ``places``: of each row (``csrc/core/table.h``), if something is rounded stochastically.
    """
    return _core.Table(reader, kind, columns, device_type=device_type, group_rows=group_rows, places=places)


def collect(
    rule: str,
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    averages: list[dict[int, Tensor]],
    buffers: list[list[Any]],
    states: list[tuple[str, ...]],
    device_type: str,
    rounds_params: bool = False,
    average_places: Sequence[Mapping[int, int]] = (),
    origin_of: Callable[[Tensor], int] | None = None,
    codes: bool = False,
) -> Any:
    """The rows of a step straight from an optimizer's containers, if all rows are regular, else None.

    See ``Kernels.collect`` in ``trainops.adapters.interface`` for the arguments. The last four say what is rounded
    stochastically (``csrc/core/rounding.h``).
    """
    found = _core.Table(
        reader,
        rule,
        param_groups=param_groups,
        state=state,
        averages=averages,
        buffers=buffers,
        states=states,
        device_type=device_type,
        rounding=_core.Rounding(
            params=rounds_params, codes=codes, average_places=average_places, origin_of=origin_of
        ),
    )
    return found if found.regular else None


def local_tensors(tensors: list[OptionalTensor]) -> list[OptionalTensor] | None:
    """Tensors with this rank's shard in place of each DTensor; None where one is of another subclass."""
    found = _core.local_tensors(reader, tensors) if available else None
    return cast(list[OptionalTensor] | None, found)


def shards_of_gradients(param_groups: Sequence[Mapping[str, Any]]) -> tuple[list[Tensor], bool] | None:
    """This rank's shards of all gradients, and whether one is of float64.

    None where a parameter has none, or where they are not all placed alike and on one device, for kernels to read.
    """
    found = _core.shards_of_gradients(reader, param_groups) if available else None
    return cast(tuple[list[Tensor], bool] | None, found)


def are_small(branch: Tensor, residual: Tensor | None, layer_scale: Tensor | None, largest: int) -> bool:
    """Whether DropPath's operands are plain tensors of up to ``largest`` elements on the CPU.

    A residual must have the branch's type and size, and both must be contiguous. So must layer scale, of one
    dimension and of the same type. False where ``TRAINOPS_BACKEND`` is set.
    """
    return cast(bool, _core.are_small(reader, branch, residual, layer_scale, largest))


def drop_path(*, rows: Tensor | None, **operands: Any) -> Any:
    """The arguments of DropPath's kernel: those of ``trainops.adapters._drop_path.Launch``, and ``device_type``."""
    return _core.DropPath(reader, rows=address(rows), **operands)


def drop_path_backward(*, rows: Tensor | None, **operands: Any) -> Any:
    """The arguments of its derivative's kernels: those of ``LaunchBackward``, and ``device_type``."""
    return _core.DropPathBackward(reader, rows=address(rows), **operands)


def seeds(params: int, averages: Sequence[int]) -> Any:
    """What random bits depend on, for C++."""
    return _core.Seeds(params=params, averages=averages)


def step_settings(
    rule: str,
    max_norm: float | Tensor | None,
    ema_decays: Sequence[float],
    settings: Sequence[Mapping[str, float | Tensor]],
    seeds_of_step: tuple[int, Sequence[int]] = (0, ()),
) -> bytes:
    """The settings of a step as 64-bit words for the device. Tensors among them must lie on that device."""
    names = schemas[rule].settings
    return cast(
        bytes,
        _core.step_words(
            reader=reader,
            max_norm=0.0 if max_norm is None else max_norm,
            ema_decays=ema_decays,
            seeds=seeds(*seeds_of_step),
            groups=[[group[name] for name in names] for group in settings],
        ),
    )
