"""Statistics over a column (``statistics.py``).

Each element is read once (4 bytes in float32), in two launches: one partial result per chunk; then the results over
each row's chunks and over all. Only runs of a few elements are gathered in float32; they are joined in float64. A
chunk of which float32 holds too little is read again, from a cache, in float64.

Lane i of a block has the elements i, i + BLOCK, ... of a chunk, and there are as many lanes for every type: the order
depends on the sizes alone, and the same values give the same bits in every type that holds them.
"""

import triton
import triton.language as tl

from ._common import FIRST_CHUNK, NUMEL, elements_of
from .statistics import add, finish, is_doubtful, join, join_lanes, start
from .storage import load


@triton.jit
def gather_chunk(
    address,
    begin,
    body,
    end,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    STATISTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state of one chunk in float64, from runs in ``WIDE``."""
    states = start(STATISTIC, BLOCK, WIDE)
    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            exists = offset + tl.arange(0, BLOCK) < end if MASKED else None
            states = add(states, load(address, offset, end, DTYPE, WIDE, BLOCK, MASKED), exists, STATISTIC)
    return join_lanes(states, STATISTIC)


@triton.jit(do_not_specialize=["first_chunk"])
def partial_results(
    rows,
    chunks,
    first_chunk,
    partials,
    STATISTIC: tl.constexpr,
    COLUMN: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: the state of chunk ``first_chunk + i``, into ``partials``, which have the order of the rows."""
    chunk = first_chunk + tl.program_id(0)
    _, words, address, begin, body, end = elements_of(rows, chunks, chunk, COLUMN, WORDS, CHUNK, BLOCK)
    state = gather_chunk(address, begin, body, end, DTYPE, WIDE, STATISTIC, BLOCK)
    if WIDE != tl.float64:
        if is_doubtful(state, STATISTIC):
            state = gather_chunk(address, begin, body, end, DTYPE, tl.float64, STATISTIC, BLOCK)
    index = tl.load(words + FIRST_CHUNK) + begin // CHUNK
    for i in tl.static_range(len(state)):
        tl.store(partials + index * len(state) + i, state[i])


@triton.jit
def results_of(partials, first, last, STATISTIC: tl.constexpr, BLOCK: tl.constexpr):
    """The results of a statistic over chunks ``first`` to ``last``."""
    states = start(STATISTIC, BLOCK, tl.float64)
    for offset in range(first, last, BLOCK):
        index = offset + tl.arange(0, BLOCK)
        others = ()
        for i in tl.static_range(len(states)):
            nothing = start(STATISTIC, BLOCK, tl.float64)[i]
            number = tl.load(partials + index * len(states) + i, mask=index < last, other=nothing)
            others = others + (number,)  # noqa: RUF005 (Triton has no stars)
        states = join(states, others, STATISTIC)
    return finish(join_lanes(states, STATISTIC), STATISTIC)


@triton.jit
def result_of(partials, first, last, STATISTIC: tl.constexpr, BLOCK: tl.constexpr):
    """The same of a norm, which has one."""
    return results_of(partials, first, last, STATISTIC, BLOCK)[0]


@triton.jit
def chunks_of_row(rows, row, WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """The first chunk of a row, and the one after its last."""
    words = rows + row * WORDS
    first = tl.load(words + FIRST_CHUNK)
    return first, first + tl.cdiv(tl.load(words + NUMEL), CHUNK)


@triton.jit(do_not_specialize=["chunk_count"])
def finish_rows(
    rows,
    partials,
    chunk_count,
    total,
    results,
    STATISTIC: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program 0: a norm of everything, unless ``total`` is None. Program i: the results of row i - 1."""
    row = tl.program_id(0).to(tl.int64) - 1
    if row < 0:
        if total is not None:
            tl.store(total, result_of(partials, 0, chunk_count, STATISTIC, BLOCK))
    else:
        first, last = chunks_of_row(rows, row, WORDS, CHUNK)
        found = results_of(partials, first, last, STATISTIC, BLOCK)
        for i in tl.static_range(len(found)):
            tl.store(results + row * len(found) + i, found[i])


@triton.jit(do_not_specialize=["first_chunk"])
def count_exponents(
    rows,
    chunks,
    first_chunk,
    counts,
    COLUMN: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BINS: tl.constexpr,
    WORDS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the elements of a chunk to its row's counts of binary exponents (``csrc/math/moments.h``)."""
    chunk = first_chunk + tl.program_id(0)
    row, _, address, begin, body, end = elements_of(rows, chunks, chunk, COLUMN, WORDS, CHUNK, BLOCK)
    found = tl.zeros([BINS + 1], tl.int32)
    for MASKED in tl.static_range(2):
        for offset in range(body if MASKED else begin, end if MASKED else body, BLOCK):
            x = load(address, offset, end, DTYPE, WIDE, BLOCK, MASKED)
            if WIDE == tl.float64:
                exponents = ((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023 + 127
                bins = tl.minimum(tl.maximum(exponents, 0), BINS - 1).to(tl.int32)
            else:
                bins = (x.to(tl.int32, bitcast=True) >> 23) & 0xFF
            counted = ((x - x) == 0.0) & (x != 0.0)
            if MASKED:
                counted = counted & (offset + tl.arange(0, BLOCK) < end)
            found += tl.histogram(tl.where(counted, bins, BINS), BINS + 1)  # the last: what is not counted
    index = tl.arange(0, BINS + 1)
    tl.atomic_add(counts + row * BINS + index, found.to(tl.int64), mask=(index < BINS) & (found > 0))
