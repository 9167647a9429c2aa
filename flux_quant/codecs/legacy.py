"""GGUF's blocks of 32 weights: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0. Bytes equal those of ggml's reference quantizer.

Every function works on blocks: (n, 32) float32 <-> (n, bytes) uint8, fields in the order of the C structs in
ggml-common.h, scales chosen as in ggml-quants.c `quantize_row_*_ref` (in float32, stored as float16; the codes are
computed with the float32 scale). Nibbles: byte j holds element j in its low and element j + 16 in its high half.
"""

import torch
from torch import Tensor


def pack_q8_0(blocks: Tensor) -> Tensor:
    d = divide(blocks.abs().amax(dim=1, keepdim=True), 127)
    scaled = blocks * inverse(d)
    codes = scaled.sign() * (scaled.abs() + 0.5).floor()  # roundf: half away from zero
    return torch.cat([as_bytes(d), codes.to(torch.int8).view(torch.uint8)], dim=1)


def unpack_q8_0(data: Tensor) -> Tensor:
    d, codes = data.split([2, 32], dim=1)
    return as_half(d) * codes.contiguous().view(torch.int8).float()


def pack_q4_0(blocks: Tensor) -> Tensor:
    d = signed_largest(blocks) / -8
    codes = (blocks * inverse(d) + 8.5).to(torch.uint8).clamp(max=15)
    return torch.cat([as_bytes(d), pack_nibbles(codes)], dim=1)


def unpack_q4_0(data: Tensor) -> Tensor:
    d, qs = data.split([2, 16], dim=1)
    return as_half(d) * (unpack_nibbles(qs).float() - 8)


def pack_q4_1(blocks: Tensor) -> Tensor:
    low = blocks.amin(dim=1, keepdim=True)
    d = divide(blocks.amax(dim=1, keepdim=True) - low, 15)
    codes = ((blocks - low) * inverse(d) + 0.5).to(torch.uint8).clamp(max=15)
    return torch.cat([as_bytes(d), as_bytes(low), pack_nibbles(codes)], dim=1)


def unpack_q4_1(data: Tensor) -> Tensor:
    d, m, qs = data.split([2, 2, 16], dim=1)
    return as_half(d) * unpack_nibbles(qs).float() + as_half(m)


def pack_q5_0(blocks: Tensor) -> Tensor:
    d = signed_largest(blocks) / -16
    codes = (blocks * inverse(d) + 16.5).to(torch.uint8).clamp(max=31)
    return torch.cat([as_bytes(d), pack_fifth_bits(codes), pack_nibbles(codes & 15)], dim=1)


def unpack_q5_0(data: Tensor) -> Tensor:
    d, qh, qs = data.split([2, 4, 16], dim=1)
    return as_half(d) * ((unpack_nibbles(qs) | unpack_fifth_bits(qh)).float() - 16)


def pack_q5_1(blocks: Tensor) -> Tensor:
    low = blocks.amin(dim=1, keepdim=True)
    d = divide(blocks.amax(dim=1, keepdim=True) - low, 31)
    codes = ((blocks - low) * inverse(d) + 0.5).to(torch.uint8)
    return torch.cat([as_bytes(d), as_bytes(low), pack_fifth_bits(codes), pack_nibbles(codes & 15)], dim=1)


def unpack_q5_1(data: Tensor) -> Tensor:
    d, m, qh, qs = data.split([2, 2, 4, 16], dim=1)
    return as_half(d) * (unpack_nibbles(qs) | unpack_fifth_bits(qh)).float() + as_half(m)


def signed_largest(blocks: Tensor) -> Tensor:
    """(n, 32) -> (n, 1): the value of largest magnitude with its sign, the first one on a tie."""
    return blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))


def divide(values: Tensor, divisor: float) -> Tensor:
    """Rounded correctly on every device: by a Python number, CUDA would multiply by the rounded reciprocal."""
    return values / values.new_full((), divisor)


def inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, torch.zeros_like(d), 1 / d)


def as_bytes(scale: Tensor) -> Tensor:
    """(n, 1) float32 -> (n, 2) uint8, the bytes of the float16."""
    return scale.to(torch.float16).view(torch.uint8)


def as_half(data: Tensor) -> Tensor:
    """(n, 2) uint8 -> (n, 1) float32."""
    return data.contiguous().view(torch.float16).float()


def pack_nibbles(codes: Tensor) -> Tensor:
    """(n, 32) codes 0-15 -> (n, 16) uint8."""
    return codes[:, :16] | codes[:, 16:] << 4


def unpack_nibbles(qs: Tensor) -> Tensor:
    return torch.cat([qs & 15, qs >> 4], dim=1)


def pack_fifth_bits(codes: Tensor) -> Tensor:
    """(n, 32) codes 0-31 -> (n, 4) uint8: bit i of the little-endian word is bit 4 of element i."""
    bits = (codes >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return bits.sum(dim=2, dtype=torch.uint8)


def unpack_fifth_bits(qh: Tensor) -> Tensor:
    """(n, 4) uint8 -> (n, 32) uint8, each 0 or 16."""
    bits = qh.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=qh.device) & 1
    return bits.flatten(1) << 4
