"""Triton: the int8 product for Hopper, its tiles fetched by the copy engine (TMA), programs that stay.

As many programs as find room at once compute one tile after the other, so that the first tiles of the next product are
on their way while the last one is scaled and stored; addresses are the copy engine's work. The same result as
`int8.int8_matmul`, bit for bit up to the compiler's contraction of the bias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flux_quant.kernels.int8 import GROUP_M, Config, scaled
from flux_quant.kernels.int8_torch import check_operands, refuse

CONFIGS = (
    Config(128, 128, 128, 4, 3, programs=2),
    Config(128, 256, 128, 8, 3),
    Config(128, 256, 128, 8, 4),
    Config(256, 128, 128, 8, 3),
)


@triton.jit
def persistent_kernel(
    a,
    w,
    a_scale,
    w_scale,
    bias,
    out,
    M,
    N,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TURNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """out (M, N) = a (M, K) int8 times w (N, K) int8 transposed, scaled; a and w are descriptors with zeros outside."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for turn in tl.range(0, TURNS, flatten=True):
        # Programs without a tile in the last turn repeat the last tile: they store the same values once more.
        tile = tl.minimum(tl.program_id(0) + turn * tl.num_programs(0), tiles_m * tiles_n - 1)
        first_m = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first_m, GROUP)
        within = tile % (GROUP * tiles_n)
        row, column = (first_m + within % height) * BM, within // height * BN
        acc = tl.zeros((BM, BN), dtype=tl.int32)
        for k in range(0, K, BK):
            acc = tl.dot(a.load([row, k]), w.load([column, k]).T, acc, out_dtype=tl.int32)
        rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
        row_live, column_live = rows < M, columns < N
        y = scaled(acc, a_scale, w_scale, bias, rows, columns, row_live, column_live, HAS_BIAS)
        pointers = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(pointers, y.to(out.dtype.element_ty), mask=row_live[:, None] & column_live[None, :])


def int8_matmul_tma(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    config: Config = CONFIGS[0],
    programs: int | None = None,
) -> Tensor:
    """As `int8.int8_matmul`, on compute capability 9.0; `programs`: as many as find room at once if not given."""
    check_operands(a, a_scale, w, w_scale, bias)
    (rows, channels), columns = a.shape, w.shape[0]
    on_cpu = a.device.type == "cpu"  # in the interpreter, which takes anything
    capability = (9, 0) if on_cpu else torch.cuda.get_device_capability(a.device)
    refuse("tma", capability, rows, columns, channels)
    out = torch.empty(rows, columns, dtype=dtype, device=a.device)
    if not out.numel():
        return out
    if programs is None:
        programs = torch.cuda.get_device_properties(a.device).multi_processor_count * config.programs
    tiles = triton.cdiv(rows, config.bm) * triton.cdiv(columns, config.bn)
    persistent_kernel[(min(programs, tiles),)](
        descriptor(a, config.bm, config.bk),
        descriptor(w, config.bn, config.bk),
        a_scale,
        w_scale,
        bias,
        out,
        rows,
        columns,
        K=channels,
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        GROUP=GROUP_M,
        TURNS=triton.cdiv(tiles, programs),
        HAS_BIAS=bias is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def descriptor(tensor: Tensor, height: int, width: int) -> TensorDescriptor:
    """Of rows that lie a multiple of 16 bytes apart from an address divisible by 16: a copy where they do not."""
    if tensor.stride(1) != 1 or tensor.stride(0) % 16 or tensor.data_ptr() % 16:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(tensor, [height, width])
