"""One weight from one format to another, in slices of rows, with the error measured on the way.

Blocks never cross rows, so a weight is converted slice by slice: the working memory stays at a few times `SLICE`
elements however large the weight is. A format with a scale for the whole weight is packed at once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log10, prod

import torch
from torch import Tensor

from flux_quant.formats import FORMATS, QuantFormat, Shape

SLICE = 1 << 22  # elements: 16 MB as float32

Parts = tuple[Tensor, ...]


@dataclass(frozen=True)
class Deviation:
    """Sums of squares of a weight (signal) and of what conversion changed in it (noise)."""

    signal: float = 0.0
    noise: float = 0.0

    def __add__(self, other: "Deviation") -> "Deviation":
        return Deviation(self.signal + other.signal, self.noise + other.noise)

    @property
    def snr(self) -> float:
        """In dB; infinite where nothing changed."""
        if not self.noise:
            return float("inf")
        return 10 * log10(self.signal / self.noise) if self.signal else float("-inf")

    @property
    def relative(self) -> float:
        """Root of the mean squared error over that of the weight."""
        return (self.noise / self.signal) ** 0.5 if self.signal else float(self.noise > 0)


def requantize(source: QuantFormat, parts: Parts, shape: Shape, target: QuantFormat) -> tuple[Parts, Deviation]:
    """Stored parts of a weight of `shape` -> its parts in another format (unchanged in the same), and the deviation."""
    ready = parts if source.name == target.name else None
    if ready is None and len(target.parts) > 1:
        ready = target.pack(parts[0] if source.is_plain else source.unpack(*parts))
    packed, deviation = [], Deviation()
    for first, last in row_ranges(shape):
        weight = source.unpack(*take_rows(parts, first, last))
        rows = take_rows(ready, first, last) if ready else target.pack(weight)
        packed.append(rows)
        deviation += Deviation(square_sum(weight), square_sum(weight - target.unpack(*rows)))
    return ready or tuple(map(torch.cat, zip(*packed, strict=True))), deviation


def row_ranges(shape: Shape) -> Iterator[tuple[int, int]]:
    """(first, last) of consecutive slices of rows."""
    rows = shape[0] if shape else 1
    step = max(1, SLICE * rows // max(prod(shape), 1))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def take_rows(parts: Parts, first: int, last: int) -> Parts:
    """The same rows of every part; a scale of the whole weight goes with all of them."""
    return tuple(part[first:last] if part.ndim else part for part in parts)


def square_sum(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2


def survives_float16(source: QuantFormat, parts: Parts, shape: Shape) -> bool:
    """Nothing overflows, and the error is no more than that of rounding to float16's 11 bits."""
    half = FORMATS["f16"]
    deviation = Deviation()
    for first, last in row_ranges(shape):
        weight = source.unpack(*take_rows(parts, first, last))
        deviation += Deviation(square_sum(weight), square_sum(weight - half.unpack(*half.pack(weight))))
    return deviation.noise <= deviation.signal * 2.0**-22
