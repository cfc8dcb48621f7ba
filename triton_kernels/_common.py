"""Finds the elements of a kernel.

A program takes one chunk of a table (``csrc/core/device_words.h``): up to ``CHUNK`` consecutive elements of one row.
Triton compiles code after a return. Kernels use ``else`` so that it is not compiled.
"""

import triton
import triton.language as tl

from trainops import core

CHUNK = 8192  # elements; a multiple of every block
REDUCTION_BLOCK = 2048  # partial results that a program takes at a time
MOMENTS_BLOCK = 256  # of those of eight numbers
THREADS = 128  # of a program


SMALLEST = 2  # bytes of an element. What is added up is divided among threads as if all had so many


def block_numel(*itemsizes: int) -> int:
    """Elements that a program takes at a time: 16 bytes per thread of the tensor with the smallest ones."""
    return THREADS * 16 // min(itemsizes)


# Words of a row.
NUMEL, FIRST_CHUNK, GROUP, FIRST_PLACE, AVERAGE_PLACE, ORIGIN = (
    tl.constexpr(core.words("row")[name])
    for name in ("numel", "first_chunk", "group", "first_place", "average_place", "origin")
)
ADDRESSES = tl.constexpr(len(core.words("row")))

# Words of a chunk.
CHUNK_ROW, CHUNK_BEGIN = (tl.constexpr(core.words("chunk")[name]) for name in ("row", "begin"))
CHUNK_WORDS = tl.constexpr(len(core.words("chunk")))


@triton.jit
def chunk_of(chunks, index, CHUNK: tl.constexpr):
    """The row of a chunk, and its first element there."""
    words = chunks + CHUNK_WORDS * index
    row, begin = tl.load(words + CHUNK_ROW), tl.load(words + CHUNK_BEGIN)
    begin = tl.multiple_of(begin, CHUNK)  # stated here, because loops pass it on
    return row, begin


@triton.jit
def end_of_body(begin, end, addresses, BLOCK: tl.constexpr):
    """The end of the elements that whole, aligned blocks can take. ``addresses``: those of all tensors, or-ed."""
    end_of_blocks = begin + (end - begin) // BLOCK * BLOCK
    return tl.where(addresses % 16 == 0, end_of_blocks, begin)


@triton.jit
def elements_of(
    rows, chunks, index, COLUMN: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """A chunk of one column: its row and that row's words, the column's address, and where the chunk's elements lie.

    They begin at the fourth number. The fifth is the end of those that whole blocks can take, the last that of all.
    """
    row, begin = chunk_of(chunks, index, CHUNK)
    words = rows + row * WORDS
    end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))
    address = tl.load(words + ADDRESSES + COLUMN)
    return row, words, address, begin, end_of_body(begin, end, address, BLOCK), end


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
def penalized(grad, penalty, param):
    """The gradient of a loss with an L2 penalty. Without one, the parameter is not looked at: it may be infinite."""
    return tl.where(penalty != 0.0, grad + penalty * param, grad)
