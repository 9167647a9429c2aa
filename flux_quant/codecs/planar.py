"""Planar rows: the bytes of each row rearranged so that a GPU can load them in wide pieces.

Blocks of 18, 22, 34, 110 or 210 bytes put every field at an address that only two divides, and a GPU then loads two
bytes at a time. In a planar row all codes of the row come first, then the next smaller field of all its blocks, and so
on: as many bytes, in another order. Rows stay independent and keep their length, so that rows are cut and joined as in
native weights. Formats whose blocks are aligned as they are (Q4_K, Q5_K, Q5_1, IQ4_XS) need no such order.
"""

import torch
from torch import Tensor

# Bytes of each field of a block, in the file's order (the C structs of ggml-common.h).
FIELDS: dict[str, tuple[int, ...]] = {
    "q8_0": (2, 32),
    "q5_0": (2, 4, 16),
    "q4_1": (4, 16),
    "q4_0": (2, 16),
    "iq4_nl": (2, 16),
    "q6_k": (128, 64, 16, 2),
    "q3_k": (32, 64, 12, 2),
    "q2_k": (16, 64, 4),
}


def to_planar(name: str, data: Tensor) -> Tensor:
    """(..., bytes of a row) uint8 in native blocks -> the same shape, planar. A copy."""
    sizes = FIELDS[name]
    fields = data.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
    return torch.cat([fields[i].flatten(-2) for i in by_size(sizes)], dim=-1)


def to_native(name: str, data: Tensor) -> Tensor:
    """The inverse of `to_planar`."""
    sizes = FIELDS[name]
    blocks, order = data.shape[-1] // sum(sizes), by_size(sizes)
    planes = data.split([sizes[i] * blocks for i in order], dim=-1)
    fields = {i: plane.unflatten(-1, (blocks, sizes[i])) for i, plane in zip(order, planes, strict=True)}
    return torch.cat([fields[i] for i in range(len(sizes))], dim=-1).flatten(-2)


def by_size(sizes: tuple[int, ...]) -> list[int]:
    """Numbers of the fields in planar order: the largest first, so that every field starts as aligned as can be."""
    return sorted(range(len(sizes)), key=lambda i: -sizes[i])
