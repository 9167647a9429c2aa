"""Triton kernels of known quality, good and bad: what `sass.py` must tell apart."""

import triton
import triton.language as tl

from kernel_cases import float_of, meta

N = 3072


@triton.jit
def copy(source, target, count, TILE: tl.constexpr):
    offsets = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(target + offsets, tl.load(source + offsets, mask=offsets < count), mask=offsets < count)


@triton.jit
def product(x, w, y, rows, columns, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """y (rows, columns) = x (rows, inner) @ w (columns, inner).T, all sizes multiples of the tile's."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, inner, BK):
        left = tl.load(x + m * inner + k + tl.arange(0, BK)[None, :])
        right = tl.load(w + n[:, None] * inner + k + tl.arange(0, BK)[None, :])
        total = tl.dot(left, right.trans(), total)
    tl.store(y + m * columns + n[None, :], total.to(y.dtype.element_ty))


def copy_aligned(cc: int) -> None:
    copy[(N * N // 1024,)](meta(N, N), meta(N, N), N * N, 1024, num_warps=2)


def copy_misaligned(cc: int) -> None:
    """Addresses that nothing divides: byte by byte."""
    copy[(N * N // 1024,)](meta(N * N + 1)[1:], meta(N, N), N * N, 1024, num_warps=2)


def multiply(cc: int, warps: int = 4) -> None:
    x, w, y = (meta(N, N, dtype=float_of(cc)) for _ in range(3))
    product[(N // 64, N // 128)](x, w, y, N, N, N, 64, 128, 64, num_warps=warps, num_stages=3)


def multiply_in_one_warp(cc: int) -> None:
    """64 x 128 sums in 32 threads are 256 registers each: some are spilled."""
    multiply(cc, warps=1)
