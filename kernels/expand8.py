"""Triton: a packed weight of a few bits becomes int8 codes for `int8.py`, rotated, in one launch.

For weights that stay packed in memory and are expanded into a scratch of one byte per weight whenever they are used.
The scales of the rows come from `int8_torch.weight_rows`, computed once. All planes of a block are unpacked by one
program and put in order in registers, because the rotation mixes them; matches `int8_torch.codes_for`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.codecs.rotation import check_group
from flux_quant.kernels.codes import as_float
from flux_quant.kernels.planes import Rows
from flux_quant.kernels.rows8 import int8_codes, rotated

WEIGHTS = 4096  # that a program expands, 32 per thread
WARPS = 4
MAX_OFFSET = 2**31  # offsets are computed in 32 bits


@triton.jit
def plane(base, block, live, inverse, p: tl.constexpr, R: tl.constexpr):
    """(x, plane_step) float32: the elements of plane p in runs of neighbours, over their row's scale."""
    codes, scale, low = R.layout.unpack(base, block, live, p, R.planar_blocks, R.wide)
    values = as_float(codes, R) * (scale * inverse[:, None])[:, :, None]
    if R.layout.affine:
        values += (low * inverse[:, None])[:, :, None]
    STEP: tl.constexpr = R.layout.plane_step if R.layout.planes > 1 else R.layout.width
    RUNS: tl.constexpr = live.shape[0] * R.layout.groups * R.layout.width // STEP
    return tl.reshape(values, (RUNS, STEP))


@triton.jit
def expand_kernel(
    weight,
    scales,
    out,
    first_row,
    blocks,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """`blocks` blocks from the start of `first_row` on -> int8 codes in out, one after the other."""
    TILE: tl.constexpr = SIZE // R.layout.block
    tile = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = tile < blocks
    row = first_row + tile // R.blocks
    base = weight + row * R.nbytes
    block = tile % R.blocks
    inverse = tl.div_rn(1.0, tl.load(scales + row, mask=live, other=1.0))
    y = plane(base, block, live, inverse, 0, R)
    if R.layout.planes == 2:
        y = tl.join(y, plane(base, block, live, inverse, 1, R)).permute(0, 2, 1)
    if R.layout.planes == 4:
        first = tl.join(y, plane(base, block, live, inverse, 1, R))
        last = tl.join(plane(base, block, live, inverse, 2, R), plane(base, block, live, inverse, 3, R))
        y = tl.join(first, last).permute(0, 3, 2, 1)
    y = rotated(tl.reshape(y, (SIZE,)), SIZE, GROUP)
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + offsets, int8_codes(y), mask=offsets < blocks * R.layout.block)


def expand(data: Tensor, rows: Rows, scale: Tensor, group: int, out: Tensor, first_row: int = 0) -> Tensor:
    """Rows `first_row` to `first_row + len(out)` of data (N, bytes of a row) uint8, scale (N,) float32 of all rows ->
    out (n, K) int8, contiguous, rotated in groups of `group`."""
    group = check_group(rows.columns, group)
    count = out.numel()
    if data.shape[1] != rows.nbytes or out.shape[1] != rows.columns or first_row + len(out) > len(data):
        raise ValueError(
            f"rows {first_row} to {first_row + len(out)} of {tuple(data.shape)} bytes ({rows.name}, {rows.columns} "
            f"columns in {rows.nbytes} bytes) do not fill {tuple(out.shape)}"
        )
    if scale.shape != data.shape[:1] or scale.dtype != torch.float32 or out.dtype != torch.int8:
        raise ValueError(f"float32 scales of {len(data)} rows and int8 codes, got {scale.dtype} {tuple(scale.shape)}")
    if max(data.numel(), count) >= MAX_OFFSET:
        raise ValueError(f"{data.numel()} bytes, {count} weights: at most {MAX_OFFSET - 1} at a time; cut the rows")
    if count:
        blocks = count // rows.layout.block
        expand_kernel[(triton.cdiv(count, WEIGHTS),)](
            data, scale, out, first_row, blocks, R=rows, GROUP=group, SIZE=WEIGHTS, num_warps=WARPS
        )
    return out
