"""Reads and writes elements, in the type of each tensor (``csrc/math/storage.h``).

Where all addresses of a row are multiples of 16 bytes, whole blocks are read and written without a mask, which lets
the compiler use 16-byte accesses; the rest goes through a mask. Both do the same arithmetic.
"""

import triton
import triton.language as tl

from ._common import chunk_of
from .random import random_bits

# Triton's interpreter truncates to bfloat16, where GPUs round to nearest even.
INTERPRETED = tl.constexpr(not isinstance(chunk_of, triton.JITFunction))

# Half a unit in bfloat16's last place, in bits of float32.
HALF_OF_BFLOAT16 = tl.constexpr(0x8000)


@triton.jit
def elements(address, offset, DTYPE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Pointers to one block. Their alignment must be stated where it is known."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if not MASKED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + (offset + tl.arange(0, BLOCK))


@triton.jit
def load(
    address,
    offset,
    end,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of a tensor in the type that arithmetic is done in; None where ``DTYPE`` is."""
    if DTYPE is None:
        return None
    else:
        pointers = elements(address, offset, DTYPE, BLOCK, MASKED)
        if MASKED:
            values = tl.load(pointers, mask=offset + tl.arange(0, BLOCK) < end, other=0)
        else:
            values = tl.load(pointers)
        return values.to(WIDE)


@triton.jit
def store(address, offset, end, values, DTYPE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Round one block to the type of a tensor and write it there; returns what was written."""
    rounded = narrow(values, DTYPE)
    store_as_is(address, offset, end, rounded, BLOCK, MASKED)
    return rounded


@triton.jit
def store_rounded(
    address, offset, end, values, DTYPE: tl.constexpr, random, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """:func:`store`, but with ``random``, a key and the index of the first element, to bfloat16 stochastically.

    Adds random bits below the last place and truncates: what bfloat16 has stays as it is, and so do infinities.
    """
    if random is None:
        return store(address, offset, end, values, DTYPE, BLOCK, MASKED)
    else:
        key, origin = random
        values = values.to(tl.float32)
        bits = random_bits(key, origin + (offset + tl.arange(0, BLOCK)).to(tl.uint32))
        bits = tl.where(values != values, 0x7FC00000, values.to(tl.uint32, bitcast=True) + bits).to(tl.uint32)
        rounded = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        store_as_is(address, offset, end, rounded, BLOCK, MASKED)
        return rounded


@triton.jit
def store_as_is(address, offset, end, values, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Write one block of values, which have the type of the tensor."""
    pointers = elements(address, offset, values.dtype, BLOCK, MASKED)
    if MASKED:
        tl.store(pointers, values, mask=offset + tl.arange(0, BLOCK) < end)
    else:
        tl.store(pointers, values)


@triton.jit
def load_weight(
    param_address,
    master_address,
    offset,
    end,
    PARAM_TYPE: tl.constexpr,
    MASTER_TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of weights: parameters, or what they are together with their masters.

    A parameter that others have written wins.
    """
    param = load(param_address, offset, end, PARAM_TYPE, WIDE, BLOCK, MASKED)
    if MASTER_TYPE is None:
        return param
    elif MASTER_TYPE == tl.int16:
        remainder = load(master_address, offset, end, MASTER_TYPE, tl.int32, BLOCK, MASKED)
        weight = (param.to(tl.int32, bitcast=True) + remainder).to(tl.float32, bitcast=True)
        return tl.where(weight != weight, param, weight)
    else:
        master = load(master_address, offset, end, MASTER_TYPE, WIDE, BLOCK, MASKED)
        if PARAM_TYPE == tl.bfloat16:
            difference = master.to(tl.uint32, bitcast=True) - param.to(tl.uint32, bitcast=True)
            belongs = difference + HALF_OF_BFLOAT16 <= 2 * HALF_OF_BFLOAT16
        else:
            belongs = narrow(master, PARAM_TYPE).to(WIDE) == param
        return tl.where(belongs, master, param)


@triton.jit
def store_weight(
    param_address,
    master_address,
    offset,
    end,
    weight,
    PARAM_TYPE: tl.constexpr,
    MASTER_TYPE: tl.constexpr,
    random,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write one block of weights to parameters and masters; returns them as they are stored.

    ``random``: as of :func:`store_rounded`. With a master, bfloat16 is rounded to nearest with ties away from zero,
    and NaN has no remainder.
    """
    if MASTER_TYPE is None:
        return store_rounded(param_address, offset, end, weight, PARAM_TYPE, random, BLOCK, MASKED)
    else:
        bits = tl.where(weight != weight, 0x7FC00000, weight.to(tl.uint32, bitcast=True)).to(tl.uint32)
        if PARAM_TYPE == tl.bfloat16:
            rounded = ((bits + HALF_OF_BFLOAT16) >> 16).to(tl.uint16)
            store_as_is(param_address, offset, end, rounded.to(PARAM_TYPE, bitcast=True), BLOCK, MASKED)
        else:
            store(param_address, offset, end, weight, PARAM_TYPE, BLOCK, MASKED)
        if MASTER_TYPE == tl.int16:
            remainder = bits.to(tl.uint16).to(tl.int16, bitcast=True)
            store_as_is(master_address, offset, end, remainder, BLOCK, MASKED)
        else:
            store(master_address, offset, end, weight, MASTER_TYPE, BLOCK, MASKED)
        return weight


@triton.jit
def narrow(values, DTYPE: tl.constexpr):
    """To nearest even; float64 reaches 16 bits by way of float32, as in PyTorch."""
    if DTYPE != tl.float64:
        values = values.to(tl.float32)
    if INTERPRETED and DTYPE == tl.bfloat16 and values.dtype == tl.float32:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values != values, (bits >> 16) | 0x40, nearest).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(DTYPE)


@triton.jit
def real(word):
    """A float64 that a table of 64-bit words holds."""
    return word.to(tl.float64, bitcast=True)
