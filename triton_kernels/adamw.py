"""AdamW with clipping, unscaling, skipping and EMA (arXiv:1711.05101, algorithm 2; AMSGrad: arXiv:1904.09237).

    g <- coefficient * g                    clipping, unscaling and `maximize` in one factor
    p <- p * (1 - lr * weight_decay)
    m <- m + (1 - beta1) * (g - m)
    v <- beta2 * v + (1 - beta2) * g^2
    p <- p - step_size * m / (sqrt(v) + scaled_eps)
    with step_size = lr * sqrt(1 - beta2^t) / (1 - beta1^t) and scaled_eps = eps * sqrt(1 - beta2^t)

Two launches after the partial sums of the norm (``clip_grad_norm.py``): ``plan`` finishes the norm, decides the
coefficient and whether the step is skipped, and evaluates each row's scalars in float64; ``update`` reads grad, reads
and writes param, exp_avg and exp_avg_sq (28 bytes per float32 element), max_exp_avg_sq with AMSGrad (8 more) and the
average where there is one (8 more). Arithmetic in float32, or float64 for float64 parameters.

Agrees with: torch.optim.AdamW (torch/optim/adam.py, _single_tensor_adam).
"""

import triton
import triton.language as tl

from ._common import ADDRESSES, GROUP, NUMEL, chunk_of, divide, end_of_body, load, real, square_root, store
from .clip_grad_norm import chunks_of_row, norm_of
from .ema import moved

# Columns of the table, in the order of trainops.backends.AdamWGroup.COLUMNS.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, AVERAGE, STEP = (tl.constexpr(i) for i in range(7))

# Words of the settings: two for the step, then eight for each group. A learning rate that lies on the device has an
# address, of a float32 or of a float64. `maximize` is known when these kernels are compiled.
MAX_NORM, EMA_DECAY, GROUPS = (tl.constexpr(i) for i in range(3))
LR, LR_FLOAT32, LR_FLOAT64, BETA1, BETA2, EPS, WEIGHT_DECAY, IS_MAXIMIZED, GROUP_WORDS = map(tl.constexpr, range(9))

# What `plan` finds out for each row, in float64.
KEEP, WEIGHT1, BETA1_, BETA2_, WEIGHT2, STEP_SIZE, SCALED_EPS, NEW_STEP, SCALARS = (tl.constexpr(i) for i in range(9))


@triton.jit
def learning_rate(group):
    """That of a group: from the settings, or from where it lies."""
    lr = real(tl.load(group + LR))
    float32, float64 = tl.load(group + LR_FLOAT32), tl.load(group + LR_FLOAT64)
    if float32 != 0:
        lr = tl.load(float32.to(tl.pointer_type(tl.float32))).to(tl.float64)
    if float64 != 0:
        lr = tl.load(float64.to(tl.pointer_type(tl.float64)))
    return lr


@triton.jit
def bias_correction(beta, step):
    """``1 - beta ** step`` in float64, 1 for a beta of 0.

    ``1 - exp(x)`` loses digits where ``exp(x)`` is near 1. Kahan's ``(1 - e) * x / log(e)`` with ``e = exp(x)`` does
    not: the rounding of ``e`` is in both factors.
    """
    x = step * tl.log(tl.where(beta > 0.0, beta, 0.5))
    power = tl.exp(x)
    quotient = x / tl.where(power == 1.0, 1.0, tl.log(power))
    correction = tl.where(power == 1.0, -x, tl.where(power > 0.0, (1.0 - power) * quotient, 1.0))
    return tl.where(beta > 0.0, correction, 1.0)


@triton.jit
def store_scalars(out, words, settings):
    """What ``update`` needs to know of a row."""
    group = settings + GROUPS + tl.load(words + GROUP) * GROUP_WORDS
    lr = learning_rate(group)
    beta1, beta2 = real(tl.load(group + BETA1)), real(tl.load(group + BETA2))
    step = tl.load(tl.load(words + ADDRESSES + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
    correction = tl.sqrt(bias_correction(beta2, step))
    tl.store(out + KEEP, 1.0 - lr * real(tl.load(group + WEIGHT_DECAY)))
    tl.store(out + WEIGHT1, 1.0 - beta1)
    tl.store(out + BETA1_, beta1)
    tl.store(out + BETA2_, beta2)
    tl.store(out + WEIGHT2, 1.0 - beta2)
    tl.store(out + STEP_SIZE, lr / bias_correction(beta1, step) * correction)
    tl.store(out + SCALED_EPS, real(tl.load(group + EPS)) * correction)
    tl.store(out + NEW_STEP, step)


@triton.jit(do_not_specialize=["chunk_count"])
def plan(
    rows,
    settings,
    partials,
    chunk_count,
    grad_scale,
    found_inf,
    known_norm,
    total_norm,
    norms,
    coefficient,
    skip,
    skipped_steps,
    scalars,
    CLIP: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 decides the coefficient and whether to skip; program i finds the scalars of row i - 1.

    ``partials`` (with ``total_norm`` and ``norms`` to be written), ``known_norm``, ``grad_scale`` and ``found_inf``
    may each be None. ``norms`` are those of the unscaled gradients.
    """
    row = tl.program_id(0).to(tl.int64) - 1
    inverse_scale = 1.0
    if grad_scale is not None:
        inverse_scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    if row < 0:
        factor = inverse_scale
        skipped = False
        if found_inf is not None:
            skipped = tl.load(found_inf) != 0
        if partials is not None or known_norm is not None:
            if partials is not None:
                norm = norm_of(partials, 0, chunk_count, 2, BLOCK) * inverse_scale
                tl.store(total_norm, norm)
            else:
                norm = tl.load(known_norm).to(tl.float64)
            if CLIP:
                ratio = real(tl.load(settings + MAX_NORM)) / (norm + 1e-6)
                factor = inverse_scale * tl.where(ratio > 1.0, 1.0, ratio)
            if SKIP_NONFINITE:
                skipped = skipped | (norm != norm) | (tl.abs(norm) == float("inf"))
        tl.store(coefficient, factor)
        if skip is not None:
            tl.store(skip, skipped)
        if skipped_steps is not None:
            count = tl.load(skipped_steps)
            tl.debug_barrier()  # all threads load it, and one stores
            tl.store(skipped_steps, count + tl.where(skipped, 1, 0))
    else:
        if partials is not None:
            first, last = chunks_of_row(rows, row, WORDS, CHUNK)
            tl.store(norms + row, norm_of(partials, first, last, 2, BLOCK) * inverse_scale)
        store_scalars(scalars + row * SCALARS, rows + row * WORDS, settings)


@triton.jit(do_not_specialize=["first_chunk"])
def update(
    rows,
    chunks,
    first_chunk,
    settings,
    scalars,
    coefficient,
    skip,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    EXP_AVG_TYPE: tl.constexpr,
    EXP_AVG_SQ_TYPE: tl.constexpr,
    MAX_EXP_AVG_SQ_TYPE: tl.constexpr,  # None without AMSGrad
    AVERAGE_TYPE: tl.constexpr,  # None without EMA
    WIDE: tl.constexpr,
    AVERAGE_WIDE: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of AdamW and EMA. The average follows the parameter as it is stored, rounded."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row, begin = chunk_of(chunks, first_chunk + tl.program_id(0), CHUNK)
    words, row_scalars = rows + row * WORDS, scalars + row * SCALARS
    addresses = words + ADDRESSES
    if begin == 0:
        step = tl.load(addresses + STEP).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(row_scalars + NEW_STEP).to(tl.float32))
    end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))
    param_address, grad_address = tl.load(addresses + PARAM), tl.load(addresses + GRAD)
    exp_avg_address, exp_avg_sq_address = tl.load(addresses + EXP_AVG), tl.load(addresses + EXP_AVG_SQ)
    max_exp_avg_sq_address, average_address = tl.load(addresses + MAX_EXP_AVG_SQ), tl.load(addresses + AVERAGE)
    together = param_address | grad_address | exp_avg_address | exp_avg_sq_address
    body = end_of_body(begin, end, together | max_exp_avg_sq_address | average_address, BLOCK)

    factor = tl.load(coefficient)
    factor = (-factor if MAXIMIZE else factor).to(WIDE)
    keep, step_size = tl.load(row_scalars + KEEP).to(WIDE), tl.load(row_scalars + STEP_SIZE).to(WIDE)
    beta1, weight1 = tl.load(row_scalars + BETA1_).to(WIDE), tl.load(row_scalars + WEIGHT1).to(WIDE)
    beta2, weight2 = tl.load(row_scalars + BETA2_).to(WIDE), tl.load(row_scalars + WEIGHT2).to(WIDE)
    eps = tl.load(row_scalars + SCALED_EPS).to(WIDE)
    ema_decay = real(tl.load(settings + EMA_DECAY))

    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            grad = load(grad_address, offset, end, GRAD_TYPE, WIDE, BLOCK, MASKED) * factor
            exp_avg = load(exp_avg_address, offset, end, EXP_AVG_TYPE, WIDE, BLOCK, MASKED)
            exp_avg_sq = load(exp_avg_sq_address, offset, end, EXP_AVG_SQ_TYPE, WIDE, BLOCK, MASKED)
            param = load(param_address, offset, end, PARAM_TYPE, WIDE, BLOCK, MASKED)
            if MAX_EXP_AVG_SQ_TYPE is not None:
                largest = load(max_exp_avg_sq_address, offset, end, MAX_EXP_AVG_SQ_TYPE, WIDE, BLOCK, MASKED)

            difference = grad - exp_avg
            exp_avg = tl.where(weight1 < 0.5, exp_avg + weight1 * difference, grad - beta1 * difference)
            store(exp_avg_address, offset, end, exp_avg, EXP_AVG_TYPE, BLOCK, MASKED)
            exp_avg_sq = exp_avg_sq * beta2 + weight2 * grad * grad
            store(exp_avg_sq_address, offset, end, exp_avg_sq, EXP_AVG_SQ_TYPE, BLOCK, MASKED)
            second_moment = exp_avg_sq
            if MAX_EXP_AVG_SQ_TYPE is not None:
                second_moment = tl.maximum(largest, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
                store(max_exp_avg_sq_address, offset, end, second_moment, MAX_EXP_AVG_SQ_TYPE, BLOCK, MASKED)
            param = param * keep - divide(step_size * exp_avg, square_root(second_moment) + eps)

            stored = store(param_address, offset, end, param, PARAM_TYPE, BLOCK, MASKED)
            if AVERAGE_TYPE is not None:
                average = load(average_address, offset, end, AVERAGE_TYPE, AVERAGE_WIDE, BLOCK, MASKED)
                average = moved(average, stored.to(AVERAGE_WIDE), ema_decay, AVERAGE_WIDE)
                store(average_address, offset, end, average, AVERAGE_TYPE, BLOCK, MASKED)
