"""Which code unpacks or multiplies a packed weight, by format, rows of the input and device; what it chose and why.

The torch path, which runs everywhere: the codec unpacks to float32, the result is cast to the input's dtype and given
to torch's own matrix product. A large weight is unpacked some rows at a time, so the scratch stays small whatever the
layer: FLUX.1's widest (21504 x 3072) would need 264 MB at once. The backward pass unpacks again instead of keeping the
unpacked weight: a LoRA trained on a quantized base costs no more weight memory than running it.
"""

from collections.abc import Iterator, Sequence
from math import prod
from types import EllipsisType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from flux_quant.formats import QuantFormat, Shape

SCRATCH_BYTES = 64 << 20  # of float32 weight at a time

Rows = slice | EllipsisType


def dequantize(fmt: QuantFormat, parts: Sequence[Tensor], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Parts of a weight (N, ..., K) -> (N, ..., K) in `dtype`, written to `out` if given."""
    shape = weight_shape(fmt, parts)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=parts[0].device)
    elif out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, should be {shape} {dtype}")
    for rows in row_slices(shape):
        out[rows] = fmt.unpack(*take(parts, rows))
    return out


def linear(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """x (..., K), parts of a weight (N, K), bias (N) -> (..., N) in x's dtype. Gradients flow to x and bias."""
    if bias is not None:
        bias = bias.to(x.dtype)
    if fmt.is_plain and parts[0].dtype == x.dtype:
        return F.linear(x, parts[0], bias)
    return UnpackedLinear.apply(x, bias, fmt, *parts)


def explain(fmt: QuantFormat, rows: int, device: torch.device | str) -> str:
    """What `linear` does with `rows` rows of input on `device`, and why, in one line."""
    place = f"{fmt.name}, {rows} rows on {torch.device(device).type}"
    if fmt.is_plain:
        return f"{place}: F.linear on the stored weight (activations of another dtype: cast in slices of rows first)"
    cap = f"at most {SCRATCH_BYTES >> 20} MiB"
    return f"{place}: codec to float32 in slices of {cap}, then F.linear (no kernel for this format)"


def weight_shape(fmt: QuantFormat, parts: Sequence[Tensor]) -> Shape:
    """The shape (..., K) of the weight that is stored in `parts`."""
    stored = parts[0].shape
    if fmt.block == 1:
        return tuple(stored)
    (per_block,) = fmt.parts[0].shape((fmt.block,))
    return (*stored[:-1], stored[-1] // per_block * fmt.block)


def row_slices(shape: Shape) -> list[Rows]:
    """Cut (N, ..., K) along N into pieces of at most SCRATCH_BYTES in float32. Fewer than two axes stay whole."""
    if len(shape) < 2:
        return [...]
    step = max(1, SCRATCH_BYTES // max(1, 4 * prod(shape[1:])))
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def take(parts: Sequence[Tensor], rows: Rows) -> Iterator[Tensor]:
    """The rows of every part; a part without axes (one scale for the whole weight) belongs to all of them."""
    return (part[rows] if part.ndim else part for part in parts)


class UnpackedLinear(torch.autograd.Function):
    """x @ weight.T + bias with the weight unpacked slice by slice, in the forward and again in the backward pass."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bias: Tensor | None, fmt: QuantFormat, *parts: Tensor) -> Tensor:
        ctx.fmt = fmt
        ctx.save_for_backward(*parts)
        shape = weight_shape(fmt, parts)
        slices = row_slices(shape)
        if len(slices) == 1:
            return F.linear(x, fmt.unpack(*parts).to(x.dtype), bias)
        out = x.new_empty(*x.shape[:-1], shape[0])
        for rows in slices:
            weight = fmt.unpack(*take(parts, rows)).to(x.dtype)
            out[..., rows] = F.linear(x, weight, None if bias is None else bias[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        fmt, parts = ctx.fmt, ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            shape = weight_shape(fmt, parts)
            total = grad.new_zeros(*grad.shape[:-1], shape[1], dtype=torch.float32)
            for rows in row_slices(shape):
                total += grad[..., rows] @ fmt.unpack(*take(parts, rows)).to(grad.dtype)
            grad_x = total.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(dim=0)
        return grad_x, grad_bias, None, *(None for _ in parts)
