"""Unpacking by torch alone, with the codec. Runs on every device, and defines what the other ways must give."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flux_quant.formats import QuantFormat
from flux_quant.kernels.packed import Rows, row_slices, take, weight_shape

SCRATCH_BYTES = 64 << 20  # of float32 weight at a time: FLUX.1's widest layer would need 264 MB at once


def dequantize(fmt: QuantFormat, parts: Sequence[Tensor], out: Tensor) -> Tensor:
    """Parts of a weight (N, ..., K) -> out, the same shape in any float dtype."""
    for rows in row_slices(tuple(out.shape), SCRATCH_BYTES, 4):
        out[rows] = fmt.unpack(*take(parts, rows))
    return out


def pieces(fmt: QuantFormat, parts: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Rows, Tensor]]:
    """Rows of a weight (N, K) in `dtype`, for `passes`."""
    for rows in row_slices(weight_shape(fmt, parts), SCRATCH_BYTES, 4):
        yield rows, fmt.unpack(*take(parts, rows)).to(dtype)
