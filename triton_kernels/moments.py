"""Extremes, mean, deviation, sums and counts of the finite elements (``csrc/math/moments.h``), as a statistic.

A lane adds its elements one after the other (Welford, "Note on a method for calculating corrected sums of squares and
products", 1962); lanes and chunks join around their common mean.
"""

import triton
import triton.language as tl

from ._common import divide

# The numbers of a state, in this order.
COUNT, NONFINITE, ZEROS, MIN, MAX, L1, MEAN, M2 = (tl.constexpr(i) for i in range(8))


@triton.jit
def start(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The states before the first element."""
    none = tl.zeros([BLOCK], WIDE)
    return none, none, none, none + float("inf"), none - float("inf"), none, none, none


@triton.jit
def add(states, x, exists):
    """The states with the elements ``x``. None for ``exists``: all do."""
    count, nonfinite, zeros, least, most, l1, mean, m2 = states
    seen = (x - x) == 0.0
    other = seen == 0
    if exists is not None:
        seen, other = seen & exists, other & exists
    x = tl.where(seen, x, 0.0)
    count += seen.to(x.dtype)
    d = x - mean
    moved = mean + tl.where(seen, divide(d, tl.where(count > 0.0, count, 1.0)), 0.0)
    return (
        count,
        nonfinite + other.to(x.dtype),
        zeros + (seen & (x == 0.0)).to(x.dtype),
        tl.where(seen & (x < least), x, least),
        tl.where(seen & (x > most), x, most),
        l1 + tl.abs(x),
        moved,
        m2 + tl.where(seen, d * (x - moved), 0.0),
    )


@triton.jit
def join(a, b):
    """Combines two states in each lane."""
    count = a[COUNT] + b[COUNT]
    share = divide(b[COUNT], tl.where(count > 0.0, count, 1.0))
    d, weight = b[MEAN] - a[MEAN], a[COUNT] * share
    return (
        count,
        a[NONFINITE] + b[NONFINITE],
        a[ZEROS] + b[ZEROS],
        tl.minimum(a[MIN], b[MIN]),
        tl.maximum(a[MAX], b[MAX]),
        a[L1] + b[L1],
        tl.where(share == 1.0, b[MEAN], a[MEAN] + d * share),
        a[M2] + b[M2] + tl.where(weight > 0.0, d * d * weight, 0.0),
    )


@triton.jit
def join_lanes(states, add_up: tl.constexpr):
    """Combines the states of all lanes into one, in float64."""
    count, nonfinite, zeros, least, most, l1, means, m2 = states
    total = add_up(count)
    number = tl.where(total > 0.0, total, 1.0)
    center = (add_up(count * means) / number).to(means.dtype)
    d = means - center
    off = add_up(count * d) / number  # of the mean, from the center
    around = add_up(m2 + count * d * d) - number * off * off
    return (
        total,
        add_up(nonfinite),
        add_up(zeros),
        tl.min(least, axis=0).to(tl.float64),
        tl.max(most, axis=0).to(tl.float64),
        add_up(l1),
        tl.where(total > 0.0, center.to(tl.float64) + off, 0.0),
        tl.where((total > 0.0) & ((around >= 0.0) | (around != around)), around, 0.0),
    )


@triton.jit
def is_doubtful(state):
    """Whether sums have overflowed, or squares of deviations may have vanished."""
    overflows = ((state[L1] < float("inf")) & (state[M2] < float("inf"))) == 0
    return overflows | ((state[M2] < 2.0**-100) & (state[MIN] < state[MAX]))
