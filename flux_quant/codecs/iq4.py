"""GGUF's types with a table of 16 values, dense around zero: IQ4_NL (blocks of 32), IQ4_XS (8 groups of 32).

Fields are in the order of the C structs in ggml-common.h, values as in ggml-quants.c `dequantize_row_iq4_*`.
"""

from functools import cache

import torch
from torch import Tensor

from flux_quant.codecs.choice import Choice, half_bytes, half_values, join_bits, split_bits

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml's kvalues_iq4nl
BOUNDS = tuple((low + high) / 2 for low, high in zip(VALUES, VALUES[1:], strict=False))


def store_iq4_nl(choice: Choice) -> Tensor:
    return torch.cat([half_bytes(choice.d), join_bits(choice.codes.view(-1, 2, 16), 4)], dim=1)


def unpack_iq4_nl(data: Tensor) -> Tensor:
    d, qs = data.split([2, 16], dim=1)
    return half_values(d) * values_of(split_bits(qs, 4).flatten(1))


def store_iq4_xs(choice: Choice) -> Tensor:
    scales = choice.scales + 32  # six bits each
    qs = join_bits(choice.codes.view(-1, 8, 2, 16), 4)
    low = join_bits((scales & 15).to(torch.uint8).view(-1, 4, 2).transpose(1, 2), 4)
    high = join_bits((scales >> 4).to(torch.uint8).view(-1, 2, 4).transpose(1, 2), 2)
    return torch.cat([half_bytes(choice.d), high, low, qs.flatten(1)], dim=1)


def unpack_iq4_xs(data: Tensor) -> Tensor:
    d, high, low, qs = data.split([2, 2, 4, 128], dim=1)
    high = split_bits(high, 2).transpose(1, 2).flatten(1)
    scales = (split_bits(low, 4).transpose(1, 2).flatten(1) | high << 4).float() - 32
    codes = split_bits(qs.reshape(-1, 8, 16), 4).flatten(2)
    return ((half_values(d) * scales).unsqueeze(2) * values_of(codes)).flatten(1)


def values_of(codes: Tensor) -> Tensor:
    plain = type(codes) is Tensor  # a traced or fake one must not leave its like behind
    return (table if plain else table.__wrapped__)(codes.device)[codes.int()]


@cache
def table(device: torch.device) -> Tensor:
    """VALUES, once on each device: a copy at every call would wait for the device, and no graph could be captured."""
    return torch.tensor(VALUES, dtype=torch.float32, device=device)
