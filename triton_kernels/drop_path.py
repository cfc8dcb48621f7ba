"""DropPath: stochastic depth with layer scale and the residual, and its derivative.

    out            = residual + branch * layer_scale * mask[sample]          mask: 0, or 1 / keep_prob
    of_branch      = grad * layer_scale * mask[sample]
    of_layer_scale = sum over samples and positions of grad * mask[sample] * branch

The branch may hold only the kept samples. Forward then reads ``branch[rows[sample]]``; backward reads
``grad[rows[sample]]``.

Per element of a kept sample, forward reads branch and residual and writes out (12 bytes in float32); backward reads
grad and branch and writes the branch's gradient (12 bytes), or reads grad alone (8 bytes) where layer scale needs no
gradient. With a residual, and for layer scale's gradient, a dropped sample's branch is not read. Arithmetic in
float32, or float64 when all operands are; each product of the first two lines is rounded to the type that PyTorch
gives it. Layer scale's gradient is summed in two launches, in runs of a few elements in the type of arithmetic, which
are joined in float64. The order depends on the sizes alone.

Forward looks up mask, row and channel once per ``UNIT`` elements: a power of two that divides the size of a sample
and the number of channels, at most the eight elements of a 16-byte access. The conditions of accesses are uniform
within a unit, else a 16-byte access splits in four.

Agrees with: timm.layers.drop_path (timm/layers/drop.py), and csrc/math/drop_path.h.
"""

import triton
import triton.language as tl

from .statistics import sum_in_pairs
from .storage import narrow

UNIT = 8  # elements of a 16-bit type in 16 bytes
RUN = tl.constexpr(8)  # elements that are added up before they are joined in float64
PARTIALS = 1024  # sums that are added up for a channel in the end, at most


@triton.jit
def term(x, layer_scale, mask, PRODUCT: tl.constexpr):
    """``x * layer_scale * mask``, each product as the type ``PRODUCT`` holds it."""
    wide: tl.constexpr = x.dtype
    x = narrow(x, PRODUCT).to(wide)
    if layer_scale is not None:
        x = narrow(x * layer_scale, PRODUCT).to(wide)
    return narrow(x * mask, PRODUCT).to(wide)


@triton.jit(do_not_specialize=["units", "sample_units", "channel_units"])
def drop_path(
    out,
    residual,
    branch,
    layer_scale,
    mask,
    rows,
    units,
    sample_units,
    channel_units,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    PRODUCT: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: the i-th chunk. Sizes are in units; ``INDEX`` is a type that holds those of a sample and a chunk.

    Where a chunk lies in one sample, as most do, its mask is one value, and so is its row; else they are looked up
    unit by unit.
    """
    begin = tl.program_id(0).to(tl.int64) * (CHUNK // UNIT)
    size = tl.minimum(units - begin, CHUNK // UNIT).to(tl.int32)
    sample = begin // sample_units
    position = begin - sample * sample_units
    mask_of_sample = tl.full([1, 1], tl.load(mask + sample), mask.dtype.element_ty).to(WIDE)
    if rows is not None:
        shift_of_sample = (tl.load(rows + sample) - sample) * sample_units * UNIT
    channel = position
    if layer_scale is not None:
        channel = position % channel_units
    mixed = (size < CHUNK // UNIT) | (position + size > sample_units)
    for MIXED in tl.static_range(2):
        if mixed == MIXED:
            for offset in range(0, size, BLOCK // UNIT):
                unit = offset + tl.arange(0, BLOCK // UNIT)
                lane = tl.arange(0, UNIT)[None, :]
                element = begin * UNIT + (unit[:, None] * UNIT + lane)
                inside, value = tl.full([BLOCK // UNIT, 1], True, tl.int1), mask_of_sample
                if MIXED:
                    inside = (unit < size)[:, None]
                    begun = (position.to(INDEX) + unit.to(INDEX)) // sample_units.to(INDEX)
                    sample_of_unit = sample + begun.to(tl.int64)
                    value = tl.load(mask + sample_of_unit, mask=unit < size, other=0).to(WIDE)[:, None]
                source = element  # of the branch
                if rows is not None:
                    shift = shift_of_sample
                    if MIXED:
                        row = tl.load(rows + sample_of_unit, mask=unit < size, other=0)
                        shift = ((row - sample_of_unit) * sample_units * UNIT)[:, None]
                    source = element + shift
                scale = None
                if layer_scale is not None:
                    channel_of_unit = (channel.to(INDEX) + unit.to(INDEX)) % channel_units.to(INDEX)
                    scale = tl.load(layer_scale + channel_of_unit.to(tl.int64)[:, None] * UNIT + lane).to(WIDE)
                if residual is None:
                    x = tl.load(branch + source, mask=inside, other=0).to(WIDE)
                    result = narrow(term(x, scale, value, PRODUCT), out.dtype.element_ty)
                else:
                    kept = inside & (value != 0)
                    x = tl.load(branch + source, mask=kept, other=0).to(WIDE)
                    rest = tl.load(residual + element, mask=inside, other=0)
                    total = narrow(rest.to(WIDE) + term(x, scale, value, PRODUCT), out.dtype.element_ty)
                    result = tl.where(kept, total, rest.to(out.dtype.element_ty))
                tl.store(out + element, result, mask=inside)


@triton.jit(do_not_specialize=["positions", "sample_positions", "program_positions", "channel_units"])
def drop_path_backward(
    of_branch,
    partials,
    grad,
    branch,
    layer_scale,
    mask,
    rows,
    positions,
    sample_positions,
    program_positions,
    channel_units,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    PRODUCT: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program: ``program_positions`` positions of samples, and ``COLUMNS`` channels.

    ``partials``: a sum for each channel, for every ``program_positions`` positions.
    """
    channels = channel_units.to(tl.int64) * UNIT
    column_blocks = tl.cdiv(channels, COLUMNS)
    index = tl.program_id(0) // column_blocks
    column = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    begin = index * program_positions
    sample = begin // sample_positions
    begin_in_sample = (begin - sample * sample_positions).to(INDEX)
    scale = tl.load(layer_scale + column, mask=column < channels, other=0).to(WIDE)[None, :]
    ROUND: tl.constexpr = BLOCK // COLUMNS
    element = tl.arange(0, ROUND).to(tl.int64)[:, None] * channels + column[None, :]
    total = tl.zeros([ROUND, COLUMNS], tl.float64)
    size = tl.minimum(positions - begin, program_positions).to(tl.int32)
    for first_round in range(0, size, RUN * ROUND):
        run = tl.zeros([ROUND, COLUMNS], WIDE)
        for offset in range(first_round, tl.minimum(first_round + RUN * ROUND, size), ROUND):
            position = offset + tl.arange(0, ROUND)
            begun = (begin_in_sample + position.to(INDEX)) // sample_positions.to(INDEX)
            sample_of_position = sample + begun.to(tl.int64)
            value = tl.load(mask + sample_of_position, mask=position < size, other=0).to(WIDE)[:, None]
            inside = (position < size)[:, None] & (column < channels)[None, :]
            first = (begin + offset) * channels
            source = first + element
            if rows is not None:
                row = tl.load(rows + sample_of_position, mask=position < size, other=0)
                source += ((row - sample_of_position) * sample_positions * channels)[:, None]
            g = narrow(tl.load(grad + source, mask=inside, other=0), PRODUCT).to(WIDE)
            x = tl.load(branch + first + element, mask=inside & (value != 0), other=0).to(WIDE)
            result = term(g, scale, value, PRODUCT)
            tl.store(of_branch + first + element, narrow(result, of_branch.dtype.element_ty), mask=inside)
            run += g * value * x
        total += run.to(tl.float64)
    tl.store(partials + index * channels + column, sum_in_pairs(total), mask=column < channels)


@triton.jit(do_not_specialize=["count", "channels"])
def finish_layer_scale(of_layer_scale, partials, count, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the ``count`` rows of ``partials``, for as many channels as a block of ``ROWS`` of them takes."""
    column = tl.program_id(0).to(tl.int64) * (BLOCK // ROWS) + tl.arange(0, BLOCK // ROWS)
    total = tl.zeros([ROWS, BLOCK // ROWS], tl.float64)
    for offset in range(0, count, ROWS):
        row = offset + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < count)[:, None] & (column < channels)[None, :]
        total += tl.load(partials + row[:, None] * channels + column[None, :], mask=inside, other=0)
    result = narrow(sum_in_pairs(total), of_layer_scale.dtype.element_ty)
    tl.store(of_layer_scale + column, result, mask=column < channels)
