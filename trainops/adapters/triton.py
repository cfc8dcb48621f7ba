"""The ``triton`` backend: Triton kernels (``triton_kernels``) for NVIDIA and AMD GPUs.

Under Triton's interpreter (``TRITON_INTERPRET=1`` in the environment before Python starts) it takes CPU tensors
instead: slow, and meant for tests.
"""

import importlib
import importlib.util
import math
import os
import struct
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import core
from ..tables import staged_table
from ..uploads import uploaded
from ._device import StagedWords, copy_back, device_guard, stage, step_settings, to_device
from ._drop_path import operations
from ._tables import columns_of, ema_operations
from .interface import Backend, Group, StepControl, StepResult


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def probe() -> Backend:
    """Available where Triton is installed and can launch on a GPU, or its interpreter is on."""
    if not _is_installed():
        return Backend(available=False, reason="Triton is not installed")
    if not core.available:
        return Backend(available=False, reason=f"it needs trainops' compiled core: {core.reason}")
    if not _interpreted() and not torch.cuda.is_available():
        return Backend(available=False, reason="PyTorch finds no GPU")
    try:
        import triton

        _kernels()
        if not _interpreted():
            _ = triton.runtime.driver.active.utils  # is built when first wanted, for which it needs a C compiler
    except Exception as error:
        reason = f"Triton is installed but does not work: {error}"
        warnings.warn(f"trainops runs without its triton backend: {reason}", RuntimeWarning, stacklevel=2)
        return Backend(available=False, reason=reason)
    where = "interpreted, on CPU tensors" if _interpreted() else torch.cuda.get_device_name()
    return Backend(available=True, details=f"Triton {triton.__version__}; {where}")


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module without a specification stands in its place
        return False


def serves(device_type: str) -> bool:
    """CUDA and ROCm tensors; CPU tensors under the interpreter."""
    return device_type == ("cpu" if _interpreted() else "cuda")


@cache
def _kernels() -> Any:
    """The kernels, imported when they are first wanted."""
    return importlib.import_module("trainops.triton_kernels")


@cache
def _type(dtype: torch.dtype | str | None) -> Any:
    """Triton's name for a dtype."""
    import triton.language

    return None if dtype is None else getattr(triton.language, str(dtype).removeprefix("torch."))


@cache
def _warps() -> int:
    """How many a program has."""
    threads: int = _kernels()._common.THREADS
    if _interpreted():
        return threads // 32
    import triton

    warp_size: int = triton.runtime.driver.active.get_current_target().warp_size
    return max(1, threads // warp_size)


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Contraction to fused multiply-add is off so that results do not depend on how a kernel was compiled."""
    kernel[(programs,)](*args, **constants, num_warps=_warps(), enable_fp_fusion=False)


class _Staged:
    """A table whose words lie on its device, for kernels that take chunks."""

    def __init__(self, kind: str, table: Any, device: torch.device) -> None:
        self.words = stage(table, device, _kernels()._common.CHUNK, by_kind=True)
        self.device, self.row_count, self.has_float64 = device, table.rows, table.has_float64
        self.columns = {column.name: i for i, column in enumerate(core.schema(kind).columns)}
        self._row_words = len(core.row_words()) + len(self.columns)

    def constants(self, block: int) -> dict[str, int]:
        """What every kernel must know of the table; ``block``: how many elements a program takes at a time."""
        return {"WORDS": self._row_words, "CHUNK": _kernels()._common.CHUNK, "BLOCK": block}

    def reduction_constants(self) -> dict[str, int]:
        """The same for a kernel that joins partial results."""
        return self.constants(_kernels()._common.REDUCTION_BLOCK)

    def over_chunks(
        self, kernel: Any, *args: Any, types: dict[str, str], wide: dict[str, tuple[str, ...]], **constants: Any
    ) -> None:
        """Launch a kernel for each section of chunks.

        ``types`` has the constants for the types of columns, ``wide`` those for the type of arithmetic on some.
        """
        for section in self.words.sections:
            dtypes = {constant: section.kind[self.columns[column]] for constant, column in types.items()}
            block = _kernels()._common.block_numel(*(_itemsize(dtype) for dtype in dtypes.values() if dtype))
            _launch(
                kernel,
                section.chunk_count,
                self.words.rows,
                self.words.chunks,
                section.first_chunk,
                *args,
                **{constant: _type(dtype) for constant, dtype in dtypes.items()},
                **{constant: _type(_wide(*(dtypes[x] for x in among))) for constant, among in wide.items()},
                **constants,
                **self.constants(block),
            )

    def results(self) -> tuple[Tensor, Tensor]:
        """Room for a statistic of everything and of each row."""
        dtype = torch.float64 if self.has_float64 else torch.float32
        rows = torch.empty(self.row_count, dtype=dtype, device=self.device)
        return torch.empty((), dtype=dtype, device=self.device), rows

    def partial_results(self, statistic: str, column: str) -> Tensor:
        """The statistic of each chunk, as far as it goes."""
        partials = torch.empty(self.words.chunk_count, dtype=torch.float64, device=self.device)
        self.over_chunks(
            _kernels().reduce.partial_results,
            partials,
            types={"DTYPE": column},
            wide={"WIDE": ("DTYPE",)},
            STATISTIC=statistic,
            COLUMN=self.columns[column],
        )
        return partials


@cache
def _itemsize(dtype: str) -> int:
    return int(getattr(torch, dtype).itemsize)


def _wide(*dtypes: str | None) -> str:
    """The type of arithmetic on such types."""
    return "float64" if "float64" in dtypes else "float32"


def _device_type() -> str:
    return "cpu" if serves("cpu") else "cuda"


def reduce(statistic: str, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    device = tensors[0].device
    with staged_table("reduce", {"tensor": list(tensors)}, _device_type()) as table, device_guard(device):
        staged = _Staged("reduce", table, device)
        total, rows = staged.results()
        _launch(
            _kernels().reduce.finish_rows,
            1 + staged.row_count,
            staged.words.rows,
            staged.partial_results(statistic, "tensor"),
            staged.words.chunk_count,
            total,
            rows,
            STATISTIC=statistic,
            **staged.reduction_constants(),
        )
    return total, rows


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """See :func:`trainops.reference.scale_`. A coefficient of 1 leaves the tensors unread."""
    _transform(tensors, coefficient.to(tensors[0].device), clamp=False)


def clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """See :func:`trainops.reference.clamp_`."""
    device = tensors[0].device
    with device_guard(device):
        operand = uploaded(struct.pack("d", bound), device).view(torch.float64)
    _transform(tensors, operand, clamp=True)


def _transform(tensors: Sequence[Tensor], operand: Tensor, clamp: bool) -> None:
    device = tensors[0].device
    with staged_table("transform", {"tensor": list(tensors)}, _device_type()) as table, device_guard(device):
        staged = _Staged("transform", table, device)
        kernel = _kernels().transform.transform
        staged.over_chunks(kernel, operand, types={"DTYPE": "tensor"}, wide={"WIDE": ("DTYPE",)}, CLAMP=clamp)


def _ema(table: Any, decay: float, skip: Tensor | None) -> None:
    device = _table_device(table)
    with device_guard(device):
        _Staged("ema", table, device).over_chunks(
            _kernels().ema.ema,
            uploaded(struct.pack("d", decay), device),
            None if skip is None else skip.to(device),
            types={"AVERAGE_TYPE": "average", "TENSOR_TYPE": "tensor"},
            wide={"WIDE": ("AVERAGE_TYPE", "TENSOR_TYPE")},
        )


ema_, try_ema_ = ema_operations(_device_type, _ema)


def _table_device(table: Any) -> torch.device:
    return torch.device("cpu") if _device_type() == "cpu" else torch.device("cuda", table.device_index)


def collect(
    rule: str,
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    averages: dict[int, Tensor],
    states: list[tuple[str, ...]],
) -> Any:
    """See :class:`trainops.adapters.interface.Kernels`."""
    return core.collect(rule, param_groups, state, averages, states, _device_type())


def update(
    rule: str, groups: Sequence[Group], control: StepControl, ema_decay: float, collected: Any = None
) -> StepResult:
    """See :class:`trainops.adapters.interface.Kernels`. All groups are one table, in three launches or two."""
    if collected is not None:
        return _update(collected, rule, groups, control, ema_decay)
    group_rows = [group.rows for group in groups]
    with staged_table(rule, columns_of(rule, groups), _device_type(), group_rows) as table:
        return _update(table, rule, groups, control, ema_decay)


def _update(table: Any, rule: str, groups: Sequence[Group], control: StepControl, ema_decay: float) -> StepResult:
    kernels, device = _kernels().update, _table_device(table)
    formulas = importlib.import_module(f"trainops.triton_kernels.{rule}")
    with device_guard(device):
        staged = _Staged(rule, table, device)
        settings = uploaded(step_settings(rule, groups, control, ema_decay, device), device)
        scalars = torch.empty(staged.row_count, kernels.SCALARS.value, dtype=torch.float64, device=device)
        coefficient = torch.empty((), dtype=torch.float64, device=device)
        skip = torch.empty((), dtype=torch.bool, device=device) if control.may_skip else None
        counter = None if skip is None else to_device(control.skipped_steps, device)
        partials = staged.partial_results("l2_norm", "grad") if control.measures else None
        total_norm, norms = (None, None) if partials is None else staged.results()
        _launch(
            kernels.plan,
            1 + staged.row_count,
            staged.words.rows,
            settings,
            partials,
            staged.words.chunk_count,
            to_device(control.grad_scale, device),
            to_device(control.found_inf, device),
            to_device(control.total_norm, device),
            total_norm,
            norms,
            coefficient,
            skip,
            counter,
            scalars,
            STORE_SCALARS=formulas.store_scalars,
            GROUP_WORDS=2 * len(core.schema(rule).settings),
            MAXIMIZE=core.setting(rule, "maximize"),
            CLIP=control.max_norm is not None,
            SKIP_NONFINITE=control.skip_nonfinite,
            **staged.reduction_constants(),
        )
        types = {"PARAM_TYPE": "param", "GRAD_TYPE": "grad", "AVERAGE_TYPE": "average"}
        state = list(staged.columns)[kernels.STATE.value :]
        types |= {f"STATE{i}_TYPE": name for i, name in enumerate(state)}
        absent = {f"STATE{i}_TYPE": None for i in range(len(state), 3)}
        staged.over_chunks(
            kernels.update,
            settings,
            scalars,
            coefficient,
            skip,
            types=types,
            LOAD_SCALARS=formulas.load_scalars,
            FORMULA=formulas.formula,
            wide={"WIDE": ("PARAM_TYPE",), "AVERAGE_WIDE": ("PARAM_TYPE", "AVERAGE_TYPE")},
            **absent,
        )
    copy_back(counter, control)
    return StepResult(control.total_norm if total_norm is None else total_norm, norms, skip)


def _launch_drop_path(
    *,
    out: Tensor,
    residual: Tensor | None,
    branch: Tensor,
    layer_scale: Tensor | None,
    mask: Tensor,
    rows: Tensor | None,
    samples: int,
    sample_numel: int,
    channels: int,
) -> None:
    common = _kernels()._common
    unit = _unit(sample_numel if layer_scale is None else channels)
    with device_guard(out.device):
        _launch(
            _kernels().drop_path.drop_path,
            -(-out.numel() // common.CHUNK),
            out,
            residual,
            branch,
            layer_scale,
            mask,
            rows,
            out.numel() // unit,
            sample_numel // unit,
            channels // unit,
            UNIT=unit,
            INDEX=_index(sample_numel // unit),
            PRODUCT=_type(mask.dtype),
            WIDE=_type(torch.float64 if mask.dtype == torch.float64 else torch.float32),
            CHUNK=common.CHUNK,
            BLOCK=_block(out, residual, branch),
        )


def _launch_drop_path_backward(
    *,
    of_branch: Tensor,
    of_layer_scale: Tensor,
    grad: Tensor,
    branch: Tensor,
    layer_scale: Tensor,
    mask: Tensor,
    rows: Tensor | None,
    samples: int,
    sample_numel: int,
    channels: int,
) -> None:
    common, kernels = _kernels()._common, _kernels().drop_path
    positions, unit = branch.numel() // channels, _unit(channels)
    block = _block(grad, branch)
    columns = min(block // 8, max(8, 1 << (channels - 1).bit_length()))
    program_positions = max(common.CHUNK // columns, -(-positions // kernels.PARTIALS))
    programs = -(-positions // program_positions)
    finish_rows = 8 if programs <= 8 else 64
    partials = torch.empty(programs, channels, dtype=torch.float64, device=grad.device)
    with device_guard(grad.device):
        _launch(
            kernels.drop_path_backward,
            programs * -(-channels // columns),
            of_branch,
            partials,
            grad,
            branch,
            layer_scale,
            mask,
            rows,
            positions,
            sample_numel // channels,
            program_positions,
            channels // unit,
            UNIT=unit,
            INDEX=_index(sample_numel // channels + program_positions),
            PRODUCT=_type(mask.dtype),
            WIDE=_type(torch.float64 if mask.dtype == torch.float64 else torch.float32),
            COLUMNS=columns,
            BLOCK=block,
        )
        _launch(
            kernels.finish_layer_scale,
            -(-channels // (common.REDUCTION_BLOCK // finish_rows)),
            of_layer_scale,
            partials,
            programs,
            channels,
            ROWS=finish_rows,
            BLOCK=common.REDUCTION_BLOCK,
        )


drop_path, drop_path_backward = operations(_launch_drop_path, _launch_drop_path_backward)


def _block(*tensors: Tensor | None) -> int:
    return int(_kernels()._common.block_numel(*(x.itemsize for x in tensors if x is not None)))


def _unit(numel: int) -> int:
    """How many consecutive elements the DropPath kernels take as one."""
    return math.gcd(numel, _kernels().drop_path.UNIT)


def _index(largest: int) -> Any:
    """The type of an index up to ``largest``, and some chunks more."""
    return _type(torch.uint32 if largest < 2**31 else torch.uint64)
