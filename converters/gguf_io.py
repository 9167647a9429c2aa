"""GGUF, version 3: the only file that imports gguf.

The writer is strict: every offset is the running sum of padded sizes, the last tensor is padded too, no alignment key,
no prefix, no reshaping; every reader takes that. The header is parsed here and not by `gguf.GGUFReader`, which builds
one Python object per tokenizer entry and trusts the sizes it finds. Format: ggml-org/ggml docs/gguf.md.
"""

import struct
from collections.abc import Iterable, Mapping
from math import prod

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from flux_quant.converters.container import Contents, Layout, MappedFile, Place, TensorInfo
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape

CONTAINER = "GGUF"
MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32
QUANTIZATION_VERSION = 2
LONGEST_NAME = 63  # GGML_MAX_NAME of stock ggml, without the terminator
SHAPE_KEY = "comfy.gguf.orig_shape."

# Format name -> tensor type, and -> `general.file_type`, which counts differently.
TYPES = {name: kind for kind in GGMLQuantizationType if (name := kind.name.lower()) in FORMATS}
FILE_TYPES = {
    name: kind
    for kind in LlamaFileType
    if (name := kind.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()) in TYPES
}
FORMAT_NAMES = {int(kind): kind.name.lower() for kind in GGMLQuantizationType}
SIZES = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}  # (elements, bytes) of a block

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, STRING, ARRAY = 4, 8, 9


def recognises(mapped: MappedFile) -> bool:
    return mapped.bytes(0, 4) == MAGIC


def parse(mapped: MappedFile) -> Contents:
    cursor = Cursor(mapped)
    version = cursor.number("I")
    if version not in (2, 3):
        raise UserError(f"{mapped.path} is GGUF version {version}; versions 2 and 3 are supported")
    tensor_count, key_count = cursor.count(24), cursor.count(12)
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    rows = [(cursor.string(), cursor.shape(), cursor.number("I"), cursor.number("Q")) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{mapped.path}: an alignment of {alignment} makes no sense; the file is damaged")
    begin = cursor.offset + -cursor.offset % alignment
    contents = Contents(CONTAINER, metadata)
    for name, shape, kind, offset in sorted(rows, key=lambda row: row[3]):
        place = place_of(mapped, name, shape, kind, begin + offset)
        if SHAPE_KEY + name in metadata:
            shape = original_shape(mapped, name, shape, kind, metadata[SHAPE_KEY + name])
            place = stored(shape, kind, place.offset)
        if name in contents.places:
            raise UserError(f"{mapped.path}: the tensor {name} occurs twice; the file is damaged")
        contents.add(TensorInfo(name, shape, FORMAT_NAMES[kind]), place)
    return contents


class Cursor:
    """Reads the header from front to back, never beyond the end of the file."""

    def __init__(self, mapped: MappedFile) -> None:
        self.mapped, self.offset = mapped, len(MAGIC)

    def take(self, count: int) -> bytes:
        if self.offset + count > self.mapped.size:
            path, size = self.mapped.path, self.mapped.size
            raise UserError(f"{path} is truncated or damaged: its header goes beyond the {size:,} bytes of the file")
        data = self.mapped.bytes(self.offset, count)
        self.offset += count
        return data

    def number(self, code: str) -> int | float | bool:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, smallest: int) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count = self.number("Q")
        if count * smallest > self.mapped.size:
            raise UserError(f"{self.mapped.path} is damaged: {count:,} entries in {self.mapped.size:,} bytes")
        return count

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def shape(self) -> Shape:
        """In torch's order; the file has the innermost dimension first."""
        ndim = self.number("I")
        if ndim > 8:
            raise UserError(f"{self.mapped.path} is damaged: a tensor of {ndim:,} dimensions")
        return tuple(self.number("Q") for _ in range(ndim))[::-1]

    def value(self, kind: int) -> object:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise UserError(f"{self.mapped.path} is damaged: a value of type {kind}")
        kind, count = self.number("I"), self.count(1)
        if kind in SCALARS:
            code = f"<{count}{SCALARS[kind]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        if kind != STRING:
            raise UserError(f"{self.mapped.path} is damaged: an array of values of type {kind}")
        return [self.string() for _ in range(count)]


def place_of(mapped: MappedFile, name: str, shape: Shape, kind: int, offset: int) -> Place:
    if kind not in SIZES:
        raise UserError(f"{mapped.path}: {name} has the unknown type {kind}; the file is damaged or too new")
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


def original_shape(mapped: MappedFile, name: str, shape: Shape, kind: int, original: object) -> Shape:
    """Some converters rewrite (768, 320) as (960, 256) and keep the shape aside: blocks stay in the same order."""
    if not isinstance(original, list) or prod(original) != prod(shape) or original[-1] % SIZES[kind][0]:
        raise UserError(f"{mapped.path}: {name} {list(shape)} cannot be viewed as {original}, as its {SHAPE_KEY}* says")
    return tuple(original)


def model_metadata(architecture: str, format_name: str) -> dict[str, object]:
    """The three keys that readers know. `format_name` is the format of the bulk of the weights."""
    return {
        "general.architecture": architecture,
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": int(FILE_TYPES[format_name]),
    }


def layout(infos: Iterable[TensorInfo], metadata: Mapping[str, object]) -> Layout:
    """Tensors in the order given. Metadata: strings, and integers as uint32."""
    infos = list(infos)
    offset, offsets, rows = 0, {}, []
    for info in infos:
        if info.format not in TYPES:
            raise UserError(f"{info.name}: {info.format} cannot be stored as GGUF; use a .safetensors file")
        if len(info.name.encode()) > LONGEST_NAME:
            raise UserError(f"the name {info.name} has more than {LONGEST_NAME} bytes, which GGUF readers refuse")
        if len(info.shape) > 4:
            raise UserError(f"{info.name}: {len(info.shape)} dimensions; GGUF allows 4")
        shape = info.shape or (1,)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        rows.append(string(info.name) + dimensions + struct.pack("<IQ", TYPES[info.format], offset))
        offsets[info.name] = offset
        offset += info.nbytes + -info.nbytes % ALIGNMENT
    keys = [string(key) + value(content) for key, content in metadata.items()]
    header = MAGIC + struct.pack("<IQQ", VERSION, len(rows), len(keys)) + b"".join(keys + rows)
    header += bytes(-len(header) % ALIGNMENT)
    places = {info.name: (stored(info.shape, TYPES[info.format], len(header) + offsets[info.name]),) for info in infos}
    return Layout(header, places, len(header) + offset)


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(content: object) -> bytes:
    if isinstance(content, int):
        return struct.pack("<II", UINT32, content)
    return struct.pack("<I", STRING) + string(str(content))
