"""A step of any rule with clipping, unscaling, skipping and averages.

Two launches after the partial results of the norm (``reduce.py``). ``plan`` finishes the norm, decides the
coefficient and whether the step is skipped, and evaluates each row's scalars in float64. ``update`` reads and writes
every column once. With AdamW in float32, that is 28 bytes per element, 8 more with AMSGrad and 8 more with each
average; 16.1 with 8-bit state (``codes.py``). Arithmetic in float32, or float64 for float64 parameters.

A rule is a file like ``adamw.py``. Its functions are constants of these kernels: ``STORE_SCALARS``, ``LOAD_SCALARS``,
``NEW_STATE`` and ``NEW_PARAM``; so is ``SCALARS``, how many float64 slots its scalars take for each row. Its state
fills up to three columns.
"""

import triton
import triton.language as tl

from trainops import core

from ._common import ADDRESSES, AVERAGE_PLACE, FIRST_PLACE, GROUP, NUMEL, chunk_of, end_of_body
from .codes import CODE_BLOCK, load_state, random_of_codes, random_words, store_state
from .control import EMA_DECAY, EMA_SEED, GROUPS, SEED, decide, judge
from .ema import move
from .random import random_of, random_of_param
from .reduce import chunks_of_row, result_of
from .storage import load, load_weight, real, store_weight

PARAM, GRAD, AVERAGE, STEP, MASTER = (
    tl.constexpr(core.step_columns[name]) for name in ("param", "grad", "average", "step", "master")
)
STATE = tl.constexpr(len(core.step_columns))

# For each row, `plan` stores float64 slots: these, then the rule's scalars.
NEW_STEP, RULE_SCALARS = tl.constexpr(0), tl.constexpr(1)


@triton.jit(do_not_specialize=["chunk_count"])
def plan(
    rows,
    settings,
    partials,
    chunk_count,
    grad_scale,
    found_inf,
    known_norm,
    guard,
    total_norm,
    norms,
    coefficient,
    skip,
    skipped_steps,
    scalars,
    STORE_SCALARS: tl.constexpr,
    SCALARS: tl.constexpr,
    GROUP_WORDS: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0 decides the coefficient and whether to skip; program i finds the scalars of row i - 1.

    ``partials`` (with ``total_norm`` and ``norms``, which are written), ``known_norm``, ``grad_scale``,
    ``found_inf``, ``guard``, ``skip`` and ``skipped_steps`` may each be None. ``norms`` are those of the unscaled
    gradients.
    """
    row = tl.program_id(0).to(tl.int64) - 1
    inverse_scale = 1.0
    if grad_scale is not None:
        inverse_scale = 1.0 / tl.load(grad_scale).to(tl.float64)
    if row < 0:
        norm = None
        if partials is not None:
            norm = result_of(partials, 0, chunk_count, "l2_norm", BLOCK) * inverse_scale
            tl.store(total_norm, norm)
        elif known_norm is not None:
            norm = tl.load(known_norm).to(tl.float64)
        factor, skipped = decide(settings, norm, inverse_scale, found_inf, CLIP, SKIP_NONFINITE)
        if guard is not None:
            skipped = skipped | judge(guard, norm, skipped)
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
            tl.store(norms + row, result_of(partials, first, last, "l2_norm", BLOCK) * inverse_scale)
        words, out = rows + row * WORDS, scalars + row * (RULE_SCALARS + SCALARS)
        group = settings + GROUPS + tl.load(words + GROUP) * GROUP_WORDS
        step = tl.load(tl.load(words + ADDRESSES + STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
        tl.store(out + NEW_STEP, step)
        STORE_SCALARS(out + RULE_SCALARS, group, step)


@triton.jit
def follow(
    address,
    offset,
    end,
    weight,
    decay,
    random,
    DTYPE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Move one block of an average, if there is one (``DTYPE``), towards a weight as it is stored."""
    if DTYPE is not None:
        if DTYPE == tl.float64 or PARAM_TYPE == tl.float64:
            move(address, offset, end, weight.to(tl.float64), decay, random, DTYPE, tl.float64, BLOCK, MASKED)
        else:
            move(address, offset, end, weight.to(tl.float32), decay, random, DTYPE, tl.float32, BLOCK, MASKED)


@triton.jit
def random_of_average(words, settings, index: tl.constexpr, STOCHASTIC: tl.constexpr):
    """What the random bits of one of the averages depend on; None where it is rounded to nearest."""
    if (STOCHASTIC >> (index + 1)) % 2 == 0:
        return None
    else:
        return random_of(words, AVERAGE_PLACE + index, settings + EMA_SEED + index)


@triton.jit(do_not_specialize=["first_chunk"])
def update(
    rows,
    chunks,
    first_chunk,
    settings,
    scalars,
    coefficient,
    skip,
    LOAD_SCALARS: tl.constexpr,
    SCALARS: tl.constexpr,
    NEW_STATE: tl.constexpr,
    NEW_PARAM: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    MASTER_TYPE: tl.constexpr,  # this and the following: None if there is no such column
    AVERAGE_TYPE: tl.constexpr,
    AVERAGE2_TYPE: tl.constexpr,
    AVERAGE3_TYPE: tl.constexpr,
    AVERAGE4_TYPE: tl.constexpr,
    STATE0_TYPE: tl.constexpr,
    STATE1_TYPE: tl.constexpr,
    STATE2_TYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,  # bits: of the parameter, and of each average
    CODES: tl.constexpr,  # whether some of the state is codes
    FURTHER: tl.constexpr,  # the column of the second average
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of a rule and of EMA. Averages follow the weight as it is stored: rounded, or in full."""
    if skip is not None:
        if tl.load(skip) != 0:
            return
    row, begin = chunk_of(chunks, first_chunk + tl.program_id(0), CHUNK)
    words, row_scalars = rows + row * WORDS, scalars + row * (RULE_SCALARS + SCALARS)
    addresses = words + ADDRESSES
    if begin == 0:
        step = tl.load(addresses + STEP).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(row_scalars + NEW_STEP).to(tl.float32))
    end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))
    param_address, grad_address = tl.load(addresses + PARAM), tl.load(addresses + GRAD)
    address_bits, average_address = param_address | grad_address, tl.load(addresses + AVERAGE)
    address_bits |= average_address
    master_address = tl.load(addresses + MASTER)
    address_bits |= master_address
    state0_address, state1_address, state2_address = param_address, param_address, param_address
    if STATE0_TYPE is not None:
        state0_address = tl.load(addresses + STATE)
        address_bits |= state0_address
    if STATE1_TYPE is not None:
        state1_address = tl.load(addresses + STATE + 1)
        address_bits |= state1_address
    if STATE2_TYPE is not None:
        state2_address = tl.load(addresses + STATE + 2)
        address_bits |= state2_address
    average2_address, average3_address, average4_address = param_address, param_address, param_address
    if AVERAGE2_TYPE is not None:
        average2_address = tl.load(addresses + FURTHER)
        address_bits |= average2_address
    if AVERAGE3_TYPE is not None:
        average3_address = tl.load(addresses + FURTHER + 1)
        address_bits |= average3_address
    if AVERAGE4_TYPE is not None:
        average4_address = tl.load(addresses + FURTHER + 2)
        address_bits |= average4_address
    body = end_of_body(begin, end, address_bits, BLOCK)

    # Masks and codes together leave too few registers for a whole block.
    TAIL: tl.constexpr = BLOCK // 8 if CODES and BLOCK >= 8 * CODE_BLOCK else BLOCK
    rule_scalars = LOAD_SCALARS(row_scalars + RULE_SCALARS, tl.load(coefficient), WIDE)
    decay, decay2 = real(tl.load(settings + EMA_DECAY)), real(tl.load(settings + EMA_DECAY + 1))
    decay3, decay4 = real(tl.load(settings + EMA_DECAY + 2)), real(tl.load(settings + EMA_DECAY + 3))
    random = None
    if STOCHASTIC % 2 != 0:
        random = random_of_param(words, FIRST_PLACE, settings + SEED, tl.load(row_scalars + NEW_STEP))
    numel, of_codes = None, None
    if CODES:
        numel = tl.load(words + NUMEL)
        of_codes = random_of_codes(words, FIRST_PLACE, settings + SEED, tl.load(row_scalars + NEW_STEP))
    random1 = random_of_average(words, settings, 0, STOCHASTIC)
    random2 = random_of_average(words, settings, 1, STOCHASTIC)
    random3 = random_of_average(words, settings, 2, STOCHASTIC)
    random4 = random_of_average(words, settings, 3, STOCHASTIC)

    for MASKED in tl.static_range(2):
        for N in tl.static_range(TAIL if MASKED else BLOCK, 1 + (TAIL if MASKED else BLOCK)):  # names a constant
            for offset in range(body if MASKED else begin, end if MASKED else body, N):
                grad = load(grad_address, offset, end, GRAD_TYPE, WIDE, N, MASKED)
                state0 = load_state(state0_address, numel, offset, end, STATE0_TYPE, WIDE, N, MASKED)
                state1 = load_state(state1_address, numel, offset, end, STATE1_TYPE, WIDE, N, MASKED)
                param = load_weight(
                    param_address, master_address, offset, end, PARAM_TYPE, MASTER_TYPE, WIDE, N, MASKED
                )
                state2 = load_state(state2_address, numel, offset, end, STATE2_TYPE, WIDE, N, MASKED)
                state0, state1, state2 = NEW_STATE(param, grad, state0, state1, state2, rule_scalars)
                bits = random_words(of_codes, offset, N)
                store_state(state0_address, numel, offset, end, state0, STATE0_TYPE, bits, N, MASKED)
                store_state(state1_address, numel, offset, end, state1, STATE1_TYPE, bits, N, MASKED)
                store_state(state2_address, numel, offset, end, state2, STATE2_TYPE, bits, N, MASKED)
                param = NEW_PARAM(param, state0, state1, state2, rule_scalars)
                weight = store_weight(
                    param_address, master_address, offset, end, param, PARAM_TYPE, MASTER_TYPE, random, N, MASKED
                )
                follow(average_address, offset, end, weight, decay, random1, AVERAGE_TYPE, PARAM_TYPE, N, MASKED)
                follow(average2_address, offset, end, weight, decay2, random2, AVERAGE2_TYPE, PARAM_TYPE, N, MASKED)
                follow(average3_address, offset, end, weight, decay3, random3, AVERAGE3_TYPE, PARAM_TYPE, N, MASKED)
                follow(average4_address, offset, end, weight, decay4, random4, AVERAGE4_TYPE, PARAM_TYPE, N, MASKED)
