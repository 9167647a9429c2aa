"""Triton: the int8 product with its scales and bias in one kernel, and the epilogue for accumulators of torch._int_mm.

Tensor cores from compute capability 8.0 on; upstream Triton has none for int8 below that, where `int8_torch.int_mm`
with `finish` is the way. The product is exact in int32 and so equal to torch._int_mm's bit for bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.kernels.int8_torch import check_operands, refuse

GROUP_M = 8  # tiles below each other whose programs follow one another: they share the columns of the weight in L2


@dataclass(frozen=True)
class Config:
    """A tile of the output (bm, bn), the step along K, and how a program runs."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    programs: int = 1  # on a multiprocessor, where they stay: see `int8_tma`

    @property
    def shared_bytes(self) -> int:
        """Of the tiles in flight."""
        return (self.bm + self.bn) * self.bk * self.stages


MMA = (  # mma.sync with at most 99 KB of shared memory: 8.6, 8.9, 12.0; 8.0 takes them too
    Config(128, 128, 128, 8, 3),
    Config(128, 256, 64, 8, 4),
    Config(128, 128, 64, 4, 4),
    Config(64, 256, 64, 4, 4),
    Config(64, 128, 128, 4, 4),
    Config(64, 64, 128, 4, 4),
    Config(32, 128, 128, 4, 4),
    Config(16, 128, 128, 4, 5),
)
CONFIGS = {  # lowest compute capability -> candidates, those for many rows first
    (8, 0): (Config(128, 256, 128, 8, 3), *MMA[:2], *MMA[3:]),  # 163 KB
    (8, 6): MMA,
    # wgmma, 227 KB. Triton 3.6 waits for every wgmma whose sums are not float32 (WGMMAPipeline.cpp, rule 2.1): tensor
    # cores rest between steps unless a second program on the multiprocessor has work for them. So small tiles first.
    (9, 0): (
        Config(128, 128, 128, 8, 3),
        Config(128, 128, 128, 4, 3),
        Config(128, 256, 128, 8, 4),
        Config(128, 128, 256, 8, 3),
        Config(64, 256, 128, 4, 3),
        Config(64, 128, 128, 4, 4),
        Config(64, 64, 256, 4, 4),
        Config(16, 128, 128, 4, 5),
    ),
    (10, 0): (Config(128, 256, 128, 8, 3), *MMA[:2], *MMA[3:]),
    (12, 0): MMA,
}


def configs_for(capability: tuple[int, int], rows: int) -> tuple[Config, ...]:
    """Candidates for `rows` rows: tiles that are not twice as high as the rows, or the lowest."""
    table = table_for(capability)
    lowest = min((config.bm for config in table), default=0)
    return tuple(config for config in table if config.bm < 2 * rows or config.bm == lowest)


def table_for(capability: tuple[int, int]) -> tuple[Config, ...]:
    """Tiles of the newest class of cards that is not newer; none below 8.0."""
    return CONFIGS[max(known)] if (known := [lowest for lowest in CONFIGS if lowest <= capability]) else ()


def configs_of(device: torch.device) -> tuple[Config, ...]:
    """All candidates of a device, by whose numbers `tables` knows them."""
    return table_for(torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0))


@triton.jit
def scaled(acc, a_scale, w_scale, bias, rows, columns, row_live, column_live, HAS_BIAS: tl.constexpr):
    """acc (BM, BN) int32 -> float32, times the scales of its rows and columns, plus the bias."""
    y = acc.to(tl.float32) * tl.load(a_scale + rows, mask=row_live, other=0)[:, None]
    y = y * tl.load(w_scale + columns, mask=column_live, other=0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=column_live, other=0).to(tl.float32)[None, :]
    return y


@triton.jit
def matmul_kernel(
    a,
    w,
    a_scale,
    w_scale,
    bias,
    out,
    M,
    N,
    a_stride,
    w_stride,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out (M, N) = a (M, K) int8 times w (N, K) int8 transposed, scaled. Rows are `a_stride`, `w_stride` apart."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    first_m = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    within = program % (GROUP * tiles_n)
    rows = (first_m + within % height) * BM + tl.arange(0, BM)
    columns = within // height * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    # Rows beyond the end read the last one again: no mask in the loop, and what they give is not stored.
    a_pointers = a + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * a_stride + k[None, :]
    w_pointers = w + tl.minimum(columns, N - 1).to(tl.int64)[None, :] * w_stride + k[:, None]
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K, BK):
        if K % BK == 0:
            a_tile, w_tile = tl.load(a_pointers), tl.load(w_pointers)
        else:
            left = K - start
            a_tile = tl.load(a_pointers, mask=k[None, :] < left, other=0)
            w_tile = tl.load(w_pointers, mask=k[:, None] < left, other=0)
        acc = tl.dot(a_tile, w_tile, acc, out_dtype=tl.int32)
        a_pointers += BK
        w_pointers += BK
    row_live, column_live = rows < M, columns < N
    y = scaled(acc, a_scale, w_scale, bias, rows, columns, row_live, column_live, HAS_BIAS)
    pointers = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(pointers, y.to(out.dtype.element_ty), mask=row_live[:, None] & column_live[None, :])


def int8_matmul(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """a (M, K) int8, its scale (M, 1), w (N, K) int8, its scale (N,), bias (N,) -> (M, N) in `dtype`.

    Without a config the first candidate for this device and number of rows.
    """
    check_operands(a, a_scale, w, w_scale, bias)
    (rows, channels), columns = a.shape, w.shape[0]
    on_cpu = a.device.type == "cpu"  # in the interpreter, which takes anything
    capability = (8, 0) if on_cpu else torch.cuda.get_device_capability(a.device)
    refuse("triton", capability, rows, columns, channels)
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    if not out.numel():
        return out
    config = config or configs_for(capability, rows)[0]
    a, w = (tensor if tensor.stride(1) == 1 else tensor.contiguous() for tensor in (a, w))
    matmul_kernel[(triton.cdiv(rows, config.bm) * triton.cdiv(columns, config.bn),)](
        a,
        w,
        a_scale,
        w_scale,
        bias,
        out,
        rows,
        columns,
        a.stride(0),
        w.stride(0),
        K=channels,
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        GROUP=GROUP_M,
        HAS_BIAS=bias is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


@triton.jit
def finish_kernel(
    acc,
    a_scale,
    w_scale,
    bias,
    out,
    M,
    N,
    acc_stride,
    out_stride,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row_live, column_live = rows < M, columns < N
    live = row_live[:, None] & column_live[None, :]
    wide = rows.to(tl.int64)[:, None]
    sums = tl.load(acc + wide * acc_stride + columns[None, :], mask=live, other=0)
    y = scaled(sums, a_scale, w_scale, bias, rows, columns, row_live, column_live, HAS_BIAS)
    tl.store(out + wide * out_stride + columns[None, :], y.to(out.dtype.element_ty), mask=live)


def finish(acc: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (M, N) = acc (M, N) int32 * a_scale (M, 1) * w_scale (N,) + bias (N,), for `int8_torch.int_mm`."""
    rows, columns = acc.shape
    bm, bn = 16, 256
    if out.numel():
        finish_kernel[(triton.cdiv(rows, bm), triton.cdiv(columns, bn))](
            acc,
            a_scale,
            w_scale,
            bias,
            out,
            rows,
            columns,
            acc.stride(0),
            out.stride(0),
            BM=bm,
            BN=bn,
            HAS_BIAS=bias is not None,
            num_warps=4,
        )
