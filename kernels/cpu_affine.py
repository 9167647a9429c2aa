"""The search of `codecs.search` in numba for types with a minimum: Q4_1, Q5_1 and Q2_K, Q4_K, Q5_K.

Weights are taken above the lowest of their group, y = x - lowest: sums over values far from zero would lose digits.
`start` is where code 0 lies in y.
"""

import numpy as np

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
from flux_quant.kernels.cpu_lanes import WIDTH, if_less, load, nearest, splat, store

TINY, HUGE, SINGULAR = F(1e-12), F(1e30), F(1e-6)
NEIGHBOURS = (ZERO, -ONE, ONE)


@loop
def lift(x, width, positive):
    """x -> y in place; per lane: the lowest value, at most 0 if `positive`, and the range above it."""
    low = high = load(x, 0)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(x, o)
        low = if_less(value, low, value, low)
        high = if_less(high, value, value, high)
    if positive:
        low = if_less(low, splat(ZERO), low, splat(ZERO))
    for o in range(0, width * WIDTH, WIDTH):
        store(x, o, load(x, o) - low)
    return low, high - low


@loop
def still_sums(y, w, width):
    """Per lane: the sums that do not depend on codes: of weights, y, y * y."""
    sw = sy = syy = splat(ZERO)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(y, o)
        if w is None:
            sw, sy, syy = sw + splat(ONE), sy + value, syy + value * value
        else:
            weight = load(w, o)
            weighted = weight * value
            sw, sy, syy = sw + weight, sy + weighted, syy + weighted * value
    return sw, sy, syy


@loop
def code_sums(y, w, width, start, inv, top):
    """Per lane: sums of q, q * q, y * q for the codes q of (y - start) * inv."""
    sq = sqq = syq = splat(ZERO)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(y, o)
        q = clip(nearest((value - start) * inv), splat(ZERO), top)
        weighted = q if w is None else load(w, o) * q
        sq, sqq, syq = sq + weighted, sqq + weighted * q, syq + weighted * value
    return sq, sqq, syq


@loop
def affine_error(y, w, width, start, step, top, q):
    """Per lane: the sum of (y - start - step * q)^2 for the nearest codes q, which are kept."""
    inv, error = inverse(step), splat(ZERO)
    for o in range(0, width * WIDTH, WIDTH):
        value = load(y, o) - start
        code = clip(nearest(value * inv), splat(ZERO), top)
        left = value - step * code
        error = error + (left * left if w is None else load(w, o) * left * left)
        store(q, o, code)
    return error


@loop
def affine_scale(y, w, width, trials, top, low, span, sw, sy, syy, positive):
    """Per lane: scale, start and sum of codes of least squares, best of the trials and of one more round from there."""
    error, scale, shift, count = splat(HUGE), splat(ZERO), splat(ZERO), splat(ZERO)
    narrow = inverse(if_less(splat(TINY), span, span, splat(ZERO)))
    for t in range(len(trials) + 1):
        if t < len(trials):
            start = span * splat(trials[t, 0])
            inv = narrow * splat(trials[t, 1])
        else:
            start = shift
            inv = inverse(scale)
        sq, sqq, syq = code_sums(y, w, width, start, inv, top)
        det = sw * sqq - sq * sq
        reciprocal = if_less(splat(SINGULAR) * sw * sqq, det, inverse(det), splat(ZERO))
        fit = (sw * syq - sy * sq) * reciprocal
        base = (sqq * sy - sq * syq) * reciprocal
        usable = if_less(splat(ZERO), fit, splat(ONE), splat(ZERO))  # a singular fit is 0
        if positive:
            usable = if_less(splat(ZERO), base + low, splat(ZERO), usable)
        fit = if_less(splat(ZERO), usable, fit, syq * inverse(sqq))
        base = if_less(splat(ZERO), usable, base, splat(ZERO))
        left = syy - fit * syq - base * sy
        scale = if_less(left, error, fit, scale)
        shift = if_less(left, error, base, shift)
        count = if_less(left, error, sq, count)
        error = if_less(left, error, left, error)
    return scale, shift, count


@loop
def affine_integers(y, w, width, groups, highest, top, scale, base, low, count, sums, unit, reciprocal, q):
    """Scales and minimums of groups -> d and dmin of each block in all of its lanes, their integer multiples."""
    sw, sy = sums
    sx = sy + low * sw
    d = as_stored(block_largest(scale, groups) / splat(highest), unit, reciprocal)
    m = as_stored(block_largest(base, groups) / splat(highest), unit, reciprocal)
    middle, per_min = nearest(scale * inverse(d)), inverse(sw * m)
    best = scales = mins = splat(ZERO)
    for neighbour in range(3):
        s = clip(middle + splat(NEIGHBOURS[neighbour]), splat(ZERO), splat(highest))
        b = clip(nearest((d * s * count - sx) * per_min), splat(ZERO), splat(highest))
        error = affine_error(y, w, width, splat(ZERO) - m * b - low, d * s, top, q)
        if neighbour == 0:
            best, scales, mins = error, s, b
        scales = if_less(error, best, s, scales)
        mins = if_less(error, best, b, mins)
        best = if_less(error, best, error, best)
    step, start = d * scales, splat(ZERO) - m * mins - low
    sq, sqq, syq = code_sums(y, w, width, start, inverse(step), top)
    aa = block_sum(scales * scales * sqq, groups)
    ab = block_sum(scales * mins * sq, groups)
    bb = block_sum(mins * mins * sw, groups)
    ax = block_sum(scales * (syq + low * sq), groups)
    bx = block_sum(mins * sx, groups)
    per_det = inverse(aa * bb - ab * ab)
    d_new = as_stored((ax * bb - bx * ab) * per_det, unit, reciprocal)
    m_new = (ax * ab - aa * bx) * per_det
    m_new = as_stored(if_less(splat(ZERO), m_new, m_new, splat(ZERO)), unit, reciprocal)
    error = affine_error(y, w, width, splat(ZERO) - m_new * mins - low, d_new * scales, top, q)
    after, before = block_sum(error, groups), block_sum(best, groups)
    return if_less(after, before, d_new, d), if_less(after, before, m_new, m), scales, mins


@loop
def affine(source, batches, shape, w, importance, spread, row_inverse, trials, highest, top, out):
    """Search batches first .. last of the input. Returns sums of squares: (of the input, of the error).

    source = (halves, singles, kind); shape = (first weight, how many, group, groups per block); w = room for the
    weights of a batch and importance as `weigh` wants it, or None; trials (T, 2): start in units of the range, codes
    per range; highest integer scale, 0 without; top code; out = (codes (elements), scales (groups), d (blocks), mins
    (groups), m (blocks)).
    """
    start, elements, width, groups = shape
    size = width * WIDTH
    row, y, q = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    lane = np.empty(2 * WIDTH, np.float32)
    signal = noise = 0.0
    high = splat(top)
    for batch in range(batches[0], batches[1]):
        first = batch * size
        count = min(size, elements - first)
        read(source, start + first, count, width, row, y)
        unit, reciprocal, square = normalize(y, width, groups)
        if w is not None:
            weigh(y, width, start + first, importance, spread, groups, row_inverse, unit, square, lane, row, w)
        low, span = lift(y, width, highest > ZERO)
        sw, sy, syy = still_sums(y, w, width)
        scale, shift, ones = affine_scale(y, w, width, trials, high, low, span, sw, sy, syy, highest > ZERO)
        if highest:
            base = splat(ZERO) - low - shift
            sums = (sw, sy)
            d, m, scales, mins = affine_integers(
                y, w, width, groups, highest, high, scale, base, low, ones, sums, unit, reciprocal, q
            )
            step, origin = d * scales, splat(ZERO) - m * mins - low
            write_scales(scales, batch, count // width, lane, out[1])
            write_scales(mins, batch, count // width, lane, out[3])
        else:
            d = as_stored(scale, unit, reciprocal)
            m = as_stored(low + (sy - d * ones) / sw, unit, reciprocal)
            step, origin = d, m - low
        error = affine_error(y, None, width, origin, step, high, q)
        write_codes(q, ZERO, width, batch * WIDTH, count, width, 0, row, out[0])
        write_units(d * unit, batch, groups, count // width, lane, out[2])
        write_units(m * unit, batch, groups, count // width, lane, out[4])
        signal += total(square, unit, groups, lane)
        noise += total(error, unit, groups, lane)
    return signal, noise
