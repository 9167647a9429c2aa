"""Train a ControlNet for inpainting, of Alimama's form, for the bundled model.

The net is a copy of the model's double blocks. It reads the noisy latents, the text, time and guidance as the model
does, and 68 channels more: the latents of the picture with black where it is drawn anew, and where it is kept. What it
adds to the model begins at zero. The model, its text encoders and its VAE stay as they are.

Rectified flow as in `train`, an error inside the mask counting more than one outside; guidance is 3.5, or 1 to 6. Where
little is hidden the target is that of the data: what is seen decides, and guidance would lead away from it. Where most
is hidden, the caption decides: the target grows by what guidance changes in the model alone.

    python -I -m flux_quant.benchmarks.tiny_flux.inpainting --out build/tiny/inpainting --minutes 40 --compile
    flux-quant convert build/tiny/inpainting/net.safetensors -o flux_quant/tiny_flux/controlnet/inpainting-Q6_K.gguf \\
        -f q6_k --set '*embed*=q8_0' --set 'controlnet_blocks*=q8_0' --set '*norm1*.linear*=q5_k'

Writes `net.safetensors` in diffusers' names, the averaged weights, and a checkpoint at every check; resumes from it.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld, Scene
from flux_quant.benchmarks.tiny_flux.judge import Request as Asked
from flux_quant.benchmarks.tiny_flux.judge import nearest
from flux_quant.benchmarks.tiny_flux.masks import around_emoji, half, quarter, random_mask, strip
from flux_quant.benchmarks.tiny_flux.muon import Muon
from flux_quant.benchmarks.tiny_flux.networks import CONFIG, GRID, Bundle, shipped_state
from flux_quant.benchmarks.tiny_flux.train import GUIDANCE, MUON_RATE, latents_of, shifted_uniform
from flux_quant.components import BUNDLED, find_components
from flux_quant.controlnet import INPAINTING, Control, ControlNet, ControlNetConfig, served
from flux_quant.drawing import vae
from flux_quant.drawing.given import inpainting_tokens
from flux_quant.drawing.pictures import composite
from flux_quant.drawing.sampling import Conditioning, Drawing, denoise
from flux_quant.drawing.schedules import noise_levels
from flux_quant.generation import choose_device
from flux_quant.loading import load_vae
from flux_quant.model import Flux, Residuals, image_ids, text_ids, unpack_latents
from flux_quant.naming import to_diffusers

INSIDE, OUTSIDE = 1.0, 0.7  # weights of an error where the picture is drawn anew and where it is kept
USUAL_GUIDANCE = 3.5
GUIDED, HIDDEN = 12, (0.3, 0.7)  # pictures of a batch that keep guidance; all of it from the second share on
CHECKED = 48  # pictures whose masked part is compared in a check, and as many emoji that are exchanged
PARTS = (half, quarter, strip)


def fresh_net(flux: Flux, blocks: int) -> ControlNet:
    """A copy of the model's first double blocks and embedders that adds nothing yet; it sees the picture as noise."""
    config = ControlNetConfig(
        flux=CONFIG.__class__(**{**vars(CONFIG), "double_blocks": blocks, "single_blocks": 0}),
        condition=INPAINTING,
        outputs=(blocks, 0),
    )
    net = ControlNet(config)
    own = flux.state_dict()
    net.load_state_dict({name: own[name].clone() for name in net.state_dict() if name in own}, strict=False)
    with torch.no_grad():
        for project in net.controlnet_blocks:
            nn.init.zeros_(project.weight)
            nn.init.zeros_(project.bias)
        nn.init.zeros_(net.controlnet_x_embedder.bias)
        net.controlnet_x_embedder.weight.copy_(seen_beside(own["img_in.weight"]))
    return net


def seen_beside(img_in: Tensor) -> Tensor:
    """(hidden, 68): the picture and the mask where `img_in` (hidden, 64) reaches nothing, so that neither covers the
    noisy latents, and half of the picture where those are, which the copied blocks understand."""
    directions = torch.linalg.svd(img_in)[0][:, img_in.shape[1] :][:, :INPAINTING]
    beside = directions * torch.linalg.svdvals(img_in).median()
    beside[:, : img_in.shape[1]] += 0.5 * img_in
    return beside


def in_diffusers_names(net: ControlNet) -> dict[str, Tensor]:
    state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
    extra = {name: state.pop(name) for name in list(state) if name.startswith("controlnet_")}
    return {name: tensor.contiguous() for name, tensor in {**to_diffusers(state), **extra}.items()}


def velocity(
    net: ControlNet, flux: Flux, x: Tensor, condition: Tensor, txt: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor
) -> Tensor:
    """Of model and net together. One steering vector each."""
    ids = dict(img_ids=image_ids(*GRID, device=x.device), txt_ids=text_ids(txt.shape[1], device=x.device))
    double, _ = net(x, condition, txt, **ids, steering=net.steering(pooled, t, guidance, x.dtype))
    residuals = Residuals(served(double, len(flux.double_blocks)))
    return flux(x, txt, pooled, t, **ids, guidance=guidance, residuals=residuals)


class Pool:
    """Scenes, their latents (scenes, 36, 64), and the condition under some masks of each (scenes, masks, 36, 68)."""

    def __init__(
        self, world: EmojiWorld, path: Path, scenes: int, masks: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        if not path.exists():
            self.make(world, path, scenes, masks, seed, device)
        saved = torch.load(path, weights_only=True, map_location=device)
        self.scenes = [Scene(*row) for row in saved["scenes"]]
        self.latents, self.conditions = saved["latents"], saved["conditions"]

    @staticmethod
    @torch.no_grad()
    def make(
        world: EmojiWorld, path: Path, count: int, masks: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        model, rng = load_vae(find_components(BUNDLED).vae).to(device), np.random.default_rng(seed)
        scenes = [world.sample(rng) for _ in range(count)]
        latents, conditions, begin = [], [], time.monotonic()
        for start in range(0, count, 16):
            chunk = scenes[start : start + 16]
            latents.append(latents_of(world, model, chunk))
            hidden = [[random_mask(rng, world, scene) for _ in range(masks)] for scene in chunk]
            tokens = [
                inpainting_tokens(pictures_of(world, chunk), mask_tensor(column), lambda x: vae.encode(model, x))
                for column in zip(*hidden, strict=True)
            ]
            conditions.append(torch.stack(tokens, dim=1).half())
            if start % 1600 == 0:
                print(f"{start} of {count} scenes after {time.monotonic() - begin:.0f} s", flush=True)
        rows = [(s.emoji, s.size, s.position, s.colour, s.mirrored, s.tilt) for s in scenes]
        torch.save(dict(scenes=rows, latents=torch.cat(latents), conditions=torch.cat(conditions)), path)


def pictures_of(world: EmojiWorld, scenes: list[Scene]) -> Tensor:
    """(n, 3, 96, 96) in 0-1."""
    return torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).permute(0, 3, 1, 2).contiguous()


def mask_tensor(masks: list[np.ndarray]) -> Tensor:
    """(n, 1, 96, 96): 1 is drawn anew."""
    return torch.from_numpy(np.stack(masks)).float()[:, None]


def weights_of(condition: Tensor) -> Tensor:
    """(B, 36, 68) -> (B, 36, 64): of the squared errors; their mean is 1."""
    kept = condition[..., CONFIG.in_channels :].repeat(1, 1, CONFIG.in_channels // 4)
    weights = torch.where(kept > 0.5, OUTSIDE, INSIDE)
    return weights / weights.mean()


def masked_psnr(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """(n,) dB over the pixels of the mask."""
    error = ((a - b).square() * mask).sum(dim=(1, 2, 3)) / (3 * mask.sum(dim=(1, 2, 3)))
    return -10 * error.clamp(min=1e-12).log10()


class Check:
    """How well parts of pictures are restored and emoji exchanged, on scenes of its own; drawn from fixed noise."""

    def __init__(self, world: EmojiWorld, bundle: Bundle, seed: int = 4321) -> None:
        self.world, self.flux, self.device = world, bundle.flux, bundle.device
        self.vae = load_vae(find_components(BUNDLED).vae).to(self.device)
        rng = np.random.default_rng(seed)
        self.scenes = [world.sample(rng) for _ in range(CHECKED)]
        self.masks = mask_tensor([PARTS[i % 3](rng, world, scene) for i, scene in enumerate(self.scenes)])
        self.pictures = pictures_of(world, self.scenes)
        self.text = bundle.encode([world.caption(scene) for scene in self.scenes])
        emoji = rng.permutation(len(world))[: 2 * CHECKED].tolist()
        old, self.new = ([Scene(e, "large", "in the centre", "green", False, 0) for e in part] for part in (
            emoji[:CHECKED], emoji[CHECKED:]))  # fmt: skip
        self.old_pictures = pictures_of(world, old)
        self.old_masks = mask_tensor([around_emoji(rng, world, scene) for scene in old])
        self.new_text = bundle.encode([world.caption(scene) for scene in self.new])

    @torch.no_grad()
    def __call__(self, net: ControlNet | None, steps: int = 12, guidance: float = 3.5) -> dict[str, float]:
        """PSNR of restored parts, and the share of exchanged emoji that are right. What is kept is put back."""
        restored = self.drawn(net, self.pictures, self.masks, self.text, steps, guidance)
        changed = self.drawn(net, self.old_pictures, self.old_masks, self.new_text, steps, guidance)
        verdict = nearest(self.world, changed, Asked("large", None, "green"))
        right = (verdict.emoji == torch.tensor([scene.emoji for scene in self.new])).float().mean()
        psnrs = masked_psnr(restored, self.pictures, self.masks)
        return dict(restored=psnrs.mean().item(), exchanged=right.item())

    def drawn(
        self, net: ControlNet | None, pictures: Tensor, masks: Tensor, text: Conditioning, steps: int, guidance: float
    ) -> Tensor:
        noise = torch.randn(len(pictures), 36, 64, generator=torch.Generator().manual_seed(99))
        condition = inpainting_tokens(pictures, masks, lambda x: vae.encode(self.vae, x))
        kept = condition[..., CONFIG.in_channels :].repeat(1, 1, CONFIG.in_channels // 4)
        known = latents_of_pictures(self.vae, pictures)
        controls = () if net is None else (Control(net, condition.to(self.device)),)
        levels = noise_levels("euler", steps, 36, guided=True)
        given = dict(known=known.to(self.device), mask=1 - kept.to(self.device), controls=controls)
        drawing = Drawing(noise.to(self.device), Conditioning(*text), GRID, levels, guidance, **given)
        found = vae.decode(self.vae, unpack_latents(denoise(self.flux, drawing), *GRID))
        return composite(found, pictures, masks)


def latents_of_pictures(model: nn.Module, pictures: Tensor) -> Tensor:
    """Packed (n, 36, 64)."""
    whole = torch.zeros(len(pictures), 1, *pictures.shape[2:])
    return inpainting_tokens(pictures, whole, lambda x: vae.encode(model, x))[..., : CONFIG.in_channels]


class Trainer:
    """One training run: its state is what a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.world, (self.device, _) = args, EmojiWorld(), choose_device(args.device)
        torch.manual_seed(args.seed)
        self.bundle = Bundle(find_components(BUNDLED).tokenizers)
        self.bundle.load_state_dict(shipped_state(BUNDLED))
        self.bundle.requires_grad_(False)
        self.pool = Pool(self.world, args.out / "pool.pt", args.pool, args.masks, args.seed, self.device)
        self.net = fresh_net(self.bundle.flux, args.blocks).to(self.device)
        self.bundle.to(self.device)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        matrices = [p for name, p in self.net.named_parameters() if "_blocks." in name and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.net.parameters() if id(p) not in chosen]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(matrices, args.lr * MUON_RATE, weight_decay=0.01),
            "adam": torch.optim.AdamW(rest, args.lr, betas=(0.9, 0.98), weight_decay=0.01),
        }
        self.velocity, self.alone = velocity, self.model_alone
        if args.compile:
            self.velocity = torch.compile(velocity, dynamic=False)
            self.alone = torch.compile(self.model_alone, dynamic=False)
        self.minutes, self.step = 0.0, 0
        if (args.out / "checkpoint.pt").exists():
            self.resume()
        self.first_step = self.step
        self.rng = np.random.default_rng([args.seed, self.step])
        torch.manual_seed(args.seed + self.step)

    def model_alone(self, x: Tensor, txt: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        return self.bundle(x, (txt, pooled), t, guidance)

    def resume(self) -> None:
        saved = torch.load(self.args.out / "checkpoint.pt", weights_only=True, map_location=self.device)
        self.net.load_state_dict(saved["net"])
        self.average.load_state_dict(saved["average"])
        for name, state in saved["optimizers"].items():
            self.optimizers[name].load_state_dict(state)
        self.minutes, self.step = saved["minutes"], saved["step"]

    def save(self) -> None:
        state = dict(net=self.net.state_dict(), average=self.average.state_dict(), minutes=self.minutes, step=self.step)
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        torch.save(state, self.args.out / "checkpoint.tmp")
        (self.args.out / "checkpoint.tmp").replace(self.args.out / "checkpoint.pt")
        tensors = {name: tensor.bfloat16() for name, tensor in in_diffusers_names(self.average).items()}
        save_file(tensors, self.args.out / "net.safetensors")

    def learning_rate(self) -> float:
        """Warm-up over 50 steps of a run, constant until `decay_from`, then a straight line to 2 %."""
        start, done = self.args.decay_from, min(1.0, self.minutes / self.args.minutes)
        warm = min(1.0, (self.step - self.first_step + 1) / 50)
        return self.args.lr * warm * (1 - 0.98 * max(0.0, (done - start) / (1 - start)))

    def train_step(self) -> Tensor:
        n = self.args.batch
        chosen = self.rng.integers(len(self.pool.scenes), size=n)
        masks = torch.from_numpy(self.rng.integers(self.pool.conditions.shape[1], size=n)).to(self.device)
        rows = torch.from_numpy(chosen).to(self.device)
        clean, condition = self.pool.latents[rows].float(), self.pool.conditions[rows, masks].float()
        captions = [self.world.random_caption(self.pool.scenes[i], self.rng) for i in chosen]
        captions = ["" if self.rng.random() < 0.1 else caption for caption in captions]
        with torch.no_grad():
            text = self.bundle.encode(captions)
        t, noise = shifted_uniform(n, device=self.device), torch.randn_like(clean)
        x, target = torch.lerp(clean, noise, t[:, None, None]), noise - clean
        usual, others = torch.rand(n, device=self.device), torch.empty(n, device=self.device).uniform_(*GUIDANCE)
        guidance = torch.where(usual < self.args.usual, USUAL_GUIDANCE, others)
        target = target + self.left_of_guidance(x, condition, text, t, guidance)
        found = self.velocity(self.net, self.bundle.flux, x, condition, *text, t, guidance)
        loss = ((found - target).square() * weights_of(condition)).mean()
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate() * (MUON_RATE if name == "muon" else 1)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        with torch.no_grad():
            decay = min(self.args.ema, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - decay)
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def left_of_guidance(
        self, x: Tensor, condition: Tensor, text: tuple[Tensor, Tensor], t: Tensor, guidance: Tensor
    ) -> Tensor:
        """What guidance changes in the model alone, for the GUIDED pictures of which most is hidden; 0 for the rest."""
        hidden = 1 - condition[..., CONFIG.in_channels :].mean(dim=(1, 2))
        most = hidden.topk(GUIDED).indices
        share = ((hidden[most] - HIDDEN[0]) / (HIDDEN[1] - HIDDEN[0])).clamp(0, 1)
        given = [torch.cat([part[most], part[most]]) for part in (x, *text, t)]
        guided, plain = self.alone(*given, torch.cat([guidance[most], guidance.new_ones(GUIDED)])).chunk(2)
        return torch.zeros_like(x).index_copy_(0, most, share[:, None, None] * (guided - plain))

    def run(self) -> None:
        check = Check(self.world, self.bundle)
        self.report(dict(without_a_net=check(None)))
        losses, last, next_check = [], time.monotonic(), self.minutes + self.args.check_every
        while self.minutes < self.args.minutes:
            losses.append(self.train_step())
            now = time.monotonic()
            self.minutes, last = self.minutes + (now - last) / 60, now
            if self.minutes >= next_check:
                row = dict(minutes=round(self.minutes, 1), step=self.step, loss=torch.stack(losses).mean().item())
                self.save()
                self.report(row | check(self.average))
                losses, next_check = [], self.minutes + self.args.check_every
                last = time.monotonic()  # checks and saving do not count as training time
        self.save()
        self.report(dict(minutes=round(self.minutes, 1), step=self.step) | check(self.average, 20))

    def report(self, row: dict[str, object]) -> None:
        print(row, flush=True)
        with (self.args.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/tiny/inpainting"))
    parser.add_argument("--blocks", type=int, choices=(1, 2), default=2, help="double blocks of the net")
    parser.add_argument("--minutes", type=float, default=40, help="training time in all, resumed runs included")
    parser.add_argument("--decay-from", type=float, default=0.5, help="share of the time at a constant learning rate")
    parser.add_argument("--usual", type=float, default=0.7, help="share of guidance 3.5; the rest is 1 to 6")
    parser.add_argument("--check-every", type=float, default=5, help="minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--ema", type=float, default=0.995)
    parser.add_argument("--pool", type=int, default=8000, help="scenes, encoded once")
    parser.add_argument("--masks", type=int, default=2, help="of each scene")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs gcc")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    Trainer(args).run()


if __name__ == "__main__":
    main()
