"""Norms of an order: by kernels or by PyTorch, and how those of several tensors and ranks are joined."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .adapters import Kernels

STATISTICS = {1.0: "l1_norm", 2.0: "l2_norm", math.inf: "inf_norm"}


def norms_by(
    kernels: Kernels, tensors: Sequence[Tensor], norm_type: float, unrounded: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors of one device, and of each, by kernels or, for orders that they lack, by PyTorch.

    Of complex tensors, only the 2-norm equals that of their parts.
    """
    if norm_type in STATISTICS and (norm_type == 2.0 or not any(x.is_complex() for x in tensors)):
        return kernels.reduce(STATISTICS[norm_type], tensors, unrounded)
    return (reference.sum_norms if unrounded else reference.grad_norms)(tensors, norm_type)


class NormOrder:
    """How norms of an order are joined: sums of powers, or the largest; for order 0, sums of counts."""

    def __init__(self, p: float) -> None:
        self.p, self.is_largest = p, math.isinf(p)

    def powers(self, norms: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Of norms of tensors: what is added up, or the largest of which is sought."""
        if self.is_largest:
            powers = norms if self.p > 0 else -norms
        else:
            powers = norms if self.p in (0.0, 1.0) else norms.square() if self.p == 2.0 else norms**self.p
        if self.p < 0:  # of the order, no elements are as many infinite ones
            empty = torch.tensor([x.numel() == 0 for x in tensors], device=norms.device)
            powers = torch.where(empty, -math.inf if self.is_largest else 0.0, powers)
        return powers

    def norm(self, powers: Tensor) -> Tensor:
        """The inverse of ``powers``."""
        if self.is_largest:
            return powers if self.p > 0 else -powers
        return powers if self.p in (0.0, 1.0) else powers.sqrt() if self.p == 2.0 else powers ** (1 / self.p)

    def total(self, powers: Tensor) -> Tensor:
        """Of several tensors. As in PyTorch, the norm of order 0 counts the tensors whose own is not 0."""
        if self.is_largest:
            start = 0.0 if self.p > 0 else -math.inf
            return torch.cat([powers, powers.new_full((1,), start)]).amax()
        return powers.sum() if self.p else (powers != 0).sum(dtype=powers.dtype)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Of two disjoint sets of elements."""
        return torch.maximum(a, b) if self.is_largest else a + b

    def share(self, power: Tensor, weight: float | Tensor) -> Tensor:
        """One of several copies, of which all together count once."""
        return power if self.is_largest else power * weight

    def reaches(self, group: Any, device: torch.device) -> bool:
        """Whether tensors on the device can be reduced as they are: not those that FSDP keeps on the CPU."""
        supported = [x.type for x in getattr(group, "_device_types", ())]
        return not supported or device.type in supported

    def over(self, group: Any, powers: Tensor) -> Tensor:
        """All-reduced. A NaN of any rank stays, also where the largest is sought."""
        device = powers.device
        if not self.reaches(group, device):
            powers = powers.to(group._device_types[0].type)
        if not self.is_largest:
            powers = powers.clone()
            torch.distributed.all_reduce(powers, group=group)
            return powers.to(device)
        is_nan = powers.isnan()
        both = torch.stack([powers.masked_fill(is_nan, math.inf), is_nan.to(powers.dtype)])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group)
        return both[0].masked_fill(both[1] != 0, math.nan).to(device)
