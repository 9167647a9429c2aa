"""Checkpoints are created from the full list of their weights: the header first, then every weight at its place.

    with create_checkpoint(path, infos, metadata) as writer:
        for info in infos:
            writer.write(info.name, FORMATS[info.format].pack(weight))

A writer holds no tensor and knows the size of everything before it begins. Several files that belong together (the
parts of a split model) are one writer: they are published together, the first one last, because readers begin with it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from torch import Tensor

from flux_quant.converters.checkpoint import container_for
from flux_quant.converters.checksums import PENDING, checksum, entry
from flux_quant.converters.container import Layout, TensorInfo, as_bytes
from flux_quant.converters.output import OutputFile, check_space
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

SYNC_BYTES = 1 << 28  # are written before they are brought to the disk and noted as finished


@dataclass(frozen=True)
class FilePlan:
    """A file to be written: what is in it, in order."""

    path: Path
    infos: tuple[TensorInfo, ...]
    metadata: Mapping[str, object]
    options: Mapping[str, object] = field(default_factory=dict)  # of the container's `layout`


class CheckpointWriter:
    """Context manager. Every weight is written once, in any order; leaving it publishes the files if all are there.

    With a fingerprint, weights that an earlier process finished of the same work are in `finished`, with their notes,
    and need not be written again; see `OutputFile`.
    """

    def __init__(self, files: Sequence[FilePlan], force: bool, fingerprint: str = "", checksums: bool = False) -> None:
        self.files = files
        names = [info.name for file in files for info in file.infos]
        self.sums = dict.fromkeys(names, PENDING) if checksums else {}
        self.layouts = [self.layout_of(file) for file in files]
        self.outputs = [
            OutputFile(file.path, layout.nbytes, force, fingerprint)
            for file, layout in zip(files, self.layouts, strict=True)
        ]
        check_space(files[0].path, self.nbytes, sum(output.present for output in self.outputs))
        self.home = {info.name: i for i, file in enumerate(files) for info in file.infos}
        self.formats = {info.name: FORMATS[info.format] for file in files for info in file.infos}
        self.pending = set(self.home)
        self.finished: dict[str, object] = {}
        self.notes: list[dict[str, object]] = [{} for _ in files]
        self.unsynced = 0

    def layout_of(self, file: FilePlan) -> Layout:
        """The first file has the checksums of all."""
        sums = entry(self.sums) if self.sums and file is self.files[0] else {}
        return container_for(file.path).layout(file.infos, {**file.metadata, **sums}, **file.options)

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(layout.nbytes for layout in self.layouts)

    @property
    def written(self) -> list[tuple[Path, FilePlan]]:
        """The files as long as they are not published, and what should be in them."""
        return [(output.temporary, file) for output, file in zip(self.outputs, self.files, strict=True)]

    def __enter__(self) -> "CheckpointWriter":
        try:
            for output, layout in zip(self.outputs, self.layouts, strict=True):
                output.__enter__()
                for name, (note, digest) in output.finished.items():
                    self.finished[name] = note
                    if self.sums:
                        self.sums[name] = digest
                for offset, data in ((0, layout.header), *layout.constants):
                    output.write(offset, data)
        except BaseException:
            self.discard()
            raise
        self.pending -= set(self.finished)
        return self

    def write(self, name: str, parts: tuple[Tensor, ...], note: object = None) -> None:
        """The parts of a weight in the order of its format. The note is what `finished` will say of it."""
        if name not in self.pending and name not in self.finished:
            raise ValueError(f"{name} has been written already")
        self.pending.discard(name)
        i = self.home[name]
        for place, part in zip(self.layouts[i].places[name], parts, strict=True):
            if (part.dtype, tuple(part.shape)) != (place.dtype, place.shape):
                raise ValueError(f"{name}: {part.dtype} {tuple(part.shape)} in a place for {place.dtype} {place.shape}")
            self.outputs[i].write(place.offset, as_bytes(part.cpu()).numpy().data)
            self.unsynced += place.nbytes
        if self.sums:
            self.sums[name] = checksum(parts)
        self.notes[i][name] = note, self.sums.get(name)
        if self.unsynced >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Bring to the disk what was written, and note it."""
        for output, notes in zip(self.outputs, self.notes, strict=True):
            if notes:
                output.finish(notes)
                notes.clear()
        self.unsynced = 0

    def flush(self) -> None:
        """All weights are written: from now on the files in `written` can be opened as checkpoints."""
        if self.pending:
            raise ValueError(f"{len(self.pending)} weights were not written, {min(self.pending)} among them")
        if self.sums:
            self.outputs[0].write(0, self.layout_of(self.files[0]).header)
        self.sync()
        for output in self.outputs:
            output.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self.discard(keep=not issubclass(kind, UserError))
            return
        try:
            self.flush()
            for output in reversed(self.outputs):
                output.publish()
        except BaseException:
            self.discard()
            raise

    def discard(self, keep: bool = False) -> None:
        for output in self.outputs:
            output.discard(keep)


def create_checkpoint(
    path: str | Path, infos: Iterable[TensorInfo], metadata: Mapping[str, object], force: bool = False
) -> CheckpointWriter:
    """One file. The container follows from the suffix. Nothing is created before the writer is entered."""
    return CheckpointWriter([FilePlan(Path(path), tuple(infos), metadata)], force)
