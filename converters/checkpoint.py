"""Model files as weights by name: open one, read from it.

    with open_checkpoint(path) as reader:
        for name, info in reader.tensors.items():
            weight = load(reader, name)

A reader knows names, unpacked shapes and formats from the header alone. `read` gives the stored parts of a weight as
views of the mapped file. Files are created by `writer.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

from torch import Tensor

from flux_quant.converters import gguf_io, safetensors_io
from flux_quant.converters.container import Contents, MappedFile, TensorInfo
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

CONTAINERS = {".safetensors": safetensors_io, ".gguf": gguf_io}  # by suffix


class CheckpointReader(Protocol):
    path: Path
    container: str  # "safetensors" or "GGUF"
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]  # in file order
    foreign: Mapping[str, TensorInfo]  # present in the file, but of a type that we cannot unpack

    def read(self, name: str) -> tuple[Tensor, ...]:
        """The parts of a weight, in the order of its format. They are views of the file: never write into them."""
        ...

    def nbytes(self, name: str) -> int:
        """Stored bytes of a weight, foreign ones included."""
        ...

    def forget(self, name: str) -> None:
        """The weight will not be read again soon: its pages need not stay in memory."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> "CheckpointReader": ...

    def __exit__(self, *_: object) -> None: ...


class FileReader:
    """One file, mapped."""

    def __init__(self, mapped: MappedFile, contents: Contents) -> None:
        self.path, self.mapped, self.places = mapped.path, mapped, contents.places
        self.container, self.metadata = contents.container, contents.metadata
        self.tensors, self.foreign = contents.tensors, contents.foreign

    def read(self, name: str) -> tuple[Tensor, ...]:
        if name in self.foreign:
            raise UserError(f"{self.path}: {name} has the type {self.foreign[name].format}, which is not supported")
        parts = FORMATS[self.tensors[name].format].parts
        return tuple(
            self.mapped.tensor(place).to(part.dtype) for place, part in zip(self.places[name], parts, strict=True)
        )

    def nbytes(self, name: str) -> int:
        return sum(place.nbytes for place in self.places[name])

    def forget(self, name: str) -> None:
        for place in self.places[name]:
            self.mapped.forget(place)

    def close(self) -> None:
        """Views that were handed out stay valid; the file is unmapped with the last of them."""
        self.__dict__.pop("mapped", None)

    def __enter__(self) -> "FileReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> FileReader:
    """Safetensors or GGUF, told apart by the first bytes."""
    mapped = MappedFile(Path(path))
    for module in CONTAINERS.values():
        if module.recognises(mapped):
            return FileReader(mapped, module.parse(mapped))
    if mapped.bytes(0, 2) == b"PK" or mapped.bytes(0, 1) == b"\x80":
        raise UserError(f"{path} is a pickle, which can run code when it is read; save it as safetensors first")
    raise UserError(f"{path} is neither safetensors nor GGUF (first bytes {mapped.bytes(0, 8).hex(' ')})")


def load(reader: CheckpointReader, name: str) -> Tensor:
    """One weight unpacked to float32; it never shares memory with the file."""
    parts = reader.read(name)
    weight = FORMATS[reader.tensors[name].format].unpack(*parts)
    return weight.clone() if weight.data_ptr() == parts[0].data_ptr() else weight


def container_for(path: Path) -> ModuleType:
    """The module that writes files of this name."""
    if path.suffix.lower() not in CONTAINERS:
        raise UserError(f"{path}: the name must end in {' or '.join(CONTAINERS)}")
    return CONTAINERS[path.suffix.lower()]
