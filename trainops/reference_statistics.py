"""The specification of statistics of tensors: one row of numbers for each, which joins with rows of other elements.

    count, mean, m2 = the finite elements, their mean, the sum of (x - mean)^2
    join:  n = na + nb,  d = mean_b - mean_a,  mean = mean_a + d nb / n,  m2 = m2_a + m2_b + d^2 na nb / n

(Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.) A
difference of squares would lose the deviation of numbers that are far from 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import scalar_dtype
from .reference_storage import wide
from .tables import as_real

# The numbers of a row, in this order: csrc/math/moments.h has the same.
ROW = ("count", "nonfinite", "zeros", "min", "max", "l1", "mean", "m2")
COUNT, NONFINITE, ZEROS, MIN, MAX, L1, MEAN, M2 = range(len(ROW))

# Bin i of a histogram counts the elements with 2^(i - 127) <= |x| < 2^(i - 126). The first has all smaller ones but
# 0, the last all larger ones.
BINS = 255


def rows_of(tensors: Sequence[Tensor], histogram: bool) -> tuple[Tensor, Tensor | None]:
    """The row of each tensor, and its histogram if asked for. Complex numbers count as two."""
    parts = [as_real(x).reshape(-1) for x in tensors]
    rows = torch.stack([row_of(x).to(tensors[0].device) for x in parts])
    return rows, torch.stack([histogram_of(x) for x in parts]) if histogram else None


def row_of(x: Tensor) -> Tensor:
    """The row of one tensor in the dtype of scalars."""
    x = x.to(scalar_dtype(x.device))
    finite = x.isfinite()
    count = finite.sum().to(x)
    largest = torch.tensor(torch.inf).to(x)
    ends = torch.cat([torch.where(finite, x, largest), largest.view(1)])
    starts = torch.cat([torch.where(finite, x, -largest), -largest.view(1)])
    elements = torch.where(finite, x, 0.0)
    mean = elements.sum() / count.clamp(min=1)
    m2 = torch.where(finite, x - mean, 0.0).square().sum()
    zeros, l1 = (x == 0).sum().to(x), elements.abs().sum()
    return torch.stack([count, x.numel() - count, zeros, ends.amin(), starts.amax(), l1, mean, m2])


def histogram_of(x: Tensor) -> Tensor:
    """The histogram of binary exponents of one tensor."""
    exponents = torch.frexp(wide(x))[1].long() - 1
    counted = (x.isfinite() & (x != 0)).long()
    return counted.new_zeros(BINS).scatter_add_(0, (exponents + 127).clamp(0, BINS - 1), counted)


def join(rows: Tensor) -> Tensor:
    """The row of all elements of several sets, which lie along the first dimension."""
    total = rows.sum(0)
    count, means = total[..., COUNT], rows[..., MEAN]
    mean = (rows[..., COUNT] * means).sum(0) / count.clamp(min=1)
    m2 = total[..., M2] + (rows[..., COUNT] * (means - mean).square()).sum(0)
    ends = rows[..., MIN].amin(0), rows[..., MAX].amax(0)
    sums = (total[..., i] for i in (COUNT, NONFINITE, ZEROS))
    return torch.stack([*sums, *ends, total[..., L1], mean, m2], -1)


def nothing(like: Tensor) -> Tensor:
    """Rows of no elements: they change no row that they are joined with."""
    rows = torch.zeros_like(like)
    rows[..., MIN] = torch.inf
    rows[..., MAX] = -torch.inf
    return rows


def scaled(rows: Tensor, factor: Tensor) -> Tensor:
    """The rows of elements that are all multiplied by a positive factor."""
    factors = torch.ones_like(rows)
    factor = factor.to(rows)
    factors[..., MIN:M2] = factor
    factors[..., M2] = factor.square()
    return rows * factors
