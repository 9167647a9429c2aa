"""Which stored tensors make up an FP8 weight, in the conventions found in the wild.

per layer   ComfyUI: `X.weight`, `X.weight_scale`, and as marker `X.comfy_quant` or an entry in the header; ModelOpt
            writes the same without marker, convert_to_quant with a scale per row or per block
legacy      ComfyUI until 2025: `X.weight`, `X.scale_weight`, and one tensor `scaled_fp8`; kohya without it, and with
            scales per row or per block
plain cast  `X.weight` alone

All of them mean weight = data * scale, and which part of the weight a scale is for follows from its shape. e4m3 with
one scale stays as it is; the rest has no row in FORMATS and is unpacked when it is read. A scale whose weight is
missing, a marked weight without a scale, and conventions that mean something else are refused: reading such a file
unscaled gives noise, not an error. A name that ends in `.scale` is never a quantization scale: norms have one.
Sources: Comfy-Org/ComfyUI comfy/ops.py and `convert_old_quants` in comfy/utils.py, kohya-ss/sd-scripts
library/fp8_optimization_utils.py, silveroxides/convert_to_quant.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from flux_quant.converters.container import Contents, Converted, MappedFile, Place, TensorInfo
from flux_quant.converters.fp8_layout import INPUT_SCALES, LEGACY_MARKER, MARKER, METADATA_KEY, SCALES
from flux_quant.errors import UserError
from flux_quant.formats import Shape

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", E4M3: "fp8_plain"}
MARKED = {  # format name in a marker -> type of the data
    "float8_e4m3fn": E4M3,
    "float8_e4m3fn_rowwise": E4M3,
    "float8_e4m3fn_blockwise": E4M3,
    "fp8": E4M3,  # ModelOpt
    "float8_e5m2": E5M2,
}
OTHER_CONVENTIONS = {  # end of a name -> who writes it
    "._weight_qdata": "torchao",
    ".weight._data": "quanto",
    ".float8_data": "flux-fp8-api (its scales are inverse)",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes FP4",
}


def add_tensors(
    contents: Contents, mapped: MappedFile, entries: Mapping[str, Place], header: Mapping[str, object]
) -> None:
    """Fill `contents` with the weights that the stored tensors `entries` make up."""
    scales, contents.helpers = find_scales(mapped, entries, header)
    for name, place in entries.items():
        module, _, kind = name.rpartition(".")
        if kind in INPUT_SCALES and not (kind == "scale_input" and mapped.tensor(place).float().eq(1).all()):
            contents.input_scales[f"{module}.weight"] = place  # ComfyUI drops a legacy scale of 1
        if name in contents.helpers:
            continue
        scale = entries[scales[name]] if name in scales else None
        if scale is None and place.dtype == E5M2:
            contents.converted[name] = Converted("fp8_e5m2", lambda data: data.to(torch.float16))
            contents.add(TensorInfo(name, place.shape, "f16"), place)
        elif scale is None:
            contents.add(TensorInfo(name, place.shape, PLAIN.get(place.dtype) or dtype_name(place.dtype)), place)
        elif place.dtype == E4M3 and prod(scale.shape) == 1:
            contents.add(TensorInfo(name, place.shape, "fp8"), place, replace(scale, shape=()))
        else:
            contents.converted[name] = Converted(kind_of(place, scale), scaled)
            contents.add(TensorInfo(name, place.shape, "f32"), place, scale)


def dtype_name(dtype: torch.dtype) -> str:
    """A type without a row in FORMATS, as error messages call it: i64, f64, bool."""
    name = str(dtype).removeprefix("torch.")
    return {"uint8": "u8", "bool": "bool"}.get(name) or name.replace("float", "f").replace("int", "i")


def kind_of(place: Place, scale: Place) -> str:
    name = "fp8" if place.dtype == E4M3 else "fp8_e5m2"
    per = {1: "scaled", place.shape[0]: "per row"}.get(prod(scale.shape), "per block")
    return f"{name} {per}"


def scaled(data: Tensor, scale: Tensor) -> Tensor:
    """data (N, ...) FP8, scale of any shape that `grid` takes -> float32."""
    rows, columns = grid(tuple(data.shape), tuple(scale.shape))
    tiles = data.float().view(rows, data.shape[0] // rows, columns, prod(data.shape[1:]) // columns)
    return tiles.mul_(scale.float().view(rows, 1, columns, 1)).view(data.shape)


def grid(shape: Shape, scale: Shape) -> tuple[int, int]:
    """Into how many parts a scale's shape divides the rows and the columns of a weight. ValueError if it cannot."""
    if prod(scale) == 1:
        return 1, 1
    rows, columns = scale[0], prod(scale[1:])  # [N], [N, 1], [N, parts, 1], [N / size, K / size]
    if not shape or not rows or not columns or shape[0] % rows or prod(shape[1:]) % columns:
        raise ValueError(f"a scale of shape {list(scale)} does not divide {list(shape)}")
    return rows, columns


def find_scales(
    mapped: MappedFile, entries: Mapping[str, Place], header: Mapping[str, object]
) -> tuple[dict[str, str], set[str]]:
    """FP8 weight -> its scale, and all stored tensors that are no weights themselves."""
    refuse_other_conventions(mapped, entries)
    scales, helpers = {}, set()
    for name, place in entries.items():
        module, _, kind = name.rpartition(".")
        weight = f"{module}.weight"
        if kind in SCALES:
            check_scale(mapped, entries, name, weight)
            if weight in scales:
                raise UserError(f"{mapped.path}: {weight} has two scales, {scales[weight]} and {name}")
            scales[weight] = name
        elif kind in (*INPUT_SCALES, MARKER) and weight not in entries:
            raise UserError(f"{mapped.path}: {name} is there, its weight is not")
        elif kind in INPUT_SCALES and (prod(place.shape) != 1 or place.dtype not in FLOATS):
            raise UserError(f"{mapped.path}: {name} {list(place.shape)} is not one number; unsupported")
        if kind in (*SCALES, *INPUT_SCALES, MARKER, LEGACY_MARKER):
            helpers.add(name)
    for module, format_name in marked_modules(mapped, entries, header).items():
        weight = f"{module}.weight"
        if format_name not in MARKED:
            raise UserError(f"{mapped.path}: {weight} is quantized as {format_name}, which is not supported")
        if weight not in scales:
            raise UserError(f"{mapped.path}: {weight} is marked as scaled FP8, but has no scale")
        if entries[weight].dtype != MARKED[format_name]:
            raise UserError(f"{mapped.path}: {weight} is marked as {format_name} and stored as {entries[weight].dtype}")
    return scales, helpers


def refuse_other_conventions(mapped: MappedFile, entries: Iterable[str]) -> None:
    for name in entries:
        if name.endswith(tuple(OTHER_CONVENTIONS)):
            tool = next(tool for suffix, tool in OTHER_CONVENTIONS.items() if name.endswith(suffix))
            raise UserError(f"{mapped.path} was quantized by {tool}: {name}; convert the original file instead")


def check_scale(mapped: MappedFile, entries: Mapping[str, Place], name: str, weight: str) -> None:
    if weight not in entries or entries[weight].dtype not in (E4M3, E5M2):
        found = "is missing" if weight not in entries else f"is {entries[weight].dtype}".replace("torch.", "")
        raise UserError(f"{mapped.path}: {name} is there, but {weight} {found} where FP8 was expected")
    if entries[name].dtype not in FLOATS:
        raise UserError(f"{mapped.path}: {name} is {entries[name].dtype}, no scale that is known here")
    try:
        grid(entries[weight].shape, entries[name].shape)
    except ValueError as error:
        raise UserError(f"{mapped.path}: {name}: {error}") from None


def marked_modules(
    mapped: MappedFile, entries: Mapping[str, Place], header: Mapping[str, object]
) -> dict[str, str | None]:
    """Module -> quantization format, from the header and, for modules it does not name, from the marker tensors."""
    try:
        layers = json.loads(header.get(METADATA_KEY, '{"layers": {}}'))["layers"]
        formats = {module: str(entry["format"]) for module, entry in layers.items()}
        for name, place in entries.items():
            module, _, kind = name.rpartition(".")
            if kind == MARKER and module not in formats:
                content = mapped.tensor(place).view(-1).view(torch.uint8).numpy().tobytes()
                formats[module] = str(json.loads(content)["format"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{mapped.path}: a marker of quantized layers is damaged ({METADATA_KEY}, {MARKER})") from None
    return formats
