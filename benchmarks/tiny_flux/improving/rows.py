"""Scenes as rows of six numbers, and the work of the processes that help with drawing: nothing here needs torch."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from flux_quant.benchmarks.tiny_flux.emoji import COLOUR_NAMES, POSITIONS, TILTS, WIDTHS, EmojiWorld, Scene, sprites_of
from flux_quant.benchmarks.tiny_flux.masks import random_mask

SIZES = tuple(WIDTHS)
COLUMNS = {  # of a row, with what its numbers stand for; the first is the emoji's
    "size": SIZES,
    "position": POSITIONS,
    "colour": COLOUR_NAMES,
    "mirrored": (False, True),
    "tilt": TILTS,
}


def row_of(scene: Scene) -> list[int]:
    return [scene.emoji, *(values.index(getattr(scene, name)) for name, values in COLUMNS.items())]


def scene_of(row: list[int]) -> Scene:
    return Scene(row[0], *(values[i] for i, values in zip(row[1:], COLUMNS.values(), strict=True)))


def mapped(workers: int, function: Callable, items: list, chunk: int = 16) -> list:
    """function of each item, by so many processes; begun anew, as a process that has a GPU must not be forked."""
    if workers < 2:
        return [function(item) for item in items]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, items, chunksize=chunk))


def make_sprites(world: EmojiWorld, workers: int) -> np.ndarray:
    """`world.sprites`, made by several processes, and kept by the world."""
    if "sprites" not in vars(world):
        vars(world)["sprites"] = np.stack(mapped(workers, sprites_of, world.bitmaps))
    return world.sprites


def packed_masks(sprites: Path, piece: tuple[int, list[list[int]]]) -> np.ndarray:
    """Masks of scenes, (scenes, 1152) uint8: a bit for each pixel. piece: a seed and rows of scenes."""
    world = EmojiWorld.__new__(EmojiWorld)
    vars(world)["sprites"] = np.load(sprites, mmap_mode="r")
    world.names = [""] * len(world.sprites)
    rng = np.random.default_rng(piece[0])
    return np.packbits([random_mask(rng, world, scene_of(row)).ravel() for row in piece[1]], axis=1)
