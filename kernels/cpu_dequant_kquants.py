"""Unpack super-blocks of 256 weights (Q2_K to Q6_K, IQ4_XS): the loops of `codecs.kquants` and `iq4`.

Arguments and order of operations as in `cpu_dequant_legacy`. The integer scales of a super-block are put side by side
in one vector and multiplied with d there; each group then takes its lane.
"""

import numpy as np

from flux_quant.kernels.cpu_batch import ZERO, F, exact
from flux_quant.kernels.cpu_dequant_lanes import (
    field,
    fields_of,
    half_at,
    halves,
    lane,
    load_bytes,
    pair,
    raised,
    signed,
    unsigned,
    word_at,
)
from flux_quant.kernels.cpu_dequant_legacy import iq4_value
from flux_quant.kernels.cpu_dequant_targets import close, put
from flux_quant.kernels.cpu_lanes import splat

FOUR, SHIFT = F(4), F(32)
U = np.uint64
TWO_BITS, FOUR_BITS, HIGH_TWO, SIX_BITS = U(0x03030303), U(0x0F0F0F0F), U(0x30303030), U(0x3F3F3F3F)
TWO, WORD = U(2), U(32)


@exact
def q2_k(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 84 * (row * blocks + block), 256 * block
            packed = load_bytes(data, p)
            scales = half_at(data, p + 80) * unsigned(field(packed, 0, 15))
            mins = half_at(data, p + 82) * unsigned(field(packed, 4, 15))
            for group in range(16):
                half, quarter, side = group // 8, group // 2 % 4, group % 2
                codes = field(load_bytes(data, p + 16 + 32 * half + 16 * side), 2 * quarter, 3)
                total = put(
                    target, row, o + 16 * group, lane(scales, group) * unsigned(codes) - lane(mins, group), total
                )
        close(target, row, total)


@exact
def q3_k(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 110 * (row * blocks + block), 256 * block
            first_low, second_low, high = word_at(data, p + 96), word_at(data, p + 100), word_at(data, p + 104)
            low = first_low | second_low << WORD
            low = field(pair(low, low >> U(4)), 0, 15)
            top = pair(
                high & TWO_BITS | (high >> TWO & TWO_BITS) << WORD,
                high >> U(4) & TWO_BITS | (high >> U(6) & TWO_BITS) << WORD,
            )
            scales = half_at(data, p + 108) * (unsigned(low | raised(top, 4)) - splat(SHIFT))
            for group in range(16):
                half, quarter, side = group // 8, group // 2 % 4, group % 2
                low = field(load_bytes(data, p + 32 + 32 * half + 16 * side), 2 * quarter, 3)
                high = field(load_bytes(data, p + 16 * side), group // 2, 1)
                codes = unsigned(low | raised(high, 2)) - splat(FOUR)
                total = put(target, row, o + 16 * group, lane(scales, group) * codes, total)
        close(target, row, total)


@exact
def scales_and_mins(data, p):
    """d * scales in lanes 0 to 7, dmin * mins in lanes 8 to 15, of Q4_K or Q5_K from byte p on."""
    first, second, low = word_at(data, p + 4), word_at(data, p + 8), word_at(data, p + 12)
    scales = first & SIX_BITS | (low & FOUR_BITS | first >> TWO & HIGH_TWO) << WORD
    mins = second & SIX_BITS | (low >> U(4) & FOUR_BITS | second >> TWO & HIGH_TWO) << WORD
    return halves(half_at(data, p), half_at(data, p + 2)) * unsigned(pair(scales, mins))


@exact
def q4_k(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 144 * (row * blocks + block), 256 * block
            scales = scales_and_mins(data, p)
            for group in range(8):
                scale, low = lane(scales, group), lane(scales, 8 + group)
                for side in range(0, 32, 16):
                    codes = field(load_bytes(data, p + 16 + 32 * (group // 2) + side), 4 * (group % 2), 15)
                    total = put(target, row, o + 32 * group + side, scale * unsigned(codes) - low, total)
        close(target, row, total)


@exact
def q5_k(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 176 * (row * blocks + block), 256 * block
            scales = scales_and_mins(data, p)
            for group in range(8):
                scale, low = lane(scales, group), lane(scales, 8 + group)
                for side in range(0, 32, 16):
                    codes = field(load_bytes(data, p + 48 + 32 * (group // 2) + side), 4 * (group % 2), 15)
                    fifth = field(load_bytes(data, p + 16 + side), group, 1)
                    total = put(
                        target, row, o + 32 * group + side, scale * unsigned(codes | raised(fifth, 4)) - low, total
                    )
        close(target, row, total)


@exact
def q6_k(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 210 * (row * blocks + block), 256 * block
            scales = half_at(data, p + 208) * signed(load_bytes(data, p + 192))
            for group in range(16):
                half, quarter, side = group // 8, group // 2 % 4, group % 4
                low = field(load_bytes(data, p + 64 * half + 16 * side), 4 * (quarter // 2), 15)
                high = field(load_bytes(data, p + 128 + 32 * half + 16 * (group % 2)), 2 * quarter, 3)
                codes = unsigned(low | raised(high, 4)) - splat(SHIFT)
                total = put(target, row, o + 16 * group, lane(scales, group) * codes, total)
        close(target, row, total)


@exact
def iq4_xs(data, target, first, last, blocks):
    for row in range(first, last):
        total = splat(ZERO)
        for block in range(blocks):
            p, o = 136 * (row * blocks + block), 256 * block
            low, high = fields_of(word_at(data, p + 4), 4, 15), fields_of(word_at(data, p) >> U(16), 2, 3)
            scales = half_at(data, p) * (unsigned(low | raised(high, 4)) - splat(SHIFT))
            for group in range(8):
                scale, codes = lane(scales, group), load_bytes(data, p + 8 + 16 * group)
                total = put(target, row, o + 32 * group, scale * iq4_value(field(codes, 0, 15)), total)
                total = put(target, row, o + 32 * group + 16, scale * iq4_value(field(codes, 4, 15)), total)
        close(target, row, total)
