"""The search of `codecs.search` in numba for values around zero: symmetric codes, and the table of IQ4.

`low` and `high` are the range of the codes; None stands for the table.
"""

import numpy as np

from flux_quant.codecs.iq4 import BOUNDS, VALUES
from flux_quant.kernels.cpu_batch import (
    ONE,
    ZERO,
    F,
    as_stored,
    block_largest,
    block_sum,
    clip,
    inverse,
    loop,
    normalize,
    read,
    total,
    weigh,
    write_codes,
    write_scales,
    write_units,
)
from flux_quant.kernels.cpu_lanes import WIDTH, if_less, load, magnitude, nearest, splat, staircase, store

TINY = F(1e-12)
NEIGHBOURS = (ZERO, -ONE, ONE)
STEPS = tuple((bound, up - down) for bound, down, up in zip(BOUNDS, VALUES, VALUES[1:], strict=False))
table_value = staircase(VALUES[0], STEPS)
table_code = staircase(0, tuple((bound, 1) for bound in BOUNDS))


@loop
def level(value, low, high):
    """The value of the nearest code."""
    if low is None:
        return table_value(value)
    return clip(nearest(value), splat(low), splat(high))


@loop
def centred_step(x, w, o, inv, low, high, xq, qq):
    value = load(x, o)
    q = level(value * inv, low, high)
    weighted = q if w is None else load(w, o) * q
    return xq + weighted * value, qq + weighted * q


@loop
def centred_sums(x, w, width, inv, low, high):
    """Per lane: sums of x * q and q * q for the levels q of x * inv. Two of each: one addition waits for the last."""
    xq = qq = more_xq = more_qq = splat(ZERO)
    for o in range(0, width * WIDTH, 2 * WIDTH):
        xq, qq = centred_step(x, w, o, inv, low, high, xq, qq)
        more_xq, more_qq = centred_step(x, w, o + WIDTH, inv, low, high, more_xq, more_qq)
    return xq + more_xq, qq + more_qq


@loop
def centred_error(x, w, width, step, low, high, q):
    """Per lane: the sum of (x - step * q)^2 for the levels q of x in units of step, which are kept."""
    inv, error = inverse(step), splat(ZERO)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(x, o)
        code = level(value * inv, low, high)
        left = value - step * code
        error = error + (left * left if w is None else load(w, o) * left * left)
        store(q, o, code)
    return error


@loop
def centred_scale(x, w, width, trials, low, high):
    """Per lane: the scale of least squares for the best of the trials, and of one more round from there."""
    largest = splat(ZERO)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(x, o)
        largest = if_less(magnitude(largest), magnitude(value), value, largest)
    largest = if_less(splat(TINY), magnitude(largest), splat(ONE) / largest, splat(ZERO))
    gain = scale = splat(ZERO)
    for t in range(len(trials) + 1):
        inv = splat(trials[t]) * largest if t < len(trials) else inverse(scale)
        xq, qq = centred_sums(x, w, width, inv, low, high)
        fitted = xq / if_less(qq, splat(TINY), splat(TINY), qq)
        fitted = if_less(splat(ZERO), magnitude(largest), fitted, splat(ZERO))
        scale = if_less(gain, fitted * xq, fitted, scale)
        gain = if_less(gain, fitted * xq, fitted * xq, gain)
    return scale


@loop
def centred_integers(x, w, width, groups, integer_range, low, high, scale, unit, reciprocal, q):
    """Scales of groups -> d of each block in all of its lanes, integer scales; both refined by error."""
    lowest, highest, candidates = integer_range
    d = as_stored(block_largest(scale, groups) / splat(lowest), unit, reciprocal)
    middle = nearest(scale * inverse(d))
    integers = clip(middle, splat(lowest), splat(highest))
    best = centred_error(x, w, width, d * integers, low, high, q) if candidates > 1 else splat(ZERO)
    for neighbour in range(1, candidates):
        candidate = clip(middle + splat(NEIGHBOURS[neighbour]), splat(lowest), splat(highest))
        error = centred_error(x, w, width, d * candidate, low, high, q)
        integers = if_less(error, best, candidate, integers)
        best = if_less(error, best, error, best)
    xq, qq = centred_sums(x, w, width, inverse(d * integers), low, high)
    above = block_sum(integers * xq, groups)
    below = block_sum(integers * integers * qq, groups)
    return as_stored(above * inverse(below), unit, reciprocal), integers


@loop
def centred(source, batches, shape, w, importance, spread, row_inverse, trials, integer_range, low, high, out):
    """Search batches first .. last of the input. Returns sums of squares: (of the input, of the error).

    source = (halves, singles, kind); shape = (first weight, how many, group, groups per block); w = room for the
    weights of a batch and importance as `weigh` wants it, or None; integer_range = (lowest, highest, how many to try)
    of the scales, zeros without; out = (codes (elements), scales (groups), d (blocks), and what has no use here).
    """
    start, elements, width, groups = shape
    offset = ZERO if low is None else -low
    size = width * WIDTH
    row, x, q = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    lane = np.empty(2 * WIDTH, np.float32)
    signal = noise = 0.0
    for batch in range(batches[0], batches[1]):
        first = batch * size
        count = min(size, elements - first)
        read(source, start + first, count, width, row, x)
        unit, reciprocal, square = normalize(x, width, groups)
        if w is not None:
            weigh(x, width, start + first, importance, spread, groups, row_inverse, unit, square, lane, row, w)
        scale = centred_scale(x, w, width, trials, low, high)
        if integer_range[0]:
            d, scales = centred_integers(x, w, width, groups, integer_range, low, high, scale, unit, reciprocal, q)
        else:
            d, scales = as_stored(scale, unit, reciprocal), splat(ONE)
        error = centred_error(x, None, width, d * scales, low, high, q)
        if low is None:
            for o in range(0, size, WIDTH):
                store(q, o, table_code(load(q, o)))
        write_codes(q, offset, width, batch * WIDTH, count, width, 0, row, out[0])
        write_scales(scales, batch, count // width, lane, out[1])
        write_units(d * unit, batch, groups, count // width, lane, out[2])
        signal += total(square, unit, groups, lane)
        noise += total(error, unit, groups, lane)
    return signal, noise
