"""Floating point as it is: one part, no blocks."""

from collections.abc import Callable

import torch
from torch import Tensor


def pack_as(dtype: torch.dtype) -> Callable[[Tensor], tuple[Tensor]]:
    """A packer: any float tensor -> the same values in `dtype`."""
    return lambda weight: (weight.to(dtype),)


def unpack(data: Tensor) -> Tensor:
    """Any float tensor -> float32."""
    return data.float()
