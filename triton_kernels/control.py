"""What a step does with its gradients, whatever the rule (``csrc/math/control.h``), and how its settings are read.

coefficient = min(1, max_norm / (norm + 1e-6)) / grad_scale
skips       = found_inf, or skip_nonfinite and a norm that is infinite or NaN
"""

import triton
import triton.language as tl

from trainops import core

from .storage import real

# Words of the settings of a step (csrc/core/schema.h): two for each setting of each group follow.
MAX_NORM, EMA_DECAY = (tl.constexpr(core.step_words().index(name)) for name in ("max_norm", "ema_decay"))
GROUPS = tl.constexpr(len(core.step_words()))
DOUBLE, FLOAT_ADDRESS = tl.constexpr(0), tl.constexpr(1)  # forms; any other: the address of a float64


@triton.jit
def setting(words, index: tl.constexpr):
    """A setting of a group as a number, wherever it lies."""
    form, value = tl.load(words + 2 * index), tl.load(words + 2 * index + 1)
    number = real(value)
    if form != DOUBLE:
        if form == FLOAT_ADDRESS:
            number = tl.load(value.to(tl.pointer_type(tl.float32))).to(tl.float64)
        else:
            number = tl.load(value.to(tl.pointer_type(tl.float64)))
    return number


@triton.jit
def decide(settings, norm, inverse_scale, found_inf, CLIP: tl.constexpr, SKIP_NONFINITE: tl.constexpr):
    """The coefficient of the gradients, and whether the step is skipped. ``norm``: of the unscaled ones, or None."""
    factor = inverse_scale
    skipped = False
    if found_inf is not None:
        skipped = tl.load(found_inf) != 0
    if CLIP:
        ratio = real(tl.load(settings + MAX_NORM)) / (norm + 1e-6)
        factor = inverse_scale * tl.where(ratio > 1.0, 1.0, ratio)
    if SKIP_NONFINITE:
        skipped = skipped | (norm != norm) | (tl.abs(norm) == float("inf"))
    return factor, skipped
