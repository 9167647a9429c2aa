"""What the containers share: where a tensor lies in a file, and the mapped file itself.

A container (safetensors, GGUF) is two functions: `parse(mapped) -> Contents` says where everything lies, `layout(infos,
metadata) -> Layout` says where everything will lie. Reading and writing themselves are the same for all of them.
Numbers found in a file are compared with its size before anything is done with them.
"""

import mmap
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape


@dataclass(frozen=True)
class TensorInfo:
    """A weight of a checkpoint: its unpacked shape in torch's order, and the name of its format in FORMATS."""

    name: str
    shape: Shape
    format: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return FORMATS[self.format].nbytes(self.shape)


@dataclass(frozen=True)
class Place:
    """Where one stored tensor begins in its file, counted from the first byte, and what lies there."""

    offset: int
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Converted:
    """A way of storing that has no row in FORMATS, but is understood: its stored tensors -> one plain tensor."""

    kind: str  # "fp8_e5m2", "fp8 per row"
    unpack: Callable[..., Tensor]


@dataclass
class Contents:
    """A parsed header. `foreign` holds tensors of types that have no row in FORMATS, with the file's own type name."""

    container: str
    metadata: dict[str, object]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    places: dict[str, tuple[Place, ...]] = field(default_factory=dict)  # of the parts, in the format's order
    foreign: dict[str, TensorInfo] = field(default_factory=dict)
    converted: dict[str, Converted] = field(default_factory=dict)  # tensors that are unpacked when they are read
    helpers: set[str] = field(default_factory=set)  # stored tensors that are no weights: scales, markers
    input_scales: dict[str, Place] = field(default_factory=dict)  # by the name of the weight
    notes: tuple[str, ...] = ()  # what was left out

    def add(self, info: TensorInfo, *places: Place) -> None:
        (self.tensors if info.format in FORMATS else self.foreign)[info.name] = info
        self.places[info.name] = places


@dataclass(frozen=True)
class Layout:
    """A file before it is written: its first bytes, small tensors that are known already, a place for every other."""

    header: bytes
    places: Mapping[str, tuple[Place, ...]]  # weight name -> places of its parts
    nbytes: int  # of the whole file
    constants: tuple[tuple[int, bytes], ...] = ()  # (offset, content)


def as_bytes(tensor: Tensor) -> Tensor:
    """Any tensor -> its bytes in memory order, (nbytes,) uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class MappedFile:
    """A file as read-only memory. Tensors are views of it; it is unmapped when the last of them is gone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = file.seek(0, 2)
            if self.size == 0:
                raise UserError(f"{path} is empty")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            self.data = torch.frombuffer(self.map, dtype=torch.uint8)

    def bytes(self, offset: int, count: int) -> bytes:
        return self.map[offset : offset + count]

    def tensor(self, place: Place) -> Tensor:
        """A view; a copy where the file breaks the alignment of the type."""
        data = self.data[place.offset : place.end]
        if place.offset % place.dtype.itemsize:
            data = data.clone()
        return data.view(place.dtype).view(place.shape)

    def forget(self, place: Place) -> None:
        """Tell the system that these pages will not be needed again soon."""
        if place.nbytes and hasattr(self.map, "madvise"):
            begin = place.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, begin, place.end - begin)
