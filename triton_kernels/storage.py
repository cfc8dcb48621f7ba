"""Reads and writes elements, in the type of each tensor (``csrc/math/storage.h``).

Where all addresses of a row are multiples of 16 bytes, whole blocks are read and written without a mask, which lets
the compiler use 16-byte accesses; the rest goes through a mask. Both do the same arithmetic.
"""

import triton
import triton.language as tl

from ._common import chunk_of

# Triton's interpreter truncates to bfloat16, where GPUs round to nearest even.
INTERPRETED = tl.constexpr(not isinstance(chunk_of, triton.JITFunction))


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
    pointers = elements(address, offset, DTYPE, BLOCK, MASKED)
    rounded = narrow(values, DTYPE)
    if MASKED:
        tl.store(pointers, rounded, mask=offset + tl.arange(0, BLOCK) < end)
    else:
        tl.store(pointers, rounded)
    return rounded


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
