"""Triton kernels that unpack a weight, or some of its rows, into a dense tensor. No policy: see `dispatch`.

Memory-bound by design: each program unpacks whole blocks in float32, with 16-byte loads where the byte order allows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.kernels.codes import as_float, e4m3
from flux_quant.kernels.planes import Rows, first_elements

WEIGHTS = 8192  # that a program unpacks
WARPS = 4
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_OFFSET = 2**31  # offsets are computed in 32 bits


@triton.jit
def dequantize_blocks(weight, out, first_row, blocks, R: tl.constexpr, TILE: tl.constexpr):
    """`blocks` blocks from the start of `first_row` on -> out, one after the other."""
    tile = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = tile < blocks
    base = weight + (first_row + tile // R.blocks) * R.nbytes
    block = tile % R.blocks
    PLANES: tl.constexpr = R.layout.planes
    for p in tl.static_range(PLANES):
        codes, scale, low = R.layout.unpack(base, block, live, p, R.planar_blocks, R.wide)
        values = as_float(codes, R) * scale[:, :, None]
        if R.layout.affine:
            values += low[:, :, None]
        element = first_elements(p, R)[None, :, None] + tl.arange(0, R.layout.width)[None, None, :]
        offsets = tile[:, None, None] * R.layout.block + element
        tl.store(out + offsets, values.to(out.dtype.element_ty), mask=live[:, None, None])


@triton.jit
def dequantize_fp8(
    weight,
    scale,
    out,
    first,
    count,
    COLUMNS: tl.constexpr,
    SCALES: tl.constexpr,
    NATIVE: tl.constexpr,
    TILE: tl.constexpr,
):
    """`count` elements from element `first` on -> out. SCALES: 0 none, 1 one for the tensor, 2 one per row."""
    offsets = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = offsets < count
    values = e4m3(tl.load(weight + (first + offsets), mask=live, other=0), NATIVE)
    if SCALES == 1:
        values *= tl.load(scale)
    if SCALES == 2:
        values *= tl.load(scale + (first + offsets) // COLUMNS, mask=live, other=0)
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=live)


def blocks_to_dense(data: Tensor, rows: Rows, out: Tensor, first_row: int = 0) -> Tensor:
    """Rows `first_row` to `first_row + len(out)` of data (N, bytes of a row) uint8 -> out (n, K), contiguous."""
    blocks = out.shape[0] * rows.blocks
    tile = WEIGHTS // rows.layout.block
    if blocks:
        grid = (triton.cdiv(blocks, tile),)
        dequantize_blocks[grid](data, out, first_row, blocks, rows, tile, num_warps=WARPS, enable_fp_fusion=False)
    return out


def fp8_to_dense(data: Tensor, scale: Tensor | None, out: Tensor, first_row: int = 0, native: bool = False) -> Tensor:
    """The same for data (N, K) float8_e4m3fn, scale () or (N, 1). `native`: the device converts e4m3, from sm_89 on."""
    count, columns = out.numel(), out.shape[-1]
    if count:
        kind = 0 if scale is None else 2 if scale.numel() == data.shape[0] != 1 else 1
        codes = data.view(torch.uint8)  # Triton takes no pointer to e4m3 below sm_89, not even one it never reads
        place = codes, codes if scale is None else scale.view(-1), out, first_row * columns, count
        grid = (triton.cdiv(count, WEIGHTS),)
        dequantize_fp8[grid](*place, columns, kind, native, WEIGHTS, num_warps=WARPS)
    return out
