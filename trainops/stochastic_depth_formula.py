"""Stochastic depth as operations for a batch of any size, for torch.fx and torch.export."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference


def of_any_size(residual: Tensor) -> bool:
    """Whether a tracer (torch.fx, torch.export) needs operations for a batch of any size."""
    if isinstance(residual, torch.fx.Proxy) or getattr(torch.compiler, "is_exporting", bool)():
        return True
    return isinstance(residual, Tensor) and residual.ndim > 0 and isinstance(residual.shape[0], torch.SymInt)


def on_whole_batch(
    residual: Tensor,
    branch: Callable[[Tensor], Tensor],
    rate: float,
    scale_by_keep: bool,
    layer_scale: Tensor | None,
    mode: str,
) -> Tensor:
    """:func:`trainops.stochastic_depth` whose branch is run on all samples. No shape depends on how many are kept."""
    result = branch(residual)
    scaled = result if layer_scale is None else result * layer_scale
    if rate == 0.0:
        return residual + scaled
    batch, ones = residual.shape[0], (1,) * (residual.ndim - 1)
    if mode == "fixed":
        count = kept_count(batch, rate)
        rows = torch.randperm(batch, device=residual.device).argsort()
        keep, keep_prob = (rows < count).to(scaled.dtype).reshape((batch,) + ones), count / batch  # noqa: RUF005
    else:
        keep, keep_prob = reference.drop_path_mask(residual, rate, scale_by_keep=False).to(scaled.dtype), 1 - rate
    if rate == 1.0:
        keep = torch.zeros_like(keep)
    mask = keep / keep_prob if scale_by_keep and rate < 1.0 else keep
    return reference.drop_path(result, mask, residual, layer_scale)


def kept_count(batch: int, rate: float) -> int:
    """The number of samples that mode "fixed" keeps."""
    count: int = torch.sym_max(1, round(batch * (1 - rate)))  # type: ignore[no-untyped-call]
    return count


torch.fx.wrap("kept_count")  # records the call: torch.fx cannot trace `round`
