"""FP8 from 16-bit weights: the codec packs all 65536 values once, the weights look their codes up.

How often each value occurs is counted on the way, so that the error is a sum over values instead of weights.
"""

import numpy as np

from flux_quant.kernels.cpu_batch import loop

COUNTERS = 4  # neighbours often have the same value: a counter of its own for each of four saves the wait


@loop
def largest_bits(halves, first, last):
    """The bits of the largest magnitude among float16 or bfloat16 weights first .. last."""
    out = np.uint16(0)
    for i in range(first, last):
        out = max(out, halves[i] & np.uint16(0x7FFF))
    return out


@loop
def look_up(halves, first, last, table, codes, counts):
    """codes[i] = table[halves[i]]; counts (COUNTERS, 65536) int64 grows."""
    whole = last - (last - first) % COUNTERS
    for i in range(first, whole, COUNTERS):
        for k in range(COUNTERS):
            bits = halves[i + k]
            codes[i + k] = table[bits]
            counts[k, bits] += 1
    for i in range(whole, last):
        codes[i] = table[halves[i]]
        counts[0, halves[i]] += 1
