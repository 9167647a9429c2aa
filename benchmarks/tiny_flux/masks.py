"""Masks of many kinds for a 96 x 96 picture: which pixels are drawn anew.

Each is a function of a random generator, the world and the scene -> (96, 96) bool; `random_mask` chooses among them.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from flux_quant.benchmarks.tiny_flux.emoji import SIZE, EmojiWorld, Scene

Rng = np.random.Generator
LEAST = 0.02  # of the picture


def drawn(draw: Callable[[ImageDraw.ImageDraw], object]) -> np.ndarray:
    canvas = Image.new("1", (SIZE, SIZE))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas)


def half_plane(angle: float, at: float) -> np.ndarray:
    """What lies beyond a line: its normal points to `angle`, and it passes `at` pixels from the centre."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    return x * np.cos(angle) + y * np.sin(angle) > at


def bounding_box(world: EmojiWorld, scene: Scene, margin: int = 0) -> tuple[int, int, int, int]:
    """Of the emoji's pixels: left, top, right, bottom, the latter two inside; not beyond the picture."""
    rows, columns = np.nonzero(world.coverage(scene)[..., 3] > 0.02)
    box = columns.min() - margin, rows.min() - margin, columns.max() + margin, rows.max() + margin
    return tuple(int(min(max(side, 0), SIZE - 1)) for side in box)


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    return drawn(lambda d: d.rectangle((left, top, right, bottom), fill=1))


def random_box(rng: Rng, smallest: int = 20, largest: int = 72) -> tuple[int, int, int, int]:
    width, height = rng.integers(smallest, largest + 1, 2)
    left, top = rng.integers(-8, SIZE + 8 - width), rng.integers(-8, SIZE + 8 - height)
    return int(left), int(top), int(left + width), int(top + height)


def rectangle(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    return box(*random_box(rng))


def ellipse(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    corners = random_box(rng, 24, 80)
    return drawn(lambda d: d.ellipse(corners, fill=1))


def half(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    return half_plane(rng.integers(4) * np.pi / 2, rng.uniform(-16, 16))


def slanted(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    return half_plane(rng.uniform(0, 2 * np.pi), rng.uniform(-20, 24))


def quarter(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    first = rng.integers(4) * np.pi / 2
    return half_plane(first, rng.uniform(-12, 12)) & half_plane(first + np.pi / 2, rng.uniform(-12, 12))


def strip(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    angle = rng.integers(4) * np.pi / 2 if rng.random() < 0.6 else rng.uniform(0, 2 * np.pi)
    begin = rng.uniform(-36, 24)
    return half_plane(angle, begin) & ~half_plane(angle, begin + rng.uniform(8, 28))


def brush(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    points = [(int(x), int(y)) for x, y in rng.integers(4, SIZE - 4, (rng.integers(2, 6), 2))]
    width = int(rng.integers(8, 24))

    def strokes(draw: ImageDraw.ImageDraw) -> None:
        draw.line(points, fill=1, width=width, joint="curve")
        for x, y in points:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)

    return drawn(strokes)


def around_emoji(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    return box(*bounding_box(world, scene, int(rng.integers(0, 9))))


def silhouette(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    """Of the emoji itself, or of another at its place: the shape must not always give away what is behind it."""
    emoji = scene.emoji if rng.random() < 0.5 else int(rng.integers(len(world)))
    shape = Scene(emoji, scene.size, scene.position, scene.colour, scene.mirrored, scene.tilt)
    inked = Image.fromarray(((world.coverage(shape)[..., 3] > 0.02) * 255).astype(np.uint8))
    return np.asarray(inked.filter(ImageFilter.MaxFilter(2 * int(rng.integers(1, 6)) + 1))) > 127


def outside(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    return ~(rectangle if rng.random() < 0.6 else ellipse)(rng, world, scene)


def everything(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    return np.ones((SIZE, SIZE), bool)


KINDS = {  # kind -> how often
    rectangle: 0.15,
    ellipse: 0.1,
    half: 0.17,
    slanted: 0.1,
    quarter: 0.09,
    strip: 0.09,
    brush: 0.06,
    around_emoji: 0.1,
    silhouette: 0.05,
    outside: 0.06,
    everything: 0.03,
}


def random_mask(rng: Rng, world: EmojiWorld, scene: Scene) -> np.ndarray:
    """(96, 96) bool, true where the picture is drawn anew."""
    while True:
        kind = list(KINDS)[rng.choice(len(KINDS), p=list(KINDS.values()))]
        mask = kind(rng, world, scene)
        if mask.mean() >= LEAST:
            return mask
