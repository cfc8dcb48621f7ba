"""Operations on the elements of each tensor, in place (``csrc/math/transform.h``): 8 bytes per float32 element."""

import triton
import triton.language as tl

from ._common import elements_of
from .storage import load, store


@triton.jit
def clamped(x, bound):
    """``x`` within ``[-bound, bound]``; a NaN stays."""
    x = tl.where(x < -bound, -bound, x)
    return tl.where(x > bound, bound, x)


@triton.jit(do_not_specialize=["first_chunk"])
def transform(
    rows,
    chunks,
    first_chunk,
    operand,
    CLAMP: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply by an operand that lies on the device, or limit to it. A factor of 1 leaves the tensors unread."""
    value = tl.load(operand)
    if not CLAMP:
        if value == 1:
            return
    value = value.to(WIDE)
    chunk = first_chunk + tl.program_id(0)
    _, _, address, begin, body, end = elements_of(rows, chunks, chunk, 0, WORDS, CHUNK, BLOCK)
    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            x = load(address, offset, end, DTYPE, WIDE, BLOCK, MASKED)
            x = clamped(x, value) if CLAMP else x * value
            store(address, offset, end, x, DTYPE, BLOCK, MASKED)
