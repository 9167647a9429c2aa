"""Train the transformer and both text encoders of the tiny model on latents of its autoencoder.

Rectified flow: x_t = (1 - t) x_0 + t noise, the model predicts noise - x_0. In the last part of the time guidance is
distilled into the guidance input, as FLUX.1 [dev]'s was: for a scale g the target grows by (g - 1) times the difference
between the averaged model's predictions with and without the caption (at g = 1), so the model learns in one evaluation
what classifier-free guidance needs two for, and goes on learning from the data meanwhile.

    python -m flux_quant.benchmarks.tiny_flux.train --vae build/tiny/vae --out build/tiny/flux --minutes 90

Stops cleanly at any time and resumes from its last checkpoint (one every ten minutes).
"""

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from flux_quant.arch import LATENT_SCALE, LATENT_SHIFT
from flux_quant.benchmarks.tiny_flux.emoji import POSITIONS, EmojiWorld, Scene
from flux_quant.benchmarks.tiny_flux.judge import Request, nearest
from flux_quant.benchmarks.tiny_flux.muon import Muon
from flux_quant.benchmarks.tiny_flux.networks import GRID, Appearance, Bundle, shipped_state
from flux_quant.benchmarks.tiny_flux.tokenizers import corpus, train_clip, train_t5
from flux_quant.components import find_components
from flux_quant.drawing.sampling import Conditioning, Drawing, denoise
from flux_quant.drawing.schedules import noise_levels
from flux_quant.generation import choose_device
from flux_quant.loading import load_vae
from flux_quant.model import pack_latents, unpack_latents

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

GUIDANCE = (1.0, 6.0)
MUON_RATE = 2.0  # Muon's learning rate in units of Adam's
SMALL_WEIGHT = 2.0  # of a small emoji's error: it covers half as many patches as a large one, the rest is background


@torch.no_grad()
def latents_of(world: EmojiWorld, vae: "AutoencoderKL", scenes: Sequence[Scene]) -> Tensor:
    """Packed, normalised latents (scenes, 36, 64) float16, on the device of the autoencoder."""
    latents = []
    for start in range(0, len(scenes), 64):
        pictures = np.stack([world.render(scene) for scene in scenes[start : start + 64]])
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous() * 2 - 1
        z = (vae.encode(x.to(vae.device)).latent_dist.mode() - LATENT_SHIFT) * LATENT_SCALE
        latents.append(pack_latents(z).half())
    return torch.cat(latents)


class Trainer:
    """One training run: its state is what a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, (self.device, _) = args, choose_device(args.device)
        self.world = EmojiWorld()
        self.vae = open_vae(args.vae).requires_grad_(False).to(self.device)
        tokenizers = args.out / "tokenizers"
        if args.start_from:
            shutil.copytree(find_components(args.start_from).tokenizers, tokenizers, dirs_exist_ok=True)
        if not (tokenizers / "clip/vocab.json").exists():
            captions = corpus(self.world)
            train_t5(captions, tokenizers / "t5")
            train_clip(captions, tokenizers / "clip")
        self.scenes, self.latents = self.pool()
        small = torch.tensor([scene.size == "small" for scene in self.scenes])
        self.weights = torch.where(small, SMALL_WEIGHT, 1.0)
        self.weights = (self.weights / self.weights.mean()).to(self.device)
        torch.manual_seed(args.seed)
        self.bundle, self.average = Bundle(tokenizers), Bundle(tokenizers).requires_grad_(False)
        if args.start_from:
            self.bundle.load_state_dict(shipped_state(args.start_from))
        self.average.load_state_dict(self.bundle.state_dict())
        self.bundle.to(self.device), self.average.to(self.device)
        plain = [Scene(e, "large", POSITIONS[0], "white", False, 0) for e in range(len(self.world))]
        targets = latents_of(self.world, self.vae, plain).float().flatten(1)
        self.appearance = Appearance((targets - targets.mean(dim=0)).cpu()).to(self.device)
        settings = dict(lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
        matrices = [p for name, p in self.bundle.named_parameters() if "_blocks." in name and p.ndim == 2]
        others = {id(p) for p in self.bundle.parameters()} - {id(p) for p in matrices}
        rest = [p for p in self.bundle.parameters() if id(p) in others]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, args.lr * MUON_RATE, weight_decay=0.01),
            "adam": torch.optim.AdamW([*rest, *self.appearance.parameters()], **settings),
        }
        for bundle in (self.bundle, self.average) if args.compile else ():
            bundle.flux.compile(dynamic=False)
        self.minutes, self.step = 0.0, 0
        self.rng = np.random.default_rng(args.seed)
        if (args.out / "checkpoint.pt").exists():
            self.resume()
        self.first_step = self.step

    def pool(self) -> tuple[list[Scene], Tensor]:
        path = self.args.out / "pool.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True, map_location=self.device)
            return [Scene(*row) for row in saved["scenes"]], saved["latents"]
        rng = np.random.default_rng(self.args.seed)
        scenes = [self.world.sample(rng) for _ in range(self.args.pool)]
        latents = latents_of(self.world, self.vae, scenes)
        rows = [(s.emoji, s.size, s.position, s.colour, s.mirrored, s.tilt) for s in scenes]
        torch.save({"scenes": rows, "latents": latents}, path)
        return scenes, latents

    def resume(self) -> None:
        saved = torch.load(self.args.out / "checkpoint.pt", weights_only=True, map_location=self.device)
        self.bundle.load_state_dict(saved["bundle"])
        self.average.load_state_dict(saved["average"])
        self.appearance.load_state_dict(saved["appearance"])
        for name, state in saved["optimizers"].items():
            self.optimizers[name].load_state_dict(state)
        self.minutes, self.step = saved["minutes"], saved["step"]
        self.rng = np.random.default_rng([self.args.seed, self.step])
        torch.manual_seed(self.args.seed + self.step)

    def save(self) -> None:
        state = dict(bundle=self.bundle.state_dict(), average=self.average.state_dict())
        state["appearance"] = self.appearance.state_dict()
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state |= dict(minutes=self.minutes, step=self.step)
        torch.save(state, self.args.out / "checkpoint.tmp")
        (self.args.out / "checkpoint.tmp").replace(self.args.out / "checkpoint.pt")

    def learning_rate(self) -> float:
        """Warm-up over 200 steps of a run, constant until `decay_from`, then a straight line to 2 %."""
        start = self.args.decay_from
        done = min(1.0, self.minutes / self.args.minutes)
        return (
            self.args.lr
            * min(1.0, (self.step - self.first_step + 1) / 200)
            * (1 - 0.98 * max(0.0, (done - start) / (1 - start)))
        )

    def train_step(self) -> Tensor:
        n = self.args.batch
        chosen = self.rng.integers(len(self.scenes), size=n)
        captions = [self.world.random_caption(self.scenes[i], self.rng) for i in chosen]
        captions = ["" if self.rng.random() < 0.1 else caption for caption in captions]
        rows = torch.from_numpy(chosen).to(self.device)
        x0 = self.latents[rows].float()
        noise = torch.randn_like(x0)
        t = shifted_uniform(n, device=self.device)
        x = torch.lerp(x0, noise, t[:, None, None])
        target = noise - x0
        guidance = torch.empty(n, device=self.device).uniform_(*GUIDANCE)
        if self.minutes >= self.args.distill_from * self.args.minutes:
            half = n // 2
            guidance[half:] = 1.0
            target[:half] += self.guided_difference(x[:half], captions[:half], t[:half], guidance[:half])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            velocity = self.bundle(x, self.bundle.encode(captions), t, guidance)
        loss = ((velocity.float() - target).square().mean(dim=(1, 2)) * self.weights[rows]).mean()
        more = [self.world.sample(self.rng) for _ in range(self.args.captions)]
        text = self.bundle.encode([self.world.random_caption(scene, self.rng) for scene in more])
        looks = self.appearance.loss(text, torch.tensor([scene.emoji for scene in more], device=self.device))
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate() * (MUON_RATE if name == "muon" else 1)
        (loss + 0.5 * looks).backward()
        nn.utils.clip_grad_norm_(self.bundle.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        with torch.no_grad():
            decay = min(self.args.ema, (self.step + 1) / (self.step + 10))
            own, averaged = list(self.bundle.parameters()), list(self.average.parameters())
            torch._foreach_lerp_(averaged, own, 1 - decay)
        self.step += 1
        return torch.stack([loss.detach(), looks.detach()])

    @torch.no_grad()
    def guided_difference(self, x: Tensor, captions: list[str], t: Tensor, guidance: Tensor) -> Tensor:
        """(g - 1) (v(caption) - v(no caption)), by the averaged model at guidance 1."""
        empty = [part.expand(len(x), *part.shape[1:]) for part in self.average.encode([""])]
        text = [torch.cat(pair) for pair in zip(self.average.encode(captions), empty, strict=True)]
        v = self.average(torch.cat([x, x]), text, torch.cat([t, t]), torch.ones(2 * len(x), device=x.device))
        with_caption, without = v.chunk(2)
        return (guidance - 1)[:, None, None] * (with_caption - without)

    @torch.no_grad()
    def quick_check(self, count: int = 60) -> dict[str, float]:
        """Top-1 accuracy and PSNR to the nearest allowed picture, for captions that name everything."""
        rng = np.random.default_rng(7)
        right, psnr = 0, []
        for request in (Request("large", None, "white"), Request("small", "on the left", "blue")):
            position = request.position or "in the centre"
            chosen = rng.choice(len(self.world), count // 2, replace=False)
            scenes = [Scene(int(e), request.size, position, request.colour, False, 0) for e in chosen]
            text = self.average.encode([self.world.caption(scene) for scene in scenes])
            noise = torch.randn(len(scenes), 36, 64, generator=torch.Generator().manual_seed(7))
            levels = noise_levels("euler", 20, 36, guided=True)
            drawing = Drawing(noise.to(self.device), Conditioning(*text), GRID, levels, 2.5)
            z = unpack_latents(denoise(self.average.flux, drawing), *GRID)
            pictures = self.vae.decode(z / LATENT_SCALE + LATENT_SHIFT).sample.clamp(-1, 1) / 2 + 0.5
            verdict = nearest(self.world, pictures.cpu(), request)
            right += (verdict.emoji == torch.from_numpy(chosen)).sum().item()
            psnr += verdict.psnr.tolist()
        return dict(top1=right / (2 * (count // 2)), psnr=float(np.mean(psnr)))

    def run(self) -> None:
        log = (self.args.out / "log.jsonl").open("a")
        losses, last, next_report = [], time.monotonic(), self.minutes + 2
        next_check = self.minutes + 10
        while self.minutes < self.args.minutes:
            losses.append(self.train_step())
            now = time.monotonic()
            self.minutes, last = self.minutes + (now - last) / 60, now
            if self.minutes >= next_report:
                row = dict(minutes=round(self.minutes, 1), step=self.step)
                row |= dict(zip(("loss", "appearance_loss"), torch.stack(losses).mean(dim=0).tolist(), strict=True))
                losses, next_report = [], self.minutes + 2
                if self.minutes >= next_check:
                    row |= self.quick_check()
                    next_check = self.minutes + 10
                    self.save()
                    last = time.monotonic()  # checks and saving do not count as training time
                print(row, flush=True)
                log.write(json.dumps(row) + "\n")
                log.flush()
        self.save()


def open_vae(path: Path) -> "AutoencoderKL":
    """What `train_vae` wrote, or an ae.safetensors."""
    if path.is_file():
        return load_vae(path)
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(path)


def shifted_uniform(n: int, mu: float = 0.8, device: torch.device | str = "cpu") -> Tensor:
    """n times in 0-1, more of them near 1: FLUX.1's time shift of a uniform variable."""
    odds = float(np.exp(mu))
    u = torch.rand(n, device=device).clamp(1e-4, 1 - 1e-4)
    return odds / (odds + 1 / u - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vae", type=Path, required=True, help="what train_vae wrote, or an ae.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a model folder to go on from, instead of from nothing")
    parser.add_argument("--minutes", type=float, default=90, help="training time in all, resumed runs included")
    parser.add_argument("--distill-from", type=float, default=0.75, help="share of the time after which it begins")
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the time at a constant learning rate")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--captions", type=int, default=192, help="more captions a step, for the text encoders alone")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--pool", type=int, default=60000, help="pictures, encoded once")
    parser.add_argument("--compile", action="store_true", help="torch.compile, about a quarter faster; needs gcc")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16: for GPUs, and processors with AMX")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
