"""Statistics of tensors (``csrc/math/statistics.h``): the norms.

    norm = (sum over tensors and elements of |x|^p)^(1/p),    p = 1, 2 or inf

A NaN stays. Agrees with: torch.nn.utils.get_total_norm (torch/nn/utils/clip_grad.py).

A state is a tuple of numbers: one for a norm. While elements are added, each number is a block, of which every lane
has a state of its own.
"""

import triton
import triton.language as tl

# How many numbers a state has.
NUMBERS = {"l1_norm": 1, "l2_norm": 1, "inf_norm": 1}


@triton.jit
def start(STATISTIC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The states before the first element. They change no state that they are combined with."""
    return (tl.zeros([BLOCK], WIDE),)


@triton.jit
def add(states, x, exists, STATISTIC: tl.constexpr):
    """The states with the elements ``x``, which are 0 where ``exists`` is false. None: all exist."""
    if STATISTIC == "l1_norm":
        return (states[0] + tl.abs(x),)
    elif STATISTIC == "l2_norm":
        return (states[0] + x * x,)
    else:
        return (tl.maximum(states[0], tl.abs(x), propagate_nan=tl.PropagateNan.ALL),)


@triton.jit
def join(states, others, STATISTIC: tl.constexpr):
    """Combines two states in each lane."""
    if STATISTIC == "inf_norm":
        return (tl.maximum(states[0], others[0], propagate_nan=tl.PropagateNan.ALL),)
    else:
        return (states[0] + others[0],)


@triton.jit
def join_lanes(states, STATISTIC: tl.constexpr):
    """Combines the states of all lanes into one, in float64."""
    if STATISTIC == "inf_norm":
        largest = states[0]
        is_nan = tl.max((largest != largest).to(tl.int32), axis=0) != 0
        joined = tl.where(is_nan, float("nan"), tl.max(tl.where(largest != largest, 0.0, largest), axis=0))
    else:
        joined = tl.sum(states[0], axis=0)
    return (joined.to(tl.float64),)


@triton.jit
def overflows(state, STATISTIC: tl.constexpr):
    """Whether a state that was gathered in float32 has overflowed, as the squares of 1e30 do."""
    if STATISTIC == "inf_norm":
        return False
    else:
        return state[0] == float("inf")


@triton.jit
def finish(state, STATISTIC: tl.constexpr):
    """The result of a state."""
    return tl.sqrt(state[0]) if STATISTIC == "l2_norm" else state[0]
