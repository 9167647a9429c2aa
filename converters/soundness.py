"""Is every number of a stored weight finite? Without unpacking where the layout tells.

A NaN or an infinite scale makes a block useless, and nothing else can: the codes are integers and no product of finite
F16 scales overflows float32. So of a GGUF block only the upper bytes of its scales are read, 1 byte of 18 or of 210.
"""

import torch
from torch import Tensor

from flux_quant.converters.quantize import Parts, row_ranges, take_rows
from flux_quant.formats import QuantFormat, Shape

SCALES = {  # format -> where the F16 scales (and minimums) begin in a block: gguf.md, block layouts of ggml-quants.h
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}


def first_bad_row(fmt: QuantFormat, parts: Parts, shape: Shape) -> int | None:
    """The first row of the weight that holds NaN or infinite values; None if all are finite."""
    for first, last in row_ranges(shape):
        rows = take_rows(parts, first, last)
        if not all_finite(fmt, rows):
            finite = torch.isfinite(fmt.unpack(*rows)).reshape(last - first, -1).all(1)
            return first + int((~finite).nonzero()[0])
    return None


def all_finite(fmt: QuantFormat, parts: Parts) -> bool:
    data = parts[0]
    if data.numel() == 0:
        return True
    if fmt.is_plain:
        return bool(torch.isfinite(torch.stack(data.aminmax())).all())
    if fmt.name in SCALES:
        nbytes = fmt.parts[0].shape((fmt.block,))[0]
        blocks = data.reshape(-1, nbytes)
        return not any(exponent_is_full(blocks[:, offset + 1]) for offset in SCALES[fmt.name])
    if data.dtype == torch.float8_e4m3fn:
        codes = data.view(torch.uint8) & 0x7F
        return bool(codes.max() < 0x7F) and all(bool(torch.isfinite(scale).all()) for scale in parts[1:])
    return bool(torch.isfinite(fmt.unpack(*parts)).all())


def exponent_is_full(upper: Tensor) -> bool:
    """Upper bytes of F16 numbers: sign, five bits of exponent (all set: infinite or NaN), two of the fraction."""
    return bool(((upper & 0x7C) == 0x7C).any())
