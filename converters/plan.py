"""What a conversion will do, as a value: it can be printed (`--dry-run`) and tested, and `convert.run` executes it.

Everything that can be wrong with a request is found here, before anything is written.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from torch import Tensor

import flux_quant
from flux_quant import arch
from flux_quant.arch import FluxConfig
from flux_quant.converters import gguf_io, library_folder, t5_gguf
from flux_quant.converters.checkpoint import container_for, open_checkpoint
from flux_quant.converters.component import Component, components, describe
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.fp8_layout import Fp8Form
from flux_quant.converters.imatrix import check_imatrix, read_imatrix
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_math import Adapters, new_shape
from flux_quant.converters.output import check_folder_target, check_target
from flux_quant.converters.quantize import survives_float16
from flux_quant.converters.recipe import GGUF, SAFETENSORS, Recipe, Rows, build, check_used
from flux_quant.converters.shards import Sharding, split_files
from flux_quant.converters.writer import FilePlan
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape
from flux_quant.naming import Stored, to_stored

LABELS = {  # family -> what users call it
    "FLUX.1": "transformer",
    "FLUX.1 ControlNet": "controlnet",
    "FLUX.1 Redux": "redux",
    "SDXL UNet": "unet",
    "T5 encoder": "t5",
    "CLIP-L": "clip",
    "VAE": "vae",
}
ARCHITECTURES = {  # family -> `general.architecture`, by which readers choose
    "FLUX.1": "flux",
    "FLUX.1 ControlNet": "flux-controlnet",
    "SDXL UNet": "sdxl",
    "T5 encoder": "t5encoder",
}
NAMINGS = {("T5 encoder", GGUF): "llama.cpp"}  # where a container's readers expect other names than the canonical ones
RESHAPED = ("SDXL UNet",)  # families whose GGUF readers undo the rewriting of narrow rows; those of FLUX.1 do not
SUPER_BLOCK = 256
SMALLEST_RESHAPED = 512  # elements


@dataclass(frozen=True)
class Conversion:
    """What a user asks for."""

    source: Path
    target: Path
    format: str
    force: bool = False
    component: str | None = None  # a label; by default the main model of the source
    own_rows: Rows = ()
    search: bool = True
    legacy_fp8: bool = False
    imatrix: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    tokenizer: Path | None = None  # whose vocabulary a T5 in GGUF carries
    sharding: Sharding | None = None
    device: str = "cpu"
    resume: bool = False
    checksums: bool = False
    folder: bool = False  # the target is a folder as diffusers and transformers write them

    @property
    def suffix(self) -> str:
        """Of the files."""
        return SAFETENSORS if self.folder else self.target.suffix.lower()


@dataclass(frozen=True)
class Row:
    """One canonical tensor: what it is in the source, how it is packed, and which tensors of the output it becomes."""

    source: TensorInfo
    packed: TensorInfo  # canonical name; the shape differs where narrow rows are rewritten
    pieces: tuple[TensorInfo, ...]  # in the output, below each other
    swapped: bool = False  # the halves of its rows change places
    reason: str = ""  # why the format is not the recipe's

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def format(self) -> str:
        return self.packed.format


@dataclass(frozen=True)
class Plan:
    asked: Conversion
    component: Component
    recipe: Recipe
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
        paths = [self.source, *(path for path, _ in self.asked.loras), *filter(None, [self.asked.imatrix])]
        files = [(str(path.resolve()), *identity(path)) for path in paths]
        targets = [(info.name, info.shape, info.format) for info in self.infos]
        choices = [self.asked.search, self.asked.device, [strength for _, strength in self.asked.loras]]
        text = json.dumps([flux_quant.__version__, files, targets, choices, self.asked.legacy_fp8])
        return hashlib.sha256(text.encode()).hexdigest()


def identity(path: Path) -> tuple[int, int]:
    """Bytes and time of the last change; of a folder, those of all files in it."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    states = [file.stat() for file in files]
    return sum(state.st_size for state in states), max((state.st_mtime_ns for state in states), default=0)


def make_plan(asked: Conversion) -> Plan:
    """UserError says what is wrong."""
    source, target = asked.source, asked.target
    if asked.folder:
        check_folder_target(target, asked.force)
    else:
        container_for(target)
        check_target(target, asked.force)
    reader = open_checkpoint(source)
    found = components(reader)
    component = choose(found, asked, describe(reader, found))
    family, suffix = component.family.name, asked.suffix
    adapters = read_adapters(component, asked)
    infos = [
        TensorInfo(info.name, new_shape(info.name, info.shape, adapters), info.format)
        for info in sorted(component.tensors.values(), key=lambda info: arch.running_order(info.name))
    ]
    check_complete(source, component)
    names = [info.name for info in infos]
    check_used(asked.own_rows, names)
    recipe = build(asked.format, family, suffix, names, asked.own_rows)
    naming = library_folder.NAMINGS.get(family) if asked.folder else NAMINGS.get((family, suffix))
    places = target_places(family, naming, infos)
    reshape = suffix == GGUF and family in RESHAPED
    rows = tuple(plan_row(component, recipe, info, places[info.name], reshape) for info in infos)
    shapes = {info.name: info.shape for info in infos}
    importance = read_importance(asked, shapes)
    pieces = [piece for row in rows for piece in row.pieces]
    if asked.folder:
        files, extras = library_folder.files(target, family, shapes, pieces, asked.sharding)
    else:
        options = options_for(component, asked, rows)
        metadata = metadata_for(component, recipe, asked, rows)
        files, extras = split_files(target, pieces, metadata, asked.sharding, options)
        for path in (*(file.path for file in files), *extras):
            check_target(path, asked.force)
    notes = notes_for(component, found, importance, rows)
    return Plan(asked, component, recipe, rows, tuple(files), extras, tuple(notes), adapters, importance)


def choose(found: Sequence[Component], asked: Conversion, what: str) -> Component:
    """The component that was asked for, or the main one: the first in LABELS."""
    by_label = {LABELS[component.family.name]: component for component in found if component.family.name in LABELS}
    if asked.component is not None and asked.component not in by_label:
        raise UserError(f"{asked.source} holds no {asked.component}; it is {what}")
    label = asked.component or next((label for label in LABELS.values() if label in by_label), None)
    if label is None:
        raise UserError(f"{asked.source} is {what}; supported here: {', '.join(LABELS)}")
    component = by_label[label]
    if component.foreign:
        kinds = ", ".join(sorted({info.format for info in component.foreign.values()}))
        raise UserError(f"{asked.source}: {len(component.foreign)} tensors of the type {kinds}, which cannot be read")
    return component


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
    return Row(info, TensorInfo(info.name, shape, format_name), pieces, place.swapped, reason)


def super_block_rows(shape: Shape) -> Shape:
    """(320, 320, 3, 3) -> (3600, 256), as ComfyUI-GGUF's converter rewrites what no super-block fits."""
    size = prod(shape)
    narrow = len(shape) > 1 and shape[-1] % SUPER_BLOCK and size % SUPER_BLOCK == 0
    return (size // SUPER_BLOCK, SUPER_BLOCK) if narrow and size >= SMALLEST_RESHAPED else shape


def metadata_for(component: Component, recipe: Recipe, asked: Conversion, rows: Sequence[Row]) -> dict[str, object]:
    """Safetensors keep all of a safetensors source; the other pairs keep what the model says of itself (modelspec)."""
    description = {
        key: value
        for key, value in component.metadata.items()
        if key.startswith("modelspec.") and key != "modelspec.thumbnail"  # a picture, tens of kilobytes
    }
    if asked.target.suffix.lower() != GGUF:
        kept = dict(component.metadata) if component.container == "safetensors" else description
        return kept | history(component, asked, rows)
    family = component.family.name
    out = gguf_io.model_metadata(ARCHITECTURES[family], recipe.name, recipe.format)
    if family == "T5 encoder":
        shapes = {row.name: row.source.shape for row in rows}
        out = t5_gguf.t5_metadata(shapes, asked.tokenizer) | out
    for row in rows:
        if row.packed.shape != row.source.shape:
            out[gguf_io.SHAPE_KEY + row.pieces[0].name] = np.array(row.source.shape, np.int32)
    return out | {"flux_quant.version": flux_quant.__version__} | history(component, asked, rows) | description


def options_for(component: Component, asked: Conversion, rows: Sequence[Row]) -> dict[str, object]:
    """How FP8 is written; scales of activations that the source has stay, whatever its own form."""
    if not any(row.format == "fp8" for row in rows):
        return {}
    scales = {row.name: component.input_scales[row.name] for row in rows if row.name in component.input_scales}
    return {"fp8_form": Fp8Form(asked.legacy_fp8, scales)}


def requantized(component: Component, rows: Sequence[Row]) -> list[str]:
    """The quantized formats that tensors have in the source and lose."""
    changed = {component.stored_as(row.name) for row in rows if row.format != row.source.format}
    return sorted(changed & component.quantized)


def history(component: Component, asked: Conversion, rows: Sequence[Row]) -> dict[str, object]:
    """What was done to the weights that their values do not tell."""
    out = {}
    if kinds := requantized(component, rows):
        out["flux_quant.requantized_from"] = " ".join(kinds)
    if asked.loras:
        out["flux_quant.loras"] = " ".join(f"{path.name}:{strength:g}" for path, strength in asked.loras)
    if asked.imatrix:
        out["flux_quant.imatrix"] = asked.imatrix.name
    return out


def notes_for(
    component: Component, found: Sequence[Component], importance: Mapping[str, Tensor], rows: Sequence[Row]
) -> list[str]:
    notes = []
    if kinds := requantized(component, rows):
        notes.append(f"{component.path} is quantized already ({', '.join(kinds)}): its errors stay, new ones are added")
    others = [other.family.name for other in found if other is not component]
    if others:
        notes.append(f"{component.path} also holds {', '.join(others)}: left out")
    if importance:
        without = [row for row in rows if not FORMATS[row.format].is_plain and row.name not in importance]
        if without:
            notes.append(f"{len(without)} quantized weights are not in the imatrix, the first is {without[0].name}")
    return notes


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
