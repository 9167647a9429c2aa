"""The pointwise work of a transformer block: one Triton kernel each where there is one to be had, else plain torch.

Plain torch says what must come out. It runs on the CPU, on cards and in places without Triton (`fallback.triton_for`),
where a gradient is wanted, and under `torch.compile`, which fuses such code itself. The kernels round once, at the end;
in 16 bits torch rounds after every step.

Some functions take the storage of an argument for their result: what a linear of the block has just returned, never the
stream that passes through the blocks, nor anything that a linear was given before.

Bytes read and written by a block, in units of its whole stream, B L D values in 16 bits:

| | double: torch | here | single: torch | here |
|---|---|---|---|---|
| modulated norms | 12 | 4 | 6 | 2 |
| q and k normalised and turned | 72 | 4 | 72 | 4 |
| streams joined (here: v copied) | 6 | 2 | | |
| attention's output to (B, L, D) | 2 | 0 | 2 | 0 |
| GELU | 8 | 8 | 8 | 8 |
| attention and MLP joined | | | 10 | 2 |
| gated sums | 10 | 6 | 5 | 3 |
| together | 110 | 24 | 103 | 19 |

A unit is 28.3 MB at 1024 x 1024 with 512 words: a step of FLUX.1's 19 double and 38 single blocks moves 170 GB in torch
and 33 GB here. Counted from the operators that torch runs on CUDA, which has an rms_norm in one piece; not measured.

Letters: B batch, L tokens, D hidden width, H heads, C channels of a head, M width of the MLP.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_quant.kernels.fallback import guarded, triton_for

EPS = 1e-6
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Stream = tuple[Tensor, Tensor, Tensor]  # qkv (B, L, 3 D), rows q | k | v, each head by head; scales of q and k (C,)
T = TypeVar("T")


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift: x (B, L, D), shift and scale (B, 1, D) -> (B, L, D)."""

    def in_torch() -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift

    def in_triton() -> Tensor:
        out = x.new_empty(x.shape)
        pointwise().modulated_norm(x, shift, scale, EPS, out)
        return out

    return choose("modulated_norm", in_triton, in_torch, x, shift, scale)


def gated_sum(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y: x, y (B, L, D), gate (B, 1, D) -> (B, L, D). Takes y's storage."""

    def in_triton() -> Tensor:
        pointwise().gated_sum(x, gate, y, out=y)
        return y

    return choose("gated_sum", in_triton, lambda: x + gate * y, x, gate, y)


def gelu_(x: Tensor) -> Tensor:
    """GELU, tanh form: (B, L, M) -> (B, L, M). Takes x's storage."""

    def in_triton() -> Tensor:
        pointwise().gelu(x, out=x)
        return x

    return choose("gelu", in_triton, lambda: F.gelu(x, approximate="tanh"), x)


def beside_gelu(y: Tensor, wide: Tensor) -> Tensor:
    """attention y (B, H, L, C), q | k | v | mlp (B, L, 3 D + M) -> y | GELU(mlp), (B, L, D + M).

    Takes the storage of v | mlp: rows of the result are as far apart as those of `wide`.
    """
    y = y.transpose(1, 2).flatten(2)
    hidden = y.shape[-1]
    mlp = wide[..., 3 * hidden :]

    def in_torch() -> Tensor:
        return torch.cat([y, F.gelu(mlp, approximate="tanh")], dim=-1)

    def in_triton() -> Tensor:
        out = wide[..., 2 * hidden :]
        pointwise().beside_gelu(y, mlp, out)
        return out

    return choose("beside_gelu", in_triton, in_torch, wide, y)


def heads(streams: Sequence[Stream], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Streams, cos and sin (L, C / 2) float32 -> q, k, v (B, H, L, C) of all their tokens in a row.

    Every head of q and k is normalised (RMSNorm), then its neighbouring channels are turned by the token's angles. In
    memory the kernel's q and k are (B, L, H, C): attention's output takes that over, so that (B, L, D) is a view of it.
    v of a single stream is a view of its qkv.
    """

    def in_torch() -> tuple[Tensor, Tensor, Tensor]:
        parts = [normed_heads(*stream) for stream in streams]
        q, k, v = parts[0] if len(parts) == 1 else (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def in_triton() -> tuple[Tensor, Tensor, Tensor]:
        qkv, channels = streams[0][0], len(streams[0][1])
        shape = len(qkv), sum(x.shape[1] for x, *_ in streams), qkv.shape[-1] // 3 // channels, channels
        q, k = (qkv.new_empty(shape) for _ in range(2))
        joint_v = qkv.new_empty(shape) if len(streams) > 1 else None
        first = 0
        for x, *scales in streams:
            pointwise().heads(x, scales, (cos, sin), first, EPS, q, k, joint_v)
            first += x.shape[1]
        v = split_heads(qkv, channels)[2] if joint_v is None else joint_v.transpose(1, 2)
        return q.transpose(1, 2), k.transpose(1, 2), v

    inputs = [qkv for qkv, *_ in streams]
    others = [cos, sin, *(scale for _, *scales in streams for scale in scales)]
    return choose("heads", in_triton, in_torch, *inputs, others=others)


def normed_heads(qkv: Tensor, q_scale: Tensor, k_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = split_heads(qkv, len(q_scale))
    return rms_norm(q, q_scale), rms_norm(k, k_scale), v


def split_heads(qkv: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3 D), rows q | k | v, each head by head -> three of (B, H, L, C)."""
    return qkv.unflatten(-1, (3, -1, channels)).permute(2, 0, 3, 1, 4).unbind(0)


def rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=EPS)
    return normed.to(x.dtype) * scale.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of x (B, H, L, C) by the angles (L, C / 2), in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def choose(
    name: str, in_triton: Callable[[], T], in_torch: Callable[[], T], *inputs: Tensor, others: Sequence[Tensor] = ()
) -> T:
    """The kernel for inputs of one dtype, on one card that has Triton, when nobody will ask for gradients."""
    if torch.compiler.is_compiling() or not fusable(inputs, others):
        return in_torch()
    return guarded(name, inputs[0].device, in_triton, in_torch)


def fusable(inputs: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    device, dtype = inputs[0].device, inputs[0].dtype
    everything = [*inputs, *others]
    return (
        triton_for(device) is None
        and dtype in DTYPES
        and all(x.dtype == dtype for x in inputs)
        and all(x.device == device and x.stride(-1) == 1 for x in everything)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in everything))
    )


def pointwise() -> ModuleType:
    """The kernels. Imported late: triton need not be installed, and takes time to import."""
    from flux_quant.kernels import pointwise

    return pointwise
