"""What the CPU searches share: 16 groups of weights side by side in the lanes of the vector registers.

A batch is 16 consecutive groups of 16 or 32 weights, turned so that weight i of all groups lies together: `x[16 * i +
lane]`. Nothing is then summed across lanes but once per super-block, there are no branches, and every sum has a fixed
order. The error of a trial follows in closed form from its running sums, without a second pass over the codes.

Everything is float32: numba computes in float64 as soon as one operand is a Python float.
"""

import numpy as np
from numba import njit

from flux_quant.kernels.cpu_lanes import (
    WIDTH,
    if_less,
    load,
    load_bfloat16,
    load_float16,
    magnitude,
    power_below,
    root,
    splat,
    store,
    store_bytes,
    swap_1,
    swap_2,
    swap_4,
    swap_8,
    transpose,
)

F = np.float32
ZERO, ONE, EMPTY = F(0), F(1), F(1e-37)
HALF_MAX, HALF_NORMAL, HALF_STEP = F(65504), F(2.0**-14), F(0.5)  # steps of float32 at 0.5 are float16's subnormals
SPLIT = F(2**13 + 1)
FLOAT32, FLOAT16, BFLOAT16 = range(3)

loop = njit(fastmath={"contract"}, error_model="numpy", nogil=True)  # multiply-add may round once; no sum is reordered
exact = njit(error_model="numpy", nogil=True)


@loop
def clip(value, low, high):
    value = if_less(value, high, value, high)
    return if_less(low, value, value, low)


@loop
def inverse(value):
    return if_less(splat(EMPTY), magnitude(value), splat(ONE) / value, splat(ZERO))


@exact
def to_half(value):
    """The nearest float16, as float32: Dekker's splitting at 11 bits. Never infinite."""
    value = clip(value, splat(-HALF_MAX), splat(HALF_MAX))
    wide = value * splat(SPLIT)
    step = if_less(value, splat(ZERO), splat(-HALF_STEP), splat(HALF_STEP))
    return if_less(magnitude(value), splat(HALF_NORMAL), (value + step) - step, wide - (wide - value))


@loop
def as_stored(scale, unit, reciprocal):
    """What float16 keeps of scales in units of the block, in the same units."""
    most = splat(HALF_MAX) * reciprocal  # a product with `unit` may be infinite
    return to_half(clip(scale, splat(ZERO) - most, most) * unit) * reciprocal


@loop
def block_sum(value, groups):
    """In all lanes of a block (1, 8 or 16 lanes) the sum over its lanes."""
    if groups > 8:
        value = value + swap_8(value)
    if groups > 1:
        value = value + swap_4(value)
        value = value + swap_2(value)
        value = value + swap_1(value)
    return value


@loop
def block_maximum(value, groups):
    if groups > 8:
        value = larger(value, swap_8(value))
    if groups > 1:
        value = larger(value, swap_4(value))
        value = larger(value, swap_2(value))
        value = larger(value, swap_1(value))
    return value


@loop
def larger(left, right):
    return if_less(left, right, right, left)


@loop
def block_largest(value, groups):
    """In all lanes of a block the value of largest magnitude of its lanes; the negative one of two."""
    high, low = block_maximum(value, groups), block_maximum(splat(ZERO) - value, groups)
    return if_less(low, high, high, splat(ZERO) - low)


@loop
def read(source, first, count, width, row, x):
    """Weights first .. first + count of the input -> x (width * 16), turned; zeros where the last batch ends early."""
    halves, singles, kind = source
    for i in range(0, count, WIDTH):
        if kind == FLOAT32:
            store(row, i, load(singles, first + i))
        elif kind == BFLOAT16:
            store(row, i, load_bfloat16(halves, first + i))
        else:
            store(row, i, load_float16(halves, first + i))
    for i in range(count, width * WIDTH, WIDTH):
        store(row, i, splat(ZERO))
    for i in range(0, width, WIDTH):
        transpose(row, i, width, x, i * WIDTH)


@loop
def units_of(x, width, groups):
    """Per lane: the power of two just below the largest magnitude of its block, and its inverse."""
    largest = splat(ZERO)
    for o in range(0, width * WIDTH, WIDTH):
        largest = larger(largest, magnitude(load(x, o)))
    unit = power_below(block_maximum(largest, groups))
    return unit, splat(ONE) / unit


@loop
def normalize(x, width, groups):
    """Scale blocks to a largest magnitude of 1 to 2 -> the power of two, its inverse, sums of squares of groups.

    Squares then neither overflow nor vanish.
    """
    unit, reciprocal = units_of(x, width, groups)
    square = splat(ZERO)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(x, o) * reciprocal
        square = square + value * value
        store(x, o, value)
    return unit, reciprocal, square


@loop
def weigh(x, width, first, importance, spread, groups, row_inverse, unit, square, lane, row, w):
    """ggml's weight of each element, up to a factor per block: importance * sqrt(1 + x^2 / (spread * mean square)).

    The mean square is that of the block, or of the row where `row_inverse` (1 / root mean square of each row) is given;
    `spread` 0 leaves the importance alone. importance is (K + 512,) and begins anew after K.
    """
    columns = len(importance) - 2 * WIDTH * WIDTH
    share = splat(ZERO)
    if len(row_inverse):
        for k in range(WIDTH):
            lane[k] = row_inverse[min((first + k * width) // columns, len(row_inverse) - 1)]
        share = load(lane, 0) * unit
        share = share * share
    elif spread > ZERO:
        share = inverse(block_sum(square, groups) * splat(spread / F(width * groups)))
    column = first % columns
    for i in range(0, width * WIDTH, WIDTH):
        store(row, i, load(importance, column + i))
    for i in range(0, width, WIDTH):
        transpose(row, i, width, w, i * WIDTH)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(x, o)
        store(w, o, load(w, o) * root(splat(ONE) + value * value * share))


@loop
def write_codes(q, offset, width, group, count, stride, start, row, codes):
    """Codes q, turned like x, plus `offset` -> bytes: those of group n begin at codes[n * stride + start]."""
    for i in range(0, width, WIDTH):
        transpose(q, i * WIDTH, WIDTH, row, 0)
        for k in range(count // width):
            store_bytes(codes, (group + k) * stride + start + i, load(row, k * WIDTH) + splat(offset))


@loop
def write_scales(values, batch, count, lane, out):
    """Integers of the first `count` lanes -> out (groups) int16."""
    store(lane, 0, values)
    for k in range(count):
        out[batch * WIDTH + k] = np.int16(lane[k])


@loop
def write_units(values, batch, groups, count, lane, out):
    """The value of each block, which is in all of its lanes -> out (blocks) float32."""
    store(lane, 0, values)
    for k in range(0, count, groups):
        out[(batch * WIDTH + k) // groups] = lane[k]


@loop
def total(squares, unit, groups, lane):
    """Sum of all lanes, which are in units of their block, in float64."""
    store(lane, 0, block_sum(squares, groups))
    store(lane, WIDTH, unit)
    out = 0.0
    for k in range(0, WIDTH, groups):
        factor = np.float64(lane[WIDTH + k])
        out += np.float64(lane[k]) * factor * factor
    return out
