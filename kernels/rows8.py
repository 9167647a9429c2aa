"""Triton: rows of activations become 8-bit codes and a scale in one launch that reads them once.

int8 after the rotation of `rotation.py`, or e4m3 (from compute capability 8.9 on; a scale per row, or one that is
given). A row lies in the registers of one program as a whole: it is rotated, its largest magnitude found, and its codes
written. Matches `int8_torch.quantize_rows` and `fp8.quantize`, rows with NaN or infinity included.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.kernels.int8_torch import TINY, TOP
from flux_quant.kernels.rotation import check_group

LARGEST = tl.constexpr(448.0)
INT8_TOP = tl.constexpr(TOP)
SMALLEST = tl.constexpr(TINY)
INFINITY = tl.constexpr(0x7F800000)  # its bits in float32; NaNs have larger ones
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: added to a small float32 it leaves the rounded value in the low bits
LONGEST_ROW = 1 << 16
PER_THREAD = 32  # elements of a row


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
def quantize_kernel(
    x,
    codes,
    scales,
    K,
    stride,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """x (M, K) rows `stride` apart -> codes (M, K), scales (M,); with GIVEN scales () is read instead."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, SIZE)
    live = k < K
    y = rotated(tl.load(x + row * stride + k, mask=live, other=0).to(tl.float32), SIZE, GROUP)
    top = LARGEST if FP8 else INT8_TOP
    if GIVEN:
        inverse = tl.div_rn(1.0, tl.load(scales))
    else:
        bits = tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
        largest = tl.maximum(bits.to(tl.float32, bitcast=True), SMALLEST)
        tl.store(scales + row, tl.where(bits < INFINITY, tl.div_rn(largest, top), float("nan")))
        inverse = tl.div_rn(top, largest)
    y = y * inverse
    if FP8:
        tl.store(codes + row * K + k, tl.clamp(y, -LARGEST, LARGEST).to(tl.float8e4nv), mask=live)
    else:
        tl.store(codes + row * K + k, int8_codes(y), mask=live)


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x (M, K) float -> codes of x R (M, K) int8, scale (M, 1) float32; R rotates groups of `group` channels."""
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return launch(x, torch.int8, scale, check_group(x.shape[1], group), given=False), scale


def quantize_rows_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) float -> codes (M, K) float8_e4m3fn, scale (M, 1) float32."""
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    return launch(x, torch.float8_e4m3fn, scale, 1, given=False), scale


def cast_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x (M, K) float, scale () float32 -> x / scale, clamped to +-448, (M, K) float8_e4m3fn."""
    return launch(x, torch.float8_e4m3fn, scale, 1, given=True)


def launch(x: Tensor, dtype: torch.dtype, scale: Tensor, group: int, given: bool) -> Tensor:
    rows, channels = x.shape
    if not 0 < channels <= LONGEST_ROW:
        raise ValueError(f"rows of {channels} channels; a program holds 1 to {LONGEST_ROW}")
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(rows, channels, dtype=dtype, device=x.device)
    size = max(256, triton.next_power_of_2(channels))
    if rows:
        quantize_kernel[(rows,)](
            x,
            codes,
            scale,
            channels,
            x.stride(0),
            SIZE=size,
            GROUP=group,
            FP8=dtype == torch.float8_e4m3fn,
            GIVEN=given,
            num_warps=min(32, max(1, size // (32 * PER_THREAD))),
        )
    return codes
