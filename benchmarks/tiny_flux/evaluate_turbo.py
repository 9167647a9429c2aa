"""What does the Turbo LoRA add to the bundled model? Captions, noise and judge of `evaluate`, files as they ship.

    python -I -m flux_quant.benchmarks.tiny_flux.evaluate_turbo            # a quarter of an hour on one core

For the model alone and with the LoRA, at several numbers of steps: accuracy, PSNR to the nearest picture that the
caption allows, and PSNR to what the model alone draws from the same noise in 20 and in 40 steps. Then, for every third
caption, the same with the model converted to other formats; many-step pictures are still those of the model as it
ships. Writes benchmarks/results/tiny_turbo.json.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux_quant.benchmarks.machine import RESULTS
from flux_quant.benchmarks.metrics import psnr
from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld
from flux_quant.benchmarks.tiny_flux.evaluate import (
    Case,
    Generator,
    exact_device,
    held_out_cases,
    judged,
    named_cases,
    summary,
)
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan

TURBO = BUNDLED / "loras/turbo.safetensors"
GUIDANCE, NOISE = 3.5, 1000  # first seed of every kind of caption, as in `evaluate`
MANY = ("base 20", "base 40")
VARIANTS = (*MANY, "base 8", "turbo 8", "base 4", "turbo 4")  # who draws, in how many steps
FORMS = {"q8_0": ".gguf", "q4_k_s": ".gguf", "fp8": ".safetensors"}
FORM_VARIANTS = ("base 20", "base 8", "turbo 8")
THINNED = 3  # every third caption for the formats


class Task(NamedTuple):
    """A picture to be drawn."""

    kind: str
    case: Case
    seed: int


def tasks_of(world: EmojiWorld, scale: int) -> list[Task]:
    """The captions and the noise of `evaluate` at that scale."""
    rng = np.random.default_rng(2026)
    named = named_cases(world, rng, scale)
    kinds = {"trained_captions": named, "held_out_combinations": held_out_cases(world, rng, 4 * scale)}
    return [Task(kind, case, NOISE + i) for kind, cases in kinds.items() for i, case in enumerate(cases)]


@dataclass(frozen=True)
class Studio:
    lora: Path
    keep: Path  # where pictures of the model alone are kept, if it is a folder: they do not depend on the LoRA
    device: torch.device = torch.device("cpu")

    def draw(self, components: Components, tasks: Sequence[Task], variants: Sequence[str]) -> dict[str, Tensor]:
        """(n, 3, 96, 96) of every variant."""
        model, pictures = components.transformer.stem, {}
        for variant in variants:
            who, steps = variant.split()
            kept = self.keep / f"{model}-{who}-{steps}-{len(tasks)}.pt"
            if who == "base" and kept.exists():
                pictures[variant] = torch.load(kept, weights_only=True)
                continue
            print(f"{model}: {variant}", file=sys.stderr, flush=True)
            generator = Generator(components, [self.lora] if who == "turbo" else [], self.device)
            captions, seeds = [task.case.caption for task in tasks], [task.seed for task in tasks]
            pictures[variant] = generator(captions, int(steps), GUIDANCE, seeds)
            if who == "base" and self.keep.is_dir():
                torch.save(pictures[variant], kept)
        return pictures


def evaluate(world: EmojiWorld, components: Components, studio: Studio, scale: int, folder: Path) -> dict[str, object]:
    """Pictures of all variants are judged together: the judge renders what captions allow once."""
    tasks, sizes = tasks_of(world, scale), {"bf16": components.transformer.stat().st_size}
    drawn = {("bf16", name): pictures for name, pictures in studio.draw(components, tasks, VARIANTS).items()}
    for form, suffix in FORMS.items():
        packed = folder / f"flux1-tiny-{form}{suffix}"
        run(make_plan(Conversion(components.transformer, packed, form)))
        found = studio.draw(replace(components, transformer=packed), tasks[::THINNED], FORM_VARIANTS)
        drawn |= {(form, name): pictures for name, pictures in found.items()}
        sizes[form] = packed.stat().st_size
    asked = {key: tasks if key[0] == "bf16" else tasks[::THINNED] for key in drawn}
    print("judge", file=sys.stderr, flush=True)
    cases = [task.case for group in asked.values() for task in group]
    counts = [len(group) for group in asked.values()]
    right, distances = (part.split(counts) for part in judged(world, cases, torch.cat([*drawn.values()])))
    figures = {}
    for key, *verdicts in zip(asked, right, distances, strict=True):
        figures[key] = by_kind(asked[key], *verdicts)
        for many in MANY:
            if key != ("bf16", many):
                reference = drawn["bf16", many][:: 1 if key[0] == "bf16" else THINNED]
                figures[key][f"psnr_to_{many.replace(' ', '_')}"] = psnr(drawn[key], reference).mean().item()
    return dict(
        variants={name: figures["bf16", name] for name in VARIANTS},
        nearer_to_base_40=nearer(drawn),
        formats={
            form: {"bytes": sizes[form], **{name: figures[form, name] for name in FORM_VARIANTS}} for form in FORMS
        },
    )


def by_kind(tasks: Sequence[Task], right: Tensor, distances: Tensor) -> dict[str, object]:
    figures: dict[str, object] = dict(summary(right, distances))
    for kind in dict.fromkeys(task.kind for task in tasks):
        rows = torch.tensor([task.kind == kind for task in tasks])
        figures[kind] = summary(right[rows], distances[rows])
    return figures


def nearer(drawn: dict[tuple[str, str], Tensor]) -> dict[str, float]:
    """By steps: the share of pictures that are nearer with the LoRA than without to 40 steps without."""
    pictures = {name: psnr(drawn["bf16", name], drawn["bf16", "base 40"]) for name in VARIANTS}
    return {str(n): (pictures[f"turbo {n}"] > pictures[f"base {n}"]).double().mean().item() for n in (8, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lora", type=Path, default=TURBO)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--keep", type=Path, default=Path("build/turbo"), help="keeps what the model alone drew, if it exists"
    )
    parser.add_argument("--scale", type=int, default=3, help="as `evaluate`'s; 3 for both committed files")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    with open_checkpoint(args.lora) as reader:
        lora = {"bytes": args.lora.stat().st_size, "parameters": sum(prod(t.shape) for t in reader.tensors.values())}
    studio = Studio(args.lora, args.keep, exact_device(args.device))
    figures: dict[str, object] = dict(guidance=GUIDANCE, strength=1.0, activations="float32", lora=lora)
    with tempfile.TemporaryDirectory() as folder:
        figures |= evaluate(EmojiWorld(), find_components(BUNDLED), studio, args.scale, Path(folder))
    figures["versions"] = dict(torch=torch.__version__, python=platform.python_version(), device=studio.device.type)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tiny_turbo.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
