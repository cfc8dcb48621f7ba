"""Stochastic depth in PyTorch and in extended precision, and what its tests share."""

import pytest
import torch
from contract import Exact, exact
from drop_path_formulas import as_stored, exact_sum, product, seeded, timm_drop_path_add, timm_mask
from torch import nn

from trainops.stochastic_depth import MODES

SHAPE = (12, 5, 8)

modes = pytest.mark.parametrize("mode", MODES)


class Branch(nn.Module):
    """Each element by itself, so that its bits do not depend on the batch. Keeps what it was called with."""

    def __init__(self, dtype=torch.float32, device="cpu"):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, SHAPE[-1]).to(device, dtype))
        self.calls = []

    def forward(self, x):
        self.calls.append(x.detach().clone())
        return x * self.weight


def fixed_samples(residual, drop_prob):
    """Which samples mode "fixed" keeps."""
    batch = len(residual)
    return torch.randperm(batch, device=residual.device)[: max(1, round(batch * (1 - drop_prob)))]


def fixed_formula(residual, branch, drop_prob, training=True, scale_by_keep=True, layer_scale=None):
    """The docstring's, in PyTorch."""
    kept = fixed_samples(residual, drop_prob)
    scaled = branch(residual[kept]) * (1.0 if layer_scale is None else layer_scale)
    return residual.index_add(0, kept, scaled * (len(residual) / len(kept) if scale_by_keep else 1.0))


def bernoulli_formula(residual, branch, *args, layer_scale=None):
    return timm_drop_path_add(residual, branch(residual), *args, layer_scale=layer_scale)


def exact_mask(mode, residual, drop_prob, scale_by_keep):
    """What each sample is multiplied with, as 16 bits have it, from the seed of ``seeded``."""
    if mode == "bernoulli":
        return exact(timm_mask(residual, drop_prob, scale_by_keep))
    kept = seeded(fixed_samples, residual, drop_prob)
    mask = exact(residual.new_zeros(len(residual), *[1] * (residual.ndim - 1)).index_fill(0, kept, 1))
    return as_stored(mask / mask.mean(), residual.dtype) if scale_by_keep else mask


def exact_results(mode, residual, layer_scale, grad, drop_prob, scale_by_keep):
    """The output of a ``Branch`` with its residual, and the gradients of residual, weight and layer scale."""
    dtype = residual.dtype
    r, g, weight = exact(residual), exact(grad), exact(Branch(dtype).weight)
    m = exact_mask(mode, residual, drop_prob, scale_by_keep)
    factors = [m] if layer_scale is None else [exact(layer_scale), m]

    def stored(x):
        return as_stored(x, dtype)

    branch = stored(r * weight)
    term = stored(product(dtype, branch, *factors))
    of_branch = stored(product(dtype, g, *factors))
    of_samples = stored(of_branch * weight)
    results = [
        Exact(r + term, abs(r) + abs(term)),
        Exact(g + of_samples, abs(g) + abs(of_samples)),
        exact_sum(stored(of_branch * r), weight.shape),  # PyTorch's own, which rounds before it adds up
    ]
    return results if layer_scale is None else [*results, exact_sum(g * m * branch, layer_scale.shape)]
