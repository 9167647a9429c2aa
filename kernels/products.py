"""What `matmul` and `vector` share: checked operands, facts about the card, and what follows the sum over K.

Split along K, programs leave float32 sums in a workspace and a second kernel adds them in order: no atomics, the same
bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.kernels.planes import Rows

MAX_OFFSET = 2**31  # bytes of a weight: offsets into it are computed in 32 bits
NATIVE_E4M3 = (8, 9)  # from this compute capability on the hardware converts FP8
MULTIPROCESSORS = {(8, 0): 108, (8, 6): 28, (8, 9): 46, (9, 0): 132, (12, 0): 70}  # where no device can be asked
ADDED = 1024  # outputs that a program of `add_parts` finishes
WRITING, ADDING = 1.5, 2  # in steps along K; from the bytes of a tile's sums and of a step, not measured


@triton.jit
def plane_columns(p: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """(T * groups * width,) where the elements of plane p of T blocks lie in these blocks."""
    GROUPS: tl.constexpr = R.layout.groups
    WIDTH: tl.constexpr = R.layout.width
    k = tl.arange(0, T * GROUPS * WIDTH)
    group = k // WIDTH % GROUPS
    inside = R.layout.outer * (group // R.layout.inner_groups) + R.layout.inner * (group % R.layout.inner_groups)
    return k // (GROUPS * WIDTH) * R.layout.block + R.layout.plane_step * p + inside + k % WIDTH


@triton.jit
def addend(scale, low, R: tl.constexpr):
    """(T, G) float32: a weight is its `biased` code * scale + this.

    Rounded at 2**-24 of bias * scale, which puts weights off by 2**-17 of a scale at most (codes of 8 bits: 2**-9), far
    less than rounding to 16 bits does. `dequant` subtracts the bias first and is exact."""
    if R.layout.affine:
        return low - (R.layout.bias + R.layout.centre) * scale
    else:
        return -(R.layout.bias + R.layout.centre) * scale


@triton.jit
def finished(y, scale, bias, n, live, SCALES: tl.constexpr, FACTOR: tl.constexpr):
    """y float32 with columns n -> times scale and FACTOR, plus bias. SCALES: 0 none, 1 of the tensor, 2 per column."""
    if SCALES == 1:
        y *= tl.load(scale)
    if SCALES == 2:
        y *= tl.load(scale + n, mask=live, other=0)
    if FACTOR != 1:
        y *= FACTOR
    if bias is not None:
        y += tl.load(bias + n, mask=live, other=0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M"])
def add_parts(
    parts,
    scale,
    bias,
    out,
    M,
    N,
    out_stride,
    SPLIT: tl.constexpr,
    SCALES: tl.constexpr,
    FACTOR: tl.constexpr,
    TILE: tl.constexpr,
):
    """parts (SPLIT, M, N) float32, added in this order -> out (M, N)."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = n < N
    total = tl.load(parts + m * N + n, mask=live, other=0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + (part * M + m) * N + n, mask=live, other=0)
    total = finished(total, scale, bias, n, live, SCALES, FACTOR)
    tl.store(out + m * out_stride + n, total.to(out.dtype.element_ty), mask=live)


def joined(parts: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, kind: int, factor: float) -> Tensor:
    """Launch `add_parts`: parts (SPLIT, M, N) float32 -> out (M, N)."""
    split, m, n = parts.shape
    grid = (triton.cdiv(n, ADDED), m)
    add_parts[grid](parts, scale, bias, out, m, n, out.stride(0), split, kind, factor, ADDED)
    return out


def checked_output(
    x: Tensor, data: Tensor, rows: Rows, bias: Tensor | None, scale: Tensor | None, out: Tensor | None
) -> Tensor:
    """The output (M, N) in x's dtype, `out` if given. ValueError or TypeError if the operands do not fit each other."""
    m, n = x.shape[0], data.shape[0]
    if x.ndim != 2 or x.shape[1] != rows.columns or rows.columns % rows.layout.block:
        raise ValueError(
            f"x {tuple(x.shape)} does not go with rows of {rows.columns} {rows.name} weights in blocks of "
            f"{rows.layout.block}; pass (M, {rows.columns})"
        )
    if data.ndim != 2 or data.shape[1] != rows.nbytes or data.element_size() != 1 or not data.is_contiguous():
        raise ValueError(
            f"data {tuple(data.shape)} {data.dtype} does not hold contiguous rows of {rows.nbytes} bytes, "
            f"{rows.columns} {rows.name} weights each"
        )
    if n * rows.nbytes >= MAX_OFFSET:
        raise ValueError(f"{n * rows.nbytes} bytes of weight are beyond 32-bit offsets; cut it by rows")
    if x.stride(1) != 1 and x.numel():
        raise ValueError(f"columns of x are {x.stride(1)} elements apart; make it contiguous")
    if bias is not None and (bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"bias {tuple(bias.shape)} is not ({n},), contiguous")
    if scale is not None and (rows.name != "fp8" or scale.numel() not in (1, n) or scale.dtype != torch.float32):
        raise ValueError(f"{scale.numel()} scales, {scale.dtype}: fp8 has 1 or {n}, float32; {rows.name} is given none")
    out = x.new_empty(m, n) if out is None else out
    if out.shape != (m, n) or out.dtype != x.dtype or (out.stride(1) != 1 and out.numel()):
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} is not ({m}, {n}) {x.dtype} with neighbouring columns")
    return out


def scales_of(rows: Rows, scale: Tensor | None, n: int, native: bool) -> tuple[int, float]:
    """SCALES and FACTOR for `finished`: without hardware, FP8 weights are 256 times too small in the product."""
    kind = 0 if scale is None else 2 if scale.numel() == n != 1 else 1
    return kind, 256.0 if rows.name == "fp8" and not native else 1.0


def capability_of(x: Tensor) -> tuple[int, int]:
    """Of x's device; (8, 0) for the interpreter on the CPU."""
    return (8, 0) if x.is_cpu else torch.cuda.get_device_capability(x.device)


def multiprocessors(x: Tensor) -> int:
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    capability = capability_of(x)
    return MULTIPROCESSORS[max((known for known in MULTIPROCESSORS if known <= capability), default=(8, 6))]


def parts_of(programs: int, places: int, steps: int, most: int) -> int:
    """Into how many equal parts, `most` at most, to cut `steps` steps along K where `places` programs run at a time: as
    few steps as can be after each other, with WRITING for every part of a sum and ADDING for the kernel that adds."""

    def duration(parts: int) -> float:
        rounds = -(-programs * parts // places)
        return rounds * (steps // parts + (WRITING if parts > 1 else 0)) + (ADDING if parts > 1 else 0)

    return min((parts for parts in range(1, min(most, steps) + 1) if steps % parts == 0), key=duration)
