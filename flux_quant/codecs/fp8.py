"""FP8 e4m3fn: 1 sign, 4 exponent, 3 mantissa bits, largest value 448, no infinity.

Torch before 2.12 turns values above 464 into NaN where later versions saturate, so every cast here clamps first.
"""

import torch
from torch import Tensor

from flux_quant.codecs.legacy import divide

LARGEST = 448.0


def pack_scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (...) float -> data (...) float8_e4m3fn, scale () float32 with weight = data * scale.

    The scale maps the largest magnitude to 448; a tensor of zeros gets scale 1.
    """
    weight = weight.float()
    largest = weight.abs().amax()
    smallest = torch.finfo(torch.float32).tiny  # below it a scale rounds to zero
    scale = torch.where(largest > 0, divide(largest, LARGEST).clamp(min=smallest), torch.ones_like(largest))
    return cast(weight / scale), scale


def unpack_scaled(data: Tensor, scale: Tensor) -> Tensor:
    """data (...) float8_e4m3fn, scale () float32 -> (...) float32."""
    return data.float() * scale.float()


def pack_unscaled(weight: Tensor) -> tuple[Tensor]:
    """weight (...) float -> (...) float8_e4m3fn. Magnitudes above 448 saturate, below 2**-10 they become zero."""
    return (cast(weight.float()),)


def cast(values: Tensor) -> Tensor:
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
