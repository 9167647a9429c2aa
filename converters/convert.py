"""Execution of a plan: read, fuse, quantize, write, verify, publish.

Reading, quantizing and writing overlap, and memory is that of a few tensors however large the model is. The output is
verified as it lies on the disk, before it takes the name it was asked for.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.checkpoint import CheckpointReader, open_file
from flux_quant.converters.container import TensorInfo, as_bytes
from flux_quant.converters.conversion import Row
from flux_quant.converters.lora_math import fused, touches
from flux_quant.converters.output import OutputFile, OutputFolder
from flux_quant.converters.plan import Plan
from flux_quant.converters.quantize import Deviation, Parts, requantize, row_ranges, take_rows
from flux_quant.converters.stream import WriteBehind, read_ahead
from flux_quant.converters.writer import CheckpointWriter, FilePlan
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.naming import swap_halves

SAMPLES = 24  # weights that are compared with the source again
WHOLE_SAMPLES = 6  # of those formats that can only be compared whole
Progress = Callable[[str, int, int], None]  # phase, parameters done, parameters in all


@dataclass(frozen=True)
class Usage:
    """All tensors of one format in the output."""

    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    deviation: Deviation = Deviation()

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.tensors + other.tensors,
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            self.deviation + other.deviation,
        )

    @property
    def bits(self) -> float:
        """Per weight, scales included."""
        return 8 * self.bytes / max(self.parameters, 1)


@dataclass(frozen=True)
class Result:
    path: Path
    files: int
    formats: dict[str, Usage]  # most bytes first
    source_bytes: int  # of the converted tensors
    file_bytes: int
    resumed: int  # tensors that an earlier run had finished
    exceptions: tuple[Row, ...]  # those that could not take the format that was asked for

    @property
    def total(self) -> Usage:
        return sum(self.formats.values(), Usage())


def run(plan: Plan, progress: Progress = lambda phase, done, total: None) -> Result:
    """Execute a plan. Whatever goes wrong, the target keeps its old content.

    No temporary file stays, unless the request says `resume` and the work was interrupted.
    """
    with OutputFolder(plan.target, plan.asked.force, plan.fingerprint) if plan.asked.folder else nullcontext():
        tally = write(plan, progress)
        sizes = [file.path.stat().st_size for file in plan.files]
        for path, content in plan.extras.items():
            with OutputFile(path, len(content), force=True) as file:
                file.write(0, content)
    return Result(
        path=plan.target,
        files=len(plan.files),
        formats=dict(sorted(tally.usage.items(), key=lambda item: -item[1].bytes)),
        source_bytes=sum(row.component.nbytes(row.name) for row in plan.rows),
        file_bytes=sum(sizes),
        resumed=tally.resumed,
        exceptions=tuple(row for row in plan.rows if row.reason),
    )


class Tally:
    """What has been converted so far, and the progress of it."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.usage: dict[str, Usage] = {}
        self.done, self.total, self.progress, self.resumed = 0, total, progress, 0
        progress("converting", 0, total)

    def add(self, row: Row, deviation: Deviation) -> None:
        one = Usage(1, row.packed.numel, row.packed.nbytes, deviation)
        self.usage[row.format] = self.usage.get(row.format, Usage()) + one
        self.done += row.packed.numel
        self.progress("converting", self.done, self.total)


def write(plan: Plan, progress: Progress) -> Tally:
    with CheckpointWriter(plan.files, plan.asked.force, plan.fingerprint, plan.asked.checksums) as writer:
        tally = Tally(sum(row.packed.numel for row in plan.rows), progress)
        todo = []
        for row in plan.rows:
            notes = [writer.finished.get(piece.name) for piece in row.pieces]
            if None in notes:
                todo.append(row)
            else:
                tally.add(row, Deviation(*notes[0]))
        tally.resumed = len(plan.rows) - len(todo)
        rows = {piece.name: row for row in todo for piece in row.pieces}

        def put_down(name: str, parts: Parts, note: object) -> None:
            writer.write(name, parts, note)
            rows[name].component.forget(rows[name].name)  # parts that did not change are the source's own pages

        with (
            read_ahead(todo, lambda row: row.component.read(row.name)) as reading,
            WriteBehind(put_down) as writing,
        ):
            for row, parts in reading:
                packed, deviation = pack(plan, row, parts)
                check_numbers(plan.source, row, deviation)
                for name, piece in cut(row, packed):
                    writing.put(name, piece, (deviation.signal, deviation.noise))
                del parts, packed
                row.component.forget(row.name)
                tally.add(row, deviation)
        writer.flush()
        for path, file in writer.written:
            verify(plan, path, file, progress)
    return tally


def cut(row: Row, parts: Parts) -> list[tuple[str, Parts]]:
    """The parts of a canonical tensor -> those of each tensor that it becomes."""
    if row.swapped:
        parts = tuple(swap_halves(part) if part.ndim else part for part in parts)
    if len(row.pieces) == 1:
        (piece,) = row.pieces
        shapes = [part.shape(piece.shape) for part in FORMATS[row.format].parts]
        return [(piece.name, tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)))]
    first, out = 0, []
    for piece in row.pieces:
        last = first + piece.shape[0]
        out.append((piece.name, take_rows(parts, first, last)))
        first = last
    return out


def pack(plan: Plan, row: Row, parts: Parts, rows: tuple[int, int] | None = None) -> tuple[Parts, Deviation]:
    """Parts of a tensor as they lie in the source -> as they are to be stored; only some of its rows if so asked."""
    source, shape = FORMATS[row.source.format], row.packed.shape
    if touches(row.name, plan.adapters):
        weight = fused(row.name, source.unpack(*parts), plan.adapters)
        source, parts = FORMATS["f32"], (weight,)
    if shape != row.source.shape:
        if not source.is_plain:
            source, parts = FORMATS["f32"], (source.unpack(*parts),)
        parts = (parts[0].reshape(shape),)
    if rows:
        parts, shape = take_rows(parts, *rows), (rows[1] - rows[0], *shape[1:])
    return requantize(
        source,
        parts,
        shape,
        FORMATS[row.format],
        search=plan.asked.search,
        importance=plan.importance.get(row.name),
        device=plan.asked.device,
    )


def check_numbers(path: Path, row: Row, deviation: Deviation) -> None:
    if not isfinite(deviation.signal):
        raise UserError(f"{path}: {row.name} holds NaN or infinite values; the file is damaged")
    if not isfinite(deviation.noise):
        raise UserError(f"{path}: {row.name} has values too large for {row.format}; use bf16")


def verify(plan: Plan, path: Path, file: FilePlan, progress: Progress) -> None:
    """Open an output file and compare: all names, shapes and formats, and samples of the bytes packed a second time."""
    expected = {info.name: info for info in file.infos}
    rows = [row for row in plan.rows if any(piece.name in expected for piece in row.pieces)]
    for row in rows:
        if row.packed.shape != row.source.shape:  # a reader gives the original shape back
            name = row.pieces[0].name
            packed = FORMATS[row.format].fits(row.source.shape)  # else it unpacks what it reads
            expected[name] = TensorInfo(name, row.source.shape, row.format if packed else "f32")
    with open_file(path) as written:
        if written.tensors != expected or written.foreign:
            raise UserError(f"{plan.target} does not hold the tensors that were planned; is the disk faulty?")
        chosen = sample(rows)
        for done, row in enumerate(chosen):
            progress("verifying", done, len(chosen))
            compare(plan, row, written)
        progress("verifying", len(chosen), len(chosen))


def sample(rows: Sequence[Row]) -> list[Row]:
    """The first and last weight of each format, and others at random, the same ones every time."""
    ends = {row.format: row for row in reversed(rows)} | {f"last {row.format}": row for row in rows}
    others = random.Random(0).sample(rows, min(SAMPLES, len(rows)))
    chosen = list({row.name: row for row in (*ends.values(), *others)}.values())
    whole = [row.name for row in chosen if len(FORMATS[row.format].parts) > 1]
    return [row for row in chosen if row.name not in whole[WHOLE_SAMPLES:]]


def compare(plan: Plan, row: Row, written: CheckpointReader) -> None:
    """Pack some rows of a weight again (all of them if they share a scale): the bytes must be those in the file."""
    source = row.component.read(row.name)
    shared = len(FORMATS[row.format].parts) > 1 or touches(row.name, plan.adapters)
    simple = len(row.pieces) == 1 and not row.swapped and not shared and row.packed.shape == row.source.shape
    ranges = list(row_ranges(row.packed.shape)) if simple else []
    for rows in {ranges[0], ranges[-1]} if simple else (None,):
        packed, _ = pack(plan, row, source, rows)
        for name, again in [(row.pieces[0].name, packed)] if simple else cut(row, packed):
            if name not in written.tensors:  # another file of the same model has it
                continue
            stored = written.stored(name)
            if not equal(again, take_rows(stored, *rows) if rows else stored):
                raise UserError(f"{plan.target}: {name} ({row.format}) reads back differently; is the disk faulty?")
            written.forget(name)
    row.component.forget(row.name)


def equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Bit for bit, whatever the shapes."""
    return all(torch.equal(as_bytes(one.cpu()), as_bytes(other)) for one, other in zip(some, others, strict=True))
