"""GGUF, version 3: the only file that imports gguf.

The writer is strict: every offset is the running sum of padded sizes, the last tensor is padded too, no alignment key,
no prefix, no reshaping of its own; every reader takes that. The reader takes what is found in the wild as long as it
cannot be misread, and `strict_problems` tells what ggml's own reader would refuse of it.

The header is parsed here and not by `gguf.GGUFReader`, which is slow with vocabularies and trusts the sizes it finds.
Values and their types: `gguf_values`. Format: ggml-org/ggml docs/gguf.md and src/gguf.cpp.
"""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from flux_quant.converters.container import Contents, Converted, Layout, MappedFile, Place, TensorInfo
from flux_quant.converters.gguf_values import MOST_DIMENSIONS, Cursor, key_value, string
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape

CONTAINER = "GGUF"
MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
QUANTIZATION_VERSION = 2
LONGEST_NAME = 63  # GGML_MAX_NAME of stock ggml, without the terminator
MOST_ELEMENTS = (1 << 63) - 1
ALIGNMENT_KEY = "general.alignment"
SHAPE_KEY = "comfy.gguf.orig_shape."

# Format name -> tensor type.
TYPES = {name: kind for kind in GGMLQuantizationType if (name := kind.name.lower()) in FORMATS}
FORMAT_NAMES = {int(kind): kind.name.lower() for kind in GGMLQuantizationType}
SIZES = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}  # (elements, bytes) of a block

# Name of a recipe or a format -> `general.file_type`, which counts differently: Q4_K_S and Q4_K_M are made of Q4_K.
FILE_TYPES = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower(): kind for kind in LlamaFileType}
FILE_TYPES |= {name: FILE_TYPES[f"{name}_s"] for name in ("q3_k", "q4_k", "q5_k")}


def recognises(mapped: MappedFile) -> bool:
    return mapped.bytes(0, 4) == MAGIC


@dataclass(frozen=True)
class Header:
    metadata: dict[str, object]
    rows: tuple[tuple[str, Shape, int, int], ...]  # name, shape, type, offset after `begin`; in the file's order
    begin: int  # of the first tensor, counted from the first byte
    alignment: int


def read_header(mapped: MappedFile) -> Header:
    cursor = Cursor(mapped, len(MAGIC))
    version = cursor.uint32()
    if version not in (2, 3):
        raise UserError(f"{mapped.path} is GGUF version {version}; versions 2 and 3 are supported")
    tensor_count, key_count = cursor.entries(24), cursor.entries(12)
    metadata: dict[str, object] = {}
    for _ in range(key_count):
        key = cursor.string()
        if not key or key in metadata:
            what = f"the key {key} occurs twice" if key else "a key without a name"
            raise UserError(f"{mapped.path}: {what}; the file is damaged")
        metadata[key] = cursor.value()
    rows = tuple((cursor.string(), cursor.shape(), cursor.uint32(), cursor.uint64()) for _ in range(tensor_count))
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if type(alignment) is not int or alignment.bit_count() != 1:
        raise UserError(f"{mapped.path}: an alignment of {alignment} makes no sense; the file is damaged")
    return Header(metadata, rows, padded(cursor.offset, alignment), alignment)


def parse(mapped: MappedFile) -> Contents:
    header = read_header(mapped)
    contents, end = Contents(CONTAINER, header.metadata), header.begin
    for name, shape, kind, offset in sorted(header.rows, key=lambda row: row[3]):
        if name in contents.places:
            raise UserError(f"{mapped.path}: the tensor {name} occurs twice; the file is damaged")
        place = place_of(mapped, name, shape, kind, header.begin + offset)
        if place.offset < end and place.nbytes:
            raise UserError(f"{mapped.path}: {name} begins inside the tensor before it; the file is damaged")
        end = max(end, place.end)
        if SHAPE_KEY + name in header.metadata:
            shape = original_shape(mapped, name, shape, header.metadata[SHAPE_KEY + name])
        add(contents, TensorInfo(name, shape, FORMAT_NAMES[kind]), place)
    return contents


def add(contents: Contents, info: TensorInfo, place: Place) -> None:
    """Packed rows stay packed. Where blocks cross rows, or a vector is packed, reading unpacks the weight."""
    fmt = FORMATS.get(info.format)
    if fmt and not fmt.fits(info.shape):
        contents.converted[info.name] = Converted(fmt.name, lambda data: fmt.unpack(data).view(info.shape))
        contents.add(TensorInfo(info.name, info.shape, "f32"), place)
    else:
        contents.add(info, replace(place, shape=fmt.parts[0].shape(info.shape)) if fmt else place)


def place_of(mapped: MappedFile, name: str, shape: Shape, kind: int, offset: int) -> Place:
    if kind not in SIZES:
        raise UserError(f"{mapped.path}: {name} has the unknown type {kind}; the file is damaged or too new")
    if prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise UserError(f"{mapped.path}: the shape {list(shape)} of {name} is absurd; the file is damaged")
    block, _ = SIZES[kind]
    columns = shape[-1] if shape else 1
    if columns % block:
        raise UserError(f"{mapped.path}: {columns} columns of {name} are no multiple of {block}; the file is damaged")
    place = stored(shape, kind, offset)
    if place.end > mapped.size:
        raise UserError(f"{mapped.path} is truncated: {name} ends at byte {place.end:,}, the file has {mapped.size:,}")
    return place


def stored(shape: Shape, kind: int, offset: int) -> Place:
    """A tensor of this unpacked shape: typed where torch computes with it, else rows of bytes."""
    fmt = FORMATS.get(FORMAT_NAMES[kind])
    if fmt:
        return Place(offset, fmt.parts[0].dtype, fmt.parts[0].shape(shape))
    block, nbytes = SIZES[kind]
    return Place(offset, torch.uint8, (prod(shape) // block * nbytes,))


def original_shape(mapped: MappedFile, name: str, shape: Shape, original: object) -> Shape:
    """Some converters rewrite (768, 320) as (960, 256) and keep the shape aside: values stay in the same order."""
    numbers = isinstance(original, np.ndarray) and original.dtype.kind in "iu" and 0 < original.size <= 8
    sizes = tuple(original.tolist()) if numbers else ()
    if min(sizes, default=0) < 1 or prod(sizes) != prod(shape):
        says = list(sizes) or type(original).__name__
        raise UserError(f"{mapped.path}: {name} {list(shape)} cannot be viewed as {says}, as its {SHAPE_KEY}* says")
    return sizes


def strict_problems(mapped: MappedFile) -> list[str]:
    """What ggml's own reader (and so llama.cpp) refuses in a file that `parse` accepts; one line each."""
    header, problems, previous = read_header(mapped), [], 0
    for row in header.rows:
        name, _, _, offset = row
        if len(name.encode()) > LONGEST_NAME:
            problems.append(f"the name {name} has {len(name.encode())} bytes; stock readers allow {LONGEST_NAME}")
        if offset != previous:
            problems.append(f"{name} begins at byte {offset:,} of the data; {previous:,} was expected")
        previous = padded_end(row, header.alignment)
    if (rest := bytes_after(mapped)) < 0:
        problems.append(f"{-rest} bytes of padding are missing after the last tensor")
    return problems


def bytes_after(mapped: MappedFile) -> int:
    """Bytes behind the last tensor and its padding, which belong to nothing; negative if some padding is missing."""
    header = read_header(mapped)
    ends = [padded_end(row, header.alignment) for row in header.rows]
    return mapped.size - header.begin - max(ends) if ends else 0


def padded_end(row: tuple[str, Shape, int, int], alignment: int) -> int:
    _, shape, kind, offset = row
    block, nbytes = SIZES[kind]
    return padded(offset + prod(shape) // block * nbytes, alignment)


def padded(count: int, alignment: int = ALIGNMENT) -> int:
    return count + -count % alignment


def model_metadata(architecture: str, recipe: str, bulk: str = "") -> dict[str, object]:
    """The three keys that readers know.

    `recipe` is a name that users know (q4_k_m, q8_0) or a format; a recipe without a number of its own takes that of
    `bulk`, the format of most of its weights.
    """
    return {
        "general.architecture": architecture,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": int(FILE_TYPES[recipe if recipe in FILE_TYPES else bulk]),
    }


def split_name(prefix: str, number: int, count: int) -> str:
    """File name of part `number` (from 0) of `count`, as llama.cpp looks for it: it counts from 1 there."""
    return f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf"


def split_metadata(number: int, count: int, tensors: int) -> dict[str, object]:
    """Keys of part `number` (from 0) of `count`; `tensors` of all parts. All other keys belong in the first part."""
    return {
        "split.no": np.uint16(number),
        "split.count": np.uint16(count),
        "split.tensors.count": np.int32(tensors),
    }


def layout(infos: Iterable[TensorInfo], metadata: Mapping[str, object]) -> Layout:
    """Tensors in the order given, metadata with the types that `gguf_values` describes.

    A caller that reshapes a weight gives the shape to be stored, and the original as int32 under SHAPE_KEY + name.
    """
    infos = list(infos)
    if ALIGNMENT_KEY in metadata:
        raise ValueError(f"{ALIGNMENT_KEY} is not written; the alignment is always {ALIGNMENT}")
    offset, offsets, rows = 0, {}, []
    for info in infos:
        check_storable(info)
        if info.name in offsets:
            raise ValueError(f"the tensor {info.name} is there twice")
        shape = info.shape or (1,)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        rows.append(string(info.name) + dimensions + struct.pack("<IQ", TYPES[info.format], offset))
        offsets[info.name] = offset
        offset += padded(info.nbytes)
    keys = [key_value(key, content) for key, content in metadata.items()]
    header = MAGIC + struct.pack("<IQQ", VERSION, len(rows), len(keys)) + b"".join(keys + rows)
    header += bytes(-len(header) % ALIGNMENT)
    places = {info.name: (stored(info.shape, TYPES[info.format], len(header) + offsets[info.name]),) for info in infos}
    return Layout(header, places, len(header) + offset)


def check_storable(info: TensorInfo) -> None:
    if info.format not in TYPES:
        raise UserError(f"{info.name}: {info.format} cannot be stored as GGUF; use a .safetensors file")
    if len(info.name.encode()) > LONGEST_NAME:
        raise UserError(f"the name {info.name} has more than {LONGEST_NAME} bytes, which GGUF readers refuse")
    if len(info.shape) > MOST_DIMENSIONS:
        raise UserError(f"{info.name}: {len(info.shape)} dimensions; GGUF allows {MOST_DIMENSIONS}")
    block = FORMATS[info.format].block
    if info.shape and info.shape[-1] % block:
        raise UserError(f"{info.name}: {info.shape[-1]} columns are no multiple of {block}; {info.format} needs that")
