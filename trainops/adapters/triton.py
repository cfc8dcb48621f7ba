"""The ``triton`` backend: Triton kernels (``triton_kernels``) for NVIDIA and AMD GPUs.

Under Triton's interpreter (``TRITON_INTERPRET=1`` in the environment before Python starts) it takes CPU tensors
instead: slow, and meant for tests.
"""

import importlib
import importlib.util
import struct
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import core
from ..reference_statistics import BINS, ROW
from ..tables import staged_table
from ..uploads import uploaded
from . import _triton
from ._device import copy_back, device_guard, step_settings, to_device
from ._drop_path import operations
from ._tables import ema_operations, step_operations
from ._triton_drop_path import launch_drop_path, launch_drop_path_backward
from .interface import AVERAGES, Backend, Group, StepControl, StepResult


@cache
def probe() -> Backend:
    """Available where Triton is installed and can launch on a GPU, or its interpreter is on."""
    if not _is_installed():
        return Backend(available=False, reason="Triton is not installed")
    if not core.available:
        return Backend(available=False, reason=f"it needs trainops' compiled core: {core.reason}")
    if not _triton.interpreted() and not torch.cuda.is_available():
        return Backend(available=False, reason="PyTorch finds no GPU")
    try:
        import triton

        _triton.kernels()
        if not _triton.interpreted():
            _ = triton.runtime.driver.active.utils  # is built on first use, which needs a C compiler
    except Exception as error:
        reason = f"Triton is installed but does not work: {error}"
        warnings.warn(f"trainops runs without its triton backend: {reason}", RuntimeWarning, stacklevel=2)
        return Backend(available=False, reason=reason)
    where = "interpreted, on CPU tensors" if _triton.interpreted() else torch.cuda.get_device_name()
    return Backend(available=True, details=f"Triton {triton.__version__}; {where}")


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module without a specification stands in its place
        return False


def refusal(device: torch.device) -> str:
    """CUDA and ROCm tensors are taken; CPU tensors under the interpreter."""
    own = "cpu" if _triton.interpreted() else "cuda"
    return "" if device.type == own else f"it takes {own.upper()} tensors"


def _device_type() -> str:
    return "cuda" if refusal(torch.device("cpu")) else "cpu"


def reduce(statistic: str, tensors: Sequence[Tensor], unrounded: bool = False) -> tuple[Tensor, Tensor]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    device = tensors[0].device
    with staged_table("reduce", {"tensor": list(tensors)}, _device_type()) as table, device_guard(device):
        table.has_float64 |= unrounded
        staged = _triton.Staged("reduce", table, device)
        total, rows = staged.results()
        _finish_rows(staged, statistic, total, rows, staged.reduction_constants())
    return total, rows


def _finish_rows(
    staged: _triton.Staged, statistic: str, total: Tensor | None, rows: Tensor, constants: dict[str, int]
) -> None:
    _triton.launch(
        _triton.kernels().reduce.finish_rows,
        1 + staged.row_count,
        staged.words.rows,
        staged.partial_results(statistic, "tensor"),
        staged.words.chunk_count,
        total,
        rows,
        STATISTIC=statistic,
        **constants,
    )


def statistics(tensors: Sequence[Tensor], histogram: bool) -> tuple[Tensor, Tensor | None]:
    """See :class:`trainops.adapters.interface.Kernels`."""
    device = tensors[0].device
    with staged_table("reduce", {"tensor": list(tensors)}, _device_type()) as table, device_guard(device):
        staged = _triton.Staged("reduce", table, device)
        rows = torch.empty(staged.row_count, len(ROW), dtype=torch.float64, device=device)
        _finish_rows(staged, "moments", None, rows, staged.constants(_triton.kernels()._common.MOMENTS_BLOCK))
        bins = torch.zeros(staged.row_count, BINS, dtype=torch.int64, device=device) if histogram else None
        if bins is not None:
            staged.over_chunks(
                _triton.kernels().reduce.count_exponents,
                bins,
                types={"DTYPE": "tensor"},
                wide={"WIDE": ("DTYPE",)},
                COLUMN=staged.columns["tensor"],
                BINS=BINS,
            )
    return rows, bins


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
        staged = _triton.Staged("transform", table, device)
        kernel = _triton.kernels().transform.transform
        staged.over_chunks(kernel, operand, types={"DTYPE": "tensor"}, wide={"WIDE": ("DTYPE",)}, CLAMP=clamp)


def _ema(table: Any, decay: float, skip: Tensor | None, seed: int) -> None:
    device = _table_device(table)
    with device_guard(device):
        _triton.Staged("ema", table, device).over_chunks(
            _triton.kernels().ema.ema,
            uploaded(struct.pack("dq", decay, seed), device),
            None if skip is None else skip.to(device),
            types={"AVERAGE_TYPE": "average", "TENSOR_TYPE": "tensor"},
            wide={"WIDE": ("AVERAGE_TYPE", "TENSOR_TYPE")},
            DECAY=0,
            SEED=1 if table.is_special else None,
            PLACE=_triton.kernels()._common.FIRST_PLACE.value,
            AVERAGE=_triton.kernels().ema.AVERAGE,
            TENSOR=_triton.kernels().ema.TENSOR,
        )


ema_, try_ema_ = ema_operations(_device_type, _ema)


def _table_device(table: Any) -> torch.device:
    return torch.device("cpu") if _device_type() == "cpu" else torch.device("cuda", table.device_index)


def _update(
    table: Any, rule: str, groups: Sequence[Group], control: StepControl, ema_decays: Sequence[float]
) -> StepResult:
    kernels, device = _triton.kernels().update, _table_device(table)
    formulas = importlib.import_module(f"trainops.triton_kernels.{rule}")
    with device_guard(device):
        staged = _triton.Staged(rule, table, device, len(ema_decays))
        words, held = step_settings(rule, groups, control, ema_decays, device)
        settings = uploaded(words, device)
        slots = kernels.RULE_SCALARS.value + formulas.SCALARS
        scalars = torch.empty(staged.row_count, slots, dtype=torch.float64, device=device)
        coefficient = torch.empty((), dtype=torch.float64, device=device)
        skip = torch.empty((), dtype=torch.bool, device=device) if control.may_skip else None
        counter = None if skip is None else to_device(control.skipped_steps, device)
        partials = staged.partial_results("l2_norm", "grad") if control.measures else None
        total_norm, norms = (None, None) if partials is None else staged.results()
        _triton.launch(
            kernels.plan,
            1 + staged.row_count,
            staged.words.rows,
            settings,
            partials,
            staged.words.chunk_count,
            to_device(control.grad_scale, device),
            to_device(control.found_inf, device),
            to_device(control.total_norm, device),
            control.guard,
            total_norm,
            norms,
            coefficient,
            skip,
            counter,
            scalars,
            STORE_SCALARS=formulas.store_scalars,
            SCALARS=formulas.SCALARS,
            GROUP_WORDS=core.group_words(rule),
            CLIP=control.max_norm is not None,
            SKIP_NONFINITE=control.skip_nonfinite,
            **staged.reduction_constants(),
        )
        types = {"PARAM_TYPE": "param", "GRAD_TYPE": "grad", "MASTER_TYPE": "master"}
        state = list(core.schemas[rule].places)[kernels.STATE.value :]
        types |= {f"STATE{i}_TYPE": name for i, name in enumerate(state)}
        averages = {f"{name.upper()}_TYPE": name for name in AVERAGES}
        types |= {constant: name for constant, name in averages.items() if name in staged.columns}
        absent = dict.fromkeys(x for x in (*averages, *(f"STATE{i}_TYPE" for i in range(3))) if x not in types)
        staged.over_chunks(
            kernels.update,
            settings,
            scalars,
            coefficient,
            skip,
            types=types,
            rounded=("param", *AVERAGES),
            coded=state,
            LOAD_SCALARS=formulas.load_scalars,
            SCALARS=formulas.SCALARS,
            NEW_STATE=formulas.new_state,
            NEW_PARAM=formulas.new_param,
            FURTHER=len(core.schemas[rule].places),
            wide={"WIDE": ("PARAM_TYPE",)},
            **absent,
        )
        _follow_buffers(staged, settings, skip)
    del held
    copy_back(counter, control)
    return StepResult(control.total_norm if total_norm is None else total_norm, norms, skip)


def _follow_buffers(staged: _triton.Staged, settings: Tensor, skip: Tensor | None) -> None:
    """Moves or copies the averages of buffers, each of which has one in its row."""
    for section in staged.of_buffers:
        place, name = next((i, x) for i, x in enumerate(AVERAGES) if section.kind[staged.columns[x]] is not None)
        staged.over_chunks(
            _triton.kernels().ema.ema,
            settings,
            skip,
            types={"AVERAGE_TYPE": name, "TENSOR_TYPE": "param"},
            wide={"WIDE": ("AVERAGE_TYPE", "TENSOR_TYPE")},
            sections=[section],
            DECAY=core.words("step")["ema_decay"] + place,
            SEED=core.words("step")["ema_seed"] + place if staged.stochastic(section, [name]) else None,
            PLACE=core.words("row")["average_place"] + place,
            AVERAGE=staged.columns[name],
            TENSOR=staged.columns["param"],
        )


collect, update = step_operations(_device_type, _update)

drop_path, drop_path_backward = operations(launch_drop_path, launch_drop_path_backward)
