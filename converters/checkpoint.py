"""Model files as weights by name: open one, read from it.

    with open_checkpoint(path) as reader:
        for name, info in reader.tensors.items():
            weight = load(reader, name)

A reader knows names, unpacked shapes and formats from the header alone. `read` gives the stored parts of a weight as
views of the mapped file. Files are created by `writer.py`.
"""

from collections.abc import Mapping
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from flux_quant.converters import folders, gguf_io, pickle_io, safetensors_io
from flux_quant.converters.container import Contents, MappedFile, TensorInfo
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.kernels import dispatch

CONTAINERS = {".safetensors": safetensors_io, ".gguf": gguf_io}  # by suffix


class CheckpointReader(Protocol):
    path: Path
    container: str  # "safetensors", "GGUF", "PyTorch"
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]  # in file order
    foreign: Mapping[str, TensorInfo]  # present in the file, but of a type that we cannot unpack
    notes: tuple[str, ...]  # what a user should know of the file

    def read(self, name: str) -> tuple[Tensor, ...]:
        """The parts of a weight, in the order of its format. They are views of the file: never write into them."""
        ...

    def stored(self, name: str) -> tuple[Tensor, ...]:
        """What lies in the file for a weight, of any type: views, in the order of the format."""
        ...

    def nbytes(self, name: str) -> int:
        """Stored bytes of a weight, foreign ones included."""
        ...

    def stored_as(self, name: str) -> str:
        """The format in the file, which is another than the tensor's where that has no row in FORMATS."""
        ...

    @property
    def input_scales(self) -> Mapping[str, float]:
        """Scales of activations that were calibrated, by the name of the weight."""
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
        self.path, self.mapped, self.contents = mapped.path, mapped, contents
        self.container, self.metadata, self.notes = contents.container, contents.metadata, contents.notes
        self.tensors, self.foreign, self.places = contents.tensors, contents.foreign, contents.places

    def read(self, name: str) -> tuple[Tensor, ...]:
        if name in self.foreign:
            raise UserError(f"{self.path}: {name} has the type {self.foreign[name].format}, which is not supported")
        stored = self.stored(name)
        if name in self.contents.converted:
            return (self.contents.converted[name].unpack(*stored),)
        parts = FORMATS[self.tensors[name].format].parts
        return tuple(tensor.to(part.dtype) for tensor, part in zip(stored, parts, strict=True))

    def stored(self, name: str) -> tuple[Tensor, ...]:
        return tuple(self.mapped.tensor(place) for place in self.places[name])

    def nbytes(self, name: str) -> int:
        return sum(place.nbytes for place in self.places[name])

    def stored_as(self, name: str) -> str:
        converted = self.contents.converted.get(name)
        return converted.kind if converted else (self.tensors.get(name) or self.foreign[name]).format

    @cached_property
    def input_scales(self) -> dict[str, float]:
        return {name: float(self.mapped.tensor(place)) for name, place in self.contents.input_scales.items()}

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


class MergedReader:
    """Several files as one: shards of a model, or models under the prefixes of their folders."""

    def __init__(self, path: Path, parts: list[tuple[str, FileReader]]) -> None:
        self.path, self.parts = path, parts
        readers = [reader for _, reader in parts]
        self.container = " + ".join(dict.fromkeys(reader.container for reader in readers))
        self.metadata = readers[0].metadata if all(not prefix for prefix, _ in parts) else {}
        self.notes = tuple(dict.fromkeys(note for reader in readers for note in reader.notes))
        self.tensors: dict[str, TensorInfo] = {}
        self.foreign: dict[str, TensorInfo] = {}
        self.places: dict[str, tuple[FileReader, str]] = {}  # name -> the file it lies in, its name there
        for prefix, reader in parts:
            for kind, target in ((reader.tensors, self.tensors), (reader.foreign, self.foreign)):
                for name, info in kind.items():
                    full = prefix + name
                    if full in self.places:
                        raise UserError(f"{name} is in {self.places[full][0].path} and in {reader.path}")
                    self.places[full] = reader, name
                    target[full] = TensorInfo(full, info.shape, info.format)

    def read(self, name: str) -> tuple[Tensor, ...]:
        reader, inner = self.places[name]
        return reader.read(inner)

    def stored(self, name: str) -> tuple[Tensor, ...]:
        reader, inner = self.places[name]
        return reader.stored(inner)

    def nbytes(self, name: str) -> int:
        reader, inner = self.places[name]
        return reader.nbytes(inner)

    def stored_as(self, name: str) -> str:
        reader, inner = self.places[name]
        return reader.stored_as(inner)

    @cached_property
    def input_scales(self) -> dict[str, float]:
        return {prefix + name: s for prefix, reader in self.parts for name, s in reader.input_scales.items()}

    def forget(self, name: str) -> None:
        reader, inner = self.places[name]
        reader.forget(inner)

    def close(self) -> None:
        for _, reader in self.parts:
            reader.close()

    def __enter__(self) -> "MergedReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """A file, an index, a shard with its siblings, a folder with one model, a pipeline's folder (see `folders`)."""
    path = Path(path)
    source = folders.resolve(path)
    parts = [(prefix, open_file(file)) for prefix, file in source.files]
    for _, group in groupby(parts, key=itemgetter(0)):
        check_split([reader for _, reader in group])
    if len(parts) == 1 and not parts[0][0] and not source.promised:
        return parts[0][1]
    merged = MergedReader(path, parts)
    if missing := source.promised.difference(merged.places, *(reader.contents.helpers for _, reader in parts)):
        raise UserError(f"{path}: {len(missing)} tensors of the index are in no file, {min(missing)} among them")
    return merged


def open_file(path: Path) -> FileReader:
    """Safetensors, GGUF or a PyTorch pickle, told apart by the first bytes."""
    mapped = MappedFile(path)
    for module in CONTAINERS.values():
        if module.recognises(mapped):
            return FileReader(mapped, module.parse(mapped))
    if pickle_io.recognises(mapped):
        return FileReader(*pickle_io.load(path, zipped=mapped.bytes(0, 1) == b"P"))
    raise UserError(
        f"{path} is neither safetensors nor GGUF nor a PyTorch pickle (first bytes {mapped.bytes(0, 8).hex(' ')})"
    )


def check_split(readers: list[FileReader]) -> None:
    """A GGUF that is split says so: every part its number, and how many tensors all of them hold."""
    for i, reader in enumerate(readers):
        count = reader.metadata.get("split.count", 1)
        if reader.container != "GGUF" or count == 1 and len(readers) == 1:
            continue
        if count != len(readers) or reader.metadata.get("split.no") != i:
            place = f"part {reader.metadata.get('split.no', '?')} (from 0) of {count}"
            raise UserError(f"{reader.path} is {place}, its name says {i} of {len(readers)}; give it its old name")
        total = sum(len(other.places) for other in readers)
        if (promised := reader.metadata.get("split.tensors.count", total)) != total:
            raise UserError(f"{reader.path}: {total} tensors in all parts where {promised} are promised")


def load(reader: CheckpointReader, name: str) -> Tensor:
    """One weight unpacked to float32; it never shares memory with the file."""
    return dispatch.dequantize(FORMATS[reader.tensors[name].format], reader.read(name), torch.float32)


def container_for(path: Path) -> ModuleType:
    """The module that writes files of this name."""
    if path.suffix.lower() not in CONTAINERS:
        raise UserError(f"{path}: the name must end in {' or '.join(CONTAINERS)}")
    return CONTAINERS[path.suffix.lower()]
