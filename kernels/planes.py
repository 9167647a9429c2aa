"""How each format's bytes become codes, scales and minimums in a Triton kernel: what all our kernels share.

A block is unpacked plane by plane. A plane is what one nibble (or two bits, or whole byte) position of the stored codes
holds: loading the bytes once gives every plane of them by a shift. Within a plane the elements come in G groups of W
neighbours that share a scale, so a kernel sees, for T blocks,

    codes (T, G, W) uint8; scale (T, G) float32; low (T, G) float32
    value = scale * (codes - centre) + low     (`low` only where the layout is `affine`, else it is not to be added)

and group g of plane p starts at element `plane_step * p + outer * (g // inner_groups) + inner * (g % inner_groups)` of
the block. Values are those of `codecs`, bit for bit in float32, if the compiler does not contract a * b + c.

Two byte orders: native blocks, as in a file, and `planar` rows (see `flux_quant.codecs.planar`), in which the fields of
all blocks of a row lie together, the largest first, so that codes can be loaded 16 bytes at a time whatever the size of
a block. `WIDE` says that four-byte fields are aligned to four bytes.
"""

from dataclasses import dataclass
from functools import cached_property

import triton
import triton.language as tl

from flux_quant.codecs import planar
from flux_quant.kernels.codes import flipped, shifted, table_values, with_bit, with_two_bits


@dataclass(frozen=True)
class Layout:
    """The shape of a format's planes; `unpack` is the device function, see `q8_0` for its arguments."""

    unpack: triton.runtime.JITFunction
    block: int  # elements
    nbytes: int  # of a block
    planes: int
    groups: int  # of a plane
    width: int  # of a group
    centre: int = 0  # the code that means zero
    affine: bool = False
    plane_step: int = 0
    outer: int = 0
    inner: int = 0
    inner_groups: int = 1
    words: bool = False  # four-byte fields of native blocks are aligned: so is the length of a block

    @property
    def bias(self) -> int:
        """The power of two in whose float32 mantissa a code finds room: see `biased`."""
        return 128 if self.centre < 128 else 32768


@dataclass(frozen=True)
class Rows:
    """Rows of `columns` weights in a layout: what a kernel takes as one constant."""

    name: str
    columns: int
    planar: bool = False

    @property
    def layout(self) -> Layout:
        return FP8 if self.name == "fp8" else LAYOUTS[self.name]

    @property
    def blocks(self) -> int:
        return self.columns // self.layout.block

    @property
    def nbytes(self) -> int:
        return self.blocks * self.layout.nbytes

    @property
    def planar_blocks(self) -> int:
        """The PLANAR of the device functions."""
        return self.blocks if self.planar else 0

    @property
    def narrow(self) -> bool:
        """Whether codes are loaded two or four bytes at a time, because blocks are native and not aligned."""
        return not self.planar and self.name in planar.FIELDS

    @property
    def wide(self) -> bool:
        return self.nbytes % 4 == 0 if self.planar else self.layout.words

    @cached_property
    def cache_key(self) -> str:
        """By which Triton tells whether a compiled kernel is still good: everything above and the code of `unpack`."""
        return f"{self}{self.layout}{self.layout.unpack.cache_key}"


@triton.jit
def first_elements(p: tl.constexpr, R: tl.constexpr):
    """(G,) the element of a block at which each group of plane p starts."""
    g = tl.arange(0, R.layout.groups)
    inside = R.layout.inner * (g % R.layout.inner_groups)
    return R.layout.plane_step * p + R.layout.outer * (g // R.layout.inner_groups) + inside


@triton.jit
def field(
    base,
    block,
    NATIVE: tl.constexpr,
    BYTES: tl.constexpr,
    BEFORE: tl.constexpr,
    SIZE: tl.constexpr,
    PLANAR: tl.constexpr,
):
    """Pointers (T,) to a field of SIZE bytes: at byte NATIVE of a block of BYTES, or after BEFORE bytes per block."""
    if PLANAR:
        return base + (PLANAR * BEFORE + block * SIZE)
    else:
        return base + (block * BYTES + NATIVE)


@triton.jit
def bytes_of(pointers, live, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """(T, GROUPS, WIDTH) uint8: the GROUPS * WIDTH bytes from each pointer on. Loaded in pieces
    of 32, which DRAM and caches give at least: two threads of 16 bytes, the others have other blocks."""
    PIECE: tl.constexpr = 32 if GROUPS * WIDTH > 32 else GROUPS * WIDTH
    PIECES: tl.constexpr = GROUPS * WIDTH // PIECE
    offsets = tl.arange(0, PIECES)[None, :, None] * PIECE + tl.arange(0, PIECE)[None, None, :]
    pieces = tl.load(pointers[:, None, None] + offsets, mask=live[:, None, None], other=0)
    return pieces.reshape(pointers.shape[0], GROUPS, WIDTH)


@triton.jit
def repeated(values, TIMES: tl.constexpr):
    """(T, G, 1, W) -> (T, G, TIMES, W)."""
    return tl.broadcast_to(values, values.shape[0], values.shape[1], TIMES, values.shape[3])


@triton.jit
def half(pointers, live):
    """(T,) float32 from the float16 at each pointer, which is aligned to two bytes."""
    return tl.load(pointers.to(tl.pointer_type(tl.float16)), mask=live, other=0).to(tl.float32)


@triton.jit
def word(pointers, live, WIDE: tl.constexpr):
    """uint32 at each pointer; without WIDE the pointers are aligned to two bytes only."""
    if WIDE:
        return tl.load(pointers.to(tl.pointer_type(tl.uint32)), mask=live, other=0)
    else:
        halves = pointers.to(tl.pointer_type(tl.uint16))
        low = tl.load(halves, mask=live, other=0).to(tl.uint32)
        return low | tl.load(halves + 1, mask=live, other=0).to(tl.uint32) << 16


@triton.jit
def low_half(words):
    """float32 of the float16 in the low half of uint32."""
    return (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(words):
    return (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def column(values):
    """(T,) -> (T, 1)."""
    return values[:, None]


@triton.jit
def q8_0(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    """base (T,) pointers to the first byte of a row, block (T,) its number in the row, live (T,) whether to read it,
    p the plane, PLANAR the blocks of a row, or 0 where blocks are native -> codes, scale, low."""
    codes = bytes_of(field(base, block, 2, 34, 0, 32, PLANAR), live, 1, 32)
    d = half(field(base, block, 0, 34, 32, 2, PLANAR), live)
    return flipped(codes), column(d), column(d)


@triton.jit
def q4_0(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    codes = shifted(bytes_of(field(base, block, 2, 18, 0, 16, PLANAR), live, 1, 16), 4 * p, 15)
    d = half(field(base, block, 0, 18, 16, 2, PLANAR), live)
    return codes, column(d), column(d)


@triton.jit
def q4_1(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    codes = shifted(bytes_of(field(base, block, 4, 20, 0, 16, PLANAR), live, 1, 16), 4 * p, 15)
    dm = word(field(base, block, 0, 20, 16, 4, PLANAR), live, WIDE)
    return codes, column(low_half(dm)), column(high_half(dm))


@triton.jit
def with_fifth_bit(codes, words, p: tl.constexpr):
    """codes (T, 1, 16) uint8, and bit 4 from bits 16 p to 16 p + 15 of each word (T,)."""
    element = tl.arange(0, 16)[None, None, :]
    eight = (words[:, None, None] >> (element >> 3) * 8 + 16 * p).to(tl.uint8)
    return with_bit(codes, eight, like(codes, 1 << (element & 7)), 4)


@triton.jit
def like(codes, values):
    """Integers as uint8 in the shape of codes."""
    return tl.broadcast_to(values.to(tl.uint8), codes.shape)


@triton.jit
def q5_0(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    codes = shifted(bytes_of(field(base, block, 6, 22, 0, 16, PLANAR), live, 1, 16), 4 * p, 15)
    high = word(field(base, block, 2, 22, 16, 4, PLANAR), live, WIDE)
    d = half(field(base, block, 0, 22, 20, 2, PLANAR), live)
    return with_fifth_bit(codes, high, p), column(d), column(d)


@triton.jit
def q5_1(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    codes = shifted(bytes_of(field(base, block, 8, 24, 0, 16, PLANAR), live, 1, 16), 4 * p, 15)
    high = word(field(base, block, 4, 24, 16, 4, PLANAR), live, WIDE)
    dm = word(field(base, block, 0, 24, 20, 4, PLANAR), live, WIDE)
    return with_fifth_bit(codes, high, p), column(low_half(dm)), column(high_half(dm))


@triton.jit
def six_bits(low, four, g):
    """Number g (0-7) of eight six-bit integers: of the first four the low six bits of the bytes of `low`; of the others
    four bits in `four` and two at the top of the bytes of `low`. All (T, 1) uint32 but g (1, G)."""
    shift = (g & 3) * 8
    late = (four >> shift & 15) | (low >> shift + 6 & 3) << 4
    return tl.where(g < 4, low >> shift & 63, late).to(tl.float32)


@triton.jit
def scales_and_minimums(base, block, live, BYTES: tl.constexpr, p: tl.constexpr):
    """scale and low (T, 4) of the groups p, 2 + p, 4 + p, 6 + p of Q4_K and Q5_K, from the block's first 16 bytes."""
    head = base + block * BYTES
    dm = word(head, live, True)
    scales = word(head + 4, live, True)[:, None]
    mins = word(head + 8, live, True)[:, None]
    four = word(head + 12, live, True)[:, None]
    g = tl.arange(0, 4)[None, :] * 2 + p
    scale = column(low_half(dm)) * six_bits(scales, four, g)
    return scale, -(column(high_half(dm)) * six_bits(mins, four >> 4, g))


@triton.jit
def q4_k(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    codes = shifted(bytes_of(field(base, block, 16, 144, 16, 128, PLANAR), live, 4, 32), 4 * p, 15)
    scale, low = scales_and_minimums(base, block, live, 144, p)
    return codes, scale, low


@triton.jit
def q5_k(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    codes = shifted(bytes_of(field(base, block, 48, 176, 0, 128, PLANAR), live, 4, 32), 4 * p, 15)
    high = bytes_of(field(base, block, 16, 176, 0, 32, PLANAR), live, 1, 32)
    bit = 1 << tl.arange(0, 4)[None, :, None] * 2 + p
    scale, low = scales_and_minimums(base, block, live, 176, p)
    return with_bit(codes, like(codes, high), like(codes, bit), 4), scale, low


@triton.jit
def signed_byte(words, shift):
    """The byte of uint32 `words` at bit `shift`, sign-extended, float32."""
    return ((words >> shift & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - (2**23 + 128)


@triton.jit
def q6_k(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    """Group g = 4 n + 2 h + s: half n of the block, 32 elements h of the half, 16 elements s of these."""
    g = tl.arange(0, 8)[None, :]
    codes = shifted(bytes_of(field(base, block, 0, 210, 0, 128, PLANAR), live, 8, 16), 4 * p, 15)
    high = bytes_of(field(base, block, 128, 210, 128, 64, PLANAR), live, 2, 32)
    high = repeated(high[:, :, None, :], 2).reshape(codes.shape)
    late = tl.where((g & 2) != 0, 255, 0)[:, :, None]
    scales = field(base, block, 192, 210, 192, 16, PLANAR)[:, None] + ((g >> 2) * 8 + 4 * p)
    d = half(field(base, block, 208, 210, 208, 2, PLANAR), live)
    scale = column(d) * signed_byte(word(scales, live[:, None], WIDE), (g & 3) * 8)
    return with_two_bits(codes, high, like(codes, late), p), scale, scale


@triton.jit
def q3_k(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    """Group g = 2 n + s: half n of the block, 16 elements s of plane p's 32."""
    g = tl.arange(0, 4)[None, :]
    codes = shifted(bytes_of(field(base, block, 32, 110, 0, 64, PLANAR), live, 4, 16), 2 * p, 3)
    high = bytes_of(field(base, block, 0, 110, 64, 32, PLANAR), live, 1, 32)
    high = repeated(high[:, :, None, :], 2).reshape(codes.shape)
    bit = tl.where(g < 2, 1 << p, 16 << p)[:, :, None]
    packed = field(base, block, 96, 110, 96, 12, PLANAR)
    shift = (2 * (p % 2) + (g & 1)) * 8
    low = word(packed + 4 * (p // 2), live, WIDE)[:, None] >> shift + (g >> 1) * 4 & 15
    top = word(packed + 8, live, WIDE)[:, None] >> shift + (g >> 1) * 4 + 2 * (p // 2) & 3
    d = half(field(base, block, 108, 110, 108, 2, PLANAR), live)
    scale = column(d) * ((low | top << 4).to(tl.float32) - 32)
    return with_bit(codes, high, like(codes, bit), 2), scale, scale


@triton.jit
def q2_k(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    """Groups as in Q3_K."""
    g = tl.arange(0, 4)[None, :]
    codes = shifted(bytes_of(field(base, block, 16, 84, 0, 64, PLANAR), live, 4, 16), 2 * p, 3)
    pairs = field(base, block, 0, 84, 64, 16, PLANAR)[:, None] + ((g >> 1) * 8 + 4 * (p // 2))
    pair = word(pairs, live[:, None], WIDE) >> (2 * (p % 2) + (g & 1)) * 8
    dm = word(field(base, block, 80, 84, 80, 4, PLANAR), live, WIDE)
    scale = column(low_half(dm)) * (pair & 15).to(tl.float32)
    return codes, scale, -(column(high_half(dm)) * (pair >> 4 & 15).to(tl.float32))


@triton.jit
def iq4_nl(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    codes = shifted(bytes_of(field(base, block, 2, 18, 0, 16, PLANAR), live, 1, 16), 4 * p, 15)
    d = half(field(base, block, 0, 18, 16, 2, PLANAR), live)
    return table_values(codes), column(d), column(d)


@triton.jit
def iq4_xs(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    g = tl.arange(0, 8)[None, :]
    codes = shifted(bytes_of(field(base, block, 8, 136, 0, 128, PLANAR), live, 8, 16), 4 * p, 15)
    head = field(base, block, 0, 136, 0, 8, PLANAR)
    first = word(head, live, True)
    low = word(head + 4, live, True)[:, None] >> 4 * g & 15
    high = first[:, None] >> 16 + 2 * g & 3
    scale = column(low_half(first)) * ((low | high << 4).to(tl.float32) - 32)
    return table_values(codes), scale, scale


@triton.jit
def fp8(base, block, live, p: tl.constexpr, PLANAR: tl.constexpr, WIDE: tl.constexpr):
    """Codes are those of float8_e4m3fn, for `e4m3`; scale and low mean nothing."""
    zero = column(tl.zeros_like(block).to(tl.float32))
    return bytes_of(base + block * 32, live, 1, 32), zero, zero


FP8 = Layout(fp8, 32, 32, planes=1, groups=1, width=32)  # not of LAYOUTS: its codes are floats, its scale is elsewhere
LAYOUTS = {
    "q8_0": Layout(q8_0, 32, 34, planes=1, groups=1, width=32, centre=128),
    "q5_1": Layout(q5_1, 32, 24, planes=2, groups=1, width=16, affine=True, plane_step=16, words=True),
    "q5_0": Layout(q5_0, 32, 22, planes=2, groups=1, width=16, centre=16, plane_step=16),
    "q4_1": Layout(q4_1, 32, 20, planes=2, groups=1, width=16, affine=True, plane_step=16, words=True),
    "q4_0": Layout(q4_0, 32, 18, planes=2, groups=1, width=16, centre=8, plane_step=16),
    "iq4_nl": Layout(iq4_nl, 32, 18, planes=2, groups=1, width=16, centre=128, plane_step=16),
    "q6_k": Layout(
        q6_k, 256, 210, planes=2, groups=8, width=16, centre=32, plane_step=64, outer=128, inner=16, inner_groups=4
    ),
    "q5_k": Layout(
        q5_k, 256, 176, planes=2, groups=4, width=32, affine=True, plane_step=32, outer=64, words=True
    ),
    "q4_k": Layout(
        q4_k, 256, 144, planes=2, groups=4, width=32, affine=True, plane_step=32, outer=64, words=True
    ),
    "q3_k": Layout(
        q3_k, 256, 110, planes=4, groups=4, width=16, centre=4, plane_step=32, outer=128, inner=16, inner_groups=2
    ),
    "q2_k": Layout(
        q2_k, 256, 84, planes=4, groups=4, width=16, affine=True, plane_step=32, outer=128, inner=16, inner_groups=2,
        words=True,
    ),
    "iq4_xs": Layout(
        iq4_xs, 256, 136, planes=2, groups=8, width=16, centre=128, plane_step=16, outer=32, words=True
    ),
}  # fmt: skip
