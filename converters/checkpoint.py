"""Model files as weights by name: open one, read from it, create one.

    with open_checkpoint(path) as reader:
        for name, info in reader.tensors.items():
            weight = load(reader, name)

A reader knows names, unpacked shapes and formats from the header alone. `read` gives the stored parts of a weight as
views of the mapped file. A writer is created from the full list of weights, so it writes its header first, holds no
tensor, and knows the size of the file before it begins.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

from torch import Tensor

from flux_quant.converters import gguf_io, safetensors_io
from flux_quant.converters.container import Contents, Layout, MappedFile, TensorInfo, as_bytes
from flux_quant.converters.output import OutputFile
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

CONTAINERS = {".safetensors": safetensors_io, ".gguf": gguf_io}  # by the suffix of a file to be written


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


class CheckpointWriter:
    """Context manager. Every weight is written once, in any order; leaving it publishes the file if all are there."""

    def __init__(self, path: Path, infos: Iterable[TensorInfo], layout: Layout, force: bool) -> None:
        self.layout = layout
        self.formats = {info.name: FORMATS[info.format] for info in infos}
        self.pending = set(self.formats)
        self.output = OutputFile(path, layout.nbytes, force)

    @property
    def temporary(self) -> Path:
        """The file as long as it is not published."""
        return self.output.temporary

    def __enter__(self) -> "CheckpointWriter":
        self.output.__enter__()
        try:
            for offset, data in ((0, self.layout.header), *self.layout.constants):
                self.output.write(offset, data)
        except BaseException:
            self.output.discard()
            raise
        return self

    def write(self, name: str, parts: tuple[Tensor, ...]) -> None:
        self.pending.remove(name)
        for place, part in zip(self.layout.places[name], parts, strict=True):
            if (part.dtype, tuple(part.shape)) != (place.dtype, place.shape):
                raise ValueError(f"{name}: {part.dtype} {tuple(part.shape)} in a place for {place.dtype} {place.shape}")
            self.output.write(place.offset, as_bytes(part.cpu()).numpy().data)

    def flush(self) -> None:
        """All weights are written: from now on `temporary` can be opened as a checkpoint."""
        if self.pending:
            raise ValueError(f"{len(self.pending)} weights were not written, {min(self.pending)} among them")
        self.output.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self.flush()
        except BaseException:
            self.output.discard()
            raise
        self.output.__exit__(kind, error, _)


def create_checkpoint(
    path: str | Path, infos: Iterable[TensorInfo], metadata: Mapping[str, object], force: bool = False
) -> CheckpointWriter:
    """The container follows from the suffix. Nothing is created before the writer is entered."""
    path, infos = Path(path), list(infos)
    layout = container_for(path).layout(infos, metadata)
    return CheckpointWriter(path, infos, layout, force)


def container_for(path: Path):
    """The module that writes files of this name."""
    if path.suffix.lower() not in CONTAINERS:
        raise UserError(f"{path}: the name must end in {' or '.join(CONTAINERS)}")
    return CONTAINERS[path.suffix.lower()]
