"""Triton: rows of activations become 8-bit codes and a scale in one launch that reads them once.

int8 after the rotation of `rotation.py`, or e4m3 (from compute capability 8.9 on; a scale per row, or one that is
given). A row lies in the registers of one program as a whole: it is rotated, its largest magnitude found, and its codes
written. Matches `codecs.int8.quantize_rows` and `fp8.quantize`, rows with NaN or infinity included.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.codecs.int8 import TINY, TOP
from flux_quant.codecs.rotation import check_group
from flux_quant.kernels.fp8 import tensor_scale

LARGEST = tl.constexpr(448.0)
INT8_TOP = tl.constexpr(TOP)
SMALLEST = tl.constexpr(TINY)
INFINITY = tl.constexpr(0x7F800000)  # its bits in float32; NaNs have larger ones
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small float32 it leaves the rounded value in the low bits
LONGEST_ROW = 1 << 16
PER_THREAD = 32  # elements of a row, about
PIECES = (1, 3, 5)
SMALLEST_PIECE = 256


@triton.jit
def rotated(y, SIZE: tl.constexpr, GROUP: tl.constexpr):
    """y (SIZE,) float32, whole groups one after the other -> the same rotated."""
    for stage in tl.static_range(4):
        if (1 << 2 * stage) < GROUP:
            four = tl.reshape(y, (SIZE >> 2 * stage + 2, 4, 1 << 2 * stage))
            y = tl.reshape(tl.sum(four, axis=1)[:, None, :] * 0.5 - four, (SIZE,))
    return y


@triton.jit
def int8_codes(y):
    """float32 within +-127 -> int8, rounded half to even; without a conversion, which runs at a quarter of the rate."""
    return (y + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def e4m3_codes(y):
    """float32 -> float8_e4m3fn, NaN stays NaN."""
    return tl.clamp(y, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def quantize_kernel(
    x,
    codes,
    scales,
    stride,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """x (M, K) rows `stride` apart -> codes (M, K), scales (M,); with GIVEN scales () is read instead. A row is PARTS
    pieces of SIZE, the last of them filled up with zeros."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SIZE)
    pieces = ()
    highest = tl.zeros((SIZE,), tl.int32)
    for part in tl.static_range(PARTS):
        if PARTS * SIZE == K:
            piece = tl.load(x + row * stride + part * SIZE + k)
        else:
            piece = tl.load(x + row * stride + part * SIZE + k, mask=part * SIZE + k < K, other=0)
        y = rotated(piece.to(tl.float32), SIZE, GROUP)
        highest = tl.maximum(highest, y.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        pieces = pieces + (y,)
    top = LARGEST if FP8 else INT8_TOP
    if GIVEN:
        inverse = tl.div_rn(1.0, tl.load(scales))
    else:
        bits = tl.max(highest, axis=0)  # of integers: no NaN is lost
        largest = tl.maximum(bits.to(tl.float32, bitcast=True), SMALLEST)
        tl.store(scales + row, tl.where(bits < INFINITY, tl.div_rn(largest, top), float("nan")))
        inverse = tl.div_rn(top, largest)
    for part in tl.static_range(PARTS):
        y = pieces[part] * inverse
        code = e4m3_codes(y) if FP8 else int8_codes(y)
        if PARTS * SIZE == K:
            tl.store(codes + row * K + part * SIZE + k, code)
        else:
            tl.store(codes + row * K + part * SIZE + k, code, mask=part * SIZE + k < K)


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x (M, K) float -> codes of x R (M, K) int8, scale (M, 1) float32; R rotates groups of `group` channels."""
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return launch(x, torch.int8, scale, check_group(x.shape[1], group), given=False), scale


def quantize_fp8(x: Tensor, way: str, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (M, K) float -> codes (M, K) float8_e4m3fn, scale (M, 1) or () float32, by way; a given scale () is kept."""
    if way == "row":
        scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
        return launch(x, torch.float8_e4m3fn, scale, 1, given=False), scale
    scale = tensor_scale(x) if scale is None else scale
    return launch(x, torch.float8_e4m3fn, scale, 1, given=True), scale


def launch(x: Tensor, dtype: torch.dtype, scale: Tensor, group: int, given: bool) -> Tensor:
    rows, channels = x.shape
    if not 0 < channels <= LONGEST_ROW:
        raise ValueError(f"rows of {channels} channels; a program holds 1 to {LONGEST_ROW}")
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(rows, channels, dtype=dtype, device=x.device)
    parts, size = pieces_of(channels)
    if rows:
        quantize_kernel[(rows,)](
            x,
            codes,
            scale,
            x.stride(0),
            K=channels,
            SIZE=size,
            PARTS=parts,
            GROUP=group,
            FP8=dtype == torch.float8_e4m3fn,
            GIVEN=given,
            num_warps=warps_for(parts * size),
        )
    return codes


def pieces_of(channels: int) -> tuple[int, int]:
    """(3, 1024) for 3072: how many pieces of which power of two a row is cut into without a rest; else one with it."""
    for parts in PIECES:
        size = channels // parts
        if channels % parts == 0 and size == triton.next_power_of_2(size) >= SMALLEST_PIECE:
            return parts, size
    return 1, max(SMALLEST_PIECE, triton.next_power_of_2(channels))


def warps_for(elements: int) -> int:
    """The largest power of two that leaves every thread PER_THREAD elements or more; at least one, at most 32."""
    return min(32, triton.next_power_of_2(max(1, elements // (32 * PER_THREAD)) + 1) // 2)
