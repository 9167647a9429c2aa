"""The pointwise work of a transformer block: one Triton kernel each where there is one to be had, else plain torch.

Plain torch says what must come out. It runs on the CPU, on cards and in places without Triton (`fallback.triton_for`),
where a gradient is wanted, and under `torch.compile`, which fuses such code itself. The kernels round once, at the end;
in 16 bits torch rounds after every step.

Some functions take the storage of an argument for their result: what a linear of the block has just returned, never the
stream that passes through the blocks, nor anything that a linear was given before.

Bytes, in units of one stream in the engine's dtype, B L D values (28.3 MB in bfloat16 at 1024 x 1024 with 512 words):

| | torch | here | |
|---|---|---|---|
| modulated norm | 6 | 2 | one in a single block, two in a double |
| q and k normalised and turned | 72 | 4 | single; 6 in a double block, where v is copied too |
| joining the streams | 6 | 0 | double |
| attention's output in place | 2 | 2 | single; 0 in a double block |
| GELU | 8 | 8 | |
| joining attention and MLP | 10 | 0 | single |
| gated sum | 5 | 3 | one in a single block, two in a double |

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
    heads, channels = y.shape[1], y.shape[3]
    hidden = heads * channels

    def in_torch() -> Tensor:
        mlp = F.gelu(wide[..., 3 * hidden :], approximate="tanh")
        return torch.cat([y.transpose(1, 2).flatten(2), mlp], dim=-1)

    def in_triton() -> Tensor:
        out = wide[..., 2 * hidden :]
        mlp = out[..., hidden:]
        pointwise().gelu(mlp, out=mlp)
        out[..., :hidden].unflatten(-1, (heads, channels)).copy_(y.transpose(1, 2))
        return out

    return choose("gelu", in_triton, in_torch, wide, y)


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
