"""GGUF's super-blocks of 256 weights: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

A super-block has 8 groups of 32 or 16 groups of 16 weights. Each group has an integer scale (and minimum), multiples of
one float16 `d` (and `dmin`) of the super-block. Fields are in the order of the C structs in ggml-common.h; values are
formed as ggml-quants.c `dequantize_row_*` does: (d * scale) * code - (dmin * min) in float32.

`unpack_*`: (n, bytes) uint8 -> (n, 256) float32. `store_*`: a Choice -> (n, bytes) uint8.
"""

import torch
from torch import Tensor

from flux_quant.codecs.choice import Choice, half_bytes, half_values, join_bits, split_bits


def store_q2_k(choice: Choice) -> Tensor:
    scales = (choice.scales | choice.mins << 4).to(torch.uint8)
    qs = join_bits(choice.codes.view(-1, 2, 4, 32), 2)
    return torch.cat([scales, qs.flatten(1), half_bytes(choice.d), half_bytes(choice.m)], dim=1)


def unpack_q2_k(data: Tensor) -> Tensor:
    scales, qs, d, dmin = data.split([16, 64, 2, 2], dim=1)
    return affine(split_bits(qs.reshape(-1, 2, 32), 2), d, scales & 15, dmin, scales >> 4)


def store_q3_k(choice: Choice) -> Tensor:
    codes = choice.codes  # 0-7: the high bit is in hmask, so that a clear one means "subtract 4"
    hmask = join_bits(codes.view(-1, 8, 32), 1, shift=2)
    qs = join_bits(codes.view(-1, 2, 4, 32), 2)
    scales = (choice.scales + 32).to(torch.uint8)
    low = join_bits(scales.view(-1, 2, 8), 4)
    high = join_bits(scales.view(-1, 4, 4), 2, shift=4)
    return torch.cat([hmask, qs.flatten(1), low, high, half_bytes(choice.d)], dim=1)


def unpack_q3_k(data: Tensor) -> Tensor:
    hmask, qs, low, high, d = data.split([32, 64, 8, 4, 2], dim=1)
    codes = split_bits(qs.reshape(-1, 2, 32), 2).flatten(1) | split_bits(hmask, 1).flatten(1) << 2
    scales = split_bits(low, 4).flatten(1) | split_bits(high, 2).flatten(1) << 4
    return symmetric(codes, 4, d, scales.to(torch.int16) - 32)


def store_q4_k(choice: Choice) -> Tensor:
    qs = join_bits(choice.codes.view(-1, 4, 2, 32), 4)
    return torch.cat([half_bytes(choice.d), half_bytes(choice.m), join_six(choice), qs.flatten(1)], dim=1)


def unpack_q4_k(data: Tensor) -> Tensor:
    d, dmin, pairs, qs = data.split([2, 2, 12, 128], dim=1)
    scales, mins = split_six(pairs)
    return affine(split_bits(qs.reshape(-1, 4, 32), 4), d, scales, dmin, mins)


def store_q5_k(choice: Choice) -> Tensor:
    qh = join_bits(choice.codes.view(-1, 8, 32), 1, shift=4)
    qs = join_bits(choice.codes.view(-1, 4, 2, 32), 4)
    return torch.cat([half_bytes(choice.d), half_bytes(choice.m), join_six(choice), qh, qs.flatten(1)], dim=1)


def unpack_q5_k(data: Tensor) -> Tensor:
    d, dmin, pairs, qh, qs = data.split([2, 2, 12, 32, 128], dim=1)
    scales, mins = split_six(pairs)
    codes = split_bits(qs.reshape(-1, 4, 32), 4).flatten(1) | split_bits(qh, 1).flatten(1) << 4
    return affine(codes, d, scales, dmin, mins)


def store_q6_k(choice: Choice) -> Tensor:
    ql = join_bits(choice.codes.view(-1, 2, 2, 64), 4)
    qh = join_bits(choice.codes.view(-1, 2, 4, 32), 2, shift=4)
    scales = choice.scales.to(torch.int8).view(torch.uint8)
    return torch.cat([ql.flatten(1), qh.flatten(1), scales, half_bytes(choice.d)], dim=1)


def unpack_q6_k(data: Tensor) -> Tensor:
    ql, qh, scales, d = data.split([128, 64, 16, 2], dim=1)
    codes = split_bits(ql.reshape(-1, 2, 64), 4).flatten(1) | split_bits(qh.reshape(-1, 2, 32), 2).flatten(1) << 4
    return symmetric(codes, 32, d, scales.contiguous().view(torch.int8))


def affine(codes: Tensor, d: Tensor, scales: Tensor, dmin: Tensor, mins: Tensor) -> Tensor:
    """codes (n, ...) 256 per super-block, scales and mins (n, G) -> (n, 256): (d * scale) * code - dmin * min."""
    groups = codes.reshape(*scales.shape, -1).float()
    scale = (half_values(d) * scales.float()).unsqueeze(2)
    return (scale * groups - (half_values(dmin) * mins.float()).unsqueeze(2)).flatten(1)


def symmetric(codes: Tensor, offset: int, d: Tensor, scales: Tensor) -> Tensor:
    """codes (n, 256), scales (n, G) -> (n, 256): (d * scale) * (code - offset)."""
    groups = codes.reshape(*scales.shape, -1).float() - offset
    return ((half_values(d) * scales.float()).unsqueeze(2) * groups).flatten(1)


def join_six(choice: Choice) -> Tensor:
    """Eight scales and eight minimums of six bits -> (n, 12) uint8, as ggml-quants.c `get_scale_min_k4` reads them."""
    scales, mins = choice.scales.to(torch.uint8), choice.mins.to(torch.uint8)
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    return torch.cat([first, second, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], dim=1)


def split_six(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 12) uint8 -> scales (n, 8), minimums (n, 8)."""
    first, second, low = pairs.split(4, dim=1)
    scales = torch.cat([first & 63, low & 15 | first >> 6 << 4], dim=1)
    return scales, torch.cat([second & 63, low >> 4 | second >> 6 << 4], dim=1)
