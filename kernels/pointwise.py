"""The pointwise work of a transformer block in Triton: every value is read once and written once, all math in float32.

Kernels and launchers; when to use them, and what must come out, is in `fused`. A launcher writes to tensors that it is
given, of float16, bfloat16 or float32, and takes any strides but in the last axis, so that slices of a wider tensor and
rows of a longer stream are read and written where they lie. Offsets of rows are 64 bits.

Letters: B batch, L tokens, D hidden width, H heads, C channels of a head, N width of any row.
"""

from collections.abc import Sequence
from math import log, pi, sqrt

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program that needs no whole row; the norm keeps a row in registers, whatever its width
LINEAR = tl.constexpr(-2 * sqrt(2 / pi) / log(2))
CUBIC = tl.constexpr(0.044715 * LINEAR.value)
HEADS_TILE = 1024  # elements of q, of k and of v that a program holds at a time


@triton.jit
def row_start(stride_b, stride_l):
    """Offset of this program's row: grids are (L, programs of a row, B)."""
    return tl.program_id(2).to(tl.int64) * stride_b + tl.program_id(0).to(tl.int64) * stride_l


@triton.jit
def modulated_norm_kernel(x, shift, scale, out, D, eps, x_b, x_l, shift_b, scale_b, out_b, out_l, BLOCK: tl.constexpr):
    i_b = tl.program_id(2).to(tl.int64)
    o_d = tl.arange(0, BLOCK)
    m_d = o_d < D
    b_x = tl.load(x + row_start(x_b, x_l) + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_shift = tl.load(shift + i_b * shift_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_scale = tl.load(scale + i_b * scale_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    centred = tl.where(m_d, b_x - tl.sum(b_x, axis=0) / D, 0.0)
    variance = tl.sum(centred * centred, axis=0) / D
    b_y = centred * tl.rsqrt(variance + eps) * (1 + b_scale) + b_shift
    tl.store(out + row_start(out_b, out_l) + o_d, b_y.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def turned(b_x, b_scale, b_cos, b_sin, eps, C: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """RMSNorm of every row of b_x (HEADS, BLOCK), then neighbours turned by the angles (BLOCK / 2)."""
    b_x = b_x.to(tl.float32)
    b_x = b_x * tl.rsqrt(tl.sum(b_x * b_x, axis=1) / C + eps)[:, None] * b_scale[None, :]
    even, odd = tl.split(tl.reshape(b_x, (HEADS, BLOCK // 2, 2)))
    pairs = tl.join(even * b_cos - odd * b_sin, even * b_sin + odd * b_cos)
    return tl.reshape(pairs, (HEADS, BLOCK))


@triton.jit
def heads_kernel(
    qkv, q_scale, k_scale, cos, sin, q, k, v, first, eps, x_b, x_l, out_b, out_l,
    H: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, COPY_V: tl.constexpr,
):  # fmt: skip
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_q_scale = tl.load(q_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_k_scale = tl.load(k_scale + o_c, mask=m_c, other=0.0).to(tl.float32)
    o_pair = tl.arange(0, BLOCK // 2)
    o_angle = (tl.program_id(0) + first).to(tl.int64) * (C // 2) + o_pair
    b_cos = tl.load(cos + o_angle, mask=o_pair < C // 2, other=0.0)[None, :]
    b_sin = tl.load(sin + o_angle, mask=o_pair < C // 2, other=0.0)[None, :]
    o_in = row_start(x_b, x_l)
    o_out = row_start(out_b, out_l)
    for i_h in range(0, H, HEADS):
        o_h = i_h + tl.arange(0, HEADS)
        o_tile = o_h[:, None] * C + o_c[None, :]
        m_tile = (o_h < H)[:, None] & m_c[None, :]
        b_q = tl.load(qkv + o_in + o_tile, mask=m_tile, other=0.0)
        b_k = tl.load(qkv + o_in + H * C + o_tile, mask=m_tile, other=0.0)
        if COPY_V:
            b_v = tl.load(qkv + o_in + 2 * H * C + o_tile, mask=m_tile, other=0.0)
            tl.store(v + o_out + o_tile, b_v, mask=m_tile)
        b_q = turned(b_q, b_q_scale, b_cos, b_sin, eps, C, HEADS, BLOCK)
        b_k = turned(b_k, b_k_scale, b_cos, b_sin, eps, C, HEADS, BLOCK)
        tl.store(q + o_out + o_tile, b_q.to(q.dtype.element_ty), mask=m_tile)
        tl.store(k + o_out + o_tile, b_k.to(k.dtype.element_ty), mask=m_tile)


@triton.jit
def gelu_of(b_x):
    """x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), written as x / (1 + 2^(-2 u log2(e)))."""
    b_x = b_x.to(tl.float32)
    return b_x / (1 + tl.exp2(b_x * (LINEAR + CUBIC * (b_x * b_x))))


@triton.jit
def gelu_kernel(x, out, N, x_b, x_l, out_b, out_l, BLOCK: tl.constexpr):
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_x = tl.load(x + row_start(x_b, x_l) + o_n, mask=m_n, other=0.0)
    tl.store(out + row_start(out_b, out_l) + o_n, gelu_of(b_x).to(out.dtype.element_ty), mask=m_n)


@triton.jit
def beside_gelu_kernel(y, mlp, out, D, M, y_b, y_l, mlp_b, mlp_l, out_b, out_l, BLOCK: tl.constexpr):
    """The first programs of a row copy y, the others work on the MLP."""
    copying = tl.cdiv(D, BLOCK)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = out + row_start(out_b, out_l)
    if tl.program_id(1) < copying:
        m_d = o_n < D
        tl.store(row + o_n, tl.load(y + row_start(y_b, y_l) + o_n, mask=m_d), mask=m_d)
    else:
        o_m = o_n - copying * BLOCK
        m_m = o_m < M
        b_x = tl.load(mlp + row_start(mlp_b, mlp_l) + o_m, mask=m_m, other=0.0)
        tl.store(row + D + o_m, gelu_of(b_x).to(out.dtype.element_ty), mask=m_m)


@triton.jit
def gated_sum_kernel(x, gate, y, out, D, x_b, x_l, gate_b, y_b, y_l, out_b, out_l, BLOCK: tl.constexpr):
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    b_x = tl.load(x + row_start(x_b, x_l) + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = tl.load(y + row_start(y_b, y_l) + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + tl.program_id(2).to(tl.int64) * gate_b + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_x + b_gate * b_y
    tl.store(out + row_start(out_b, out_l) + o_d, b_y.to(out.dtype.element_ty), mask=m_d)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float, out: Tensor) -> None:
    """out = LayerNorm(x) * (1 + scale) + shift: x, out (B, L, D); shift, scale (B or 1, 1, D)."""
    batch, tokens, width = same_shape(x, out)
    block = triton.next_power_of_2(width)
    steps = *rows(x), per_batch(shift, batch, width), per_batch(scale, batch, width), *rows(out)
    grid = tokens, 1, batch
    modulated_norm_kernel[grid](x, shift, scale, out, width, eps, *steps, BLOCK=block, num_warps=warps(block))


def heads(
    qkv: Tensor, scales: Sequence[Tensor], angles: Sequence[Tensor], first: int, eps: float,
    q: Tensor, k: Tensor, v: Tensor | None,
) -> None:  # fmt: skip
    """Rows `first` to first + L of q and k, normalised and turned, from qkv (B, L, 3 H C), rows q | k | v.

    scales: of q and of k, (C,). angles: cos and sin of all rows, (first + L or more, C / 2) float32. q, k, v: (B, any,
    H, C) of one layout, heads and channels without gaps. v is copied if given.
    """
    (batch, tokens, width), (_, length, count, channels) = qkv.shape, q.shape
    outputs = [q, k] if v is None else [q, k, v]
    if q.shape[0] != batch or width != 3 * count * channels or channels % 2 or not 0 <= first <= length - tokens:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit into q {tuple(q.shape)} at row {first}")
    if any((t.shape, t.stride()) != (q.shape, q.stride()) for t in outputs) or q.stride()[2:] != (channels, 1):
        raise ValueError(f"q, k, v have shapes and strides {[(tuple(t.shape), t.stride()) for t in outputs]}")
    for t in angles:
        if t.shape != (max(len(t), first + tokens), channels // 2) or t.dtype != torch.float32 or not t.is_contiguous():
            raise ValueError(f"({first + tokens}, {channels // 2}) float32 angles are needed, got {described(t)}")
    for t in scales:
        if t.shape != (channels,) or not t.is_contiguous():
            raise ValueError(f"a scale of ({channels},) without gaps is needed, got {described(t)}")
    block = triton.next_power_of_2(channels)
    tile = max(1, min(HEADS_TILE // block, triton.next_power_of_2(count)))
    q, k, v = (t[:, first:] for t in (q, k, k if v is None else v))
    heads_kernel[tokens, 1, batch](
        qkv, *scales, *angles, q, k, v, first, eps, *rows(qkv), *q.stride()[:2],
        H=count, C=channels, HEADS=tile, BLOCK=block, COPY_V=len(outputs) == 3, num_warps=4,
    )  # fmt: skip


def gelu(x: Tensor, out: Tensor) -> None:
    """out = GELU(x), tanh form: x, out (B, L, N); out may be x."""
    batch, tokens, width = same_shape(x, out)
    block = min(TILE, triton.next_power_of_2(width))
    grid = tokens, triton.cdiv(width, block), batch
    gelu_kernel[grid](x, out, width, *rows(x), *rows(out), BLOCK=block, num_warps=warps(block))


def beside_gelu(y: Tensor, mlp: Tensor, out: Tensor) -> None:
    """out = y | GELU(mlp): y (B, L, D), mlp (B, L, M), out (B, L, D + M), whose last M columns may be mlp."""
    (batch, tokens, hidden), width = y.shape, mlp.shape[-1]
    if mlp.shape != (batch, tokens, width) or out.shape != (batch, tokens, hidden + width) or y.dtype != out.dtype:
        raise ValueError(f"{described(y)} beside {described(mlp)} does not fit into {described(out)}")
    block = min(TILE, triton.next_power_of_2(max(hidden, width)))
    grid = tokens, triton.cdiv(hidden, block) + triton.cdiv(width, block), batch
    steps = *rows(y), *rows(mlp), *rows(out)
    beside_gelu_kernel[grid](y, mlp, out, hidden, width, *steps, BLOCK=block, num_warps=warps(block))


def gated_sum(x: Tensor, gate: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x + gate * y: x, y, out (B, L, D), gate (B or 1, 1, D); out may be x or y."""
    batch, tokens, width = same_shape(x, y, out)
    block = min(TILE, triton.next_power_of_2(width))
    grid = tokens, triton.cdiv(width, block), batch
    steps = *rows(x), per_batch(gate, batch, width), *rows(y), *rows(out)
    gated_sum_kernel[grid](x, gate, y, out, width, *steps, BLOCK=block, num_warps=warps(block))


def same_shape(*tensors: Tensor) -> tuple[int, int, int]:
    if len({t.shape for t in tensors}) > 1 or tensors[0].ndim != 3:
        raise ValueError(f"tensors of one shape (B, L, N) are needed, got {[tuple(t.shape) for t in tensors]}")
    return tuple(tensors[0].shape)


def rows(x: Tensor) -> tuple[int, int]:
    """Elements from one batch to the next and from one row to the next, of x (B, L, N)."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(f"rows must not have gaps, strides are {x.stride()}")
    return x.stride()[:2]


def per_batch(x: Tensor, batch: int, width: int) -> int:
    """Elements from one batch to the next, of x (B or 1, 1, N)."""
    if x.ndim != 3 or x.shape[0] not in (1, batch) or x.shape[1:] != (1, width):
        raise ValueError(f"({batch}, 1, {width}) is needed, got {described(x)}")
    return rows(x)[0] if x.shape[0] > 1 else 0


def described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}, strides {x.stride()}"


def warps(block: int) -> int:
    """16 elements in every thread."""
    return min(32, max(1, block // 512))
