"""Statistics of tensors (``csrc/math/statistics.h``): the norms, and ``moments.py``.

    norm = (sum over tensors and elements of |x|^p)^(1/p),    p = 1, 2 or inf

A NaN stays. Agrees with: torch.nn.utils.get_total_norm (torch/nn/utils/clip_grad.py).

A state is a tuple of numbers: one for a norm. While elements are added, each number is a block, of which every lane
has a state of its own: a run, in the type of arithmetic. That is float32 for float32 and 16 bits, which many GPUs do
64 times as fast as float64. Runs are short, because each sum is rounded; they are joined in float64.
"""

import triton
import triton.language as tl

from . import moments

# Lanes whose runs are joined in their own type, as a power of 2: a sum of 64 elements is rounded 3 + 8 times.
SHORT = tl.constexpr(3)
MOST = tl.constexpr(20)  # no block has more lanes, as a power of 2

# How many numbers a state has.
NUMBERS = {"l1_norm": 1, "l2_norm": 1, "inf_norm": 1, "moments": 8}


@triton.jit
def start(STATISTIC: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The states before the first element. They change no state that they are combined with."""
    if STATISTIC == "moments":
        return moments.start(BLOCK, WIDE)
    else:
        return (tl.zeros([BLOCK], WIDE),)


@triton.jit
def add(states, x, exists, STATISTIC: tl.constexpr):
    """The states with the elements ``x``, which are 0 where ``exists`` is false. None: all exist."""
    if STATISTIC == "moments":
        return moments.add(states, x, exists)
    elif STATISTIC == "l1_norm":
        return (states[0] + tl.abs(x),)
    elif STATISTIC == "l2_norm":
        return (states[0] + x * x,)
    else:
        return (tl.maximum(states[0], tl.abs(x), propagate_nan=tl.PropagateNan.ALL),)


@triton.jit
def join(states, others, STATISTIC: tl.constexpr):
    """Combines two states in each lane."""
    if STATISTIC == "moments":
        return moments.join(states, others)
    elif STATISTIC == "inf_norm":
        return (tl.maximum(states[0], others[0], propagate_nan=tl.PropagateNan.ALL),)
    else:
        return (states[0] + others[0],)


@triton.jit
def sum_in_pairs(x):
    """The sum of a block along axis 0: of neighbours, then of neighbouring sums, in float64 but for the first few.

    Of :func:`tl.sum` nobody says the order. It depends on how the compiler divides the lanes among threads, and that
    depends on the type and the alignment of what was loaded.
    """
    for level in tl.static_range(MOST):
        if level == SHORT:
            x = x.to(tl.float64)
        if x.shape[0] > 2:
            if len(x.shape) == 1:
                x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
            else:
                x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), axis=1)
    return tl.sum(x.to(tl.float64), axis=0)


@triton.jit
def join_lanes(states, STATISTIC: tl.constexpr):
    """Combines the states of all lanes into one, in float64."""
    if STATISTIC == "moments":
        return moments.join_lanes(states, sum_in_pairs)
    elif STATISTIC == "inf_norm":
        largest = states[0]
        is_nan = tl.max((largest != largest).to(tl.int32), axis=0) != 0
        joined = tl.where(is_nan, float("nan"), tl.max(tl.where(largest != largest, 0.0, largest), axis=0))
        return (joined.to(tl.float64),)
    else:
        return (sum_in_pairs(states[0]).to(tl.float64),)


@triton.jit
def is_doubtful(state, STATISTIC: tl.constexpr):
    """Whether a chunk that was gathered in float32 has to be gathered again in float64.

    Sums of 1e38 overflow, and so do squares of 1e20. A square may be off by 2^-150, half of the smallest number: 2^13
    of them by 2^-37 of a sum of 2^-100.
    """
    if STATISTIC == "moments":
        return moments.is_doubtful(state)
    elif STATISTIC == "inf_norm":
        return False
    elif STATISTIC == "l2_norm":
        return (state[0] == float("inf")) | (state[0] < 2.0**-100)
    else:
        return state[0] == float("inf")


@triton.jit
def finish(state, STATISTIC: tl.constexpr):
    """The results of a state."""
    if STATISTIC == "l2_norm":
        return (tl.sqrt(state[0]),)
    else:
        return state
