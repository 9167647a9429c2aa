"""What all parts of `improve` work with, and the best model so far."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux_quant.benchmarks.tiny_flux import judge
from flux_quant.benchmarks.tiny_flux.autoencoder import Autoencoder, load_autoencoder
from flux_quant.benchmarks.tiny_flux.emoji import COLOUR_NAMES, POSITIONS, EmojiWorld, Scene
from flux_quant.benchmarks.tiny_flux.evaluate import Case, case, held_out_cases, named_cases
from flux_quant.benchmarks.tiny_flux.evaluate_turbo import NOISE, tasks_of
from flux_quant.benchmarks.tiny_flux.improving.rows import make_sprites, row_of
from flux_quant.benchmarks.tiny_flux.improving.scenes import (
    Captions,
    Catalogue,
    Painter,
    smaller,
)
from flux_quant.benchmarks.tiny_flux.improving.steps import Deadline
from flux_quant.benchmarks.tiny_flux.improving.verdict import Outcome
from flux_quant.benchmarks.tiny_flux.networks import GRID, Bundle, shipped_state
from flux_quant.benchmarks.tiny_flux.turbo import flow, levels
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing.sampling import Conditioning
from flux_quant.model import Flux, unpack_latents

GUIDANCE = 3.5
CHOOSING = 4711  # of what candidates are chosen by; neither the training's seed nor the evaluation's
DRAWN = 128  # pictures at a time
COMMITTED = 3  # scale of the committed evaluation, whose captions choose nothing


@dataclass(frozen=True)
class Sizes:
    """What one machine does at a time."""

    emoji: int | None = None  # the first so many; None: all
    pool: int | None = None  # scenes that are encoded at most
    batch: int = 512
    captions: int = 512  # more captions a step, for the text encoders alone
    decoder_batch: int = 128
    single_steps: int = 512  # of the Turbo LoRA
    paths: int = 128
    trajectories: int = 8192
    inpainting_batch: int = 256
    masked: int = 65536  # pictures with masks
    choosing: int = 8  # pictures of each kind that candidates are chosen by; see `choosing_cases`
    restored: int = 512  # pictures of which parts are restored to choose by, and as many emoji exchanged
    steps: int = 20  # of pictures to choose by
    decoded: int = 512  # pictures that a decoder is chosen by
    least: int = 0  # steps of training, however slow
    asked: int | None = None  # kinds of captions to choose by; the judge renders 4,920 pictures for each


GPU = Sizes()
CPU = Sizes(None, 2000, 16, 32, 8, 16, 4, 256, 24, 2000, 8, 48, 12, 64, 0, 4)
SMALL = Sizes(8, 32, 8, 8, 4, 4, 2, 8, 8, 16, 1, 4, 3, 8, 2)


@dataclass
class Workshop:
    device: torch.device
    sizes: Sizes
    workers: int
    out: Path
    world: EmojiWorld
    painter: Painter
    catalogue: Catalogue
    captions: Captions
    bundle: Bundle  # the best so far, without gradients
    autoencoder: Autoencoder  # likewise
    components: Components = field(default_factory=lambda: find_components(BUNDLED))

    def autocast(self) -> torch.autocast:
        """bfloat16 on CUDA. Nothing is cached: a recorded step must cast its weights anew."""
        on = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on, cache_enabled=False)

    def text(self, texts: Sequence[str]) -> Conditioning:
        with torch.no_grad():
            return Conditioning(*self.bundle.encode(list(texts)))

    def rows(self, scenes: Sequence[Scene]) -> Tensor:
        return torch.tensor([row_of(scene) for scene in scenes]).to(self.device)

    def pictures(self, tokens: Tensor, autoencoder: Autoencoder | None = None) -> Tensor:
        """Packed latents -> (B, 3, 96, 96) in 0-1."""
        decode = (autoencoder or self.autoencoder).decode
        with torch.no_grad():
            return torch.cat([decode(unpack_latents(z, *GRID)) for z in tokens.split(DRAWN)]).clamp(0, 1)

    def draw(self, flux: Flux, text: Conditioning, noise: Tensor, steps: int) -> Tensor:
        """Packed latents, by Euler steps from the noise, in float32."""
        found = []
        with torch.no_grad():
            for rows in torch.arange(len(noise), device=self.device).split(DRAWN):
                given = Conditioning(*(part[rows] for part in text))
                guidance = torch.full((len(rows),), GUIDANCE, device=self.device)
                for x in flow(flux, noise[rows], given, guidance, levels(steps)):
                    last = x
                found.append(last)
        return torch.cat(found)

    def judged(self, cases: Sequence[Case], pictures: Tensor) -> Outcome:
        """Whether the nearest picture that a caption allows is of the right emoji, and dB to it."""
        right, db = torch.zeros(len(cases), dtype=torch.bool), torch.zeros(len(cases))
        for asked in dict.fromkeys(one.asked for one in cases):
            here = [i for i, one in enumerate(cases) if one.asked == asked]
            found = judge.nearest(self.world, pictures[here], asked, self.candidates(asked))
            right[here] = found.emoji.cpu() == torch.tensor([cases[i].scene.emoji for i in here])
            db[here] = found.psnr.cpu()
        return Outcome(right, db)

    def candidates(self, asked: judge.Request) -> Iterator[judge.Group]:
        """As `judge.candidates`, rendered on the device."""
        for start, scenes in judge.allowed(self.world, asked):
            yield start, self.painter(self.rows(scenes)).permute(0, 2, 3, 1).flatten(1)


def open_workshop(font: Path | None, out: Path, device: torch.device, sizes: Sizes, workers: int) -> Workshop:
    """Everything but the latents."""
    world = EmojiWorld(font)
    world = smaller(world, sizes.emoji) if sizes.emoji else world
    painter = Painter(make_sprites(world, workers), device)
    components = find_components(BUNDLED)
    bundle = Bundle(components.tokenizers)
    bundle.load_state_dict(shipped_state(BUNDLED))
    bundle.requires_grad_(False).to(device)
    autoencoder = load_autoencoder(components.vae).to(device)
    catalogue = Catalogue(world, device, sizes.pool)
    captions = Captions(world, bundle, device)
    return Workshop(device, sizes, workers, out, world, painter, catalogue, captions, bundle, autoencoder)


def encode_latents(shop: Workshop, deadline: Deadline) -> None:
    """Of the catalogue, as far as the time goes."""
    shop.catalogue.encode(shop.painter, shop.autoencoder, lambda: deadline.left > 0)


def choosing_cases(world: EmojiWorld, scale: int, asked: int | None = None) -> list[Case]:
    """Captions that name everything, in part combinations never shown: none of the committed evaluation.

    asked: so many kinds of captions only, by what they ask for.
    """
    if len(world) < 2 * len(COLOUR_NAMES):  # too few for every combination
        scenes = [Scene(e, "large", POSITIONS[0], COLOUR_NAMES[e % 2], False, 0) for e in range(len(world))]
        return [case(world, scene) for scene in scenes]
    rng = np.random.default_rng(CHOOSING)
    seen = {task.case for task in tasks_of(world, COMMITTED)}
    found = [*named_cases(world, rng, scale), *held_out_cases(world, rng, 4 * scale)]
    kinds = list(dict.fromkeys(one.asked for one in found))
    kinds = set(kinds if asked is None else kinds[:: -(-len(kinds) // asked)])
    return [one for one in dict.fromkeys(found) if one not in seen and one.asked in kinds]


def noise_of(count: int, device: torch.device, seed: int = CHOOSING) -> Tensor:
    """(count, 36, 64), the same on every device."""
    assert not NOISE <= seed < NOISE + 10**3, "the evaluation's own"
    return torch.randn(count, 36, 64, generator=torch.Generator().manual_seed(seed)).to(device)


@contextmanager
def products_in_tf32() -> Iterator[None]:
    """Matrix products of float32 with 10 bits of mantissa, where there is hardware for them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def say(**row: object) -> None:
    print(json.dumps(row), file=sys.stderr, flush=True)
