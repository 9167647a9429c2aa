"""FP8 from 16-bit weights: the codec packs all 65536 values once, the weights look their codes up.

How often each value occurs is counted on the way, so that the error is a sum over values instead of weights.
"""

import numpy as np

from flux_quant.kernels.cpu_batch import BFLOAT16, ZERO, larger, loop
from flux_quant.kernels.cpu_lanes import WIDTH, load_bfloat16, load_float16, magnitude, splat, store

COUNTERS = 4  # neighbours often have the same value: a counter of its own for each of four saves the wait


@loop
def largest_magnitude(source, first, last):
    """The largest magnitude in sixteens first .. last of a source, as for `cpu_batch.read`, of 16 bits."""
    halves, _, kind = source
    lanes, row = splat(ZERO), np.zeros(WIDTH, np.float32)
    for i in range(first * WIDTH, last * WIDTH, WIDTH):
        lanes = larger(lanes, magnitude(load_bfloat16(halves, i) if kind == BFLOAT16 else load_float16(halves, i)))
    store(row, 0, lanes)
    return row.max()


@loop
def look_up(halves, first, last, table, codes, counts):
    """codes[i] = table[halves[i]]; counts (COUNTERS, 65536) uint32 grows."""
    whole = last - (last - first) % COUNTERS
    for i in range(first, whole, COUNTERS):
        for k in range(COUNTERS):
            bits = halves[i + k]
            codes[i + k] = table[bits]
            counts[k, bits] += 1
    for i in range(whole, last):
        codes[i] = table[halves[i]]
        counts[0, halves[i]] += 1
