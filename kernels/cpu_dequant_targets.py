"""What becomes of unpacked weights, sixteen at a time: stored in 32 or 16 bits, or multiplied at once.

A target says which: (out, K, row) stores them, its `row` first in `out`, rounded to nearest even where `out` has 16
bits (uint16 is bfloat16, int16 is float16); (x, y) multiplies each row with x (K) into y (N). Loops call `put` for
every sixteen weights of a row, pass on the total that it returns, and `close` the row with it.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from flux_quant.kernels.cpu_lanes import (
    HALF,
    POSITIONS,
    VECTOR,
    WIDTH,
    WORD,
    Lanes,
    constant,
    load,
    pointer,
    store,
)

HALVES = ir.VectorType(HALF, WIDTH)


def rounded(builder, bits, dropped: int):
    """32-bit patterns without their lowest bits, to nearest, half to even."""
    odd = builder.and_(builder.lshr(bits, constant(POSITIONS, dropped)), constant(POSITIONS, 1))
    bits = builder.add(builder.add(bits, constant(POSITIONS, (1 << dropped - 1) - 1)), odd)
    return builder.lshr(bits, constant(POSITIONS, dropped))


def as_bfloat16(builder, value):
    """Infinities stay; NaN stays one as its lowest bits are clear, which `half_at` and `e4m3` see to."""
    return rounded(builder, builder.bitcast(value, POSITIONS), 16)


def as_float16(builder, value):
    bits = builder.bitcast(value, POSITIONS)
    size = builder.and_(bits, constant(POSITIONS, 0x7FFFFFFF))
    normal = rounded(builder, builder.sub(size, constant(POSITIONS, 112 << 23)), 13)
    half = constant(VECTOR, 0.5)  # steps of float32 at 0.5 are float16's subnormals
    small = builder.bitcast(builder.fadd(builder.bitcast(size, VECTOR), half), POSITIONS)
    small = builder.sub(small, constant(POSITIONS, 126 << 23))
    out = builder.select(builder.icmp_unsigned("<", size, constant(POSITIONS, 113 << 23)), small, normal)
    infinite = builder.icmp_unsigned(">=", size, constant(POSITIONS, 0x477FF000))  # 65520 and more
    out = builder.select(infinite, constant(POSITIONS, 0x7C00), out)
    out = builder.select(
        builder.icmp_unsigned(">", size, constant(POSITIONS, 0x7F800000)), constant(POSITIONS, 0x7E00), out
    )
    return builder.or_(out, builder.lshr(builder.and_(bits, constant(POSITIONS, 1 << 31)), constant(POSITIONS, 16)))


@intrinsic
def write(typing, array, index, value):
    """array[index : index + 16] = value, in the dtype of the array: float32, uint16 for bfloat16, int16 for float16."""
    convert = {types.float32: None, types.uint16: as_bfloat16, types.int16: as_float16}[array.dtype]

    def code(context, builder, sig, args):
        array, index, value = args
        if convert:
            value = builder.trunc(convert(builder, value), HALVES)
        align = 2 if convert else 4
        builder.store(value, pointer(context, builder, sig.args[0], array, index, value.type), align=align)
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), code


@intrinsic
def plus_product(typing, total, x, index, value):
    """total + x[index : index + 16] * value, rounded once where the processor can."""

    def code(context, builder, sig, args):
        total, x, index, value = args
        kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{WIDTH}f32")
        factor = builder.load(pointer(context, builder, sig.args[1], x, index, VECTOR), align=4)
        return builder.call(function, (factor, value, total))

    return Lanes(Lanes, x, types.intp, Lanes), code


@intrinsic
def sum_of(typing, total):
    """The lanes added up, neighbours first."""

    def code(context, builder, sig, args):
        (total,) = args
        for distance in (1, 2, 4, 8):
            other = ir.Constant(POSITIONS, [i ^ distance for i in range(WIDTH)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, other))
        return builder.extract_element(total, ir.Constant(WORD, 0))

    return types.float32(Lanes), code


def put(target, row: int, column: int, value, total):
    """Sixteen weights of a row from `column` on -> the total of the row so far."""


def put_some(target, row: int, column: int, count: int, value, total):
    """Only the first `count` of them."""


def close(target, row: int, total) -> None:
    """The row is complete."""


@overload(put)
def put_for(target, row, column, value, total):
    if len(target) == 2:
        return lambda target, row, column, value, total: plus_product(total, target[0], column, value)

    def keep(target, row, column, value, total):
        write(target[0], (row - target[2]) * target[1] + column, value)
        return total

    return keep


@overload(put_some)
def put_some_for(target, row, column, count, value, total):
    kind = target[0].dtype

    def multiply(target, row, column, count, value, total):
        weights, factors = np.empty(WIDTH, kind), np.zeros(WIDTH, kind)
        store(weights, 0, value)
        weights[count:] = 0
        factors[:count] = target[0][column : column + count]
        return plus_product(total, factors, 0, load(weights, 0))

    def copy(target, row, column, count, value, total):
        weights, start = np.empty(WIDTH, kind), (row - target[2]) * target[1] + column
        write(weights, 0, value)
        target[0][start : start + count] = weights[:count]
        return total

    return multiply if len(target) == 2 else copy


@overload(close)
def close_for(target, row, total):
    if len(target) == 3:
        return lambda target, row, total: None

    def finish(target, row, total):
        target[1][row] = sum_of(total)

    return finish
