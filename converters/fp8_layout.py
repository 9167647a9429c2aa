"""Which stored tensors make up an FP8 weight, in the conventions found in the wild.

read   per layer (ComfyUI): `X.weight`, `X.weight_scale`, and as marker `X.comfy_quant` or an entry in the header
       legacy (ComfyUI until 2025): `X.weight`, `X.scale_weight`, and one tensor `scaled_fp8` for the whole model
       plain cast: `X.weight` alone
write  per layer, with both markers: the tensor survives tools that drop the header, the header is what ComfyUI reads
All of them mean weight = data * scale with one scale per tensor. A scale whose weight is missing, a marked weight
without a scale, and every other convention is refused: reading such a file unscaled gives noise, not an error.
Source: Comfy-Org/ComfyUI comfy/ops.py and `convert_old_quants` in comfy/utils.py.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod

import torch

from flux_quant.converters.container import MappedFile, Place
from flux_quant.errors import UserError

METADATA_KEY = "_quantization_metadata"
FORMAT = {"format": "float8_e4m3fn"}
MARKER = "comfy_quant"
MARKER_CONTENT = json.dumps(FORMAT).encode().ljust(32)  # JSON may end in blanks: 32 keeps what follows aligned
LEGACY_MARKER = "scaled_fp8"
SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")  # for activations: of no meaning to a weight
OTHER_CONVENTIONS = {
    "._weight_qdata": "torchao",
    ".weight._data": "quanto",
    ".float8_data": "flux-fp8-api",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes FP4",
}


def find_scales(
    mapped: MappedFile, entries: Mapping[str, Place], metadata: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """FP8 weight -> its scale, and all stored tensors that are no weights themselves."""
    refuse_other_conventions(mapped, entries)
    scales, helpers = {}, set()
    for name in entries:
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        if kind in SCALES:
            check_scale(mapped, entries, name, weight)
            scales[weight] = name
        elif kind in (*INPUT_SCALES, MARKER) and weight not in entries:
            raise UserError(f"{mapped.path}: {name} is there, its weight is not")
        if kind in (*SCALES, *INPUT_SCALES, MARKER, LEGACY_MARKER):
            helpers.add(name)
    for module, format_name in marked_modules(mapped, entries, metadata).items():
        if format_name != FORMAT["format"]:
            raise UserError(f"{mapped.path}: {module}.weight is quantized as {format_name}, which is not supported")
        if f"{module}.weight" not in scales:
            raise UserError(f"{mapped.path}: {module}.weight is marked as scaled FP8, but has no scale")
    return scales, helpers


def refuse_other_conventions(mapped: MappedFile, entries: Iterable[str]) -> None:
    for name in entries:
        for suffix, tool in OTHER_CONVENTIONS.items():
            if name.endswith(suffix):
                raise UserError(f"{mapped.path} was quantized by {tool} ({name}); convert the original file instead")


def check_scale(mapped: MappedFile, entries: Mapping[str, Place], name: str, weight: str) -> None:
    if weight not in entries or entries[weight].dtype != torch.float8_e4m3fn:
        found = "is missing" if weight not in entries else f"is {entries[weight].dtype}".replace("torch.", "")
        raise UserError(f"{mapped.path}: {name} is there, but {weight} {found} where FP8 e4m3 was expected")
    if prod(entries[name].shape) != 1:
        raise UserError(f"{mapped.path}: {name} {list(entries[name].shape)} is not one scale per tensor; unsupported")


def marked_modules(
    mapped: MappedFile, entries: Mapping[str, Place], metadata: Mapping[str, str]
) -> dict[str, str | None]:
    """Module -> quantization format, from the header and, for modules it does not name, from the marker tensors."""
    try:
        layers = json.loads(metadata.get(METADATA_KEY, '{"layers": {}}'))["layers"]
        formats = {module: entry["format"] for module, entry in layers.items()}
        for name, place in entries.items():
            module, _, kind = name.rpartition(".")
            if kind == MARKER and module not in formats:
                formats[module] = json.loads(mapped.bytes(place.offset, place.nbytes))["format"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{mapped.path}: a marker of quantized layers is damaged ({METADATA_KEY}, {MARKER})") from None
    return formats


def header_metadata(weights: Iterable[str]) -> dict[str, str]:
    """The header's entry for these FP8 weights; none if there are none."""
    layers = {name.removesuffix(".weight"): FORMAT for name in weights}
    return {METADATA_KEY: json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}
