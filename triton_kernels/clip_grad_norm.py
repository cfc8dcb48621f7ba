"""Gradient norm, scaling and clamping.

    norm        = (sum over tensors and elements of |g|^p)^(1/p),    p = 1, 2 or inf
    coefficient = min(1, max_norm / (norm + 1e-6))

The norm reads each gradient once (4 bytes per float32 element) in two launches: one partial sum per chunk, in the
type of arithmetic; then the sums over each row's chunks and over all, in float64. The order depends on the sizes
alone. Scaling and clamping read and write each gradient once.

Agrees with: torch.nn.utils.get_total_norm and clip_grads_with_norm_ (torch/nn/utils/clip_grad.py).
"""

import triton
import triton.language as tl

from ._common import ADDRESSES, FIRST_CHUNK, NUMEL, chunk_of, end_of_body, load, store

INF = tl.constexpr(0)  # stands for the order of the norm


@triton.jit
def accumulate(total, x, NORM: tl.constexpr):
    """``total`` with the elements ``x``. A NaN stays."""
    if NORM == 1:
        return total + tl.abs(x)
    elif NORM == 2:
        return total + x * x
    else:
        return tl.maximum(total, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def join(totals, NORM: tl.constexpr):
    """One sum (or maximum) of many."""
    if NORM == INF:
        is_nan = tl.max((totals != totals).to(tl.int32), axis=0) != 0
        return tl.where(is_nan, float("nan"), tl.max(tl.where(totals != totals, 0.0, totals), axis=0))
    else:
        return tl.sum(totals, axis=0)


@triton.jit
def sum_of(
    address,
    begin,
    body,
    end,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``|g|^p`` of one chunk, summed up in ``WIDE`` and returned in float64."""
    totals = tl.zeros([BLOCK], WIDE)
    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            totals = accumulate(totals, load(address, offset, end, DTYPE, WIDE, BLOCK, MASKED), NORM)
    return join(totals, NORM).to(tl.float64)


@triton.jit(do_not_specialize=["first_chunk"])
def partial_norms(
    rows,
    chunks,
    first_chunk,
    partials,
    WORDS: tl.constexpr,
    COLUMN: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    NORM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: the sum of ``|g|^p`` over chunk ``first_chunk + i``, into ``partials``.

    Where float32 overflows, as the squares of 1e30 do, the sum is made once more in float64.
    """
    index = first_chunk + tl.program_id(0)
    row, begin = chunk_of(chunks, index, CHUNK)
    words = rows + row * WORDS
    end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))
    address = tl.load(words + ADDRESSES + COLUMN)
    body = end_of_body(begin, end, address, BLOCK)
    total = sum_of(address, begin, body, end, DTYPE, WIDE, NORM, BLOCK)
    if NORM != INF and WIDE != tl.float64:
        if total == float("inf"):
            total = sum_of(address, begin, body, end, DTYPE, tl.float64, NORM, BLOCK)
    tl.store(partials + index, total)


@triton.jit
def norm_of(partials, first, last, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """The norm over chunks ``first`` to ``last``."""
    totals = tl.zeros([BLOCK], tl.float64)
    for offset in range(first, last, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        partial = tl.load(partials + i, mask=i < last, other=0.0)
        totals = tl.maximum(totals, partial, propagate_nan=tl.PropagateNan.ALL) if NORM == INF else totals + partial
    total = join(totals, NORM)
    return tl.sqrt(total) if NORM == 2 else total


@triton.jit
def chunks_of_row(rows, row, WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """The first chunk of a row, and the one after its last."""
    words = rows + row * WORDS
    first = tl.load(words + FIRST_CHUNK)
    return first, first + tl.cdiv(tl.load(words + NUMEL), CHUNK)


@triton.jit(do_not_specialize=["chunk_count"])
def finish_norms(
    rows,
    partials,
    chunk_count,
    total_norm,
    norms,
    WORDS: tl.constexpr,
    NORM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0: the norm of everything. Program i: that of row i - 1."""
    row = tl.program_id(0).to(tl.int64) - 1
    if row < 0:
        tl.store(total_norm, norm_of(partials, 0, chunk_count, NORM, BLOCK))
    else:
        first, last = chunks_of_row(rows, row, WORDS, CHUNK)
        tl.store(norms + row, norm_of(partials, first, last, NORM, BLOCK))


@triton.jit
def clamped(x, bound):
    """``x`` within ``[-bound, bound]``; a NaN stays."""
    x = tl.where(x < -bound, -bound, x)
    return tl.where(x > bound, bound, x)


@triton.jit(do_not_specialize=["first_chunk"])
def update_in_place(
    rows,
    chunks,
    first_chunk,
    operand,
    WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    CLAMP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply by an operand that lies on the device, or limit to it. A factor of 1 leaves the tensors unread."""
    value = tl.load(operand)
    if not CLAMP:
        if value == 1:
            return
    value = value.to(WIDE)
    row, begin = chunk_of(chunks, first_chunk + tl.program_id(0), CHUNK)
    words = rows + row * WORDS
    end = tl.minimum(begin + CHUNK, tl.load(words + NUMEL))
    address = tl.load(words + ADDRESSES)
    body = end_of_body(begin, end, address, BLOCK)
    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            x = load(address, offset, end, DTYPE, WIDE, BLOCK, MASKED)
            x = clamped(x, value) if CLAMP else x * value
            store(address, offset, end, x, DTYPE, BLOCK, MASKED)
