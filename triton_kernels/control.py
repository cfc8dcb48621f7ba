"""Clipping, unscaling and skipping, the same for every rule (``csrc/math/control.h``), and the settings of a step.

coefficient = min(1, max_norm / (norm + 1e-6)) / grad_scale
skips       = found_inf, or skip_nonfinite and a norm that is infinite or NaN, or a guard's verdict

The guard: ``csrc/math/guard.h``.
"""

import triton
import triton.language as tl

from trainops import core

from .storage import real

# Words of the settings of a step (csrc/core/schema.h): those of each setting of each group follow.
MAX_NORM, EMA_DECAY, SEED, EMA_SEED = (
    tl.constexpr(core.words("step")[name]) for name in ("max_norm", "ema_decay", "seed", "ema_seed")
)
GROUPS = tl.constexpr(len(core.words("step")))
FORM, VALUE = (tl.constexpr(core.words("setting")[name]) for name in ("form", "value"))
SETTING_WORDS = tl.constexpr(len(core.words("setting")))
DOUBLE, FLOAT_ADDRESS = (tl.constexpr(core.words("form")[name]) for name in ("double", "float_address"))


@triton.jit
def setting(words, index: tl.constexpr):
    """A setting of a group as a number, wherever it lies."""
    own = words + index * SETTING_WORDS
    form, value = tl.load(own + FORM), tl.load(own + VALUE)
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
        ratio = setting(settings + MAX_NORM, 0) / (norm + 1e-6)
        factor = inverse_scale * tl.where(ratio > 1.0, 1.0, ratio)
    if SKIP_NONFINITE:
        skipped = skipped | (norm != norm) | (tl.abs(norm) == float("inf"))
    return factor, skipped


MEAN, VARIANCE, COUNT, SPIKES, VERDICT, LARGEST, DEVIATIONS, DECAY, WARMUP, PATIENCE = (
    tl.constexpr(i) for i in range(len(core.GUARD))
)
LEAST_DEVIATION = tl.constexpr(core.LEAST_DEVIATION)


@triton.jit
def judge(guard, norm, skipped):
    """Whether a step is a spike, by the numbers of a guard, which are updated. ``skipped``: others skip the step."""
    count = tl.load(guard + COUNT)
    first = 1.0 / (count + 1.0)  # first: it takes many registers, and with all numbers loaded some would spill
    mean, variance, spikes = tl.load(guard + MEAN), tl.load(guard + VARIANCE), tl.load(guard + SPIKES)
    finite = (norm - norm) == 0.0
    seen = finite & (norm > 0.0)
    d = tl.log(tl.where(seen, norm, 1.0)) - mean
    deviation = tl.sqrt(variance)
    limit = tl.load(guard + DEVIATIONS) * tl.where(deviation > LEAST_DEVIATION, deviation, LEAST_DEVIATION)
    is_far = seen & (count >= tl.load(guard + WARMUP)) & (d > limit)
    spike = (finite == 0) | (norm > tl.load(guard + LARGEST)) | is_far
    forgets = seen & spike & (spikes + 1.0 >= tl.load(guard + PATIENCE))
    learns = seen & (spike == 0) & (skipped == 0)
    slow = 1.0 - tl.load(guard + DECAY)
    rate = tl.where(slow > first, slow, first)
    tl.debug_barrier()  # all threads load the numbers, and one stores
    kept, further = tl.where(forgets, 0.0, 1.0), tl.where(seen & spike, spikes + 1.0, spikes)
    tl.store(guard + MEAN, tl.where(learns, mean + rate * d, mean * kept))
    tl.store(guard + VARIANCE, tl.where(learns, (1.0 - rate) * (variance + rate * d * d), variance * kept))
    tl.store(guard + COUNT, tl.where(learns, count + 1.0, count * kept))
    tl.store(guard + SPIKES, tl.where(learns, 0.0, further * kept))
    tl.store(guard + VERDICT, tl.where(spike, 1.0, 0.0))
    return spike
