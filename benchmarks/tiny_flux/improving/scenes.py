"""All scenes that training may show, as tensors on one device: drawn by their chances, rendered, encoded, named.

There are so few that nothing has to be sampled in advance: 172,200 scenes of the 820 emoji, 95,941 captions. A scene
is a row of six numbers (COLUMNS), a caption a row of a table of tokens.

Letters: B scenes.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flux_quant.benchmarks.tiny_flux.autoencoder import Autoencoder
from flux_quant.benchmarks.tiny_flux.emoji import COLOUR_NAMES, COLOURS, OFFSETS, POSITIONS, SIZE, EmojiWorld, Scene
from flux_quant.benchmarks.tiny_flux.improving.rows import COLUMNS, SIZES
from flux_quant.benchmarks.tiny_flux.networks import Bundle
from flux_quant.benchmarks.tiny_flux.tokenizers import T5_LENGTH
from flux_quant.model import pack_latents

SMALL, WHITE = SIZES.index("small"), COLOUR_NAMES.index("white")
ENCODED = 256  # pictures at a time


def chances_of(rows: Tensor) -> Tensor:
    """(B,) float64: how often `EmojiWorld.sample` draws scenes, but for a common factor."""
    _, size, position, colour, mirrored, tilt = rows.unbind(1)
    small = size == SMALL
    chance = torch.where(small, 0.43 / len(POSITIONS), torch.where(position == 0, 0.57, 0.0)).double()
    chance = chance * torch.where(colour == WHITE, 0.3 + 0.7 / len(COLOURS), 0.7 / len(COLOURS))
    return chance * torch.where(mirrored == 1, 0.2, 0.8) * torch.where(tilt == 0, 0.9, 0.05)


def smaller(world: EmojiWorld, count: int) -> EmojiWorld:
    """The first `count` emoji of a world alone."""
    found = EmojiWorld.__new__(EmojiWorld)
    found.names, found.bitmaps = world.names[:count], world.bitmaps[:count]
    return found


class Painter:
    """Renders scenes on a device, to the same numbers as `EmojiWorld.render`."""

    def __init__(self, sprites: np.ndarray, device: torch.device) -> None:
        self.sprites = torch.from_numpy(sprites).flatten(4, 5).to(device)  # (emoji, 2, 2, 3, 96 * 96, 4)
        self.colours = (torch.tensor(list(COLOURS.values())).float() / 255).to(device)
        pixels = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
        rolled = [np.roll(pixels, (dy, dx), (0, 1)).ravel() for dx, dy in OFFSETS.values()]
        self.sources = torch.from_numpy(np.stack(rolled)).to(device)  # of each pixel, by position

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (B, 6) -> (B, 3, 96, 96) float32 in 0-1."""
        emoji, size, position, colour, mirrored, tilt = rows.unbind(1)
        sprites = self.sprites[emoji, size, mirrored, tilt]
        sources = self.sources[position][:, :, None].expand(-1, -1, 4)
        rgba = sprites.gather(1, sources).float() / 255
        pictures = (rgba[..., :3] + (1 - rgba[..., 3:]) * self.colours[colour][:, None]).clamp(max=1)
        return pictures.transpose(1, 2).unflatten(2, (SIZE, SIZE)).contiguous()


@torch.no_grad()
def encoded(
    rows: Tensor, painter: Painter, autoencoder: Autoencoder, goes_on: Callable[[], bool] = lambda: True
) -> Tensor:
    """Packed latents (B, 36, 64) float16 of scenes (B, 6), or of the first of them, when `goes_on` says no."""
    found = []
    for part in rows.split(ENCODED):
        found.append(pack_latents(autoencoder.encode(painter(part))).half())
        found[-1][0, 0, 0].item()  # the clock runs with the device, not ahead of it
        if not goes_on():
            break
    return torch.cat(found)


class Catalogue:
    """All trained scenes of a world, or `most` of them, the likely ones rather; and their latents, once encoded."""

    def __init__(self, world: EmojiWorld, device: torch.device, most: int | None = None, seed: int = 0) -> None:
        sizes = [len(world), *map(len, COLUMNS.values())]
        rows = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
        colours = torch.tensor([COLOUR_NAMES.index(world.held_out_colour(e)) for e in range(len(world))])
        places = torch.tensor([POSITIONS.index(world.held_out_position(e)) for e in range(len(world))])
        shown = (rows[:, 3] != colours[rows[:, 0]]) & (rows[:, 2] != places[rows[:, 0]])
        chances = chances_of(rows) * shown
        rows, chances = rows[chances > 0], chances[chances > 0]
        drawn = np.random.default_rng(seed).exponential(size=len(rows)) / chances.numpy()
        order = torch.from_numpy(drawn.argsort())[:most]  # drawn one after the other, without replacement
        self.rows, self.chances = rows[order].to(device), chances[order].to(device)
        self.latents = torch.zeros(0, 36, 64, dtype=torch.float16, device=device)
        self.bounds = self.chances.cumsum(0)

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, painter: Painter, autoencoder: Autoencoder, goes_on: Callable[[], bool]) -> None:
        """Latents of all scenes, or of those before `goes_on` says no; the others are forgotten."""
        self.latents = encoded(self.rows, painter, autoencoder, goes_on)
        self.rows, self.chances = self.rows[: len(self.latents)], self.chances[: len(self.latents)]
        self.bounds = self.chances.cumsum(0)

    def draw(self, count: int) -> Tensor:
        """(count,) numbers of scenes, by their chances; by the device's generator."""
        at = torch.rand(count, dtype=torch.float64, device=self.bounds.device) * self.bounds[-1]
        return torch.searchsorted(self.bounds, at, right=True).clamp(max=len(self) - 1)


NOWHERE, ALL_SMALL, ALL_LARGE, AT, SMALL_AT = 0, 1, 2, 3, 3 + len(POSITIONS)  # what a caption says of size and place
PLACES, BACKGROUNDS = SMALL_AT + len(POSITIONS), 1 + len(COLOUR_NAMES)


class Captions:
    """Tokens of every caption that a training scene can have, and of none at all: the last."""

    def __init__(self, world: EmojiWorld, bundle: Bundle, device: torch.device) -> None:
        self.texts = [*(text for e in range(len(world)) for text in captions_of(world, e)), ""]
        t5, clip = bundle.tokens(self.texts)
        assert t5.shape[1] == T5_LENGTH
        self.t5, self.clip, self.empty = t5.to(device), clip.to(device), len(self.texts) - 1

    def numbers(self, rows: Tensor, named: Tensor) -> Tensor:
        """(B,): of scenes (B, 6) whose size, place and background are named or not: (B, 3) bool."""
        emoji, size, position, colour = rows[:, :4].unbind(1)
        of_size, of_position, of_colour = named.unbind(1)
        small = size == SMALL
        sized = torch.where(small, ALL_SMALL, ALL_LARGE)
        placed = torch.where(of_size, SMALL_AT, AT) + position
        place = torch.where(of_position & small, placed, torch.where(of_size, sized, NOWHERE))
        return (emoji * PLACES + place) * BACKGROUNDS + torch.where(of_colour, 1 + colour, 0)

    def random(self, rows: Tensor, without: float = 0.0) -> Tensor:
        """(B,) as `EmojiWorld.random_caption`; a share of them empty."""
        numbers = self.numbers(rows, torch.rand(len(rows), 3, device=rows.device) < 0.6)
        return torch.where(torch.rand(len(rows), device=rows.device) < without, self.empty, numbers)

    def tokens(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5[numbers], self.clip[numbers]


def captions_of(world: EmojiWorld, emoji: int) -> list[str]:
    """PLACES x BACKGROUNDS of them, in the order of `Captions.numbers`."""
    found = []
    for place in range(PLACES):
        size = "large" if place in (NOWHERE, ALL_LARGE) else "small"
        position = POSITIONS[(place - AT) % len(POSITIONS)] if place >= AT else POSITIONS[0]
        says = dict(size=place in (ALL_SMALL, ALL_LARGE) or place >= SMALL_AT, position=place >= AT)
        for colour in (None, *COLOUR_NAMES):
            scene = Scene(emoji, size, position, colour or "white", False, 0)
            found.append(world.caption(scene, colour=colour is not None, **says))
    return found
