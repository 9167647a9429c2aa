"""One weight from one format to another, with the error measured on the way.

On the CPU the loops of `kernels.cpu_quantize` work on the stored 16 or 32 bits; elsewhere the codecs do. What has to be
unpacked first goes slice by slice: blocks never cross rows, so the working memory stays at a few times `SLICE` elements
however large the weight is, and the result does not depend on where it was cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log10, prod
from types import EllipsisType

import torch
from torch import Tensor

from flux_quant.codecs import fp8
from flux_quant.formats import FORMATS, QuantFormat, Shape
from flux_quant.kernels import cpu_quantize

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


def requantize(
    source: QuantFormat,
    parts: Parts,
    shape: Shape,
    target: QuantFormat,
    search: bool = True,
    importance: Tensor | None = None,
    device: torch.device | str | None = None,
) -> tuple[Parts, Deviation]:
    """Stored parts of a weight of `shape` -> its parts in another format (unchanged in the same), and the deviation.

    `search` looks for the best scales where the format has a search, weighted with `importance` (K,) of each input.
    """
    device = torch.device(device or "cpu")
    if source.name == target.name:
        return parts, sum((Deviation(square_sum(w)) for _, w in unpacked(source, parts, shape, device)), Deviation())
    loops = device.type == "cpu" and cpu_quantize.supports(target.name)
    if loops and source.is_plain:
        packed, *sums = cpu_quantize.quantize(target.name, parts[0], importance, search)
        return packed, Deviation(*sums)
    if len(target.parts) > 1:
        return scaled(source, parts, shape, target, device)
    pieces, deviation = [], Deviation()
    for _, weight in unpacked(source, parts, shape, device):
        if loops:
            packed, *sums = cpu_quantize.quantize(target.name, weight, importance, search)
        else:
            packed = pack(target, weight, search, importance)
            sums = square_sum(weight), square_sum(weight - target.unpack(*packed))
        pieces.append(tuple(part.to(parts[0].device) for part in packed))
        deviation += Deviation(*sums)
    return tuple(map(torch.cat, zip(*pieces, strict=True))) if len(pieces) > 1 else pieces[0], deviation


def pack(target: QuantFormat, weight: Tensor, search: bool, importance: Tensor | None) -> Parts:
    if not search or target.search is None:
        return target.pack(weight)
    return target.search(weight, None if importance is None else importance.to(weight.device))


def scaled(
    source: QuantFormat, parts: Parts, shape: Shape, target: QuantFormat, device: torch.device
) -> tuple[Parts, Deviation]:
    """FP8 with one scale: read once for the largest magnitude, once more to cast."""
    largest = torch.stack([weight.abs().amax() for _, weight in unpacked(source, parts, shape, device)]).amax()
    scale = fp8.scale_for(largest)
    data = torch.empty(shape, dtype=target.parts[0].dtype)
    deviation = Deviation()
    for rows, weight in unpacked(source, parts, shape, device):
        codes = fp8.cast(weight / scale)
        data[rows] = codes.to(data.device)
        deviation += Deviation(square_sum(weight), square_sum(weight - target.unpack(codes, scale)))
    return (data, scale.to(data.device)), deviation


def unpacked(
    source: QuantFormat, parts: Parts, shape: Shape, device: torch.device
) -> Iterator[tuple[slice | EllipsisType, Tensor]]:
    """Slices of rows of a weight in float32 on a device, and where they lie."""
    for first, last in row_ranges(shape):
        rows = slice(first, last) if shape else ...
        yield rows, source.unpack(*(part.to(device) for part in take_rows(parts, first, last)))


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
