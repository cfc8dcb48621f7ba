"""Moments in 8 bits: codes and their scales as numbers, and numbers as codes.

Signed codes are int8 here, others uint8. A tensor of codes holds those of all elements, then the scales. A block of
elements begins with a block of codes, so that a program has all elements that share a scale.

Agrees with: ``csrc/math/codes.h``, which says what codes are, and ``trainops/reference_codes.py``.
"""

import triton
import triton.language as tl

from .random import mix, random_of_param
from .storage import load, store, store_as_is

CODE_BLOCK = tl.constexpr(32)  # elements that share a scale
MANTISSA, NEXT_CODE = tl.constexpr(20), tl.constexpr(1 << 20)  # bits of float32's that codes lack; one code more
SMALLEST_SCALE, ROUND_SCALE = tl.constexpr(40), tl.constexpr(0x2FFFFF)
OF_CODES = tl.constexpr(0x636F6465)
INFINITE, MAGNITUDE, SIGN = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFFFF), tl.constexpr(-(2**31))


@triton.jit
def random_of_codes(words, place: tl.constexpr, seed, step):
    """What the random bits of a parameter's codes depend on: see :func:`random_of_param`."""
    key, origin = random_of_param(words, place, seed, step)
    return mix(key ^ tl.full((), OF_CODES, tl.uint32)), origin


@triton.jit
def random_words(random, offset, BLOCK: tl.constexpr):
    """32 bits for each two elements of a block, which serve all state of a parameter; None without ``random``."""
    if random is None:
        return None
    else:
        key, origin = random
        return mix(key ^ (origin + (offset + 2 * tl.arange(0, BLOCK // 2)).to(tl.uint32)))


@triton.jit
def random_bits_of(words, DTYPE: tl.constexpr):
    """20 bits for each element, of which 16 are random, as int32. The halves of a word go to two elements."""
    lower, upper = words & 0xFFFF, words >> 16
    if DTYPE == tl.int8:
        halves = tl.interleave(lower, upper)
    else:
        halves = tl.interleave(upper, lower)
    return (halves << 4 | 8).to(tl.int32)


@triton.jit
def first_of(scales, DTYPE: tl.constexpr):
    """The bits of code 0 in blocks of these scales, were it no zero; one in a row for each block."""
    octaves: tl.constexpr = 15 if DTYPE == tl.int8 else 31
    return ((scales - octaves) << 23)[:, None]


@triton.jit
def scale_pointers(address, numel, offset, BLOCK: tl.constexpr):
    """Pointers to the scales of a block of elements."""
    scales = (address + numel).to(tl.pointer_type(tl.uint8))
    return scales + (offset // CODE_BLOCK + tl.arange(0, BLOCK // CODE_BLOCK))


@triton.jit
def has_scales(offset, end, BLOCK: tl.constexpr):
    """Which scales of a block of elements are those of elements before the end."""
    return offset + tl.arange(0, BLOCK // CODE_BLOCK) * CODE_BLOCK < end


@triton.jit
def decode(codes, scales):
    """Numbers of codes. ``scales``: int32, of each block."""
    its = tl.reshape(codes, [codes.shape[0] // CODE_BLOCK, CODE_BLOCK]).to(tl.int32)
    last: tl.constexpr = 127 if codes.dtype == tl.int8 else 255
    magnitude = its & last
    bits = (magnitude << MANTISSA) + first_of(scales, codes.dtype)
    bits = tl.where(magnitude == 0, 0, bits)
    bits = tl.where(magnitude >= last - 1, INFINITE + ((magnitude & 1) << 22), bits)
    return tl.reshape(bits | (its & SIGN), codes.shape).to(tl.float32, bitcast=True)


@triton.jit
def encode(values, random, DTYPE: tl.constexpr):
    """Codes of type ``DTYPE``, and scales, of a block of float32 numbers. ``random``: of :func:`random_bits_of`.

    What lies beyond the end of a tensor is 0 or NaN, and neither makes a scale larger.
    """
    BLOCK: tl.constexpr = values.shape[0]
    rows: tl.constexpr = [BLOCK // CODE_BLOCK, CODE_BLOCK]
    last: tl.constexpr = 127 if DTYPE == tl.int8 else 255
    bits = tl.reshape(values.to(tl.int32, bitcast=True), rows)
    random = tl.reshape(random, rows)
    size = bits & MAGNITUDE
    finite = tl.where(size < INFINITE, size, 0)
    scales = tl.maximum((tl.max(finite, axis=1) + ROUND_SCALE) >> 23, SMALLEST_SCALE)
    first = first_of(scales, DTYPE)
    if DTYPE == tl.int8:
        unit = (first + NEXT_CODE - (MANTISSA << 23)).to(tl.float32, bitcast=True)
        is_up = finite > (random.to(tl.float32) * unit).to(tl.int32, bitcast=True)
    else:
        is_up = finite > 0
    codes = tl.where(finite < first + NEXT_CODE, is_up.to(tl.int32), (finite + random - first) >> MANTISSA)
    codes = tl.where(size == INFINITE, last - 1, codes)
    if DTYPE == tl.int8:
        codes = codes | ((bits >> 24) & 0x80)
    codes = tl.where(size > INFINITE, last, codes)
    return tl.reshape(codes, [BLOCK]).to(DTYPE), scales


@triton.jit
def load_state(
    address,
    numel,
    offset,
    end,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of state, which may be codes, in the type that arithmetic is done in; None where ``DTYPE`` is."""
    if DTYPE == tl.int8 or DTYPE == tl.uint8:
        codes = load(address, offset, end, DTYPE, DTYPE, BLOCK, MASKED)
        pointers = scale_pointers(address, numel, offset, BLOCK)
        if MASKED:
            scales = tl.load(pointers, mask=has_scales(offset, end, BLOCK), other=SMALLEST_SCALE)
        else:
            scales = tl.load(pointers)
        return decode(codes, scales.to(tl.int32))
    else:
        return load(address, offset, end, DTYPE, WIDE, BLOCK, MASKED)


@triton.jit
def store_state(
    address, numel, offset, end, values, DTYPE: tl.constexpr, words, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """Write one block of state, if there is such a column (``DTYPE``). ``words``: of :func:`random_words`."""
    if DTYPE == tl.int8 or DTYPE == tl.uint8:
        codes, scales = encode(values, random_bits_of(words, DTYPE), DTYPE)
        store_as_is(address, offset, end, codes, BLOCK, MASKED)
        pointers = scale_pointers(address, numel, offset, BLOCK)
        if MASKED:
            tl.store(pointers, scales.to(tl.uint8), mask=has_scales(offset, end, BLOCK))
        else:
            tl.store(pointers, scales.to(tl.uint8))
    elif DTYPE is not None:
        store(address, offset, end, values, DTYPE, BLOCK, MASKED)
