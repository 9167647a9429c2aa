"""Packed weights made by hand: random bytes, with the float16 fields of every block set to values that hurt."""

import torch
from torch import Tensor

from flux_quant.formats import FORMATS

# Where a block keeps its float16 scale and minimum: byte offsets, from the C structs in ggml-common.h.
HALVES = {
    "q8_0": (0,),
    "q5_1": (0, 2),
    "q5_0": (0,),
    "q4_1": (0, 2),
    "q4_0": (0,),
    "iq4_nl": (0,),
    "q6_k": (208,),
    "q5_k": (0, 2),
    "q4_k": (0, 2),
    "q3_k": (108,),
    "q2_k": (80, 82),
    "iq4_xs": (0,),
}
SUBNORMAL, LARGEST = 2.0**-24, 65504.0
SCALES = (0.0, -0.0, 1.0, -1.5, SUBNORMAL, -SUBNORMAL, 2.0**-14, 0.1, -3.7, LARGEST, -LARGEST, 1e-3)


def hard_blocks(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, bytes of a row) uint8: random codes and integer scales, all zeros and all ones among them."""
    fmt = FORMATS[name]
    (nbytes,) = fmt.parts[0].shape((fmt.block,))
    count = rows * columns // fmt.block
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (count, nbytes), dtype=torch.uint8, generator=generator)
    blocks[1::7], blocks[2::7] = 0, 255
    for offset in HALVES[name]:
        order = torch.randint(len(SCALES), (count, 1), generator=generator)
        blocks[:, offset : offset + 2] = torch.tensor(SCALES)[order].half().view(torch.uint8).view(count, 2)
    return blocks.view(rows, -1)
