"""Distil the bundled model into a LoRA that draws in 8 steps what the model alone needs many for.

The 8 noise levels are every fifth of 40. The teacher, the model alone, takes the 40 steps; what it has at the 9 levels
(with the clean end) is kept. The student, the same weights with a LoRA beside every linear, takes the 8.

1. From the teacher's state at each level it learns the one step that leads to the teacher's next state.
2. Errors add up along its own path, so it then takes all 8 steps from the noise, and gradients pass back through them:
   its last state must be the teacher's, and, with less weight, so must those on the way.

    python -I -m flux_quant.benchmarks.tiny_flux.turbo --out build/turbo
    python -I -m flux_quant.benchmarks.tiny_flux.evaluate_turbo

The teacher's states are kept below OUT in pieces of 64: a run that was stopped goes on with those it finds. Captions
are drawn as in the training of the model, so nothing is seen that `EmojiWorld.held_out` keeps for the evaluation.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.converters.lora_names import TRANSFORMER
from flux_quant.converters.lora_records import Lora, Record
from flux_quant.converters.lora_write import Factors, kohya, write_lora
from flux_quant.drawing.sampling import Conditioning
from flux_quant.drawing.schedules import noise_levels
from flux_quant.formats import FORMATS
from flux_quant.generation import Request, choose_device, encode
from flux_quant.kernels import dispatch
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux
from flux_quant.lora import apply_
from flux_quant.model import Flux, image_ids, text_ids

STEPS, FINE = 8, 40  # of the student, of the teacher
GRID, TOKENS, CHANNELS = (6, 6), 36, 64
GUIDANCE, RANGE = 3.5, (2.0, 5.0)  # half of the trajectories at the one, the others within the range
PIECE = 64  # trajectories drawn, and kept in a file, together
SEEDS = {"training": 100, "choosing": 900}  # neither is a seed of the evaluation
ON_THE_WAY = 0.1  # weight of the states before the last in part 2
FLOOR = 0.01  # of an error's root, in units of the latents' deviation
METADATA = {
    "modelspec.architecture": "flux-1-dev/lora",
    "modelspec.title": "flux1-tiny Turbo, 8 steps",
    "modelspec.license": "Apache-2.0",
    "ss_base_model_version": "flux1-tiny",
    "flux_quant.base": "flux_quant/tiny_flux/diffusion_models/flux1-tiny.safetensors",
    "flux_quant.steps": str(STEPS),
    "flux_quant.guidance": str(GUIDANCE),
    "flux_quant.strength": "1.0",
    "flux_quant.made_by": "benchmarks/tiny_flux/turbo.py",
}


@dataclass
class Trajectories:
    """What the teacher went through, for n captions."""

    txt: Tensor  # (n, 24, 128)
    pooled: Tensor  # (n, 128)
    guidance: Tensor  # (n,)
    states: Tensor  # (n, STEPS + 1, TOKENS, CHANNELS), from the noise to the clean end

    def __len__(self) -> int:
        return len(self.guidance)

    def __getitem__(self, rows: Tensor) -> "Trajectories":
        return Trajectories(*(tensor[rows] for tensor in vars(self).values()))

    @property
    def text(self) -> Conditioning:
        return Conditioning(self.txt, self.pooled)


def levels(steps: int) -> list[float]:
    return noise_levels("euler", steps, TOKENS, guided=True)


def unpacked(model: Flux) -> Flux:
    """Its linears in float32: on a processor that is what they would be unpacked to at every call."""
    f32 = FORMATS["f32"]
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.replace_parts(f32, f32.pack(dispatch.dequantize(layer.fmt, layer.parts, torch.float32)))
    return model


def velocity(model: Flux, x: Tensor, text: Conditioning, level: Tensor, guidance: Tensor) -> Tensor:
    """x (B, TOKENS, CHANNELS), level and guidance (B,)."""
    ids = image_ids(*GRID, device=x.device), text_ids(text.txt.shape[1], device=x.device)
    return model(x, *text, level, *ids, guidance)


def flow(model: Flux, x: Tensor, text: Conditioning, guidance: Tensor, sigmas: list[float]) -> Iterator[Tensor]:
    """The state at every level after the first, by Euler steps. Unlike `denoise`: gradients, guidance by picture."""
    for now, after in zip(sigmas, sigmas[1:], strict=False):
        x = x + (after - now) * velocity(model, x, text, torch.full((len(x),), now, device=x.device), guidance)
        yield x


@torch.no_grad()
def piece(model: Flux, components: Components, world: EmojiWorld, seed: int) -> Trajectories:
    """On the device of the model."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    captions = [world.random_caption(world.sample(rng), rng) for _ in range(PIECE)]
    features = encode(components, [Request(caption, size=(96, 96)) for caption in captions], guided=True)
    text = Conditioning(features.txt, features.pooled)
    guidance = torch.full((PIECE,), GUIDANCE)
    guidance[PIECE // 2 :].uniform_(*RANGE, generator=generator)
    noise = torch.randn(PIECE, TOKENS, CHANNELS, generator=generator)
    device = model.img_in.bias.device
    text, guidance, noise = Conditioning(*(x.to(device) for x in text)), guidance.to(device), noise.to(device)
    passed = list(flow(model, noise, text, guidance, levels(FINE)))
    return Trajectories(*text, guidance, torch.stack([noise, *passed[FINE // STEPS - 1 :: FINE // STEPS]], dim=1))


def trajectories(model: Flux, components: Components, out: Path, kind: str, pieces: int) -> Trajectories:
    """Those that are in OUT already, and the missing ones."""
    world, found = EmojiWorld(), []
    for i in range(pieces):
        path = out / f"{kind}-{i:03d}.pt"
        if not path.exists():
            print(f"teacher, {kind}: {i * PIECE} of {pieces * PIECE} trajectories", file=sys.stderr, flush=True)
            torch.save(vars(piece(model, components, world, SEEDS[kind] + i)), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        found.append(torch.load(path, weights_only=True, map_location=model.img_in.bias.device))
    return Trajectories(*(torch.cat([part[name] for part in found]) for name in found[0]))


def fresh(model: Flux, rank: int) -> Lora:
    """A LoRA that changes nothing yet, on every linear: modulation and embedders too, as FLUX.1-Turbo-Alpha."""
    generator, records = torch.Generator().manual_seed(0), []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            factors = {"down": down, "up": torch.zeros(layer.out_features, rank)}
            records.append(Record(TRANSFORMER, name, "lora", 0, layer.out_features, factors, 1.0, None, None, (name,)))
    return Lora(Path("new"), tuple(records), [], {}, {})


def single_steps(model: Flux, data: Trajectories, rows: Tensor, places: Tensor, sigmas: Tensor) -> Tensor:
    """(B,) error of the next state, from the teacher's states at these places of their trajectories.

    sigmas (STEPS + 1,): the `levels`, on the device.
    """
    chosen = data[rows]
    now, after = (chosen.states[torch.arange(len(rows), device=rows.device), at] for at in (places, places + 1))
    step = (sigmas[places + 1] - sigmas[places])[:, None, None]
    found = now + step * velocity(model, now, chosen.text, sigmas[places], chosen.guidance)
    return (found - after).square().mean(dim=(1, 2))


def own_path(model: Flux, data: Trajectories, rows: Tensor) -> Tensor:
    """(STEPS, B) error of every state when all steps are the student's."""
    chosen = data[rows]
    path = flow(model, chosen.states[:, 0], chosen.text, chosen.guidance, levels(STEPS))
    return torch.stack([(x - chosen.states[:, i]).square().mean(dim=(1, 2)) for i, x in enumerate(path, start=1)])


def robust(error: Tensor) -> Tensor:
    """The root of a mean square: where a coarse path leads to another picture than the fine one (mirrored, another
    background), the square would drown all others. Errors below a hundredth count less and less."""
    return (error + FLOOR**2).sqrt() - FLOOR


class Training:
    """The factors, and how they are learned."""

    def __init__(self, model: Flux, data: Trajectories, choosing: Trajectories, args: argparse.Namespace) -> None:
        self.model, self.data, self.choosing, self.args = model, data, choosing, args
        self.applied = apply_(model, [(fresh(model, args.rank), 1.0)])
        for _, path in self.applied.paths.values():
            path.move_(lambda tensor: tensor.to(model.img_in.bias.device))
        self.parameters = [t.requires_grad_() for _, path in self.applied.paths.values() for t in path.tensors]
        self.generator = torch.Generator().manual_seed(1)
        self.sigmas = torch.tensor(levels(STEPS), device=data.guidance.device)

    def drawn(self, most: int, count: int) -> Tensor:
        return torch.randint(most, (count,), generator=self.generator).to(self.data.guidance.device)

    def part1(self) -> Tensor:
        rows, places = self.drawn(len(self.data), self.args.batch), self.drawn(STEPS, self.args.batch)
        return robust(single_steps(self.model, self.data, rows, places, self.sigmas)).mean()

    def part2(self) -> Tensor:
        errors = robust(own_path(self.model, self.data, self.drawn(len(self.data), self.args.paths))).mean(dim=1)
        return errors[-1] + ON_THE_WAY * errors[:-1].mean()

    @torch.no_grad()
    def check(self) -> float:
        """Mean over trajectories that are not learned from: dB of the last state against the teacher's."""
        errors = own_path(
            self.model, self.choosing, torch.arange(len(self.choosing), device=self.data.guidance.device)
        )[-1]
        return float((-10 * errors.log10()).mean())

    def learn(self, name: str, loss: Callable[[], Tensor], minutes: float, highest: float) -> Path:
        """With an optimizer of its own: gradients of the parts are of other sizes. -> the file with the factors.

        Warm-up over 30 steps, then half a cosine down to 2 % of the highest rate.
        """
        optimizer = torch.optim.AdamW(self.parameters, highest, betas=(0.9, 0.98), weight_decay=0.0)
        losses, spent, report = [], 0.0, 0.0
        for step in itertools.count(1):
            if spent >= report or spent >= minutes:
                mean = float(np.mean(losses)) if losses else None
                self.say(part=name, minutes=round(spent, 1), step=step - 1, loss=mean)
                losses, report = [], spent + 2
            if spent >= minutes:
                return self.save(name)
            begin = time.monotonic()
            cosine = (1 + math.cos(math.pi * spent / minutes)) / 2
            optimizer.param_groups[0]["lr"] = highest * min(1.0, step / 30) * (0.02 + 0.98 * cosine)
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            losses.append(float(value.detach()))
            spent += (time.monotonic() - begin) / 60

    def say(self, **row: object) -> None:
        line = json.dumps(row | {"last_state_db": round(self.check(), 3)})
        print(line, file=sys.stderr, flush=True)
        with (self.args.out / "log.jsonl").open("a") as log:
            print(line, file=log)

    def save(self, name: str) -> Path:
        paths = {name: path for name, (_, path) in self.applied.paths.items()}
        factors = {name: Factors(path.down.cpu(), path.ups[0].weight.cpu()) for name, path in paths.items()}
        path = self.args.out / f"{name}.safetensors"
        write_lora(path, kohya(factors, {}), "bf16", METADATA, force=True)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/turbo"), help="for trajectories, log, LoRAs")
    parser.add_argument("--minutes", type=float, default=10, help="of part 1")
    parser.add_argument("--own-minutes", type=float, default=6, help="of part 2")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate of part 1")
    parser.add_argument("--own-rate", type=float, default=3e-4, help="highest learning rate of part 2")
    parser.add_argument("--pieces", type=int, default=16, help=f"of {PIECE} trajectories each")
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32, help="steps that part 1 learns from at a time")
    parser.add_argument("--paths", type=int, default=8, help="paths of 8 steps that part 2 learns from at a time")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    components = find_components(BUNDLED)
    model = unpacked(load_flux(components.transformer)).to(choose_device(args.device)[0])
    data, choosing = (
        trajectories(model, components, args.out, kind, pieces)
        for kind, pieces in (("training", args.pieces), ("choosing", 1))
    )
    training = Training(model, data, choosing, args)
    for path in (
        training.learn("single-steps", training.part1, args.minutes, args.rate),
        training.learn("turbo", training.part2, args.own_minutes, args.own_rate),
    ):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
