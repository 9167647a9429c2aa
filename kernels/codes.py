"""Bit work on the codes of weights in Triton, four to a register; their way to floats without conversion instructions.

A GPU converts integers to floats at an eighth of the rate at which it adds, and Triton works on single bytes. So a byte
goes into the mantissa of a power of two (`biased`), and the steps before that treat four bytes at once, in assembler.
Each has a twin in plain Triton, for its interpreter; `tests/test_codes.py` runs both.
"""

import triton
import triton.language as tl

PACKED = tl.constexpr(not triton.knobs.runtime.interpret)  # four codes in a register; the interpreter has no assembler
ONES = tl.constexpr(0x01010101)


@triton.jit
def shifted(codes, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """uint8 -> codes >> SHIFT & MASK."""
    if PACKED:
        asm: tl.constexpr = f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; and.b32 $0, t, {MASK * ONES}; }}"
        return tl.inline_asm_elementwise(asm, "=r,r", [codes], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return codes >> SHIFT & MASK


@triton.jit
def with_bit(codes, high, mask, BIT: tl.constexpr):
    """uint8 each, mask a power of two -> codes, and bit BIT where high has that of the mask."""
    if PACKED:
        asm: tl.constexpr = f"""{{ .reg .b32 t; and.b32 t, $2, $3; add.u32 t, t, {127 * ONES};
            shr.b32 t, t, {7 - BIT}; lop3.b32 $0, t, {ONES << BIT}, $1, 0xEA; }}"""
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [codes, high, mask], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return codes | ((high & mask) != 0).to(tl.uint8) << BIT


@triton.jit
def with_two_bits(codes, high, late, p: tl.constexpr):
    """uint8 each, late 0 or 255 -> codes, and in bits 4 and 5 those of high from 4 p on, or the next two where late."""
    if PACKED:
        shift: tl.constexpr = "shl.b32" if p == 0 else "shr.b32"
        asm: tl.constexpr = f"""{{ .reg .b32 s, t; {shift} s, $2, {4 - 4 * p}; {shift} t, $2, 2;
            lop3.b32 t, $3, t, s, 0xCA; lop3.b32 $0, t, {0x30 * ONES}, $1, 0xEA; }}"""
        return tl.inline_asm_elementwise(asm, "=r,r,r,r", [codes, high, late], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return codes | (high >> 4 * p + (late & 2) & 3) << 4


@triton.jit
def flipped(codes):
    """uint8: int8 codes plus 128."""
    if PACKED:
        asm: tl.constexpr = "xor.b32 $0, $1, 0x80808080;"
        return tl.inline_asm_elementwise(asm, "=r,r", [codes], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return codes ^ 128


@triton.jit
def biased(codes, R: tl.constexpr):
    """uint8 codes -> float32, `R.bias` more than the code: its bits put into the mantissa of that power of two. Faster
    than a conversion, which GPUs do at an eighth of the rate of additions."""
    if PACKED:
        if R.layout.bias == 128:
            asm: tl.constexpr = """prmt.b32 $0, $4, 0x43000000, 0x7054; prmt.b32 $1, $4, 0x43000000, 0x7154;
                prmt.b32 $2, $4, 0x43000000, 0x7254; prmt.b32 $3, $4, 0x43000000, 0x7354;"""
        else:
            asm: tl.constexpr = """prmt.b32 $0, $4, 0x47000000, 0x7504; prmt.b32 $1, $4, 0x47000000, 0x7514;
                prmt.b32 $2, $4, 0x47000000, 0x7524; prmt.b32 $3, $4, 0x47000000, 0x7534;"""
        return tl.inline_asm_elementwise(asm, "=r,=r,=r,=r,r", [codes], dtype=tl.float32, is_pure=True, pack=4)
    else:
        if R.layout.bias == 128:
            return (codes.to(tl.uint32) << 16 | 0x43000000).to(tl.float32, bitcast=True)
        else:
            return (codes.to(tl.uint32) << 8 | 0x47000000).to(tl.float32, bitcast=True)


@triton.jit
def as_float(codes, R: tl.constexpr):
    """uint8 codes -> float32 integers, those of `centre` being 0."""
    return biased(codes, R) - (R.layout.bias + R.layout.centre)


@triton.jit
def table_values(codes):
    """Codes 0-15 of IQ4 -> ggml's kvalues_iq4nl plus 128, uint8. The table lies in four words, a byte each."""
    if PACKED:  # a byte of two words is picked with three bits of a code, from those of both pairs with the fourth
        asm: tl.constexpr = """{ .reg .b32 s, t, low, high;
            shr.b32 t, $1, 4; or.b32 t, t, $1; prmt.b32 s, t, 0, 0x4420; and.b32 t, s, 0x7777;
            prmt.b32 low, 0x3F2D1801, 0x766A5D4F, t; prmt.b32 high, 0xA6998D81, 0xF1D9C5B5, t;
            shr.b32 t, s, 1; and.b32 t, t, 0x4444; or.b32 t, t, 0x3210; prmt.b32 $0, low, high, t; }"""
        return tl.inline_asm_elementwise(asm, "=r,r", [codes], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        first = tl.where((codes & 4) != 0, 0x766A5D4F, 0x3F2D1801)
        last = tl.where((codes & 4) != 0, 0xF1D9C5B5, 0xA6998D81)
        words = tl.where((codes & 8) != 0, last, first).to(tl.uint32)
        return (words >> (codes & 3).to(tl.uint32) * 8 & 0xFF).to(tl.uint8)


@triton.jit
def e4m3_in_halves(codes):
    """uint8 codes of float8_e4m3fn -> float16, 256 times smaller: exact, subnormals and NaN included. Integers only."""
    if PACKED:  # a code goes into the high byte of a half; f has bit 7 where a code is NaN
        asm: tl.constexpr = """{ .reg .b32 f, s, t, u;
            and.b32 f, $2, 0x7F7F7F7F; add.u32 f, f, 0x01010101;
            prmt.b32 s, $2, 0, 0x1404; and.b32 u, s, 0x80008000; shr.b32 s, s, 1; lop3.b32 u, s, 0x3F803F80, u, 0xEA;
            prmt.b32 t, f, 0, 0x1404; shr.b32 t, t, 1; lop3.b32 $0, t, 0x40004000, u, 0xEA;
            prmt.b32 s, $2, 0, 0x3424; and.b32 u, s, 0x80008000; shr.b32 s, s, 1; lop3.b32 u, s, 0x3F803F80, u, 0xEA;
            prmt.b32 t, f, 0, 0x3424; shr.b32 t, t, 1; lop3.b32 $1, t, 0x40004000, u, 0xEA; }"""
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        wide = codes.to(tl.uint16)
        nan = tl.where((wide & 0x7F) == 0x7F, 0x4000, 0).to(tl.uint16)
        return ((wide & 0x80) << 8 | (wide & 0x7F) << 7 | nan).to(tl.float16, bitcast=True)


@triton.jit
def e4m3(codes, NATIVE: tl.constexpr):
    """uint8 codes of float8_e4m3fn -> float32, NaN included. NATIVE: by the hardware, from sm_89 on."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return e4m3_in_halves(codes).to(tl.float32) * 256
