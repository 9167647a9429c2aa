"""Triton: a linear layer on packed weights for one row of input, or few, on CUDA cores of any card.

Such a product is limited by reading the weights, on an H200 also by the instructions that unpack them. So nothing is
done per weight that can be done per group of 16: codes go into the sum as they are, and scale and offset follow:

    sum of w x = scale * (sum of biased codes x) + addend * (sum of x)     see `codes.biased`, `products.addend`

Each warp of a program takes other blocks of the same `bn` rows, so that x is converted once for all of them. Rows of x
go through two at a time: beyond two, tensor cores (`matmul`) do the work of sixteen for the price of these.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.kernels.codes import as_float, biased, e4m3
from flux_quant.kernels.planes import Rows
from flux_quant.kernels.products import (
    NATIVE_E4M3,
    addend,
    capability_of,
    checked_output,
    finished,
    joined,
    multiprocessors,
    parts_of,
    plane_columns,
    scales_of,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REACH = 256  # elements of K that a warp handles per step
MAX_SPLIT = 16
HEAVY = ("q5_1", "q6_k", "q5_k", "iq4_xs")  # formats that leave registers for two rows of x beside 16 of their own


@dataclass(frozen=True)
class Config:
    """The rows of the weight that a program handles, and its warps: each takes REACH elements of every row per step."""

    bn: int
    warps: int
    but: tuple[str, ...] = ()  # formats for which it has no registers left

    def blocks(self, rows: Rows) -> int:
        """Of a weight row, per step."""
        return REACH // rows.layout.block * self.warps


CONFIGS = (
    Config(16, 1),
    Config(16, 4),
    Config(32, 1),
    Config(32, 2),
    Config(32, 4, but=("q6_k",)),
    Config(64, 4, but=("q8_0", "q5_1", "q5_0", "iq4_nl", "q6_k", "iq4_xs", "fp8")),
)
NARROW = CONFIGS[1]  # for rows that are `narrow`, see Rows: their loads take many registers


@triton.jit
def per_run(values, RUNS: tl.constexpr):
    """(T, G) -> (T, G, RUNS)."""
    return tl.broadcast_to(values[:, :, None], (values.shape[0], values.shape[1], RUNS))


@triton.jit(do_not_specialize=["M"])
def vector_kernel(
    x,
    data,
    scale,
    bias,
    out,
    M,
    N,
    x_stride,
    out_stride,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    T: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    NATIVE: tl.constexpr,
    SCALES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """ROWS rows of x (M, K) from ROWS * program_id(2) on, times BN rows of weights -> out (M, N), or part program_id(1)
    of the sums -> out (SPLIT, M, N) float32."""
    SHIFTED: tl.constexpr = R.layout.bias == 128 and R.name != "fp8"  # larger ones cost digits: they go first
    SIDE: tl.constexpr = 16 if R.layout.block == 256 else 2 if R.layout.width == 32 else 4
    EACH: tl.constexpr = T // WARPS  # blocks that a warp takes of a row
    RUNS: tl.constexpr = R.layout.width // 16  # a thread has 16 elements of a group
    SUMS: tl.constexpr = EACH * R.layout.groups * RUNS  # that a warp keeps of a row
    PLANES: tl.constexpr = R.layout.planes
    STEPS: tl.constexpr = (R.blocks + T - 1) // T
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    EVEN: tl.constexpr = R.blocks == SHARE * SPLIT * T
    place = tl.arange(0, BN * T)  # (BN / SIDE, WARPS, SIDE, EACH), as threads get them
    row = place // (SIDE * T) * SIDE + place // EACH % SIDE
    own = place // (EACH * SIDE) % WARPS * EACH + place % EACH
    n_first = tl.program_id(0) * BN
    base = data + tl.minimum(n_first + row, N - 1) * R.nbytes
    m_first = tl.program_id(2) * ROWS
    totals = ()
    for _ in tl.static_range(ROWS):
        totals += (tl.zeros((BN // SIDE, WARPS, SIDE, SUMS), tl.float32),)
    for turn in range(SHARE):
        step = tl.program_id(1) * SHARE + turn
        block = step * T + own
        live = tl.full((BN * T,), True, tl.int1) if EVEN else block < R.blocks
        for p in tl.static_range(PLANES):
            codes, group_scale, low = R.layout.unpack(base, block, live, p, R.planar_blocks, R.wide)
            k = step * (T * R.layout.block) + plane_columns(p, R, T)
            values = e4m3(codes, NATIVE) if R.name == "fp8" else biased(codes, R) if SHIFTED else as_float(codes, R)
            values = values.reshape(BN // SIDE, WARPS, SIDE, SUMS, 16)
            offset = per_run(addend(group_scale, low, R), RUNS).reshape(BN // SIDE, WARPS, SIDE, SUMS)
            group_scale = per_run(group_scale, RUNS).reshape(BN // SIDE, WARPS, SIDE, SUMS)
            sums = ()
            for i in tl.static_range(ROWS):
                x_row = x + tl.minimum(m_first + i, M - 1).to(tl.int64) * x_stride
                right = tl.load(x_row + k) if EVEN else tl.load(x_row + k, mask=k < R.columns, other=0)
                right = right.to(tl.float32).reshape(WARPS, SUMS, 16)
                total = tl.sum(values * right[None, :, None, :, :], axis=4)
                if R.name != "fp8":
                    total *= group_scale
                if SHIFTED:
                    total += offset * tl.sum(right, axis=2)[None, :, None, :]
                sums += (totals[i] + total,)
            totals = sums
    n = n_first + tl.arange(0, BN)
    for i in tl.static_range(ROWS):
        m = m_first + i
        total = tl.sum(tl.sum(totals[i], axis=3), axis=1).reshape(BN)
        if SPLIT == 1:
            total = finished(total, scale, bias, n, n < N, SCALES, FACTOR)
            tl.store(out + m.to(tl.int64) * out_stride + n, total.to(out.dtype.element_ty), mask=(n < N) & (m < M))
        else:
            part = tl.program_id(1).to(tl.int64) * M + m
            tl.store(out + part * N + n, total, mask=(n < N) & (m < M))


def linear(
    x: Tensor,
    data: Tensor,
    rows: Rows,
    bias: Tensor | None = None,
    config: Config | None = None,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    split: int | None = None,
) -> Tensor:
    """x (M, K) float, rows any stride apart; data (N, bytes of a row) -> (M, N) in x's dtype. As `matmul.linear`."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; pass one of {', '.join(map(str, DTYPES))}")
    out = checked_output(x, data, rows, bias, scale, out)
    if not out.numel():
        return out
    (m, k), n, capability = x.shape, len(data), capability_of(x)
    config = config or (NARROW if rows.narrow else default_config(capability, rows.name, m, n, k))
    split = split or default_split(config, rows, m, n, multiprocessors(x))
    native = capability >= NATIVE_E4M3
    kind, _ = scales_of(rows, scale, n, native)
    place = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    at_once = 1 if m == 1 or rows.narrow else 2
    grid = (triton.cdiv(n, config.bn), split, triton.cdiv(m, at_once))
    vector_kernel[grid](
        x, data.view(torch.uint8), scale, bias, place, m, n, x.stride(0), out.stride(0),
        rows, at_once, config.bn, config.blocks(rows), config.warps, split, native, kind, 1.0, num_warps=config.warps,
    )  # fmt: skip
    return out if split == 1 else joined(place, scale, bias, out, kind, 1.0)


def candidates(capability: tuple[int, int], name: str, m: int, n: int, k: int) -> tuple[Config, ...]:
    """What is worth a try for x (M, K) and weights (N, K)."""
    most = 64 if m == 1 else 16 if name in HEAVY else 32
    return tuple(config for config in CONFIGS if config.bn <= most and name not in config.but)


def default_config(capability: tuple[int, int], name: str, m: int, n: int, k: int) -> Config:
    """For a card that nobody measured."""
    return candidates(capability, name, m, n, k)[-1]


def default_split(config: Config, rows: Rows, m: int, n: int, multiprocessors: int) -> int:
    """Parts along K. By registers, some twelve warps run on a multiprocessor."""
    programs = triton.cdiv(n, config.bn) * triton.cdiv(m, 2)
    places = multiprocessors * 12 // config.warps
    return parts_of(programs, places, triton.cdiv(rows.blocks, config.blocks(rows)), MAX_SPLIT)
