"""What a packed weight is, for whoever runs it: its shape, its rows, and what may be asked of it."""

from collections.abc import Iterator, Sequence
from math import prod
from types import EllipsisType

import torch
from torch import Tensor

from flux_quant.formats import QuantFormat, Shape

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Rows = slice | EllipsisType


def weight_shape(fmt: QuantFormat, parts: Sequence[Tensor]) -> Shape:
    """The shape (..., K) of the weight that is stored in `parts`."""
    stored = parts[0].shape
    if fmt.block == 1:
        return tuple(stored)
    (per_block,) = fmt.parts[0].shape((fmt.block,))
    if stored[-1] % per_block:
        raise ValueError(
            f"{stored[-1]} bytes in a row of {fmt.name} are no multiple of its blocks of {per_block} bytes"
        )
    return (*stored[:-1], stored[-1] // per_block * fmt.block)


def row_slices(shape: Shape, cap: int, itemsize: int, multiple: int = 1) -> list[Rows]:
    """Cut (N, ..., K) along N into pieces of at most `cap` bytes (and one row at least), a multiple of rows where that
    fits. Fewer than two axes stay whole."""
    if len(shape) < 2:
        return [...]
    step = max(1, cap // max(1, itemsize * prod(shape[1:])))
    if step < shape[0]:
        step = max(1, step // multiple) * multiple if step >= multiple else step
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def take(parts: Sequence[Tensor], rows: Rows) -> Iterator[Tensor]:
    """The rows of every part; a part without axes (one scale for the whole weight) belongs to all of them."""
    return (part[rows] if part.ndim else part for part in parts)


def check_parts(fmt: QuantFormat, parts: Sequence[Tensor]) -> Shape:
    """The weight's shape. ValueError where the tensors are not what the format stores for any weight."""
    if len(parts) != len(fmt.parts):
        raise ValueError(f"{fmt.name} is stored in {len(fmt.parts)} tensors, got {len(parts)}")
    shape = weight_shape(fmt, parts)
    for part, tensor in zip(fmt.parts, parts, strict=True):
        if tensor.dtype != part.dtype or tuple(tensor.shape) != part.shape(shape):
            raise ValueError(
                f"{part.suffix} of a {fmt.name} weight {shape} is {part.dtype} {part.shape(shape)}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.device != parts[0].device:
            raise ValueError(f"{part.suffix} is on {tensor.device}, {fmt.parts[0].suffix} on {parts[0].device}")
    return shape


def check_linear(x: Tensor, fmt: QuantFormat, parts: Sequence[Tensor], bias: Tensor | None) -> None:
    """ValueError, TypeError with the numbers and the remedy for what `linear` cannot take."""
    shape = check_parts(fmt, parts)
    if len(shape) != 2:
        raise ValueError(f"a linear layer's weight is (N, K), this {fmt.name} weight is {shape}")
    if x.dtype not in FLOATS:
        raise TypeError(f"the input is {x.dtype}; cast it to float32, float16 or bfloat16")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        raise ValueError(
            f"the input's last axis must be {shape[1]} for a weight {shape}, the input is {tuple(x.shape)}"
        )
    if x.device != parts[0].device:
        raise ValueError(f"the input is on {x.device}, the weight on {parts[0].device}; move one of them")
    if bias is not None and (tuple(bias.shape) != shape[:1] or bias.device != x.device):
        raise ValueError(f"the bias of {shape[0]} outputs on {x.device} is {tuple(bias.shape)} on {bias.device}")
