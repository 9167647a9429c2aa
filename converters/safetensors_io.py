"""Safetensors: 8 bytes of header length, a JSON header, then the tensors without any hole.

Holes being forbidden, alignment is a matter of order: `layout` keeps the order it is given (blocks stay together) when
every tensor then begins at a multiple of its item size, which FLUX.1's shapes always allow, and otherwise sorts by
item size within blocks, and as a last resort over the whole file. Format: huggingface/safetensors README.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import groupby
from math import prod

import torch

from flux_quant.arch import block_of
from flux_quant.converters import fp8_layout, fp8_reading
from flux_quant.converters.container import Contents, Layout, MappedFile, Place, TensorInfo
from flux_quant.converters.fp8_layout import INPUT_SCALES, MARKER, PER_LAYER, Fp8Form
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

CONTAINER = "safetensors"
LARGEST_HEADER = 4_000_000  # bytes; FLUX.1 in FP8 has 200,000, and reading one takes 25 times its size of memory
LARGEST_NDIM = 8
MOST_TENSORS = 32_768
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def recognises(mapped: MappedFile) -> bool:
    return mapped.bytes(8, 1) == b"{"


def parse(mapped: MappedFile) -> Contents:
    header, begin = read_header(mapped)
    metadata = header.pop("__metadata__", {})
    entries = {name: place_of(mapped, name, entry, begin) for name, entry in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].end)))
    check_coverage(mapped, entries, begin)
    contents = Contents(CONTAINER, {key: value for key, value in metadata.items() if key != fp8_layout.METADATA_KEY})
    fp8_reading.add_tensors(contents, mapped, entries, metadata)
    return contents


def read_header(mapped: MappedFile) -> tuple[dict, int]:
    """The JSON object, and where the data begin."""
    length = int.from_bytes(mapped.bytes(0, 8), "little")
    if length > LARGEST_HEADER:
        raise UserError(f"{mapped.path}: a header of {length:,} bytes is absurd; the file is damaged")
    if 8 + length > mapped.size:
        raise UserError(f"{mapped.path} is truncated: its header takes {length:,} bytes, the file has {mapped.size:,}")
    try:
        header = json.loads(mapped.bytes(8, length).decode(), object_pairs_hook=table_of)
    except DuplicateName as error:
        raise UserError(f"{mapped.path}: {error} occurs twice in the header; the file is damaged") from None
    except (ValueError, RecursionError):
        raise UserError(f"{mapped.path}: the header of {length:,} bytes is damaged (not JSON)") from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{mapped.path}: the header is damaged (not a table of tensors)")
    if len(header) > MOST_TENSORS:
        raise UserError(f"{mapped.path}: {len(header):,} tensors are absurd; up to {MOST_TENSORS:,} are read")
    return header, 8 + length


class DuplicateName(ValueError):
    pass


def table_of(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; json itself would take the last of two values."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise DuplicateName(next(name for name in names if names.count(name) > 1))
    return table


def place_of(mapped: MappedFile, name: str, entry: object, begin: int) -> Place:
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if len(shape) > LARGEST_NDIM or not all(
            type(number) is int and number >= 0 for number in (*shape, first, last)
        ):
            raise ValueError
        if prod(number or 1 for number in shape) >= 1 << 63:  # torch multiplies empty dimensions as well
            raise ValueError
        name.encode()  # JSON can express half a character
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{mapped.path}: the header's entry for {name[:80]} is damaged") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{mapped.path}: {name} has the type {dtype}, which is not supported")
    place = Place(begin + first, DTYPES[dtype], shape)
    if place.nbytes != last - first:
        raise UserError(f"{mapped.path}: {name} {list(shape)} {dtype} cannot take {last - first:,} bytes")
    return place


def check_coverage(mapped: MappedFile, entries: Mapping[str, Place], begin: int) -> None:
    """The tensors must follow each other without hole or overlap, up to the end of the file."""
    end = begin
    for name, place in entries.items():
        if place.offset != end:
            raise UserError(f"{mapped.path}: {name} begins at byte {place.offset:,} where {end:,} was expected")
        end = place.end
    if end > mapped.size:
        raise UserError(f"{mapped.path} is truncated: it should have {end:,} bytes and has {mapped.size:,}")
    if end < mapped.size:
        raise UserError(f"{mapped.path} is damaged: {mapped.size - end:,} bytes follow the last tensor")


def layout(infos: Iterable[TensorInfo], metadata: Mapping[str, object], fp8_form: Fp8Form = PER_LAYER) -> Layout:
    """Stored tensors in an order that needs no holes."""
    infos = list(infos)
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}  # stored name -> what it is, in the wanted order
    names: dict[str, list[str]] = {}
    constants = fp8_form.constants(info.name for info in infos if info.format == "fp8")
    for info in infos:
        fmt = FORMATS[info.format]
        if fmt.parts[0].dtype not in NAMES or fmt.block > 1:
            raise UserError(f"{info.name}: {info.format} cannot be stored as safetensors; use a .gguf file")
        module = info.name.removesuffix("weight")
        scale = [module + fp8_form.scale] if len(fmt.parts) > 1 else []
        names[info.name] = [info.name, *scale]
        for name, part in zip(names[info.name], fmt.parts, strict=True):
            entries[name] = part.dtype, part.shape(info.shape)
        for suffix in (*INPUT_SCALES, MARKER):
            if scale and module + suffix in constants:
                entries[module + suffix] = constants[module + suffix][:2]
    entries |= {name: (dtype, shape) for name, (dtype, shape, _) in constants.items()}
    order = aligned_order({name: (dtype.itemsize, prod(shape)) for name, (dtype, shape) in entries.items()})
    metadata = {"format": "pt", **{key: str(value) for key, value in metadata.items()}}
    metadata |= fp8_form.metadata(info.name for info in infos if info.format == "fp8")
    header, places = place_all({name: entries[name] for name in order}, metadata)
    return Layout(
        header,
        {info.name: tuple(places[name] for name in names[info.name]) for info in infos},
        max((place.end for place in places.values()), default=len(header)),
        tuple((places[name].offset, content) for name, (_, _, content) in constants.items()),
    )


def aligned_order(entries: Mapping[str, tuple[int, int]]) -> list[str]:
    """entries: name -> (item size, items). The first of three orders in which every tensor is aligned."""

    def largest_first(names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: -entries[name][0])

    def is_aligned(order: list[str]) -> bool:
        offset = 0
        for name in order:
            size, count = entries[name]
            if offset % size:
                return False
            offset += size * count
        return True

    given = list(entries)
    by_block = [name for _, names in groupby(given, block_of) for name in largest_first(names)]
    return next((order for order in (given, by_block) if is_aligned(order)), largest_first(given))


def place_all(
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Place]]:
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    places, offset = {}, 0
    for name, (dtype, shape) in entries.items():
        places[name] = Place(offset, dtype, shape)
        table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, places[name].end]}
        offset = places[name].end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: replace(place, offset=len(header) + place.offset) for name, place in places.items()}
