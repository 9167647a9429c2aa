"""What a packed weight consists of: one table, one row per format.

A format is the list of tensors that are stored for a weight, and the two functions between them and the weight. Sizes
follow from the parts, so nothing is stored twice. F32, F16 and BF16 are rows too: no caller asks "is it quantized?".

Blocks never cross rows. A fused `qkv` is therefore cut, and `to_q, to_k, to_v` joined, on the packed bytes.

A new format is two functions in `codecs/` and a row here; the tests walk this table. `FORMATS` are what files hold,
`IN_MEMORY` what exists only between loading and computing.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from flux_quant.codecs import fp8, int8, iq4, kquants, legacy, plain, planar
from flux_quant.codecs.choice import Choice
from flux_quant.codecs.rotation import group_for
from flux_quant.codecs.search import SEARCHES, choose, element_weights

Shape = tuple[int, ...]
SLICE = 1 << 20  # weights that are searched at a time: the working memory is some ten times that, in float32


@dataclass(frozen=True)
class Part:
    """One stored tensor of a weight: its name is the module's name, a dot, and `suffix`."""

    suffix: str
    dtype: torch.dtype
    shape: Callable[[Shape], Shape]  # the weight's shape -> the stored shape


@dataclass(frozen=True)
class QuantFormat:
    """A way to store a weight of shape (..., K). `pack` takes any float dtype, `unpack` gives float32.

    `search` is `pack` with scales searched for the lowest error, each column weighted with `importance` (K,) >= 0, the
    mean square of that input of the layer. Formats without a scale to search have none.
    """

    name: str
    block: int  # K must be a multiple of it
    parts: tuple[Part, ...]
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    unpack: Callable[..., Tensor]
    search: Callable[..., tuple[Tensor, ...]] | None = None  # (weight, importance=None) -> parts
    store: Callable[[Choice], Tensor] | None = None  # blocks as a search chose them -> (n, bytes)
    native: str = ""  # of planar rows: the name of the format in whose bytes they are written to files
    compute: str = "16-bit"  # what a linear layer multiplies: 16-bit (or 32-bit) floats, int8 or fp8
    base: str = ""  # of a format with 8-bit compute: the format that the first parts are in, without what compute adds

    def fits(self, shape: Shape) -> bool:
        return self.block == 1 or (len(shape) >= 2 and shape[-1] % self.block == 0)

    def nbytes(self, shape: Shape) -> int:
        return sum(prod(part.shape(shape)) * part.dtype.itemsize for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Of the first part alone: a scale per tensor does not count."""
        data = self.parts[0]
        return prod(data.shape((self.block,))) * data.dtype.itemsize * 8 / self.block

    @property
    def is_plain(self) -> bool:
        """Stored as ordinary floats that torch computes with."""
        return self.parts[0].dtype in (torch.float32, torch.float16, torch.bfloat16)

    def __reduce__(self) -> tuple[Callable[[str], "QuantFormat"], tuple[str]]:
        """Copied and pickled by name: copies of a module share the row, and its functions need not be picklable."""
        return format_named, (self.name,)


def format_named(name: str) -> QuantFormat:
    return FORMATS.get(name) or IN_MEMORY[name]


def same_shape(shape: Shape) -> Shape:
    return shape


def scalar_shape(shape: Shape) -> Shape:
    return ()


def column_shape(shape: Shape) -> Shape:
    return (shape[0], *(1 for _ in shape[1:]))


def rows_shape(shape: Shape) -> Shape:
    return shape[:1]


def bytes_per_row(block: int, nbytes: int, shape: Shape) -> Shape:
    return (*shape[:-1], shape[-1] // block * nbytes)


def plain_format(name: str, dtype: torch.dtype) -> QuantFormat:
    return QuantFormat(name, 1, (Part("weight", dtype, same_shape),), plain.pack_as(dtype), plain.unpack)


def block_format(
    name: str, block: int, nbytes: int, unpack: Callable, pack: Callable | None = None, store: Callable | None = None
) -> QuantFormat:
    """A GGUF layout from its functions on blocks: unpack (n, nbytes) uint8 -> (n, block) float32, pack the reverse.

    `store` writes a Choice of the search; without a `pack` of its own, the search without importance is `pack`.
    """

    def pack_rows(weight: Tensor) -> tuple[Tensor]:
        blocks = pack(weight.float().reshape(-1, block))
        return (blocks.view(bytes_per_row(block, nbytes, weight.shape)),)

    def unpack_rows(data: Tensor) -> Tensor:
        values = unpack(data.reshape(-1, nbytes)) if data.numel() else data.new_empty(0, dtype=torch.float32)
        return values.view(*data.shape[:-1], data.shape[-1] // nbytes * block)

    def search_rows(weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor]:
        rows, search = weight.reshape(-1, weight.shape[-1]), SEARCHES[name]
        data = weight.new_empty(bytes_per_row(block, nbytes, rows.shape), dtype=torch.uint8)
        step = max(1, SLICE // rows.shape[1])
        for values, target in zip(rows.split(step), data.split(step), strict=True):
            values = values.float().contiguous()
            weights = None if importance is None else element_weights(search, values, importance, block)
            target.copy_(store(choose(search, values.view(-1, block), weights)).view(target.shape))
        return (data.view(bytes_per_row(block, nbytes, weight.shape)),)

    part = Part("weight", torch.uint8, partial(bytes_per_row, block, nbytes))
    searched = search_rows if store else None
    return QuantFormat(name, block, (part,), pack_rows if pack else search_rows, unpack_rows, searched, store)


def planar_format(fmt: QuantFormat) -> QuantFormat:
    """A GGUF layout with its rows in planar order: the same bytes for a kernel, see `codecs.planar`."""

    def pack(weight: Tensor) -> tuple[Tensor]:
        return (planar.to_planar(fmt.name, fmt.pack(weight)[0]),)

    def unpack(data: Tensor) -> Tensor:
        return fmt.unpack(planar.to_native(fmt.name, data))

    return QuantFormat(f"{fmt.name} planar", fmt.block, fmt.parts, pack, unpack, native=fmt.name)


def pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) float -> codes (N, K) int8, rotated in groups as large as K allows, and scale (N,) float32."""
    codes, scale = int8.quantize_rows(weight, group_for(weight.shape[1]))
    return codes, scale[:, 0].clone()


def unpack_int8(codes: Tensor, scale: Tensor) -> Tensor:
    return int8.unpack_rows(codes, scale, group_for(codes.shape[1]))


def computed_in_int8(fmt: QuantFormat) -> QuantFormat:
    """A packed weight that is expanded to int8 rows when it is used: its parts, and the scales of those rows."""

    def pack(weight: Tensor) -> tuple[Tensor, ...]:
        parts = fmt.pack(weight)
        return *parts, pack_int8(fmt.unpack(*parts))[1]

    def unpack(*parts: Tensor) -> Tensor:
        return fmt.unpack(*parts[:-1])

    parts = (*fmt.parts, Part("int8_scale", torch.float32, rows_shape))
    name = f"{fmt.name} as int8"
    return QuantFormat(name, fmt.block, parts, pack, unpack, native=fmt.native, compute="int8", base=fmt.name)


def computed_in_fp8(fmt: QuantFormat) -> QuantFormat:
    return replace(fmt, name=f"{fmt.name} as fp8", compute="fp8", base=fmt.name)


FP8_DATA = Part("weight", torch.float8_e4m3fn, same_shape)
FP8_SCALE = Part("weight_scale", torch.float32, scalar_shape)
FP8_ROW_SCALE = Part("weight_scale", torch.float32, column_shape)
INT8_DATA = Part("weight", torch.int8, same_shape)
INT8_SCALE = Part("weight_scale", torch.float32, rows_shape)

FORMATS: dict[str, QuantFormat] = {
    fmt.name: fmt
    for fmt in (
        plain_format("f32", torch.float32),
        plain_format("f16", torch.float16),
        plain_format("bf16", torch.bfloat16),
        QuantFormat("fp8", 1, (FP8_DATA, FP8_SCALE), fp8.pack_scaled, fp8.unpack_scaled),
        QuantFormat("fp8_plain", 1, (FP8_DATA,), fp8.pack_unscaled, plain.unpack),
        block_format("q8_0", 32, 2 + 32, legacy.unpack_q8_0, legacy.pack_q8_0),
        block_format("q5_1", 32, 2 + 2 + 4 + 16, legacy.unpack_q5_1, legacy.pack_q5_1, legacy.store_q5_1),
        block_format("q5_0", 32, 2 + 4 + 16, legacy.unpack_q5_0, legacy.pack_q5_0, legacy.store_q5_0),
        block_format("q4_1", 32, 2 + 2 + 16, legacy.unpack_q4_1, legacy.pack_q4_1, legacy.store_q4_1),
        block_format("q4_0", 32, 2 + 16, legacy.unpack_q4_0, legacy.pack_q4_0, legacy.store_q4_0),
        block_format("q6_k", 256, 128 + 64 + 16 + 2, kquants.unpack_q6_k, store=kquants.store_q6_k),
        block_format("q5_k", 256, 2 + 2 + 12 + 32 + 128, kquants.unpack_q5_k, store=kquants.store_q5_k),
        block_format("q4_k", 256, 2 + 2 + 12 + 128, kquants.unpack_q4_k, store=kquants.store_q4_k),
        block_format("q3_k", 256, 32 + 64 + 12 + 2, kquants.unpack_q3_k, store=kquants.store_q3_k),
        block_format("q2_k", 256, 16 + 64 + 2 + 2, kquants.unpack_q2_k, store=kquants.store_q2_k),
        block_format("iq4_xs", 256, 2 + 2 + 4 + 128, iq4.unpack_iq4_xs, store=iq4.store_iq4_xs),
        block_format("iq4_nl", 32, 2 + 16, iq4.unpack_iq4_nl, store=iq4.store_iq4_nl),
    )
}

PLANAR = tuple(planar_format(FORMATS[name]) for name in planar.FIELDS)
FP8_ROWS = QuantFormat("fp8_rows", 1, (FP8_DATA, FP8_ROW_SCALE), fp8.pack_rows, fp8.unpack_scaled)
INT8_ROWS = QuantFormat("int8_rows", 1, (INT8_DATA, INT8_SCALE), pack_int8, unpack_int8, compute="int8")

IN_MEMORY: dict[str, QuantFormat] = {
    fmt.name: fmt
    for fmt in (
        *PLANAR,
        FP8_ROWS,
        INT8_ROWS,
        *(computed_in_int8(fmt) for fmt in (*FORMATS.values(), *PLANAR) if fmt.block > 1 and fmt.bits_per_weight < 8),
        *(computed_in_fp8(fmt) for fmt in (FORMATS["fp8"], FORMATS["fp8_plain"], FP8_ROWS)),
    )
}
