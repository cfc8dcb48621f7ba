"""Statistics of tensors (``csrc/math/statistics.h``): the norms.

    norm = (sum over tensors and elements of |x|^p)^(1/p),    p = 1, 2 or inf

A NaN stays. Agrees with: torch.nn.utils.get_total_norm (torch/nn/utils/clip_grad.py).
"""

import triton
import triton.language as tl


@triton.jit
def add(state, x, STATISTIC: tl.constexpr):
    """``state`` with the elements ``x``."""
    if STATISTIC == "l1_norm":
        return state + tl.abs(x)
    elif STATISTIC == "l2_norm":
        return state + x * x
    else:
        return tl.maximum(state, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def add_state(state, other, STATISTIC: tl.constexpr):
    """Combines two states, element by element."""
    if STATISTIC == "inf_norm":
        return tl.maximum(state, other, propagate_nan=tl.PropagateNan.ALL)
    else:
        return state + other


@triton.jit
def join(states, STATISTIC: tl.constexpr):
    """Combines all states into one."""
    if STATISTIC == "inf_norm":
        is_nan = tl.max((states != states).to(tl.int32), axis=0) != 0
        return tl.where(is_nan, float("nan"), tl.max(tl.where(states != states, 0.0, states), axis=0))
    else:
        return tl.sum(states, axis=0)


@triton.jit
def finish(state, STATISTIC: tl.constexpr):
    """The result of a state."""
    return tl.sqrt(state) if STATISTIC == "l2_norm" else state
