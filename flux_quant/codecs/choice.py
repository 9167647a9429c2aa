"""What a quantizer decides about blocks of a GGUF format, before it is written as bytes.

The searches (torch: `search`, CPU loops: `kernels.cpu_quantize`) end in a Choice; `kquants`, `iq4` and `legacy` turn a
Choice into the bytes of their format and read those bytes again.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Choice(NamedTuple):
    """n blocks of one format in G groups: codes as they are stored (from 0), scales and minimums as integers."""

    codes: Tensor  # (n, elements) uint8
    d: Tensor  # (n, 1) float32 that float16 holds exactly
    m: Tensor | None = None  # (n, 1) float32: the minimum (Q4_1, Q5_1) or what the minimums are multiples of (dmin)
    scales: Tensor | None = None  # (n, G) int16, signed where the format is
    mins: Tensor | None = None  # (n, G) int16, from 0


def half_bytes(values: Tensor) -> Tensor:
    """(n, 1) float32 -> (n, 2) uint8, the bytes of the float16."""
    return values.to(torch.float16).view(torch.uint8)


def half_values(data: Tensor) -> Tensor:
    """(n, 2) uint8 -> (n, 1) float32."""
    return data.contiguous().view(torch.float16).float()


def join_bits(fields: Tensor, width: int, shift: int = 0) -> Tensor:
    """(..., f, e) uint8 -> (..., e) uint8: `width` bits of each from bit `shift` on, the first field in the lowest.

    Eight bytes are handled as one integer where e allows: what crosses into the next byte is masked away.
    """
    word = fields.shape[-1] % 8 == 0 and fields.is_contiguous()
    if word:
        fields = fields.view(torch.int64)
    out = (fields >> shift if shift else fields) & ((1 << width) - 1) * (0x0101010101010101 if word else 1)
    while (count := out.shape[-2]) > 1:  # 2, 4 or 8: the second half above the first, until one is left
        low, high = out.split(count // 2, dim=-2)
        out = low | high << width * (count // 2)
    return out.squeeze(-2).view(torch.uint8)


def split_bits(data: Tensor, width: int) -> Tensor:
    """The inverse of `join_bits`: (..., e) uint8 -> (..., 8 // width, e) uint8."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=data.device)
    return data.unsqueeze(-2) >> shifts.unsqueeze(-1) & (1 << width) - 1
