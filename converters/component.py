"""One model out of a checkpoint, in its canonical names.

An all-in-one file holds a transformer, encoders and a VAE under prefixes; files saved by ComfyUI spell some names
differently. A `Component` is a reader that shows one model without any of that.
"""

from pathlib import Path

from torch import Tensor

from flux_quant import arch
from flux_quant.arch import Family
from flux_quant.converters.checkpoint import CheckpointReader, open_checkpoint
from flux_quant.converters.container import TensorInfo
from flux_quant.errors import UserError


class Component:
    """The tensors of a reader whose names begin with `prefix`, as a reader."""

    def __init__(self, reader: CheckpointReader, prefix: str, family: Family) -> None:
        self.reader, self.prefix, self.family = reader, prefix, family
        self.path, self.container, self.metadata = reader.path, reader.container, reader.metadata
        self.stored: dict[str, str] = {}  # canonical name -> name in the file
        self.tensors = self.rename(reader.tensors)
        self.foreign = self.rename(reader.foreign)

    def rename(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        renamed = {}
        for name, info in tensors.items():
            if name.startswith(self.prefix):
                canonical = arch.canonical_name(name.removeprefix(self.prefix), self.family)
                self.stored[canonical] = name
                renamed[canonical] = TensorInfo(canonical, info.shape, info.format)
        return renamed

    def read(self, name: str) -> tuple[Tensor, ...]:
        return self.reader.read(self.stored[name])

    def nbytes(self, name: str) -> int:
        return self.reader.nbytes(self.stored[name])

    def forget(self, name: str) -> None:
        self.reader.forget(self.stored[name])

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> "Component":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def components(reader: CheckpointReader) -> list[Component]:
    """Every model in the file; empty if none is known."""
    shapes = {info.name: info.shape for tensors in (reader.tensors, reader.foreign) for info in tensors.values()}
    return [Component(reader, prefix, family) for prefix, family in arch.identify_all(shapes).items()]


def select(reader: CheckpointReader, family: str, naming: str) -> Component:
    """The one model of this family, all of whose tensors can be read. UserError that says what the file is instead."""
    found = components(reader)
    for component in found:
        if (component.family.name, component.family.naming) == (family, naming):
            if component.foreign:
                kinds = ", ".join(sorted({info.format for info in component.foreign.values()}))
                count = len(component.foreign)
                raise UserError(f"{reader.path}: {count} tensors of the type {kinds}, which cannot be read")
            return component
    raise UserError(f"{reader.path} is {describe(reader, found)}; supported here: {family} in {naming} names")


def describe(reader: CheckpointReader, found: list[Component]) -> str:
    """`a VAE (BFL names)`, for error messages."""
    if not found:
        first = next(iter({**reader.tensors, **reader.foreign}), "it has no tensors")
        return f"no model that is known here (first tensor: {first})"
    names = dict.fromkeys(f"{component.family.name} ({component.family.naming} names)" for component in found)
    return "a " + " with a ".join(names)


def open_component(path: str | Path, family: str, naming: str) -> Component:
    return select(open_checkpoint(path), family, naming)
