"""DropPath's Triton kernels: how large their programs and units are."""

import math
from typing import Any

import torch
from torch import Tensor

from . import _triton
from ._device import device_guard


def launch_drop_path(
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
    """The kernel of DropPath: see ``_drop_path.Launch``."""
    common = _triton.kernels()._common
    unit = _unit(sample_numel if layer_scale is None else channels)
    with device_guard(out.device):
        _triton.launch(
            _triton.kernels().drop_path.drop_path,
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
            CHUNK=common.CHUNK,
            BLOCK=_block(out, residual, branch),
            **_types(mask),
        )


def launch_drop_path_backward(
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
    """The two kernels of its derivative."""
    common, kernels = _triton.kernels()._common, _triton.kernels().drop_path
    positions, unit = branch.numel() // channels, _unit(channels)
    block = int(common.block_numel(common.SMALLEST))
    columns = min(block // 8, max(8, 1 << (channels - 1).bit_length()))
    program_positions = max(common.CHUNK // columns, -(-positions // kernels.PARTIALS))
    programs = -(-positions // program_positions)
    finish_rows = 8 if programs <= 8 else 64
    partials = torch.empty(programs, channels, dtype=torch.float64, device=grad.device)
    with device_guard(grad.device):
        _triton.launch(
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
            COLUMNS=columns,
            BLOCK=block,
            **_types(mask),
        )
        _triton.launch(
            kernels.finish_layer_scale,
            -(-channels // (common.REDUCTION_BLOCK // finish_rows)),
            of_layer_scale,
            partials,
            programs,
            channels,
            ROWS=finish_rows,
            BLOCK=common.REDUCTION_BLOCK,
        )


def _types(mask: Tensor) -> dict[str, Any]:
    """The types of products, which are rounded to the mask's, and of sums."""
    product = str(mask.dtype).removeprefix("torch.")
    return {"PRODUCT": _triton.type_of(product), "WIDE": _triton.type_of(_triton.wide_type(product))}


def _block(*tensors: Tensor | None) -> int:
    return int(_triton.kernels()._common.block_numel(*(x.itemsize for x in tensors if x is not None)))


def _unit(numel: int) -> int:
    """The number of consecutive elements that the DropPath kernels take as a unit."""
    return math.gcd(numel, _triton.kernels().drop_path.UNIT)


def _index(largest: int) -> Any:
    """The type of an index up to ``largest``, and some chunks more."""
    return _triton.type_of(torch.uint32 if largest < 2**31 else torch.uint64)
