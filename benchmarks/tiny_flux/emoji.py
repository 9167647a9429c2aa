"""The training set of the tiny model: emoji bitmaps, rendered with attributes that a caption may name.

Every picture is a `Scene`: which emoji, small or large, where, on which background, mirrored or not, tilted or not.
A caption names the emoji and some of its attributes; the rest is left to the seed. All attributes are drawn from
short lists, so the evaluation can render every picture a caption allows and look for the nearest one.

Bitmaps: the CBDT strikes (136 x 128) of Noto Color Emoji (OFL 1.1), names: the Unicode character names.
"""

import io
import os
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian package fonts-noto-color-emoji
FONT_VARIABLE = "FLUX_QUANT_EMOJI_FONT"  # another place of that file
SIZE = 96  # pixels
WIDTHS = {"small": 60, "large": 86}  # width of the bitmap in pixels
OFFSETS = {  # shift of the centre, (x, y) in pixels: one latent patch; a large emoji is always in the centre
    "in the centre": (0, 0),
    "on the left": (-16, 0),
    "on the right": (16, 0),
    "at the top": (0, -16),
    "at the bottom": (0, 16),
}
COLOURS = {
    "white": (255, 255, 255),
    "red": (229, 115, 115),
    "orange": (255, 183, 77),
    "yellow": (255, 241, 118),
    "green": (129, 199, 132),
    "blue": (100, 181, 246),
    "purple": (186, 138, 220),
    "grey": (158, 158, 158),
}
TILTS = (0, 15, -15)  # degrees
POSITIONS, COLOUR_NAMES = tuple(OFFSETS), tuple(COLOURS)
UNICODE = "14.0.0"  # whose names were trained on; Python 3.11 has them, later ones have more
LATER = {  # code points that got their names in Unicode 15 to 16
    *(0x1F6DC, 0x1FA89, 0x1FA8F, 0x1FABE, 0x1FABF, 0x1FAC6, 0x1FACE, 0x1FACF, 0x1FADC, 0x1FADF, 0x1FAE8, 0x1FAE9),
    *range(0x1FA75, 0x1FA78),
    *range(0x1FA87, 0x1FA89),
    *range(0x1FAAD, 0x1FAB0),
    *range(0x1FABB, 0x1FABE),
    *range(0x1FADA, 0x1FADC),
    *range(0x1FAF7, 0x1FAF9),
}
UNUSABLE = ("squared", "circled", "mahjong", "arrow", "button", "keycap", "regional", "modifier", "clock face")


@dataclass(frozen=True)
class Scene:
    """One picture, completely described."""

    emoji: int
    size: str
    position: str
    colour: str
    mirrored: bool
    tilt: int


def font_file() -> Path:
    return Path(os.environ.get(FONT_VARIABLE) or FONT)


def load_bitmaps(font: Path) -> list[tuple[str, Image.Image]]:
    """All single-codepoint colour bitmaps of the font as (lower-case Unicode name, RGBA image).

    ImportError without fonttools, or on a Python that lacks some of the names.
    """
    from fontTools.ttLib import TTFont

    if [int(part) for part in unicodedata.unidata_version.split(".")] < [int(part) for part in UNICODE.split(".")]:
        raise ImportError(f"the names of Unicode {UNICODE} are needed, this Python has {unicodedata.unidata_version}")
    ttf = TTFont(font)
    strike = ttf["CBDT"].strikeData[0]
    found = []
    for codepoint, glyph in sorted(ttf.getBestCmap().items()):
        name = unicodedata.name(chr(codepoint), "").lower()
        if codepoint < 0x1F300 or codepoint in LATER or not name or glyph not in strike:
            continue
        found.append((name, Image.open(io.BytesIO(strike[glyph].imageData)).convert("RGBA")))
    return found


def select(bitmaps: list[tuple[str, Image.Image]], distance: float = 0.17) -> list[tuple[str, Image.Image]]:
    """Keep emoji with short names, enough ink, and a pixel RMSE above `distance` (0-1, on white) to all kept."""
    kept, pixels = [], []
    for name, image in bitmaps:
        if len(name.split()) > 4 or any(word in name for word in UNUSABLE):
            continue
        small = np.asarray(on_white(image).resize((34, 32), Image.Resampling.BOX), np.float32) / 255
        if (small < 0.9).any(axis=2).mean() < 0.15:
            continue
        if pixels and np.sqrt(((np.stack(pixels) - small) ** 2).mean(axis=(1, 2, 3))).min() < distance:
            continue
        kept.append((name, image))
        pixels.append(small)
    return kept


def on_white(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(canvas, image).convert("RGB")


def sprites_of(bitmap: Image.Image) -> np.ndarray:
    """(size, mirrored, tilt, 96, 96, 4) uint8, premultiplied RGBA, in the centre of the canvas."""
    out = np.zeros((2, 2, len(TILTS), SIZE, SIZE, 4), np.uint8)
    side = max(bitmap.size)
    square = Image.new("RGBa", (side * 2, side * 2))
    square.paste(bitmap.convert("RGBa"), ((2 * side - bitmap.width) // 2, (2 * side - bitmap.height) // 2))
    for s, width in enumerate(WIDTHS.values()):
        for t, tilt in enumerate(TILTS):
            turned = square.rotate(tilt, Image.Resampling.BICUBIC)
            scaled = turned.resize((2 * width, 2 * width), Image.Resampling.LANCZOS)
            canvas = Image.new("RGBa", (SIZE, SIZE))
            canvas.paste(scaled, ((SIZE - 2 * width) // 2, (SIZE - 2 * width) // 2))
            plain = np.asarray(canvas)
            out[s, 0, t], out[s, 1, (0, 2, 1)[t]] = plain, plain[:, ::-1]
    return out


class EmojiWorld:
    """The chosen emoji and all their scenes."""

    def __init__(self, font: Path | None = None) -> None:
        self.names, self.bitmaps = map(list, zip(*select(load_bitmaps(font or font_file())), strict=True))

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def sprites(self) -> np.ndarray:
        """(emoji, size, mirrored, tilt, 96, 96, 4) uint8, premultiplied RGBA, in the centre of the canvas."""
        return np.stack([sprites_of(bitmap) for bitmap in self.bitmaps])

    def coverage(self, scene: Scene) -> np.ndarray:
        """(96, 96, 4) float32 in 0-1, premultiplied: the emoji alone, at its place."""
        size = tuple(WIDTHS).index(scene.size)
        sprite = self.sprites[scene.emoji, size, int(scene.mirrored), TILTS.index(scene.tilt)]
        dx, dy = OFFSETS[scene.position]
        return np.roll(sprite, (dy, dx), (0, 1)).astype(np.float32) / 255

    def render(self, scene: Scene) -> np.ndarray:
        """(96, 96, 3) float32 in 0-1."""
        rgba = self.coverage(scene)
        background = np.array(COLOURS[scene.colour], np.float32) / 255
        return np.minimum(rgba[..., :3] + (1 - rgba[..., 3:]) * background, 1)  # resampling overshoots by a level

    def held_out(self, scene: Scene) -> bool:
        """Combinations never trained: one colour other than white and one position other than the centre per emoji."""
        return scene.colour == self.held_out_colour(scene.emoji) or scene.position == self.held_out_position(
            scene.emoji
        )

    @staticmethod
    def held_out_colour(emoji: int) -> str:
        return COLOUR_NAMES[1 + emoji * 5 % 7]

    @staticmethod
    def held_out_position(emoji: int) -> str:
        return POSITIONS[1 + emoji * 7 % 4]

    def sample(self, rng: np.random.Generator) -> Scene:
        """A random training scene: 40 % of them small, 40 % on white, a fifth mirrored, 10 % tilted."""
        while True:
            size = "small" if rng.random() < 0.43 else "large"
            scene = Scene(
                emoji=int(rng.integers(len(self))),
                size=size,
                position=str(rng.choice(POSITIONS)) if size == "small" else POSITIONS[0],
                colour="white" if rng.random() < 0.3 else str(rng.choice(COLOUR_NAMES)),
                mirrored=bool(rng.random() < 0.2),
                tilt=int(rng.choice(TILTS, p=(0.9, 0.05, 0.05))),
            )
            if not self.held_out(scene):
                return scene

    def caption(self, scene: Scene, size: bool = True, position: bool = True, colour: bool = True) -> str:
        """The caption of a scene, naming the attributes asked for. A place is only ever named for small emoji."""
        words = [scene.size] if size else []
        words.append(self.names[scene.emoji])
        if position and scene.size == "small":
            words.append(scene.position)
        if colour:
            words.append(f"on a {scene.colour} background")
        return " ".join(words)

    def random_caption(self, scene: Scene, rng: np.random.Generator) -> str:
        size, position, colour = rng.random(3) < 0.6
        return self.caption(scene, bool(size), bool(position), bool(colour))
