"""A numba type of 16 float32 side by side, and what can be done with it.

LLVM turns `Lanes` into the vector registers of the processor (one of AVX-512, two of AVX, four of SSE or NEON), so that
vector code does not depend on whether a loop was recognized as such, and sums stay in registers. Arithmetic is by the
usual operators, lane by lane; memory is float32 arrays of one dimension, at any index.
"""

import operator
from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

WIDTH = 16
FLOAT, HALF, BYTE, WORD = ir.FloatType(), ir.IntType(16), ir.IntType(8), ir.IntType(32)
VECTOR = ir.VectorType(FLOAT, WIDTH)
POSITIONS = ir.VectorType(WORD, WIDTH)


class LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


Lanes = LanesType()


@register_model(LanesType)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: object, fe_type: LanesType) -> None:
        super().__init__(manager, fe_type, VECTOR)


def operate(function: Callable, instruction: str, kind: types.Type = Lanes) -> None:
    """Let the operator `function` on two Lanes, or two of another type of vectors, be an LLVM instruction."""

    @infer_global(function)
    class Typing(ConcreteTemplate):
        cases = (signature(kind, kind, kind),)

    @lower_builtin(function, kind, kind)
    def lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args)


for function, instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    operate(function, instruction)


def pointer(context, builder, array_type, array, index, kind):
    """The address of array[index], as one of `kind`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def constant(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * WIDTH)


def call(builder, name: str, *args):
    """An LLVM intrinsic on whole vectors."""
    kind = ir.FunctionType(VECTOR, [VECTOR] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{WIDTH}f32"), args)


@intrinsic
def load(typing, array, index):
    """array[index : index + 16] of float32."""

    def code(context, builder, sig, args):
        return builder.load(pointer(context, builder, sig.args[0], *args, VECTOR), align=4)

    return Lanes(array, types.intp), code


@intrinsic
def store(typing, array, index, value):
    def code(context, builder, sig, args):
        builder.store(args[2], pointer(context, builder, sig.args[0], *args[:2], VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), code


@intrinsic
def splat(typing, value):
    """The same float32 in all lanes."""

    def code(context, builder, sig, args):
        vector = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), args[0], ir.Constant(WORD, 0))
        return builder.shuffle_vector(vector, vector, ir.Constant(POSITIONS, [0] * WIDTH))

    return Lanes(types.float32), code


@intrinsic
def nearest(typing, value):
    """Rounded to integers, half to even."""
    return Lanes(Lanes), lambda context, builder, sig, args: call(builder, "llvm.rint", args[0])


@intrinsic
def floor(typing, value):
    return Lanes(Lanes), lambda context, builder, sig, args: call(builder, "llvm.floor", args[0])


@intrinsic
def magnitude(typing, value):
    return Lanes(Lanes), lambda context, builder, sig, args: call(builder, "llvm.fabs", args[0])


@intrinsic
def root(typing, value):
    return Lanes(Lanes), lambda context, builder, sig, args: call(builder, "llvm.sqrt", args[0])


@intrinsic
def if_less(typing, left, right, yes, no):
    """Per lane: yes where left < right, else no."""

    def code(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return Lanes(Lanes, Lanes, Lanes, Lanes), code


def staircase(lowest: float, steps: tuple[tuple[float, float], ...]) -> Callable:
    """A function of Lanes: `lowest`, and for each step (bound, rise) the rise where the value is above the bound."""

    @intrinsic
    def climb(typing, value):
        def code(context, builder, sig, args):
            out = constant(VECTOR, lowest)
            for bound, rise in steps:
                above = builder.fcmp_ordered(">", args[0], constant(VECTOR, bound))
                out = builder.fadd(out, builder.select(above, constant(VECTOR, rise), constant(VECTOR, 0.0)))
            return out

        return Lanes(Lanes), code

    return climb


def swapped(distance: int) -> Callable:
    """A function of Lanes: lane i takes the value of lane i ^ distance."""

    @intrinsic
    def swap(typing, value):
        def code(context, builder, sig, args):
            return builder.shuffle_vector(*args, *args, ir.Constant(POSITIONS, [i ^ distance for i in range(WIDTH)]))

        return Lanes(Lanes), code

    return swap


swap_8, swap_4, swap_2, swap_1 = (swapped(distance) for distance in (8, 4, 2, 1))


@intrinsic
def power_below(typing, value):
    """The greatest power of two up to a positive value, from 2**-100 to 2**126."""

    def code(context, builder, sig, args):
        bits = builder.and_(builder.bitcast(args[0], POSITIONS), constant(POSITIONS, 0xFF << 23))
        for sign, exponent in (("<", -100), (">", 126)):
            bound = constant(POSITIONS, 127 + exponent << 23)
            bits = builder.select(builder.icmp_unsigned(sign, bits, bound), bound, bits)
        return builder.bitcast(bits, VECTOR)

    return Lanes(Lanes), code


@intrinsic
def load_bfloat16(typing, array, index):
    """array[index : index + 16] of uint16 as float32."""

    def code(context, builder, sig, args):
        half = ir.VectorType(HALF, WIDTH)
        bits = builder.load(pointer(context, builder, sig.args[0], *args, half), align=2)
        bits = builder.shl(builder.zext(bits, POSITIONS), constant(POSITIONS, 16))
        return builder.bitcast(bits, VECTOR)

    return Lanes(array, types.intp), code


@intrinsic
def load_float16(typing, array, index):
    """array[index : index + 16] of uint16 as float32. Exponent and mantissa move, a product corrects the bias."""

    def code(context, builder, sig, args):
        half = ir.VectorType(HALF, WIDTH)
        bits = builder.load(pointer(context, builder, sig.args[0], *args, half), align=2)
        bits = builder.zext(bits, POSITIONS)
        size = builder.shl(builder.and_(bits, constant(POSITIONS, 0x7FFF)), constant(POSITIONS, 13))
        sign = builder.shl(builder.and_(bits, constant(POSITIONS, 0x8000)), constant(POSITIONS, 16))
        value = builder.bitcast(builder.or_(size, sign), VECTOR)
        return builder.fmul(value, constant(VECTOR, 2.0**112))

    return Lanes(array, types.intp), code


@intrinsic
def store_bytes(typing, array, index, value):
    """array[index : index + 16] of uint8 = lanes, which are integers of 0 to 255."""

    def code(context, builder, sig, args):
        codes = builder.trunc(builder.fptosi(args[2], POSITIONS), ir.VectorType(BYTE, WIDTH))
        address = pointer(context, builder, sig.args[0], *args[:2], codes.type)
        builder.store(codes, address, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, Lanes), code


@intrinsic
def transpose(typing, source, start, step, target, offset):
    """target[offset + 16 * j + i] = source[start + step * i + j] for i, j of 0 to 15: four rounds of interleaving."""

    def code(context, builder, sig, args):
        array, start, step, target, offset = args
        low = ir.Constant(POSITIONS, [i // 2 + WIDTH * (i % 2) for i in range(WIDTH)])
        high = ir.Constant(POSITIONS, [i // 2 + WIDTH * (i % 2) + WIDTH // 2 for i in range(WIDTH)])
        rows = []
        for i in range(WIDTH):
            at = builder.add(start, builder.mul(step, ir.Constant(step.type, i)))
            rows.append(builder.load(pointer(context, builder, sig.args[0], array, at, VECTOR), align=4))
        for _ in range(4):
            pairs = [(rows[i], rows[i + WIDTH // 2]) for i in range(WIDTH // 2)]
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in (low, high)]
        for i, row in enumerate(rows):
            at = builder.add(offset, ir.Constant(offset.type, WIDTH * i))
            builder.store(row, pointer(context, builder, sig.args[3], target, at, VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp), code
