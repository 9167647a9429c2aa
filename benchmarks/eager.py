"""For comparison: packed weights unpacked as GGUF loaders do it today, by a chain of torch operations.

Written to move the same tensors in the same number of steps as the nodes in use: codes are cast to the activations'
dtype and scaled in it, each operation reads and writes device memory. Values differ from the codec's by the rounding of
that dtype. Formats without a chain here go through the codec, which is of the same kind but computes in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flux_quant.formats import QuantFormat


def unpack(fmt: QuantFormat, data: Tensor, dtype: torch.dtype) -> Tensor:
    """data (N, bytes of a row) of a GGUF format -> weight (N, K) in `dtype`."""
    if fmt.name not in CHAINS:
        return fmt.unpack(data).to(dtype)
    (nbytes,) = fmt.parts[0].shape((fmt.block,))
    return CHAINS[fmt.name](data.view(-1, nbytes), dtype).view(len(data), -1)


def halves(data: Tensor, dtype: torch.dtype) -> Tensor:
    return data.contiguous().view(torch.float16).to(dtype)


def shifted(data: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """(n, ..., e) uint8 -> (n, ..., len(shifts), e) uint8."""
    step = shifts[1] - shifts[0]  # made on the device: nothing is copied there, which a captured graph forbids
    amounts = torch.arange(0, step * len(shifts), step, dtype=torch.uint8, device=data.device).view(-1, 1)
    return data.unsqueeze(-2) >> amounts & mask


def fifth_bits(qh: Tensor) -> Tensor:
    """(n, 4) uint8 -> (n, 32) uint8, 0 or 1."""
    words = qh.contiguous().view(torch.int32)
    return (words >> torch.arange(32, dtype=torch.int32, device=qh.device) & 1).to(torch.uint8)


def q8_0(data: Tensor, dtype: torch.dtype) -> Tensor:
    d, codes = data.split([2, 32], dim=1)
    return halves(d, dtype) * codes.contiguous().view(torch.int8)


def q4_0(data: Tensor, dtype: torch.dtype) -> Tensor:
    d, qs = data.split([2, 16], dim=1)
    return halves(d, dtype) * (shifted(qs, (0, 4), 15).flatten(1).to(torch.int8) - 8)


def q4_1(data: Tensor, dtype: torch.dtype) -> Tensor:
    d, m, qs = data.split([2, 2, 16], dim=1)
    return halves(d, dtype) * shifted(qs, (0, 4), 15).flatten(1) + halves(m, dtype)


def q5_0(data: Tensor, dtype: torch.dtype) -> Tensor:
    d, qh, qs = data.split([2, 4, 16], dim=1)
    codes = shifted(qs, (0, 4), 15).flatten(1) | fifth_bits(qh) << 4
    return halves(d, dtype) * (codes.to(torch.int8) - 16)


def q5_1(data: Tensor, dtype: torch.dtype) -> Tensor:
    d, m, qh, qs = data.split([2, 2, 4, 16], dim=1)
    codes = shifted(qs, (0, 4), 15).flatten(1) | fifth_bits(qh) << 4
    return halves(d, dtype) * codes + halves(m, dtype)


def scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 12) -> six-bit scales and minimums (n, 8)."""
    first, second, four = packed.split(4, dim=1)
    scales = torch.cat([first & 63, four & 15 | first >> 2 & 48], dim=1)
    return scales, torch.cat([second & 63, four >> 4 | second >> 2 & 48], dim=1)


def q4_k(data: Tensor, dtype: torch.dtype) -> Tensor:
    d, dmin, packed, qs = data.split([2, 2, 12, 128], dim=1)
    scales, mins = scales_and_minimums(packed)
    codes = shifted(qs.reshape(-1, 4, 32), (0, 4), 15).view(-1, 8, 32)
    return (halves(d, dtype) * scales).unsqueeze(2) * codes - (halves(dmin, dtype) * mins).unsqueeze(2)


def q5_k(data: Tensor, dtype: torch.dtype) -> Tensor:
    d, dmin, packed, qh, qs = data.split([2, 2, 12, 32, 128], dim=1)
    scales, mins = scales_and_minimums(packed)
    codes = shifted(qs.reshape(-1, 4, 32), (0, 4), 15).view(-1, 8, 32) | shifted(qh, tuple(range(8)), 1) << 4
    return (halves(d, dtype) * scales).unsqueeze(2) * codes - (halves(dmin, dtype) * mins).unsqueeze(2)


def q6_k(data: Tensor, dtype: torch.dtype) -> Tensor:
    ql, qh, scales, d = data.split([128, 64, 16, 2], dim=1)
    low = shifted(ql.reshape(-1, 2, 64), (0, 4), 15).reshape(-1, 8, 32)
    high = shifted(qh.reshape(-1, 2, 32), (0, 2, 4, 6), 3).reshape(-1, 8, 32)
    codes = (low | high << 4).to(torch.int8) - 32
    return (halves(d, dtype) * scales.contiguous().view(torch.int8)).unsqueeze(2) * codes.view(-1, 16, 16)


CHAINS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "q8_0": q8_0,
    "q5_1": q5_1,
    "q5_0": q5_0,
    "q4_1": q4_1,
    "q4_0": q4_0,
    "q6_k": q6_k,
    "q5_k": q5_k,
    "q4_k": q4_k,
}
