"""Sixteen packed weights at a time: bytes in, float32 `Lanes` out.

As in `cpu_lanes`, vector code is written out and not left to LLVM's luck with loops over bytes. `Bytes` are 16 bytes
side by side, from any address. Words are little-endian, as on all machines that numba compiles for but s390x.
"""

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from flux_quant.kernels.cpu_lanes import (
    BYTE,
    FLOAT,
    HALF,
    POSITIONS,
    VECTOR,
    WIDTH,
    WORD,
    Lanes,
    constant,
    operate,
    pointer,
)

DOUBLES = ir.VectorType(HALF, WIDTH // 2)
LONG, BIT = ir.IntType(64), ir.IntType(1)
VALUES = ir.VectorType(BYTE, WIDTH)
BITS = ir.VectorType(BIT, WIDTH)
LONGS = ir.VectorType(LONG, 2)


class BytesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Bytes")


Bytes = BytesType()


@register_model(BytesType)
class BytesModel(models.PrimitiveModel):
    def __init__(self, manager: object, fe_type: BytesType) -> None:
        super().__init__(manager, fe_type, VALUES)


operate(operator.or_, "or_", Bytes)


def splatted(builder, value, kind: ir.VectorType):
    """A scalar in all lanes of a vector of its type, or of narrower integers."""
    if value.type != kind.element:
        value = builder.trunc(value, kind.element)
    vector = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(WORD, 0))
    zeros = ir.Constant(ir.VectorType(WORD, kind.count), [0] * kind.count)
    return builder.shuffle_vector(vector, vector, zeros)


@intrinsic
def load_bytes(typing, array, index):
    """array[index : index + 16] of uint8."""

    def code(context, builder, sig, args):
        return builder.load(pointer(context, builder, sig.args[0], *args, VALUES), align=1)

    return Bytes(array, types.intp), code


@intrinsic
def pair(typing, low, high):
    """Two uint64 as 16 bytes, the lowest first."""

    def code(context, builder, sig, args):
        words = ir.Constant(LONGS, ir.Undefined)
        for i, word in enumerate(args):
            words = builder.insert_element(words, word, ir.Constant(WORD, i))
        return builder.bitcast(words, VALUES)

    return Bytes(types.uint64, types.uint64), code


@intrinsic
def field(typing, data, shift, mask):
    """data >> shift & mask, byte by byte; the mask is what 8 - shift bits hold at most."""

    def code(context, builder, sig, args):
        data, shift, mask = args  # bits that cross into the next byte are masked away
        words = builder.lshr(builder.bitcast(data, DOUBLES), splatted(builder, shift, DOUBLES))
        return builder.and_(builder.bitcast(words, VALUES), splatted(builder, mask, VALUES))

    return Bytes(Bytes, types.intp, types.intp), code


@intrinsic
def raised(typing, data, shift):
    """data << shift, byte by byte, for bytes below 1 << 8 - shift."""

    def code(context, builder, sig, args):
        words = builder.shl(builder.bitcast(args[0], DOUBLES), splatted(builder, args[1], DOUBLES))
        return builder.bitcast(words, VALUES)

    return Bytes(Bytes, types.intp), code


@intrinsic
def spread_bits(typing, array, index, value):
    """`value` in byte i where bit i of the two bytes from array[index] on is set, else 0."""

    def code(context, builder, sig, args):
        array, index, value = args
        word = builder.load(pointer(context, builder, sig.args[0], array, index, HALF), align=1)
        chosen = builder.bitcast(word, BITS)
        return builder.select(chosen, splatted(builder, value, VALUES), constant(VALUES, 0))

    return Bytes(array, types.intp, types.intp), code


@intrinsic
def unsigned(typing, data):
    """Bytes as float32."""

    def code(context, builder, sig, args):
        return builder.sitofp(builder.zext(args[0], POSITIONS), VECTOR)

    return Lanes(Bytes), code


@intrinsic
def signed(typing, data):
    """Bytes as float32, those above 127 negative."""

    def code(context, builder, sig, args):
        return builder.sitofp(builder.sext(args[0], POSITIONS), VECTOR)

    return Lanes(Bytes), code


def table_of(entries: tuple[int, ...]):
    """A function of Bytes 0 to 15: the signed entry of each, as float32. Bit by bit, half of the entries drop out."""

    @intrinsic
    def look_up(typing, codes):
        def code(context, builder, sig, args):
            left = [constant(VALUES, entry) for entry in entries]
            bit = 1
            while len(left) > 1:
                set_bit = builder.and_(args[0], constant(VALUES, bit))
                chosen = builder.icmp_signed("!=", set_bit, constant(VALUES, 0))
                left = [builder.select(chosen, odd, even) for even, odd in zip(left[::2], left[1::2], strict=True)]
                bit <<= 1
            return builder.sitofp(builder.sext(left[0], POSITIONS), VECTOR)

        return Lanes(Bytes), code

    return look_up


@intrinsic
def e4m3(typing, data):
    """FP8 e4m3fn -> float32: the exponent moves by 120, below the normal numbers the leading 1 is taken off again."""

    def code(context, builder, sig, args):
        bits = builder.zext(args[0], POSITIONS)
        size = builder.and_(bits, constant(POSITIONS, 0x7F))
        small = builder.icmp_unsigned("<", size, constant(POSITIONS, 8))
        bias = builder.select(small, constant(POSITIONS, 121 << 23), constant(POSITIONS, 120 << 23))
        value = builder.bitcast(builder.add(builder.shl(size, constant(POSITIONS, 20)), bias), VECTOR)
        value = builder.fsub(value, builder.select(small, constant(VECTOR, 2.0**-6), constant(VECTOR, 0.0)))
        nan = builder.icmp_unsigned("==", size, constant(POSITIONS, 0x7F))
        value = builder.select(nan, constant(VECTOR, float("nan")), value)
        sign = builder.shl(builder.and_(bits, constant(POSITIONS, 0x80)), constant(POSITIONS, 24))
        return builder.bitcast(builder.or_(builder.bitcast(value, POSITIONS), sign), VECTOR)

    return Lanes(Bytes), code


@intrinsic
def word_at(typing, array, index):
    """The 32 bits from array[index] on."""

    def code(context, builder, sig, args):
        word = builder.load(pointer(context, builder, sig.args[0], *args, WORD), align=1)
        return builder.zext(word, LONG)

    return types.uint64(array, types.intp), code


@intrinsic
def half_at(typing, array, index):
    """The float16 in the two bytes from array[index] on, in all lanes. Every NaN becomes the same quiet one."""

    def code(context, builder, sig, args):
        half = builder.load(pointer(context, builder, sig.args[0], *args, HALF), align=1)
        bits = builder.zext(half, WORD)
        size = builder.and_(bits, WORD(0x7FFF))
        normal = builder.add(builder.shl(size, WORD(13)), WORD(112 << 23))
        small = builder.bitcast(builder.fmul(builder.uitofp(size, FLOAT), FLOAT(2.0**-24)), WORD)
        value = builder.select(builder.icmp_unsigned("<", size, WORD(1 << 10)), small, normal)
        value = builder.select(builder.icmp_unsigned("==", size, WORD(0x7C00)), WORD(0x7F800000), value)
        value = builder.or_(value, builder.shl(builder.and_(bits, WORD(0x8000)), WORD(16)))
        value = builder.select(builder.icmp_unsigned(">", size, WORD(0x7C00)), WORD(0x7FC00000), value)
        return splatted(builder, builder.bitcast(value, FLOAT), VECTOR)

    return Lanes(array, types.intp), code


@intrinsic
def lane(typing, values, index):
    """Lane `index` in all lanes."""

    def code(context, builder, sig, args):
        return splatted(builder, builder.extract_element(args[0], args[1]), VECTOR)

    return Lanes(Lanes, types.intp), code


@intrinsic
def halves(typing, low, high):
    """Lanes 0 to 7 of one, 8 to 15 of the other."""

    def code(context, builder, sig, args):
        places = ir.Constant(POSITIONS, [*range(8), *range(24, 32)])
        return builder.shuffle_vector(*args, places)

    return Lanes(Lanes, Lanes), code


@intrinsic
def fields_of(typing, word, width, mask):
    """(word >> width * lane) & mask in lanes 0 to 7 as bytes; the others are 0."""

    def code(context, builder, sig, args):
        word, width, mask = args
        places = builder.mul(splatted(builder, width, POSITIONS), ir.Constant(POSITIONS, [i % 8 for i in range(WIDTH)]))
        bits = builder.lshr(splatted(builder, word, POSITIONS), places)
        return builder.trunc(builder.and_(bits, splatted(builder, mask, POSITIONS)), VALUES)

    return Bytes(types.uint64, types.intp, types.intp), code
