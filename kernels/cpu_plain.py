"""ggml's reference quantizers (quantize_row_*_ref) in numba, to the bit: Q8_0, and Q4_0, Q4_1, Q5_0, Q5_1 unsearched.

Compiled without fused multiply-add, which would round once where the reference rounds twice.
"""

import numpy as np

from flux_quant.kernels.cpu_batch import ONE, ZERO, F, exact, read, to_half, total, units_of, write_codes, write_units
from flux_quant.kernels.cpu_lanes import WIDTH, floor, if_less, load, magnitude, splat, store

HALF, ENORMOUS = F(0.5), F(1e30)
OVERFLOW = F(65520)  # from here on a float16 is infinite
GROUP = 32
EIGHT, AROUND, ABOVE = range(3)


@exact
def reference_inverse(d):
    return if_less(splat(ZERO), magnitude(d), splat(ONE) / d, splat(ZERO))


@exact
def whole(value, top):
    """Truncated to 0..top; what is not a number, because the scale is subnormal, becomes 0 as in C on x86."""
    value = if_less(magnitude(value), splat(ENORMOUS), value, splat(ZERO))
    return if_less(floor(value), top, floor(value), top)


@exact
def round_away(value):
    """C's roundf: half away from zero. What is not a number becomes 0."""
    size = floor(magnitude(value) + splat(HALF))
    size = if_less(size, splat(ENORMOUS), size, splat(ZERO))
    return if_less(value, splat(ZERO), splat(ZERO) - size, size)


@exact
def extremes(x):
    """Per lane: lowest, highest, and the value of largest magnitude, the first one on a tie."""
    low = high = largest = load(x, 0)
    for o in range(0, GROUP * WIDTH, WIDTH):
        value = load(x, o)
        low = if_less(value, low, value, low)
        high = if_less(high, value, value, high)
        largest = if_less(magnitude(largest), magnitude(value), value, largest)
    return low, high, largest


@exact
def plain(source, batches, start, elements, rule, divisor, top, out):
    """Batches first .. last of `elements` weights from `start` on -> sums of squares: of the input, of the error.

    rule, divisor, top: EIGHT 127 127; AROUND -8 15 or -16 31, stored with the negative divisor as offset; ABOVE 15 15
    or 31 31. out = (codes, their stride and place in a block, d (blocks), m (blocks)).
    """
    codes, stride, head, scales, minimums = out
    size = GROUP * WIDTH
    row, x, q, lane = np.empty(size, F), np.empty(size, F), np.empty(size, F), np.empty(2 * WIDTH, F)
    signal = noise = 0.0
    zero, half, most = splat(ZERO), splat(HALF), splat(top)
    for batch in range(batches[0], batches[1]):
        first = batch * size
        count = min(size, elements - first)
        read(source, start + first, count, GROUP, row, x)
        unit, reciprocal = units_of(x, GROUP, 1)
        low, high, largest = extremes(x)
        base, shift = zero, zero
        if rule == EIGHT:
            d = magnitude(largest) / splat(divisor)
        elif rule == AROUND:
            d = largest / splat(divisor)
            shift = splat(-divisor)
        else:
            base = low
            d = (high - low) / splat(divisor)
        inv = reference_inverse(d)
        stored_d, stored_base = to_half(d), to_half(base)
        square = error = zero
        for o in range(0, size, WIDTH):
            value = load(x, o)
            scaled = (value - base) * inv
            code = round_away(scaled) if rule == EIGHT else whole(scaled + (shift + half), most)
            left = ((value - stored_base) - stored_d * (code - shift)) * reciprocal
            value = value * reciprocal
            square, error = square + value * value, error + left * left
            store(q, o, code)
        write_codes(q, ZERO, GROUP, batch * WIDTH, count, stride, head, row, codes)
        write_units(d, batch, 1, count // GROUP, lane, scales)
        write_units(base, batch, 1, count // GROUP, lane, minimums)
        signal += total(square, unit, 1, lane)
        noise += total(error, unit, 1, lane)
        store(lane, 0, if_less(magnitude(d), magnitude(base), magnitude(base), magnitude(d)))
        for k in range(WIDTH):
            if lane[k] >= OVERFLOW:
                noise = np.inf
    return signal, noise
