"""Sound files of unsound models: tensors missing, of other shapes and types. They are refused, or read as they are."""

import json
import random
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import components
from flux_quant.errors import UserError
from flux_quant.loading import load_clip, load_flux, load_t5, load_vae
from flux_quant.naming import to_stored

Shapes = dict[str, tuple[int, ...]]
ODD_SHAPES = [(), (0,), (1,), (3,), (64,), (0, 4), (4, 0), (2, 3), (64, 64), (6, 4), (192, 64), (3, 1, 1)]
ODD_SHAPES += [(1, 1, 1, 1), (2, 2, 1, 1)]
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8}
LOADERS: dict[str, Callable[[Path], object]] = {
    "transformer": load_flux,
    "t5": load_t5,
    "clip": lambda path: load_clip(path, end_of_text=1),
    "vae": load_vae,
}


def stored_shapes(name: str, diffusers: bool) -> Shapes:
    """Of a bundled model, in its own names or in diffusers'."""
    with open_checkpoint(getattr(find_components(BUNDLED), name)) as reader:
        shapes = {info.name: info.shape for info in reader.tensors.values()}
        if not diffusers:
            return shapes
        places = to_stored(components(reader)[0].family.name, "diffusers", shapes)
    return {
        piece: place.shape or (rows, *shapes[name][1:])
        for name, place in places.items()
        for piece, rows in zip(place.names, place.rows, strict=True)
    }


def write_zeros(path: Path, shapes: Shapes, types: dict[str, str]) -> None:
    table, end = {}, 0
    for name, shape in shapes.items():
        dtype = types.get(name, "F32")
        begin, end = end, end + SIZES[dtype] * prod(shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)


def mutated(shapes: Shapes, rng: random.Random) -> tuple[Shapes, dict[str, str]]:
    shapes, types = dict(shapes), {}
    for name in rng.sample([*shapes], rng.choice((1, 1, 2, 5))):
        kind = rng.randrange(4)
        if kind == 0:
            shapes.pop(name)
        elif kind == 1:
            types[name] = rng.choice([*SIZES])
        else:
            shapes[name if kind == 2 else name + ".more"] = rng.choice(ODD_SHAPES)
    return shapes, types


CASES = [("transformer", False), ("transformer", True), ("t5", False), ("clip", False), ("vae", False), ("vae", True)]


@pytest.mark.parametrize(("name", "diffusers"), CASES, ids=[f"{n}-{'diffusers' if d else 'own'}" for n, d in CASES])
def test_odd_models(tmp_path, name, diffusers):
    path, refused = tmp_path / "x.safetensors", 0
    shapes = stored_shapes(name, diffusers)
    write_zeros(path, shapes, {})
    LOADERS[name](path)
    for seed in range(16):
        write_zeros(path, *mutated(shapes, random.Random(seed)))
        try:
            with open_checkpoint(path) as reader:
                for component in components(reader):
                    assert all(load(component, n).shape == info.shape for n, info in component.tensors.items())
            LOADERS[name](path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 4
