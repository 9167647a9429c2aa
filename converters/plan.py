"""What a conversion will do, as a value: it can be printed (`--dry-run`) and tested, and `convert.run` executes it.

Everything that can be wrong with a request is found here, before anything is written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

import flux_quant
from flux_quant import arch
from flux_quant.arch import FluxConfig
from flux_quant.converters import folders, library_folder
from flux_quant.converters.checkpoint import container_for, open_checkpoint
from flux_quant.converters.component import Component, components, describe
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.conversion import Conversion, Row
from flux_quant.converters.description import metadata_for, notes_for, options_for
from flux_quant.converters.imatrix import check_imatrix, read_imatrix
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_math import Adapters, new_shape
from flux_quant.converters.output import check_folder_target, check_target
from flux_quant.converters.quantize import survives_float16
from flux_quant.converters.recipe import GGUF, KEEP, Recipe, build, check_used
from flux_quant.converters.shards import split_files
from flux_quant.converters.targets import LABELS, TARGETS
from flux_quant.converters.writer import FilePlan
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape
from flux_quant.naming import Stored, to_stored

NAMINGS = {("T5 encoder", GGUF): "llama.cpp"}  # where a container's readers expect other names than the canonical ones
RESHAPED = ("SDXL",)  # families whose GGUF readers undo the rewriting of narrow rows; those of FLUX.1 do not
QUANTIZED_TOGETHER = ("FLUX.1", "T5 encoder")  # in an all-in-one file
SUPER_BLOCK = 256
SMALLEST_RESHAPED = 512  # elements


@dataclass(frozen=True)
class Plan:
    asked: Conversion
    recipe: Recipe  # of the main model
    rows: tuple[Row, ...]  # in the order of the output
    files: tuple[FilePlan, ...]
    extras: Mapping[Path, bytes]  # small files that belong to the output
    notes: tuple[str, ...]  # what a user should know before the work begins
    adapters: Adapters = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)  # canonical name -> (K,)

    @property
    def source(self) -> Path:
        return self.asked.source

    @property
    def target(self) -> Path:
        return self.asked.target

    @property
    def infos(self) -> list[TensorInfo]:
        return [piece for row in self.rows for piece in row.pieces]

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.infos)

    @property
    def fingerprint(self) -> str:
        """The same for the same work only: what a resumed conversion must agree in. Empty if it is not resumable."""
        if not self.asked.resume:
            return ""
        paths = [self.source, *(path for path, _ in self.asked.loras)]
        paths += [path for path in (self.asked.imatrix, self.asked.calibration) if path]
        files = [(str(path.resolve()), identity(path)) for path in paths]
        targets = [(info.name, info.shape, info.format) for info in self.infos]
        choices = [
            self.asked.search,
            self.asked.device,
            self.asked.checksums,
            [strength for _, strength in self.asked.loras],
        ]
        text = json.dumps([flux_quant.__version__, files, targets, choices, self.asked.legacy_fp8])
        return hashlib.sha256(text.encode()).hexdigest()


def identity(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change of every file of a source."""
    files = [file for _, file in folders.resolve(path).files]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def make_plan(asked: Conversion) -> Plan:
    """UserError says what is wrong."""
    check_place(asked)
    reader = open_checkpoint(asked.source)
    found = components(reader)
    chosen = choose(found, asked, describe(reader, found))
    adapters = read_adapters(chosen[0], asked)
    models = {component.family.name: adapted_infos(component, adapters) for component in chosen}
    names = [info.name for infos in models.values() for info in infos]
    check_used(asked.own_rows, names)
    recipes = [recipe_for(component, asked, models[component.family.name], len(chosen) > 1) for component in chosen]
    rows = tuple(
        row
        for component, recipe in zip(chosen, recipes, strict=True)
        for row in rows_for(component, recipe, asked, models[component.family.name], len(chosen) > 1)
    )
    importance = read_importance(asked, {info.name: info.shape for infos in models.values() for info in infos})
    files, extras = files_for(asked, chosen[0], recipes[0], rows)
    left = [component for component in found if component not in chosen]
    notes = notes_for(asked, left, adapters, importance, rows)
    return Plan(asked, recipes[0], rows, tuple(files), extras, tuple(notes), adapters, importance)


def check_place(asked: Conversion) -> None:
    check_device(asked.device)
    if asked.folder:
        check_folder_target(asked.target, asked.force)
    else:
        container_for(asked.target)
        check_target(asked.target, asked.force)


def check_device(name: str) -> None:
    """UserError if nothing can be computed there."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"device {name}: {str(error).splitlines()[0]}") from None


def choose(found: Sequence[Component], asked: Conversion, what: str) -> list[Component]:
    """The components that were asked for, or the main one, in the order of TARGETS."""
    by_label = {LABELS[component.family.name]: component for component in found if component.family.name in LABELS}
    known = [label for label in dict.fromkeys(LABELS.values()) if label in by_label]
    if missing := [label for label in asked.components if label not in by_label]:
        raise UserError(f"{asked.source} holds no {missing[0]}; it is {what}")
    if not known:
        raise UserError(f"{asked.source} is {what}; supported here: {', '.join(LABELS)}")
    chosen = [by_label[label] for label in known if label in asked.components] or [by_label[known[0]]]
    for component in chosen:
        if component.foreign:
            kinds = ", ".join(sorted({info.format for info in component.foreign.values()}))
            count = len(component.foreign)
            raise UserError(f"{asked.source}: {count} tensors of the type {kinds}, which cannot be read")
        check_complete(asked.source, component)
        if len(chosen) > 1 and (asked.folder or asked.suffix == GGUF or TARGETS[component.family.name].prefix is None):
            raise UserError(f"{', '.join(asked.components)} do not go into one {asked.target.suffix or 'folder'}")
    return chosen


def adapted_infos(component: Component, adapters: Adapters) -> list[TensorInfo]:
    """In running order; a control LoRA widens the model's input."""
    return [
        TensorInfo(info.name, new_shape(info.name, info.shape, adapters), info.format)
        for info in sorted(component.tensors.values(), key=lambda info: arch.running_order(info.name))
    ]


def recipe_for(component: Component, asked: Conversion, infos: Sequence[TensorInfo], together: bool) -> Recipe:
    """In an all-in-one file only the transformer and T5 get the format: the rest is small, and kept as it is."""
    family = component.family.name
    keep = together and family not in QUANTIZED_TOGETHER
    names = [info.name for info in infos]
    return build(KEEP if keep else asked.format, family, asked.suffix, names, asked.own_rows)


def rows_for(
    component: Component, recipe: Recipe, asked: Conversion, infos: Sequence[TensorInfo], together: bool
) -> list[Row]:
    family = component.family.name
    naming = library_folder.NAMINGS.get(family) if asked.folder else NAMINGS.get((family, asked.suffix))
    places = target_places(family, naming, infos)
    reshape = asked.suffix == GGUF and family in RESHAPED
    rows = [plan_row(component, recipe, info, places[info.name], reshape) for info in infos]
    if not together:
        return rows
    prefix = TARGETS[family].prefix
    return [
        replace(row, pieces=tuple(replace(piece, name=prefix + piece.name) for piece in row.pieces)) for row in rows
    ]


def files_for(
    asked: Conversion, main: Component, recipe: Recipe, rows: Sequence[Row]
) -> tuple[list[FilePlan], dict[Path, bytes]]:
    """The files to be written, and small ones with their content."""
    pieces = [piece for row in rows for piece in row.pieces]
    if asked.folder:
        shapes = {row.name: row.source.shape for row in rows}
        return library_folder.files(asked.target, main.family.name, shapes, pieces, asked.sharding)
    metadata, options = metadata_for(main, recipe, asked, rows), options_for(asked, rows)
    files, extras = split_files(asked.target, pieces, metadata, asked.sharding, options)
    for path in (*(file.path for file in files), *extras):
        check_target(path, asked.force)
    return files, extras


def check_complete(source: Path, component: Component) -> None:
    if component.family.name != "FLUX.1":
        return
    config = FluxConfig.from_shapes({name: info.shape for name, info in component.tensors.items()})
    if missing := arch.missing_tensors(component.tensors, config):
        raise UserError(f"{source} is incomplete: {len(missing)} tensors are missing, the first is {missing[0]}")


def target_places(family: str, naming: str | None, infos: Sequence[TensorInfo]) -> dict[str, Stored]:
    """Canonical name -> where the tensor goes."""
    shapes = {info.name: info.shape for info in infos}
    if naming is None:
        return {name: Stored((name,), shape[:1] or (1,), shape) for name, shape in shapes.items()}
    return to_stored(family, naming, shapes)


def plan_row(component: Component, recipe: Recipe, info: TensorInfo, place: Stored, reshape: bool) -> Row:
    def in_range() -> bool:
        return survives_float16(FORMATS[info.format], component.read(info.name), component.tensors[info.name].shape)

    shape = super_block_rows(info.shape) if reshape else info.shape
    format_name, reason = recipe.choose(info.name, shape, info.format, in_range)
    if FORMATS[format_name].block == 1:
        shape = info.shape
    if len(place.names) > 1:
        shapes = [(rows, *shape[1:]) for rows in place.rows]
    else:
        shapes = [shape if place.shape is None or shape != info.shape else place.shape]
    pieces = tuple(TensorInfo(*piece, format_name) for piece in zip(place.names, shapes, strict=True))
    return Row(component, info, TensorInfo(info.name, shape, format_name), pieces, place.swapped, reason)


def super_block_rows(shape: Shape) -> Shape:
    """(320, 320, 3, 3) -> (3600, 256), as ComfyUI-GGUF's converter rewrites what no super-block fits."""
    size = prod(shape)
    narrow = len(shape) > 1 and shape[-1] % SUPER_BLOCK and size % SUPER_BLOCK == 0
    return (size // SUPER_BLOCK, SUPER_BLOCK) if narrow and size >= SMALLEST_RESHAPED else shape


def read_adapters(component: Component, asked: Conversion) -> Adapters:
    if asked.loras and component.family.name != "FLUX.1":
        raise UserError(f"LoRAs are fused into a FLUX.1 transformer only, this is a {component.family.name}")
    shapes = {name: info.shape for name, info in component.tensors.items()}
    return tuple((read_lora(path, shapes), strength) for path, strength in asked.loras)


def read_importance(asked: Conversion, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    if asked.imatrix is None:
        return {}
    importance = read_imatrix(asked.imatrix)
    check_imatrix(importance, shapes)
    return {name: importance[name] for name in shapes if name in importance}
