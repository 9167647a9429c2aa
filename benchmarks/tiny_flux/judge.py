"""Which emoji does a picture show? The nearest, in pixels, of all pictures that the caption allows.

A caption asks for a size, a place and a colour, or leaves some of them open (None). Candidates are all emoji, mirrored
and not, at every tilt, with every value of what was left open.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from flux_quant.benchmarks.tiny_flux.emoji import COLOUR_NAMES, POSITIONS, TILTS, EmojiWorld, Scene

CHUNK = 64  # emoji rendered at a time


@dataclass(frozen=True)
class Request:
    """What a caption names besides the emoji; None is left to the seed."""

    size: str | None
    position: str | None
    colour: str | None

    def places(self) -> list[tuple[str, str]]:
        """All (size, position) it allows. A named place means a small emoji; a large one is always in the centre."""
        return [
            (size, position)
            for size, position in [("large", POSITIONS[0]), *(("small", p) for p in POSITIONS)]
            if self.size in (None, size)
            and self.position in (None, position)
            and (self.position is None or size == "small")
        ]

    def colours(self) -> tuple[str, ...]:
        return COLOUR_NAMES if self.colour is None else (self.colour,)


@dataclass
class Verdict:
    emoji: Tensor  # (n,) the nearest emoji
    psnr: Tensor  # (n,) dB to the nearest picture of it


Group = tuple[int, Tensor]  # the first emoji, (emoji * mirrored * tilts, 96 * 96 * 3) in 0-1


def candidates(world: EmojiWorld, request: Request) -> Iterator[Group]:
    """All pictures that the request allows, a few emoji at a time."""
    for start, scenes in allowed(world, request):
        yield start, torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).flatten(1)


def allowed(world: EmojiWorld, request: Request) -> Iterator[tuple[int, list[Scene]]]:
    """The scenes of `candidates`, each group with its first emoji."""
    for (size, position), colour in product(request.places(), request.colours()):
        for start in range(0, len(world), CHUNK):
            emoji = range(start, min(start + CHUNK, len(world)))
            yield start, [Scene(e, size, position, colour, m, t) for e in emoji for m in (False, True) for t in TILTS]


def nearest(world: EmojiWorld, pictures: Tensor, request: Request, groups: Iterable[Group] | None = None) -> Verdict:
    """pictures (n, 3, 96, 96) in 0-1, all made from captions with the same request.

    groups: its `candidates`, where they are kept, in any float dtype.
    """
    flat = pictures.permute(0, 2, 3, 1).flatten(1)
    squares = flat.square().sum(1)
    best = torch.full((len(flat),), float("inf"), device=flat.device)
    winner = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
    for start, group in candidates(world, request) if groups is None else groups:
        shown = group.float()
        distance = squares[:, None] - 2 * flat @ shown.T + shown.square().sum(1)
        value, index = distance.min(dim=1)
        closer = value < best
        best = torch.where(closer, value, best)
        winner = torch.where(closer, start + index // (2 * len(TILTS)), winner)
    return Verdict(winner, -10 * (best.clamp(min=1e-9) / flat.shape[1]).log10())
