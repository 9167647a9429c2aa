"""Triton: a linear layer on packed weights in one kernel with tensor cores, for ten to some hundred rows of input.

Each program takes a tile of the output. Per step it unpacks a few blocks of `bn` weight rows in registers, once, and
multiplies plane by plane: the elements of a plane lie in runs of 16 or 32 neighbours, so the same runs of x are loaded
and nothing has to be interleaved. Scales are applied in float32 before a weight is rounded to x's dtype. What a step
costs in instructions per weight, and which forms were tried: `docs/log.md`.

Tensor cores from compute capability 8.0 on; upstream Triton has none below, where two passes with cuBLAS are the way.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_quant.kernels.codes import PACKED, biased, e4m3, e4m3_in_halves
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

DTYPES = (torch.float16, torch.bfloat16)
OLDEST = (8, 0)
GROUP_M = 8  # tiles below each other whose programs follow one another: they share the weights in L2
MAX_SPLIT = 8
SHARED = {(8, 0): 163, (8, 6): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}  # KiB that a program can have
KIB = 1024
WGMMA, MMA_SYNC = "wgmma", "mma.sync"  # what Triton multiplies 16-bit tiles with, on Hopper and elsewhere
BYTES = ("q8_0", "fp8")
LEGACY = ("q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
K_QUANTS = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "iq4_xs")  # blocks of 256


@dataclass(frozen=True)
class Config:
    """A tile of the output (bm, bn), the elements of K per step (a block at least), and how a program runs."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    only: str = ""  # WGMMA or MMA_SYNC, if the other one leaves it no registers or makes it pointless
    but: tuple[str, ...] = ()  # formats for which it has no registers left

    def blocks(self, rows: Rows) -> int:
        """Of a weight row, per step."""
        return max(1, self.bk // rows.layout.block)

    def shared_bytes(self, rows: Rows, unit: str) -> int:
        """What Triton 3.6 takes, at most: x and packed weights on their way, and one plane of each as operands; wgmma
        reads x from where it arrives."""
        count, layout = self.blocks(rows), rows.layout
        plane = count * layout.groups * layout.width * 2
        x = self.bm * count * layout.block * 2
        packed = self.bn * count * (layout.nbytes + 4 * layout.groups * layout.planes)
        arriving = x * self.stages if unit == WGMMA and self.bm >= 64 else x * (self.stages - 1)
        return arriving + packed * (self.stages - 1) + self.bn * plane + (self.bm * plane if not arriving else 0)


CONFIGS = (
    Config(16, 64, 128, 4, 3),
    Config(16, 128, 128, 8, 2),
    Config(32, 64, 128, 4, 2),
    Config(32, 128, 128, 8, 2, but=("q5_0",)),
    Config(64, 64, 128, 4, 2),
    Config(64, 64, 128, 4, 1, only=MMA_SYNC),
    Config(64, 128, 128, 8, 1, only=MMA_SYNC),
    Config(64, 128, 128, 4, 2, only=WGMMA, but=("q6_k",)),
    Config(128, 64, 128, 8, 2),
    Config(128, 128, 128, 8, 1),
    Config(128, 128, 128, 8, 2, only=WGMMA),
    Config(128, 128, 128, 4, 2, only=WGMMA, but=(*BYTES, *K_QUANTS)),  # two of these and the next on a multiprocessor:
    Config(128, 128, 64, 4, 3, only=WGMMA, but=(*LEGACY, *K_QUANTS)),  # one unpacks while the other multiplies
)
DEFAULTS = {  # rows of x -> numbers in CONFIGS, the first that fits; from counts of instructions, registers and memory
    WGMMA: ((16, (0,)), (32, (3, 2)), (64, (7, 4)), (None, (11, 12, 10))),
    MMA_SYNC: ((16, (0,)), (32, (2,)), (None, (6,))),
}


@triton.jit
def rounded_weights(codes, scale, low, R: tl.constexpr, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """What `unpack` gave -> weights (T, G, W) in `dtype`. FP8: without its scale, 256 times less if not NATIVE."""
    if R.name == "fp8":
        if NATIVE:  # by way of float32: Triton 3.6 has no working conversion from e4m3 to bfloat16 on sm_89
            return e4m3(codes, True).to(dtype)
        else:
            return e4m3_in_halves(codes).to(dtype)
    else:
        offset = tl.broadcast_to(addend(scale, low, R)[:, :, None], codes.shape)
        return tl.fma(biased(codes, R), tl.broadcast_to(scale[:, :, None], codes.shape), offset).to(dtype)


@triton.jit
def unpacked_here(weights):
    """The same 16-bit values. The barrier keeps the unpacking where the bytes were loaded: Triton would move it behind
    the change to the operand's layout, where each warp repeats it and registers are shuffled for every product."""
    if PACKED:
        asm: tl.constexpr = "mov.b32 $0, $1;"
        return tl.inline_asm_elementwise(asm, "=r,r", [weights], dtype=weights.dtype, is_pure=False, pack=2)
    else:
        return weights


@triton.jit(do_not_specialize=["M"])
def fused_kernel(
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    T: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
    SCALES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """x (M, K) @ weights (N, K).T -> out (M, N), or part program_id(1) of the sum -> out (SPLIT, M, N) float32."""
    tiles_n = tl.cdiv(N, BN)
    program = tl.program_id(0)
    first = program // (GROUP * tiles_n) * GROUP
    group = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    m = (first + program % (GROUP * tiles_n) % group) * BM + tl.arange(0, BM)
    n_first = program % (GROUP * tiles_n) // group * BN
    x_rows = x + tl.minimum(m, M - 1)[:, None].to(tl.int64) * x_stride
    place = tl.arange(0, BN * T)
    base = data + tl.minimum(n_first + place // T, N - 1) * R.nbytes
    PLANES: tl.constexpr = R.layout.planes
    PLANE: tl.constexpr = T * R.layout.groups * R.layout.width
    STEPS: tl.constexpr = (R.blocks + T - 1) // T
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    EVEN: tl.constexpr = R.blocks == SHARE * SPLIT * T
    total = tl.zeros((BM, BN), tl.float32)
    for turn in range(SHARE):
        step = tl.program_id(1) * SHARE + turn
        block = step * T + place % T
        live = tl.full((BN * T,), True, tl.int1) if EVEN else block < R.blocks
        planes = ()  # all are read before one is used: what they have in common is then loaded once
        for p in tl.static_range(PLANES):
            planes += (R.layout.unpack(base, block, live, p, R.planar_blocks, R.wide),)
        for p in tl.static_range(PLANES):
            k = step * (T * R.layout.block) + plane_columns(p, R, T)
            inside = tl.full(k.shape, True, tl.int1) if EVEN else k < R.columns
            left = tl.load(x_rows + k[None, :], mask=inside[None, :], other=0)
            weights = rounded_weights(planes[p][0], planes[p][1], planes[p][2], R, NATIVE, x.dtype.element_ty)
            total = tl.dot(left, unpacked_here(weights).reshape(BN, PLANE).T, total)
    n = n_first + tl.arange(0, BN)
    live = (m < M)[:, None] & (n < N)[None, :]
    m = m.to(tl.int64)
    if SPLIT == 1:
        total = finished(total, scale, bias, n[None, :], (n < N)[None, :], SCALES, FACTOR)
        tl.store(out + m[:, None] * out_stride + n[None, :], total.to(out.dtype.element_ty), mask=live)
    else:
        m += tl.program_id(1).to(tl.int64) * M
        tl.store(out + m[:, None] * N + n[None, :], total, mask=live)


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
    """x (M, K) float16 or bfloat16, rows any stride apart; data (N, bytes of a row) -> (M, N) in x's dtype.

    `rows` says what a row of data holds; Rows("fp8", K) is float8_e4m3fn with scale None, () or (N, 1) float32.
    bias (N,) of any float dtype. `config` and `split`, the parts along K, follow from shape and card where not given.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; the tensor cores take float16 or bfloat16")
    out = checked_output(x, data, rows, bias, scale, out)
    if not out.numel():
        return out
    (m, k), n, capability = x.shape, len(data), capability_of(x)
    if capability < OLDEST:
        raise ValueError(f"compute capability {capability} has no tensor cores in Triton; dequantize and use cuBLAS")
    config = config or default_config(capability, rows.name, m, n, k, rows.narrow)
    split = split or default_split(config, rows, m, n, multiprocessors(x))
    native = capability >= NATIVE_E4M3
    kind, factor = scales_of(rows, scale, n, native)
    place = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn), split)
    fused_kernel[grid](
        x, data.view(torch.uint8), scale, bias, place, m, n, x.stride(0), out.stride(0),
        rows, config.bm, config.bn, config.blocks(rows), split, GROUP_M, native, kind, factor,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out if split == 1 else joined(place, scale, bias, out, kind, factor)


def candidates(capability: tuple[int, int], name: str, m: int, n: int, k: int) -> tuple[Config, ...]:
    """What is worth a try for x (M, K) and weights (N, K): tiles that are not twice as high as x, and fit the card."""
    table = fitting(capability, name, k)
    lowest = min(config.bm for config in table)
    return tuple(config for config in table if config.bm < 2 * m or config.bm == lowest)


def fitting(capability: tuple[int, int], name: str, k: int) -> tuple[Config, ...]:
    """The configurations that a card can run without spilling registers."""
    unit, rows = unit_of(capability), Rows(name, k)
    memory = SHARED[max(start for start in SHARED if start <= capability)] * KIB
    return tuple(
        config
        for config in CONFIGS
        if config.only in ("", unit) and name not in config.but and config.shared_bytes(rows, unit) <= memory
    )


def unit_of(capability: tuple[int, int]) -> str:
    return WGMMA if capability[0] == 9 else MMA_SYNC


def default_config(capability: tuple[int, int], name: str, m: int, n: int, k: int, narrow: bool = False) -> Config:
    """For a card that nobody measured, by the rows of x; `narrow`: see Rows."""
    numbers = next(numbers for rows, numbers in DEFAULTS[unit_of(capability)] if rows is None or m <= rows)
    table = fitting(capability, name, k)
    # Tiles of four warps have no registers left for narrow loads.
    return next(CONFIGS[i] for i in numbers if CONFIGS[i] in table and not (narrow and i in (11, 12)))


def default_split(config: Config, rows: Rows, m: int, n: int, multiprocessors: int) -> int:
    """Parts along K. By registers, eight warps of a large tile run on a multiprocessor, or sixteen of a small one."""
    programs = triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn)
    places = multiprocessors * (16 if config.bm <= 32 else 8) // config.warps
    return parts_of(programs, places, triton.cdiv(rows.blocks, config.blocks(rows)), MAX_SPLIT)
