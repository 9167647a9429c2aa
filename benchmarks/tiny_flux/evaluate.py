"""How good is the bundled model? Generates with the files as they ship and the pipeline as users run it.

    python -m flux_quant.benchmarks.tiny_flux.evaluate            # minutes

Prints the figures and writes them with a contact sheet to benchmarks/results. An accuracy is the share of pictures
whose nearest neighbour (pixels, over all emoji with the attributes the caption asks for) is the right emoji.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_quant.benchmarks.metrics import psnr
from flux_quant.benchmarks.sheet import contact_sheet
from flux_quant.benchmarks.tiny_flux.emoji import COLOUR_NAMES, POSITIONS, EmojiWorld, Scene
from flux_quant.benchmarks.tiny_flux.judge import Request as Asked
from flux_quant.benchmarks.tiny_flux.judge import nearest
from flux_quant.benchmarks.tiny_flux.train_vae import batch as random_pictures
from flux_quant.benchmarks.tiny_flux.train_vae import reconstruction_psnr
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing.vae import decode
from flux_quant.generation import Request, choose_device, denoise_batch, encode, load_loras, to_images
from flux_quant.loading import load_flux, load_vae
from flux_quant.lora import apply_

BATCH = 64
FEW = {  # what the captions ask for with which steps, seeds and guidance are varied
    *(Asked("large", None, colour) for colour in ("white", "blue", "red")),
    *(Asked("small", position, "green") for position in POSITIONS),
}


@dataclass(frozen=True)
class Case:
    """A caption and what it asks for."""

    scene: Scene
    asked: Asked
    caption: str


class Generator:
    """The bundled model, loaded once, and the LoRAs beside it."""

    def __init__(self, components: Components, loras: Sequence[Path] = (), device: torch.device | str = "cpu") -> None:
        self.components, self.device = components, torch.device(device)
        self.flux, self.vae = load_flux(components.transformer), load_vae(components.vae).to(self.device)
        given = Request("", loras=tuple((path, 1.0) for path in loras))
        apply_(self.flux, load_loras(given, self.flux))
        self.flux.to(self.device)

    def __call__(self, captions: Sequence[str], steps: int, guidance: float, seed: int | Sequence[int]) -> Tensor:
        """(n, 3, 96, 96) in 0-1, on the CPU. Picture i starts from the noise of seed + i, or of the i-th seed."""
        seeds = range(seed, seed + len(captions)) if isinstance(seed, int) else seed
        requests = [
            Request(caption, steps=steps, guidance=guidance, seed=seed, size=(96, 96))
            for caption, seed in zip(captions, seeds, strict=True)
        ]
        pictures = []
        for start in range(0, len(requests), BATCH):
            chunk = requests[start : start + BATCH]
            features = encode(self.components, chunk, guided=True)
            pictures.append(decode(self.vae, denoise_batch(self.flux, features, chunk, self.device)))
        return torch.cat(pictures)


def case(world: EmojiWorld, scene: Scene, size: bool = True, position: bool = True, colour: bool = True) -> Case:
    asked = Asked(
        scene.size if size else None,
        scene.position if position and scene.size == "small" else None,
        scene.colour if colour else None,
    )
    return Case(scene, asked, world.caption(scene, size, position, colour))


def named_cases(world: EmojiWorld, rng: np.random.Generator, per_place: int) -> list[Case]:
    """Everything named, combinations that occur in training: half of them large, half small in five places."""
    cases = []
    for size, position in [("large", POSITIONS[0]), *(("small", p) for p in POSITIONS)]:
        count = per_place if size == "small" else per_place * len(POSITIONS)
        for colour in COLOUR_NAMES:
            scenes = (Scene(int(e), size, position, colour, False, 0) for e in rng.permutation(len(world)))
            allowed = [scene for scene in scenes if not world.held_out(scene)][:count]
            cases += [case(world, scene) for scene in allowed]
    return cases


def held_out_cases(world: EmojiWorld, rng: np.random.Generator, per_value: int) -> list[Case]:
    """A colour, or a place, never shown with this emoji."""
    cases = []
    for colour in COLOUR_NAMES[1:]:
        emoji = [e for e in rng.permutation(len(world)).tolist() if world.held_out_colour(e) == colour][:per_value]
        cases += [case(world, Scene(e, "large", POSITIONS[0], colour, False, 0)) for e in emoji]
    for position in POSITIONS[1:]:
        emoji = [e for e in rng.permutation(len(world)).tolist() if world.held_out_position(e) == position][:per_value]
        cases += [case(world, Scene(e, "small", position, "white", False, 0)) for e in emoji]
    return cases


def open_cases(world: EmojiWorld, rng: np.random.Generator, count: int) -> list[Case]:
    """Nothing but the emoji named: size, place and background are the seed's."""
    emoji = rng.choice(len(world), count, replace=False).tolist()
    scenes = (Scene(e, "large", POSITIONS[0], "white", False, 0) for e in emoji)
    return [case(world, scene, False, False, False) for scene in scenes]


def judged(world: EmojiWorld, cases: Sequence[Case], pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) whether the nearest picture that the caption allows is of the right emoji, and the PSNR to it in dB."""
    right, distances = torch.zeros(len(cases), dtype=torch.bool), torch.zeros(len(cases))
    for asked in {case.asked for case in cases}:
        rows = [i for i, case in enumerate(cases) if case.asked == asked]
        verdict = nearest(world, pictures[rows], asked)
        right[rows] = verdict.emoji == torch.tensor([cases[i].scene.emoji for i in rows])
        distances[rows] = verdict.psnr
    return right, distances


def score(world: EmojiWorld, cases: Sequence[Case], pictures: Tensor) -> dict[str, float]:
    """Accuracy, and mean PSNR in dB to the nearest picture the caption allows."""
    return summary(*judged(world, cases, pictures))


def summary(right: Tensor, distances: Tensor) -> dict[str, float]:
    accuracy, distance = (values.double().mean().item() for values in (right, distances))
    return dict(pictures=len(right), accuracy=accuracy, psnr_to_nearest=distance)


def evaluate(world: EmojiWorld, generator: Generator, guidance: float, scale: int) -> dict[str, object]:
    """`scale` 1 is quick, 3 the committed run."""
    rng = np.random.default_rng(2026)
    figures: dict[str, object] = dict(emoji=len(world), guidance=guidance, activations="float32", weights="bf16")
    test = random_pictures(world, np.random.default_rng(777), 100 * scale)
    figures["vae_psnr"] = reconstruction_psnr(generator.vae, test.to(generator.device))

    named = named_cases(world, rng, scale)
    for name, cases in {
        "trained_captions": named,
        "held_out_combinations": held_out_cases(world, rng, 4 * scale),
        "emoji_named_only": open_cases(world, rng, 12 * scale),
    }.items():
        figures[name] = score(world, cases, generator([case.caption for case in cases], 20, guidance, seed=1000))
        print(name, figures[name], flush=True)
    few = [case for case in named if case.asked in FEW]
    captions = [case.caption for case in few]
    reference = generator(captions, 20, guidance, seed=5000)
    figures["psnr_between_seeds"] = psnr(reference, generator(captions, 20, guidance, seed=9000)).mean().item()
    by_steps = {steps: generator(captions, steps, guidance, seed=5000) for steps in (1, 4, 8)} | {20: reference}
    figures["steps"] = {str(steps): score(world, few, pictures) for steps, pictures in by_steps.items()}
    figures["psnr_between_4_and_20_steps"] = psnr(reference, by_steps[4]).mean().item()
    low, high = (generator(captions, 20, g, seed=5000) for g in (1.0, 6.0))
    figures["psnr_between_guidance_1_and_6"] = psnr(low, high).mean().item()
    figures["guidance"] = {
        "default": guidance,
        "1": score(world, few, low),
        str(guidance): score(world, few, reference),
        "6": score(world, few, high),
    }
    return figures


def sheet(world: EmojiWorld, generator: Generator, guidance: float) -> Image.Image:
    """Rows: captions of every kind. Columns: four seeds, then 4 steps, guidance 1 and 6 with the first seed."""
    rng = np.random.default_rng(11)
    cases = [
        *named_cases(world, rng, 1)[5::9],
        *held_out_cases(world, rng, 1)[2::3],
        *open_cases(world, rng, 4),
    ]
    captions = [case.caption + ("  (never shown)" if world.held_out(case.scene) else "") for case in cases]
    prompts = [case.caption for case in cases]
    settings = [(20, guidance, s) for s in (0, 100, 200, 300)] + [(4, guidance, 0), (20, 1.0, 0), (20, 6.0, 0)]
    pictures = [to_images(generator(prompts, *setting)) for setting in settings]
    columns = ["seed A", "seed B", "seed C", "seed D", "seed A\n4 steps", "seed A\nguidance 1", "seed A\nguidance 6"]
    rows = [(caption, [column[i] for column in pictures]) for i, caption in enumerate(captions)]
    return contact_sheet(rows, columns, cell=96)


def exact_device(name: str) -> torch.device:
    """What is drawn there is drawn in float32 throughout: convolutions of CUDA would round to 10 bits."""
    torch.backends.cudnn.allow_tf32 = False
    return choose_device(name)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--scale", type=int, default=3, help="pictures per kind, in units of 136 captions in all")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    device = exact_device(args.device)
    world, generator = EmojiWorld(), Generator(find_components(args.model), device=device)
    figures = evaluate(world, generator, args.guidance, args.scale)
    figures["versions"] = dict(torch=torch.__version__, python=platform.python_version(), device=device.type)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tiny_flux.json").write_text(json.dumps(figures, indent=2) + "\n")
    sheet(world, generator, args.guidance).save(args.out / "tiny_flux.png")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
