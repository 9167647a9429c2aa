"""Unpack blocks of 32 weights and FP8: the loops of `codecs.legacy`, `codecs.fp8` and of IQ4_NL in `codecs.iq4`.

Each takes the bytes of a weight, a target (see `cpu_dequant_targets`), the rows first .. last and the blocks of a row.
Every value is formed by the operations of the codec in its order, each rounded on its own.
"""

import numpy as np

from flux_quant.codecs.iq4 import VALUES
from flux_quant.kernels.cpu_batch import ZERO, F, exact
from flux_quant.kernels.cpu_dequant_lanes import (
    e4m3,
    field,
    half_at,
    load_bytes,
    signed,
    spread_bits,
    table_of,
    unsigned,
)
from flux_quant.kernels.cpu_dequant_targets import close, put, put_some
from flux_quant.kernels.cpu_lanes import WIDTH, splat

EIGHT, SIXTEEN = F(8), F(16)
NAN = F(np.nan)

iq4_value = table_of(VALUES)


@exact
def q8_0(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 34 * (row * blocks + block), 32 * block
            d = half_at(data, p)
            total = put(target, row, o, d * signed(load_bytes(data, p + 2)), total)
            total = put(target, row, o + 16, d * signed(load_bytes(data, p + 18)), total)
        close(target, row, total)


@exact
def q4_0(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 18 * (row * blocks + block), 32 * block
            d, codes = half_at(data, p), load_bytes(data, p + 2)
            total = put(target, row, o, d * (unsigned(field(codes, 0, 15)) - splat(EIGHT)), total)
            total = put(target, row, o + 16, d * (unsigned(field(codes, 4, 15)) - splat(EIGHT)), total)
        close(target, row, total)


@exact
def q4_1(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 20 * (row * blocks + block), 32 * block
            d, m, codes = half_at(data, p), half_at(data, p + 2), load_bytes(data, p + 4)
            total = put(target, row, o, d * unsigned(field(codes, 0, 15)) + m, total)
            total = put(target, row, o + 16, d * unsigned(field(codes, 4, 15)) + m, total)
        close(target, row, total)


@exact
def q5_0(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 22 * (row * blocks + block), 32 * block
            d, codes = half_at(data, p), load_bytes(data, p + 6)
            low = field(codes, 0, 15) | spread_bits(data, p + 2, 16)
            high = field(codes, 4, 15) | spread_bits(data, p + 4, 16)
            total = put(target, row, o, d * (unsigned(low) - splat(SIXTEEN)), total)
            total = put(target, row, o + 16, d * (unsigned(high) - splat(SIXTEEN)), total)
        close(target, row, total)


@exact
def q5_1(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 24 * (row * blocks + block), 32 * block
            d, m, codes = half_at(data, p), half_at(data, p + 2), load_bytes(data, p + 8)
            low = field(codes, 0, 15) | spread_bits(data, p + 4, 16)
            high = field(codes, 4, 15) | spread_bits(data, p + 6, 16)
            total = put(target, row, o, d * unsigned(low) + m, total)
            total = put(target, row, o + 16, d * unsigned(high) + m, total)
        close(target, row, total)


@exact
def iq4_nl(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 18 * (row * blocks + block), 32 * block
            d, codes = half_at(data, p), load_bytes(data, p + 2)
            total = put(target, row, o, d * iq4_value(field(codes, 0, 15)), total)
            total = put(target, row, o + 16, d * iq4_value(field(codes, 4, 15)), total)
        close(target, row, total)


@exact
def fp8(data, target, first, last, columns, scale):
    """Rows of any length, no blocks. scale (1,) or (N,) float32."""
    whole = columns // WIDTH * WIDTH
    rest = np.zeros(WIDTH, np.uint8)
    for row in range(first, last):
        total = splat(ZERO)
        s = scale[row if len(scale) > 1 else 0]
        factor = splat(s if s == s else NAN)  # one NaN for all, as `half_at` has it
        start = row * columns
        for column in range(0, whole, WIDTH):
            total = put(target, row, column, e4m3(load_bytes(data, start + column)) * factor, total)
        if whole < columns:
            for i in range(columns - whole):
                rest[i] = data[start + whole + i]
            total = put_some(target, row, whole, columns - whole, e4m3(load_bytes(rest, 0)) * factor, total)
        close(target, row, total)
