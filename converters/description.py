"""What a converted file says of itself, and what a user should know before a conversion begins."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

import flux_quant
from flux_quant.codecs.fp8 import LARGEST
from flux_quant.converters import checksums, gguf_io, t5_gguf
from flux_quant.converters.component import Component
from flux_quant.converters.conversion import Conversion, Row
from flux_quant.converters.fp8_layout import Fp8Form
from flux_quant.converters.imatrix import read_maxima
from flux_quant.converters.lora_math import Adapters, touches
from flux_quant.converters.recipe import GGUF, Recipe
from flux_quant.converters.targets import TARGETS
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

# What is left of a change by 2 % that is fused into a weight stored like this (benchmarks/lora_fusing.py).
SURVIVES = {"q8_0": 1.0, "fp8": 0.68, "q6_k": 0.8, "q5_k": 0.28, "q5_0": 0.19, "q4_k": 0.06, "q4_0": 0.05}

TOKENIZERS = ("spiece.model", "tokenizers/t5/spiece.model", "tokenizer_2/spiece.model")  # of T5


def metadata_for(component: Component, recipe: Recipe, asked: Conversion, rows: Sequence[Row]) -> dict[str, object]:
    """Safetensors keep all of a safetensors source; the other pairs keep what the model says of itself (modelspec)."""
    description = {
        key: value
        for key, value in component.metadata.items()
        if key.startswith("modelspec.") and key != "modelspec.thumbnail"  # a picture, tens of kilobytes
    }
    if asked.suffix != GGUF:
        kept = kept_metadata(component) if component.container == "safetensors" else description
        return kept | history(asked, rows)
    family = component.family.name
    out = gguf_io.model_metadata(TARGETS[family].architecture, recipe.name, recipe.format)
    if family == "T5 encoder":
        shapes = {row.name: row.source.shape for row in rows}
        out = t5_gguf.t5_metadata(shapes, tokenizer_of(asked)) | out
    for row in rows:
        if row.packed.shape != row.source.shape:
            out[gguf_io.SHAPE_KEY + row.pieces[0].name] = np.array(row.source.shape, np.int32)
    return out | {"flux_quant.version": flux_quant.__version__} | history(asked, rows) | description


def kept_metadata(component: Component) -> dict[str, object]:
    """All of a safetensors source, less what holds for its bytes only."""
    return {key: value for key, value in component.metadata.items() if key != checksums.KEY}


def tokenizer_of(asked: Conversion) -> Path | None:
    """The vocabulary that was named, or lies where folders of ours, diffusers and transformers have it."""
    if asked.tokenizer is not None:
        return asked.tokenizer
    near = asked.source if asked.source.is_dir() else asked.source.parent
    candidates = (folder / place for folder in (near, near.parent) for place in TOKENIZERS)
    return next((path for path in candidates if path.is_file()), None)


def options_for(asked: Conversion, rows: Sequence[Row]) -> dict[str, object]:
    """How FP8 is written. Scales of activations come from a calibration; without one, those of the source stay."""
    quantized = [row for row in rows if row.format == "fp8"]
    if not quantized:
        return {}
    if asked.calibration:
        maxima = read_maxima(asked.calibration)
        known = {name: value / LARGEST for name, value in maxima.items() if value > 0}
    else:
        known = {row.name: scale for row in quantized if (scale := row.component.input_scales.get(row.name))}
    scales = {piece.name: known[row.name] for row in quantized if row.name in known for piece in row.pieces}
    if asked.calibration and not scales:
        raise UserError(f"{asked.calibration} has no entry for any of the {len(quantized)} FP8 weights")
    roots = dict.fromkeys(piece.name.removesuffix(row.name) for row in quantized for piece in row.pieces)
    return {"fp8_form": Fp8Form(asked.legacy_fp8, scales, tuple(roots))}


def requantized(rows: Sequence[Row]) -> list[str]:
    """The quantized formats that tensors have in the source and lose."""
    lost = set()
    for row in rows:
        if row.format != row.source.format and row.component.quantized:
            lost |= row.component.quantized.intersection(row.component.stored_as(row.name).split(" + "))
    return sorted(lost)


def history(asked: Conversion, rows: Sequence[Row]) -> dict[str, object]:
    """What was done to the weights that their values do not tell."""
    out = {}
    if kinds := requantized(rows):
        out["flux_quant.requantized_from"] = " ".join(kinds)
    if asked.loras:
        out["flux_quant.loras"] = " ".join(f"{path.name}:{strength:g}" for path, strength in asked.loras)
    if asked.imatrix:
        out["flux_quant.imatrix"] = asked.imatrix.name
    return out


def fused_into_quantized(adapters: Adapters, rows: Sequence[Row]) -> str | None:
    """Rounding brings most of a small change back to where the weight was. None where all of them are unquantized."""
    changed = [row for row in rows if touches(row.name, adapters) and not FORMATS[row.source.format].is_plain]
    if not changed:
        return None
    same = {row.format for row in changed if row.format == row.source.format}
    kept = [(SURVIVES[name], name) for name in same if name in SURVIVES]
    worst = f"; of a change by 2% about {min(kept)[0]:.0%} survives in {min(kept)[1]}" if kept else ""
    return (
        f"a LoRA is fused into {len(changed)} weights that are quantized already{worst}. Fuse it into 16 bits, or use "
        "it beside the weights: generate --lora"
    )


def notes_for(
    asked: Conversion,
    left: Sequence[Component],
    adapters: Adapters,
    importance: Mapping[str, Tensor],
    rows: Sequence[Row],
) -> list[str]:
    """`left`: the models of the source that are not converted."""
    notes = []
    if kinds := requantized(rows):
        notes.append(f"{asked.source} is quantized already ({', '.join(kinds)}): its errors stay, new ones are added")
    if left:
        notes.append(f"{asked.source} also holds {', '.join(other.family.name for other in left)}: left out")
    if adapters and (lossy := fused_into_quantized(adapters, rows)):
        notes.append(lossy)
    for lora, _ in adapters:
        if unused := [*lora.unused, *lora.unapplied(row.name for row in rows)]:
            notes.append(f"{len(unused)} keys of {lora.path} were not applied, {unused[0]} among them")
    if importance:
        without = [row for row in rows if not FORMATS[row.format].is_plain and row.name not in importance]
        if without:
            notes.append(f"{len(without)} quantized weights are not in the imatrix, the first is {without[0].name}")
    if asked.suffix == GGUF and rows[0].component.family.name == "T5 encoder" and tokenizer_of(asked) is None:
        notes.append("no spiece.model found: llama.cpp does not read a T5 without one; name it with --tokenizer")
    return notes
