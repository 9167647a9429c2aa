"""Is a file sound, does it hold what its source holds, how do two files differ? Reports are data; others print them.

`verify`  reads every byte once: headers, finite numbers, checksums if the file has them, names and shapes of the model,
          traps of GGUF readers; and with a source the error of every tensor
`diff`    tensors that only one of two has, other shapes and formats, metadata, and the error where both have a tensor
Tensors are matched by canonical names, so the other file may have other names, containers or parts. They are compared
in slices of rows: the memory is that of a slice, or of one weight where its rows lie in several tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from pathlib import Path

import numpy as np
import torch

from flux_quant.converters import checksums, folders, gguf_io
from flux_quant.converters.checkpoint import CheckpointReader, open_checkpoint
from flux_quant.converters.component import Component, components
from flux_quant.converters.container import MappedFile, TensorInfo, as_bytes
from flux_quant.converters.expectations import gguf_warnings, model_problems
from flux_quant.converters.quantize import Deviation, row_ranges, square_sum, take_rows
from flux_quant.converters.soundness import first_bad_row
from flux_quant.errors import UserError
from flux_quant.families import Family
from flux_quant.formats import FORMATS, Shape
from flux_quant.kernels import dispatch

Model = Component | CheckpointReader  # the reader itself where no model is known
Progress = Callable[[str, int, int], None]  # phase, parameters done, parameters in all
LOWEST_SNR = 6.0  # dB: no format is as bad, Q2_K with outliers included, so values below are other values


@dataclass(frozen=True)
class Row:
    """One tensor. `source_format` and what follows are empty where it was not compared."""

    name: str  # canonical, after the prefix of its model
    shape: Shape
    format: str
    nbytes: int
    source_format: str = ""
    deviation: Deviation | None = None
    identical: bool = False  # the same bytes in both


@dataclass
class Report:
    """`problems` make a file unusable or wrong, `warnings` do so in some programs; one line each."""

    path: Path
    against: Path | None = None
    families: tuple[Family, ...] = ()
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checksums: int = 0  # tensors whose SHA-256 was recorded and is right
    metadata: list[tuple[str, object, object]] = field(default_factory=list)  # diff: key, here, there; None if absent

    @property
    def deviations(self) -> dict[str, Deviation]:
        """By format, of all tensors that were compared."""
        sums: dict[str, Deviation] = {}
        for row in self.rows:
            if row.deviation is not None:
                sums[row.format] = sums.get(row.format, Deviation()) + row.deviation
        return sums


def verify(path: Path, against: Path | None = None, progress: Progress = lambda phase, done, total: None) -> Report:
    """Damage is reported, not raised. UserError only for a source that cannot be compared with."""
    report = Report(path, against)
    try:
        reader = open_checkpoint(path)
    except UserError as error:
        report.problems.append(str(error))
        return report
    with reader:
        report.warnings += reader.notes
        report.warnings += [problem for file in gguf_files(path) for problem in strict_warnings(file)]
        check_values(reader, report, progress)
        models = check_models(reader, report)
        if against is None:
            report.rows = [row_of(p, m, info) for p, m in models.items() for info in all_of(m).values()]
        else:
            with open_checkpoint(against) as source:
                compare_all(report, models, models_of(source), progress)
            report.problems += [
                f"{row.name} is not that of {against}: SNR {row.deviation.snr:.1f} dB"
                for row in report.rows
                if row.deviation and row.deviation.snr < LOWEST_SNR
            ]
    return report


def diff(a: Path, b: Path, progress: Progress = lambda phase, done, total: None) -> Report:
    """How `b` differs from `a`. Missing tensors and other shapes are problems; formats, errors, metadata are data."""
    report = Report(b, a)
    with open_checkpoint(a) as source, open_checkpoint(b) as reader:
        models = models_of(reader)
        report.families = tuple(model.family for model in models.values() if isinstance(model, Component))
        compare_all(report, models, models_of(source), progress)
        for key in sorted({**source.metadata, **reader.metadata}):
            here, there = reader.metadata.get(key), source.metadata.get(key)
            if not np.array_equal(here, there):
                report.metadata.append((key, here, there))
    return report


def gguf_files(path: Path) -> list[MappedFile]:
    mapped = [MappedFile(file) for _, file in folders.resolve(path).files]
    return [file for file in mapped if gguf_io.recognises(file)]


def strict_warnings(file: MappedFile) -> list[str]:
    """A few lines at most: there may be gaps before all tensors."""
    found = gguf_io.strict_problems(file)
    more = [f"and {len(found) - 3} more of the kind"] if len(found) > 3 else []
    rest = gguf_io.bytes_after(file)
    ignored = [f"{rest:,} bytes follow after the last tensor of {file.path.name}"] if rest > 0 else []
    return [f"llama.cpp and others refuse the file: {problem}" for problem in found[:3] + more] + ignored


def check_values(reader: CheckpointReader, report: Report, progress: Progress) -> None:
    """Every stored tensor: finite numbers, and the checksum if there is one."""
    try:
        sums = checksums.recorded(reader.metadata)
    except UserError as error:
        report.problems.append(str(error))
        sums = {}
    report.problems += [f"{name} has a checksum, but is not in the file" for name in sums if name not in reader.tensors]
    if unknown := [name for name in reader.tensors if sums and name not in sums]:
        report.warnings.append(f"{len(unknown)} tensors have no checksum, {unknown[0]} among them")
    total, done = sum(info.numel for info in reader.tensors.values()), 0
    for name, info in reader.tensors.items():
        progress("checking", done, total)
        parts = reader.read(name)
        if (row := first_bad_row(FORMATS[info.format], parts, info.shape)) is not None:
            report.problems.append(f"{name} ({info.format}) holds NaN or infinite values, first in row {row}")
        if name in sums:
            right = checksums.checksum(reader.stored(name)) == sums[name]
            report.checksums += right
            if not right:
                report.problems.append(f"{name} has changed since it was written: its SHA-256 is another")
        del parts
        reader.forget(name)
        done += info.numel
    progress("checking", done, total)


def check_models(reader: CheckpointReader, report: Report) -> dict[str, Model]:
    """Names and shapes. Returns the models by prefix, the reader itself if none can be told apart."""
    try:
        found = components(reader)
    except UserError as error:
        report.problems.append(str(error))
        return {"": reader}
    report.families = tuple(component.family for component in found)
    if not found:
        report.warnings.append("no model that is known here: names and shapes were not checked")
    for component in found:
        report.problems += [component.prefix + problem for problem in model_problems(component)]
        if component.ignored:
            what = f"{len(component.ignored)} tensors are no part of a {component.family.name}"
            report.warnings.append(f"{what}, {component.prefix}{component.ignored[0]} among them")
    if strange := outside(reader, found):
        report.warnings.append(f"{len(strange)} tensors belong to no model that is known here, {strange[0]} among them")
    if reader.container == "GGUF":
        report.warnings += gguf_warnings(reader, found)
    return {component.prefix: component for component in found} or {"": reader}


def outside(reader: CheckpointReader, found: list[Component]) -> list[str]:
    """Stored tensors under none of the prefixes."""
    prefixes = tuple(component.prefix for component in found)
    return [name for name in (*reader.tensors, *reader.foreign) if found and not name.startswith(prefixes)]


def models_of(reader: CheckpointReader) -> dict[str, Model]:
    return {component.prefix: component for component in components(reader)} or {"": reader}


def all_of(model: Model) -> dict[str, TensorInfo]:
    return {**model.tensors, **model.foreign}


def row_of(prefix: str, model: Model, info: TensorInfo) -> Row:
    return Row(prefix + info.name, info.shape, model.stored_as(info.name), model.nbytes(info.name))


def compare_all(report: Report, models: dict[str, Model], sources: dict[str, Model], progress: Progress) -> None:
    """Every model with that of the same family in the source. UserError if there is no pair."""
    pairs = [(p, m, s) for p, m in models.items() for s in sources.values() if family_of(m) == family_of(s)]
    if not pairs:
        kinds = [" + ".join(map(family_of, each.values())) for each in (models, sources)]
        raise UserError(f"{report.path} ({kinds[0]}) and {report.against} ({kinds[1]}) have no model in common")
    if left := [family_of(m) for p, m in models.items() if p not in [pair[0] for pair in pairs]]:
        report.warnings.append(f"{report.against} has no {', '.join(left)} to compare with")
    total, done = sum(info.numel for _, model, _ in pairs for info in all_of(model).values()), 0
    for prefix, model, source in pairs:
        theirs = all_of(source)
        for name, info in all_of(model).items():
            progress("comparing", done, total)
            row = row_of(prefix, model, info)
            other = theirs.pop(name, None)
            if other is None:
                report.problems.append(f"{row.name} is not in {report.against}")
            elif other.shape != info.shape:
                shapes = f"the shape {list(info.shape)}; in {report.against} {list(other.shape)}"
                report.problems.append(f"{row.name} has {shapes}")
            elif info.format not in FORMATS or other.format not in FORMATS:
                report.warnings.append(f"{row.name} was not compared: {info.format} and {other.format}")
            else:
                deviation, identical = deviation_of(model, source, info, other)
                row = replace(row, source_format=source.stored_as(name), deviation=deviation, identical=identical)
            report.rows.append(row)
            done += info.numel
        report.problems += [f"{prefix}{name} is missing; {report.against} has it" for name in theirs]
    progress("comparing", done, total)


def family_of(model: Model) -> str:
    return model.family.name if isinstance(model, Component) else "unknown model"


def deviation_of(model: Model, source: Model, info: TensorInfo, other: TensorInfo) -> tuple[Deviation, bool]:
    """Of the weight from the source's (NaN where numbers are not finite), and whether the stored bytes are the same."""
    parts, originals = model.read(info.name), source.read(info.name)
    fmt, original = FORMATS[info.format], FORMATS[other.format]
    total, identical = Deviation(), fmt is original
    for first, last in row_ranges(info.shape):
        rows, wanted = take_rows(parts, first, last), take_rows(originals, first, last)
        same = fmt is original and all(torch.equal(as_bytes(a), as_bytes(b)) for a, b in zip(rows, wanted, strict=True))
        weight = dispatch.dequantize(original, wanted, torch.float32)
        stored = weight if same else dispatch.dequantize(fmt, rows, torch.float32)
        total += Deviation(square_sum(weight), square_sum(weight - stored))
        identical &= same
    del parts, originals
    model.forget(info.name)
    source.forget(info.name)
    return total if isfinite(total.signal + total.noise) else Deviation(nan, nan), identical
