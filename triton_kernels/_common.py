"""How every kernel finds its elements.

A program takes one chunk of the table (``trainops.device_table`` describes it): up to ``CHUNK`` consecutive elements
of one row. Where all addresses of the row are multiples of 16 bytes, whole blocks are read and written without a
mask, which lets the compiler use 16-byte accesses; the rest goes through a mask. Both do the same arithmetic.
What follows a return is compiled, too, unless it stands in an ``else``.
"""

import triton
import triton.language as tl

CHUNK = 8192  # elements: a multiple of every block
REDUCTION_BLOCK = 2048  # partial sums that a program takes at a time
THREADS = 128  # of a program


def block_numel(*itemsizes: int) -> int:
    """Elements that a program takes at a time: 16 bytes per thread of the tensor with the smallest ones."""
    return THREADS * 16 // min(itemsizes)


# Words of a row in front of its addresses: number of elements, first chunk, group, dtypes (which these kernels know).
NUMEL, FIRST_CHUNK, GROUP, DTYPES, ADDRESSES = (tl.constexpr(i) for i in range(5))


@triton.jit
def chunk_of(chunks, index, CHUNK: tl.constexpr):
    """The row of a chunk, and its first element there."""
    row = tl.load(chunks + 2 * index)
    begin = tl.load(chunks + 2 * index + 1)
    begin = tl.multiple_of(begin, CHUNK)  # to be stated where it is loaded: loops hand it on
    return row, begin


@triton.jit
def end_of_body(begin, end, addresses, BLOCK: tl.constexpr):
    """Where the elements end that can be taken in whole, aligned blocks. ``addresses``: of all tensors, or-ed."""
    end_of_blocks = begin + (end - begin) // BLOCK * BLOCK
    return tl.where(addresses % 16 == 0, end_of_blocks, begin)


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
    """One block of a tensor in the type that arithmetic is done in."""
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
    return values.to(DTYPE)


@triton.jit
def square_root(x):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def real(word):
    """A float64 that a table of 64-bit words holds."""
    return word.to(tl.float64, bitcast=True)
