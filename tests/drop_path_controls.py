"""Wrong ways to drop paths, which every check of the numbers must notice: see ``controls.py``."""

from functools import partial
from unittest import mock

import torch
from controls import cut_off
from targets import thorough

from trainops.adapters import pytorch as kernels
from trainops.adapters.pytorch import drop_path, drop_path_backward

# The contract has two rules, and each has two dtypes.
two_dtypes = thorough(lambda dtype, **_: dtype in (torch.float64, torch.float16))


def keep(mask):
    return (mask != 0).to(mask.dtype)


MASKS = {
    "unscaled": keep,
    "of_another_seed": lambda mask: mask.roll(1, 0),
    "leaking": lambda mask: torch.where(mask == 0, 1, mask),  # dropped samples are not dropped
}


def unwritten(x, last):
    """A result of which the last sample or element is what its memory happened to hold."""
    memory = torch.full_like(x, 0.7)
    where = torch.zeros(len(x) if last == "sample" else x.numel(), dtype=torch.bool, device=x.device)
    where[-1:] = True
    shape = (-1, *[1] * (x.ndim - 1)) if last == "sample" else x.shape
    return torch.where(where.view(shape), memory, x)


def truncated(branch, mask, residual, layer_scale, rows):
    """The last rounding is to the 16-bit number that is nearer to zero."""
    right = drop_path(branch, mask, residual, layer_scale, rows)
    scaled = drop_path(branch, torch.ones_like(mask), None, layer_scale, rows)
    term = scaled.float() * mask.float()
    if residual is None:
        return cut_off(term, right.dtype)
    total = residual.float() + term.to(scaled.dtype).float()
    return torch.where(mask != 0, cut_off(total, right.dtype), residual)


def forward(fault, branch, mask, residual=None, layer_scale=None, rows=None):
    """A result with such a fault."""
    if fault in MASKS:
        return drop_path(branch, MASKS[fault](mask), residual, layer_scale, rows)
    if fault == "truncated":
        return truncated(branch, mask, residual, layer_scale, rows)
    result = drop_path(branch, mask, residual, None if fault == "no_layer_scale" else layer_scale, rows)
    if fault == "contiguous":
        return result.contiguous()
    if fault == "nothing":
        unchanged = residual if residual is not None else branch if rows is None else branch.index_select(0, rows)
        return unchanged.to(result.dtype, copy=True)
    if fault.startswith("last_"):
        return unwritten(result, fault.removeprefix("last_"))
    return result


def of_layer_scale(fault, grad, branch, mask, layer_scale, rows):
    """The gradient of layer scale, with such a fault."""
    right = drop_path_backward(grad, branch, mask, layer_scale, rows)[1]
    if right is None or fault == "nothing":
        return None if right is None else torch.zeros_like(right)
    if fault == "forgets_a_sample":
        mask = torch.where(mask.flatten().cumsum(0).view(mask.shape) == mask.max(), 0, mask)  # the first that is kept
    elif fault in MASKS:
        mask = MASKS[fault](mask)
    elif fault == "truncated":
        return cut_off(
            drop_path_backward(grad.float(), branch.float(), mask.float(), layer_scale.float(), rows)[1], right.dtype
        )
    result = drop_path_backward(grad, branch, mask, layer_scale, rows)[1]
    return unwritten(result.flatten(), "element").view(result.shape) if fault == "last_element" else result


def wrong_forward(fault):
    """The result is wrong."""
    return mock.patch.object(kernels, "drop_path", partial(forward, fault))


def wrong_gradient(operand, fault):
    """The gradient of an operand is wrong, and no other result."""

    def backward(grad, branch, mask, layer_scale, rows=None):
        of_branch, of_scale = drop_path_backward(grad, branch, mask, layer_scale, rows)
        if operand == "layer_scale":
            return of_branch, of_layer_scale(fault, grad, branch, mask, layer_scale, rows)
        return forward(fault, grad.to(mask.dtype), mask, None, layer_scale, rows), of_scale

    return mock.patch.object(kernels, "drop_path_backward", backward)
