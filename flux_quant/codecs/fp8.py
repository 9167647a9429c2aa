"""FP8 e4m3fn: 1 sign, 4 exponent, 3 mantissa bits, largest value 448, no infinity.

Torch before 2.12 turns values above 464 into NaN where later versions saturate, so every cast here clamps first.
"""

import torch
from torch import Tensor

from flux_quant.codecs.legacy import divide

LARGEST = 448.0
SLICE = 1 << 22  # elements that are cast at a time


def pack_scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (...) float -> data (...) float8_e4m3fn, scale () float32 with weight = data * scale.

    The scale maps the largest magnitude to 448; a tensor of zeros gets scale 1. The working memory is that of a slice.
    """
    low, high = weight.aminmax()
    scale = scale_for(torch.maximum(-low, high).float())
    data = torch.empty_like(weight, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    for values, codes in zip(weight.reshape(-1).split(SLICE), data.view(-1).split(SLICE), strict=True):
        codes.copy_(cast(values.float() / scale))
    return data, scale


def pack_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, ...) float -> data (N, ...) float8_e4m3fn, scale (N, 1, ...) float32: each row with its own scale."""
    values = weight.float()
    scale = scale_for(values.abs().amax(dim=tuple(range(1, values.ndim)), keepdim=True))
    return cast(values / scale), scale


def scale_for(largest: Tensor) -> Tensor:
    """The largest magnitudes, float32 -> their scales, float32."""
    smallest = torch.finfo(torch.float32).tiny  # below it a scale rounds to zero
    return torch.where(largest > 0, divide(largest, LARGEST).clamp(min=smallest), torch.ones_like(largest))


def unpack_scaled(data: Tensor, scale: Tensor) -> Tensor:
    """data (...) float8_e4m3fn, scale () or (N, 1, ...) float32 -> (...) float32."""
    return data.float() * scale.float()


def pack_unscaled(weight: Tensor) -> tuple[Tensor]:
    """weight (...) float -> (...) float8_e4m3fn. Magnitudes above 448 saturate, below 2**-10 they become zero."""
    return (cast(weight.float()),)


def cast(values: Tensor) -> Tensor:
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
