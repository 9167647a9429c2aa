"""Conversion of one model: plan, stream, verify, publish.

The plan is a value: it can be printed, and `run` executes it without deciding anything. Memory is one tensor's work.
The output is verified as it lies on the disk, before it takes the name it was asked for.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch

import flux_quant
from flux_quant import arch
from flux_quant.arch import FluxConfig
from flux_quant.converters import gguf_io
from flux_quant.converters.checkpoint import CheckpointReader, container_for, open_checkpoint
from flux_quant.converters.component import Component, components, select
from flux_quant.converters.container import TensorInfo, as_bytes
from flux_quant.converters.output import check_target
from flux_quant.converters.quantize import Deviation, requantize, row_ranges, survives_float16, take_rows
from flux_quant.converters.recipe import Recipe, build
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

SAMPLES = 24  # weights that are compared with the source again
Progress = Callable[[str, int, int], None]  # phase, parameters done, parameters in all


@dataclass(frozen=True)
class Row:
    """One tensor of a plan."""

    source: TensorInfo
    target: TensorInfo
    reason: str  # why the format is not the recipe's; empty if it is


@dataclass(frozen=True)
class Plan:
    source: Path
    target: Path
    component: Component
    recipe: Recipe
    rows: tuple[Row, ...]  # in the order of the output
    metadata: dict[str, object]
    notes: tuple[str, ...]  # what a user should know before the work begins
    force: bool

    @property
    def infos(self) -> list[TensorInfo]:
        return [row.target for row in self.rows]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)


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
    formats: dict[str, Usage]  # most bytes first
    source_bytes: int  # of the converted tensors
    file_bytes: int

    @property
    def total(self) -> Usage:
        return sum(self.formats.values(), Usage())


def make_plan(source: Path, target: Path, format_name: str, force: bool = False) -> Plan:
    """Everything that can be wrong with the request is found here. UserError says what."""
    container_for(target)
    reader = open_checkpoint(source)
    if target.exists() and source.samefile(target):
        raise UserError(f"{target} is the input; give the output another name")
    check_target(target, force)
    component = select(reader, "FLUX.1", "BFL")
    config = FluxConfig.from_shapes({name: info.shape for name, info in component.tensors.items()})
    if missing := arch.missing_tensors(component.tensors, config):
        raise UserError(f"{source} is incomplete: {len(missing)} tensors are missing, the first is {missing[0]}")
    names = sorted(component.tensors, key=arch.running_order)
    recipe = build(format_name, component.family.name, target.suffix.lower(), names)
    return Plan(
        source=source,
        target=target,
        component=component,
        recipe=recipe,
        rows=tuple(plan_row(component, recipe, component.tensors[name]) for name in names),
        metadata=metadata_for(target, component, recipe),
        notes=tuple(notes_for(reader, component)),
        force=force,
    )


def plan_row(component: Component, recipe: Recipe, info: TensorInfo) -> Row:
    def in_range() -> bool:
        return survives_float16(FORMATS[info.format], component.read(info.name), info.shape)

    format_name, reason = recipe.choose(info.name, info.shape, info.format, in_range)
    return Row(info, TensorInfo(info.name, info.shape, format_name), reason)


def metadata_for(target: Path, component: Component, recipe: Recipe) -> dict[str, object]:
    """Safetensors keep all of a safetensors source; the other pairs keep what the model says of itself (modelspec)."""
    description = {
        key: value
        for key, value in component.metadata.items()
        if key.startswith("modelspec.") and key != "modelspec.thumbnail"  # a picture, tens of kilobytes
    }
    if target.suffix.lower() == ".gguf":
        own = {"flux_quant.version": flux_quant.__version__}
        return gguf_io.model_metadata("flux", recipe.format) | own | description
    return dict(component.metadata) if component.container == "safetensors" else description


def notes_for(reader: CheckpointReader, component: Component) -> list[str]:
    notes = []
    quantized = sorted({i.format for i in component.tensors.values() if not FORMATS[i.format].is_plain})
    if quantized:
        notes.append(
            f"{reader.path} is quantized already ({', '.join(quantized)}): its errors stay, new ones are added"
        )
    others = [other.family.name for other in components(reader) if other.prefix != component.prefix]
    if others:
        notes.append(f"{reader.path} also holds {', '.join(others)}: left out")
    return notes


def run(plan: Plan, progress: Progress = lambda phase, done, total: None) -> Result:
    """Execute a plan. Whatever goes wrong, the target keeps its old content and no temporary file stays."""
    total = sum(info.numel for info in plan.infos)
    usage: dict[str, Usage] = {}
    done = 0
    with create_checkpoint(plan.target, plan.infos, plan.metadata, plan.force) as writer:
        progress("converting", 0, total)
        for row in plan.rows:
            info = row.target
            parts = plan.component.read(info.name)
            packed, deviation = requantize(FORMATS[row.source.format], parts, info.shape, FORMATS[info.format])
            check_numbers(plan.source, info, deviation)
            writer.write(info.name, packed)
            del parts, packed
            plan.component.forget(info.name)
            usage[info.format] = usage.get(info.format, Usage()) + Usage(1, info.numel, info.nbytes, deviation)
            done += info.numel
            progress("converting", done, total)
        writer.flush()
        verify(plan, writer.written[0][0], progress)
    return Result(
        path=plan.target,
        formats=dict(sorted(usage.items(), key=lambda item: -item[1].bytes)),
        source_bytes=sum(plan.component.nbytes(info.name) for info in plan.infos),
        file_bytes=plan.target.stat().st_size,
    )


def check_numbers(path: Path, info: TensorInfo, deviation: Deviation) -> None:
    if not isfinite(deviation.signal):
        raise UserError(f"{path}: {info.name} holds NaN or infinite values; the file is damaged")
    if not isfinite(deviation.noise):
        raise UserError(f"{path}: {info.name} has values too large for {info.format}; use bf16")


def verify(plan: Plan, path: Path, progress: Progress) -> None:
    """Open the output and compare: all names, shapes and formats, and samples of the bytes packed a second time."""
    with open_checkpoint(path) as written:
        expected = {info.name: info for info in plan.infos}
        if written.tensors != expected or written.foreign:
            raise UserError(f"{plan.target} does not hold the tensors that were planned; is the disk faulty?")
        chosen = sample(plan)
        for done, row in enumerate(chosen):
            progress("verifying", done, len(chosen))
            compare(plan.target, plan.component, row, written)
        progress("verifying", len(chosen), len(chosen))


def sample(plan: Plan) -> list[Row]:
    """The first and last weight of each format, and others at random, the same ones every time."""
    ends = {row.target.format: row for row in reversed(plan.rows)} | {f"last {r.target.format}": r for r in plan.rows}
    others = random.Random(0).sample(plan.rows, min(SAMPLES, len(plan.rows)))
    return list({row.target.name: row for row in (*ends.values(), *others)}.values())


def compare(path: Path, source: CheckpointReader, row: Row, written: CheckpointReader) -> None:
    """Pack some rows of a weight again (all of them if they share a scale): the bytes must be those in the file."""
    info, fmt = row.target, FORMATS[row.target.format]
    original, stored = source.read(info.name), written.read(info.name)
    ranges = list(row_ranges(info.shape)) if len(fmt.parts) == 1 else [(0, info.shape[0])]
    for first, last in {ranges[0], ranges[-1]}:
        piece = take_rows(original, first, last)
        shape = (last - first, *info.shape[1:]) if info.shape else ()
        again, _ = requantize(FORMATS[row.source.format], piece, shape, fmt)
        for one, other in zip(again, take_rows(stored, first, last), strict=True):
            if not torch.equal(as_bytes(one), as_bytes(other)):
                raise UserError(f"{path}: {info.name} ({info.format}) reads back differently; is the disk faulty?")
    source.forget(info.name)
    written.forget(info.name)
