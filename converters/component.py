"""One model out of a checkpoint, in its canonical names.

An all-in-one file or a pipeline's folder holds several models under prefixes, and every layout has its own names. A
`Component` is a reader that shows one model without any of that: rows that lie in several tensors are joined (on the
packed bytes where that is exact), halves that have changed places are put back.
"""

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.checkpoint import CheckpointReader, open_checkpoint
from flux_quant.converters.container import TensorInfo
from flux_quant.errors import UserError
from flux_quant.families import Family, identify_all
from flux_quant.formats import FORMATS, QuantFormat
from flux_quant.layouts import CANONICAL, TABLES
from flux_quant.naming import Stored, from_stored, swap_halves


class Component:
    """The tensors of a reader whose names begin with `prefix`, as a reader. `others`: prefixes of other components."""

    def __init__(self, reader: CheckpointReader, prefix: str, family: Family, others: tuple[str, ...] = ()) -> None:
        self.reader, self.prefix, self.family = reader, prefix, family
        self.path, self.container = reader.path, reader.container
        self.metadata, self.notes = reader.metadata, reader.notes
        infos = {
            name.removeprefix(prefix): info
            for name, info in {**reader.tensors, **reader.foreign}.items()
            if name.startswith(prefix) and not (others and name.startswith(others))
        }
        self.places = places_of(reader, family, {name: info.shape for name, info in infos.items()})
        used = {name for stored in self.places.values() for name in stored.names}
        self.ignored = tuple(name for name in infos if name not in used)
        """Stored tensors (without the prefix) that are no part of the model: T5's decoder, copies, position ids."""
        self.tensors: dict[str, TensorInfo] = {}
        self.foreign: dict[str, TensorInfo] = {}
        for name, stored in self.places.items():
            format_name = self.presented_format(stored)
            info = TensorInfo(name, stored.full, format_name)
            (self.tensors if format_name in FORMATS else self.foreign)[name] = info
        kinds = {reader.stored_as(prefix + name) for name in used}
        self.quantized = frozenset(kind for kind in kinds if kind not in FORMATS or not FORMATS[kind].is_plain)

    def presented_format(self, stored: Stored) -> str:
        """That of the stored tensors, if it survives what has to be done with them; else f32."""
        names = [self.prefix + name for name in stored.names]
        for name in names:
            if name in self.reader.foreign:
                return self.reader.foreign[name].format
        formats = {self.reader.tensors[name].format for name in names}
        if len(formats) > 1:
            return "f32"
        fmt = FORMATS[formats.pop()]
        reshaped = stored.transposed or stored.shape and len(stored.shape) != len(stored.full)
        if reshaped and fmt.block > 1:
            return "f32"
        if len(names) > 1 and len(fmt.parts) > 1:  # one scale for all of a weight: pieces must agree on it
            scales = [self.reader.read(name)[1:] for name in names]
            if any(not torch.equal(a, b) for other in scales for a, b in zip(scales[0], other, strict=True)):
                return "f32"
        return fmt.name

    def read(self, name: str) -> tuple[Tensor, ...]:
        """The parts of a weight in the format that `tensors` says; views of the file if it lies there as it is."""
        stored = self.places[name]
        if stored.is_plain:
            return self.reader.read(self.prefix + stored.names[0])
        fmt = FORMATS[self.tensors[name].format]
        pieces = [self.piece(self.prefix + piece, fmt) for piece in stored.names]
        return tuple(arranged(stored, parts, fmt) if parts[0].ndim else parts[0] for parts in zip(*pieces, strict=True))

    def piece(self, name: str, fmt: QuantFormat) -> tuple[Tensor, ...]:
        own = FORMATS[self.reader.tensors[name].format]
        parts = self.reader.read(name)
        return parts if own is fmt else fmt.pack(own.unpack(*parts))

    def nbytes(self, name: str) -> int:
        """Of the stored tensors; a share of them, if they hold others as well."""
        stored = self.places[name]
        nbytes = sum(self.reader.nbytes(self.prefix + piece) for piece in stored.names)
        partial = stored.shape and not stored.transposed and stored.shape[0] > stored.rows[0]
        return nbytes * stored.rows[0] // stored.shape[0] if partial else nbytes

    def stored_as(self, name: str) -> str:
        return " + ".join(dict.fromkeys(self.reader.stored_as(self.prefix + n) for n in self.places[name].names))

    @cached_property
    def input_scales(self) -> dict[str, float]:
        """By canonical name; the largest where several layers were joined."""
        scales = self.reader.input_scales
        found = {}
        for name, stored in self.places.items():
            values = [scales[self.prefix + piece] for piece in stored.names if self.prefix + piece in scales]
            if values:
                found[name] = max(values)
        return found

    def forget(self, name: str) -> None:
        for piece in self.places[name].names:
            self.reader.forget(self.prefix + piece)

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> "Component":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def arranged(stored: Stored, parts: tuple[Tensor, ...], fmt: QuantFormat) -> Tensor:
    """One part of the canonical tensor from those of the stored ones; rows stay whole, so packed bytes do as well."""
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    if stored.transposed:
        return tensor.t().contiguous()
    if len(tensor) != sum(stored.rows):
        tensor = tensor[stored.start : stored.start + stored.rows[0]]
    if stored.swapped:
        tensor = swap_halves(tensor)
    return tensor.view(stored.full) if fmt.block == 1 else tensor


def places_of(reader: CheckpointReader, family: Family, shapes: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """Canonical names of a family that we have tables of; a relative keeps the names that it has."""
    if family.naming not in TABLES.get(family.name, ()):
        return {name: Stored((name,), shape[:1] or (1,), shape) for name, shape in shapes.items()}
    try:
        return from_stored(family.name, family.naming, shapes)
    except UserError as error:
        raise UserError(f"{reader.path}: {error}") from None


def components(reader: CheckpointReader) -> list[Component]:
    """Every model in the file; empty if none is known."""
    shapes = {info.name: info.shape for tensors in (reader.tensors, reader.foreign) for info in tensors.values()}
    found = identify_all(shapes)
    return [
        Component(reader, prefix, family, tuple(other for other in found if other and other != prefix))
        for prefix, family in found.items()
    ]


def select(reader: CheckpointReader, family: str) -> Component:
    """The one model of this family, all of whose tensors can be read. UserError that says what the file is instead."""
    found = components(reader)
    for component in found:
        if component.family.name == family and family in CANONICAL:
            if component.foreign:
                kinds = ", ".join(sorted({info.format for info in component.foreign.values()}))
                count = len(component.foreign)
                raise UserError(f"{reader.path}: {count} tensors of the type {kinds}, which cannot be read")
            return component
    raise UserError(f"{reader.path} is {describe(reader, found)}; {family} is needed here")


def describe(reader: CheckpointReader, found: list[Component]) -> str:
    """`a VAE (BFL names)`, for error messages."""
    if not found:
        first = next(iter({**reader.tensors, **reader.foreign}), "it has no tensors")
        return f"no model that is known here (first tensor: {first})"
    names = dict.fromkeys(f"{component.family.name} ({component.family.naming} names)" for component in found)
    return "a " + " with a ".join(names)


def open_component(path: str | Path, family: str) -> Component:
    return select(open_checkpoint(path), family)
