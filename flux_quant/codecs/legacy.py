"""GGUF's blocks of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Every function works on blocks: (n, 32) float32 <-> (n, bytes) uint8, fields in the order of the C structs in
ggml-common.h. Nibbles: byte j holds element j in its low and element j + 16 in its high half.

`pack_*` gives the bytes of ggml's reference quantizer, ggml-quants.c `quantize_row_*_ref`: scales in float32, stored as
float16; the codes are computed with the float32 scale. `store_*` writes what a search chose.
"""

import torch
from torch import Tensor

from flux_quant.codecs.choice import Choice, half_bytes, half_values, join_bits, split_bits


def pack_q8_0(blocks: Tensor) -> Tensor:
    d = divide(blocks.abs().amax(dim=1, keepdim=True), 127)
    scaled = blocks * inverse(d)
    codes = scaled.sign() * (scaled.abs() + 0.5).floor()  # roundf: half away from zero
    return torch.cat([half_bytes(d), codes.to(torch.int8).view(torch.uint8)], dim=1)


def unpack_q8_0(data: Tensor) -> Tensor:
    d, codes = data.split([2, 32], dim=1)
    return half_values(d) * codes.contiguous().view(torch.int8).float()


def pack_q4_0(blocks: Tensor) -> Tensor:
    d = signed_largest(blocks) / -8
    codes = (blocks * inverse(d) + 8.5).to(torch.uint8).clamp(max=15)
    return store_q4_0(Choice(codes, d))


def store_q4_0(choice: Choice) -> Tensor:
    return torch.cat([half_bytes(choice.d), nibbles(choice.codes)], dim=1)


def unpack_q4_0(data: Tensor) -> Tensor:
    d, qs = data.split([2, 16], dim=1)
    return half_values(d) * (split_bits(qs, 4).flatten(1).float() - 8)


def pack_q4_1(blocks: Tensor) -> Tensor:
    low = blocks.amin(dim=1, keepdim=True)
    d = divide(blocks.amax(dim=1, keepdim=True) - low, 15)
    codes = ((blocks - low) * inverse(d) + 0.5).to(torch.uint8).clamp(max=15)
    return store_q4_1(Choice(codes, d, low))


def store_q4_1(choice: Choice) -> Tensor:
    return torch.cat([half_bytes(choice.d), half_bytes(choice.m), nibbles(choice.codes)], dim=1)


def unpack_q4_1(data: Tensor) -> Tensor:
    d, m, qs = data.split([2, 2, 16], dim=1)
    return half_values(d) * split_bits(qs, 4).flatten(1).float() + half_values(m)


def pack_q5_0(blocks: Tensor) -> Tensor:
    d = signed_largest(blocks) / -16
    codes = (blocks * inverse(d) + 16.5).to(torch.uint8).clamp(max=31)
    return store_q5_0(Choice(codes, d))


def store_q5_0(choice: Choice) -> Tensor:
    return torch.cat([half_bytes(choice.d), fifth_bits(choice.codes), nibbles(choice.codes)], dim=1)


def unpack_q5_0(data: Tensor) -> Tensor:
    d, qh, qs = data.split([2, 4, 16], dim=1)
    return half_values(d) * (five_bits(qh, qs) - 16)


def pack_q5_1(blocks: Tensor) -> Tensor:
    low = blocks.amin(dim=1, keepdim=True)
    d = divide(blocks.amax(dim=1, keepdim=True) - low, 31)
    codes = ((blocks - low) * inverse(d) + 0.5).to(torch.uint8)
    return store_q5_1(Choice(codes, d, low))


def store_q5_1(choice: Choice) -> Tensor:
    fields = half_bytes(choice.d), half_bytes(choice.m), fifth_bits(choice.codes), nibbles(choice.codes)
    return torch.cat(fields, dim=1)


def unpack_q5_1(data: Tensor) -> Tensor:
    d, m, qh, qs = data.split([2, 2, 4, 16], dim=1)
    return half_values(d) * five_bits(qh, qs) + half_values(m)


def signed_largest(blocks: Tensor) -> Tensor:
    """(n, L) -> (n, 1): the value of largest magnitude with its sign, the first one on a tie."""
    return blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))


def divide(values: Tensor, divisor: float) -> Tensor:
    """Rounded correctly on every device: by a Python number, CUDA would multiply by the rounded reciprocal."""
    return values / values.new_full((), divisor)


def inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def nibbles(codes: Tensor) -> Tensor:
    """(n, 32) codes -> (n, 16) uint8, the low four bits of each."""
    return join_bits(codes.view(-1, 2, 16), 4)


def fifth_bits(codes: Tensor) -> Tensor:
    """(n, 32) codes 0-31 -> (n, 4) uint8: bit i of the little-endian word is bit 4 of element i."""
    words = codes.view(torch.int64) >> 4 & 0x0101010101010101
    return (words * 0x0102040810204080 >> 56).to(torch.uint8)  # the product gathers one bit of each byte at the top


def five_bits(qh: Tensor, qs: Tensor) -> Tensor:
    """qh (n, 4), qs (n, 16) uint8 -> (n, 32) float32, codes 0-31."""
    high = split_bits(qh, 1).transpose(1, 2).flatten(1)
    return (split_bits(qs, 4).flatten(1) | high << 4).float()
