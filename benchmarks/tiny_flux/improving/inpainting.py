"""The ControlNet for inpainting goes on from the shipped one, beside the best model so far, as `inpainting` does it.

Both are compared in the form that ships, Q6_K: the shipped file's values are where training begins.
"""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.benchmarks.tiny_flux import inpainting
from flux_quant.benchmarks.tiny_flux.emoji import SIZE, Scene
from flux_quant.benchmarks.tiny_flux.evaluate import case
from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import NET
from flux_quant.benchmarks.tiny_flux.improving.rows import mapped, packed_masks, row_of
from flux_quant.benchmarks.tiny_flux.improving.steps import Deadline, Learned, Rates, Stepper, learn
from flux_quant.benchmarks.tiny_flux.improving.verdict import Outcome, compare
from flux_quant.benchmarks.tiny_flux.improving.workshop import CHOOSING, DRAWN, GUIDANCE, Workshop, noise_of, say
from flux_quant.benchmarks.tiny_flux.inpainting import (
    GUIDED,
    HIDDEN,
    PARTS,
    USUAL_GUIDANCE,
    in_diffusers_names,
    masked_psnr,
    weights_of,
)
from flux_quant.benchmarks.tiny_flux.masks import around_emoji
from flux_quant.benchmarks.tiny_flux.networks import CONFIG, Bundle
from flux_quant.benchmarks.tiny_flux.train import GUIDANCE as RANGE
from flux_quant.benchmarks.tiny_flux.train import shifted_uniform
from flux_quant.benchmarks.tiny_flux.turbo import levels
from flux_quant.controlnet import ControlNet, ControlNetConfig
from flux_quant.converters.checkpoint import load
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.drawing.given import inpainting_tokens
from flux_quant.drawing.pictures import composite
from flux_quant.drawing.sampling import noised
from flux_quant.loading import open_controlnet, shapes_of

RATE = 4e-4
USUAL = 0.7  # share of guidance 3.5
WITHOUT = 0.1  # share of empty captions
MASKS_IN = 0.3  # of the whole time, at most, for pictures with masks
OWN_ROWS = (("*embed*", "q8_0"), ("controlnet_blocks*", "q8_0"), ("*norm1*.linear*", "q5_k"))  # as the shipped net
WRITING = 3.0  # seconds, the conversion among them


def float_net(path: Path) -> ControlNet:
    """A net with its values in float32, to be trained."""
    reader = open_controlnet(path)
    net = ControlNet(ControlNetConfig.from_shapes(shapes_of(reader), CONFIG))
    net.load_state_dict({name: load(reader, name) for name in net.state_dict()})
    return net


def make_masks(shop: Workshop, rows: Tensor, file: Path) -> np.ndarray:
    """(rows, 1152), the same for any number of workers, which read the sprites in `file`."""
    np.save(file, shop.world.sprites)
    pieces = [(CHOOSING + i, part.tolist()) for i, part in enumerate(rows.cpu().split(256))]
    try:
        return np.concatenate(mapped(shop.workers, partial(packed_masks, file), pieces, chunk=1))
    finally:
        file.unlink()


def unpacked(masks: Tensor) -> Tensor:
    """(B, 1152) uint8 -> (B, 1, 96, 96): 1 is drawn anew."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=masks.device)
    return ((masks[:, :, None] >> shifts) & 1).view(-1, 1, SIZE, SIZE).float()


class Masked:
    """Pictures with masks: the numbers of their scenes in the catalogue, and the conditions (n, 36, 68) float16."""

    def __init__(self, shop: Workshop, deadline: Deadline) -> None:
        self.scenes = shop.catalogue.draw(shop.sizes.masked)
        rows = shop.catalogue.rows[self.scenes]
        masks = torch.from_numpy(make_masks(shop, rows, shop.out / "sprites.npy")).to(shop.device)
        found = []
        with torch.no_grad():
            for part in torch.arange(len(rows), device=shop.device).split(256):
                mask = unpacked(masks[part])
                found.append(inpainting_tokens(shop.painter(rows[part]), mask, shop.autoencoder.encode).half())
                found[-1][0, 0, 0].item()  # the clock runs with the device
                if deadline.left < 0:
                    break
        self.conditions = torch.cat(found)
        self.scenes = self.scenes[: len(self.conditions)]

    def __len__(self) -> int:
        return len(self.scenes)


def alone(bundle: Bundle, x: Tensor, txt: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
    return bundle(x, (txt, pooled), t, guidance)


class InpaintingTask:
    def __init__(self, shop: Workshop, net: ControlNet, masked: Masked) -> None:
        self.shop, self.masked = shop, masked
        self.net, self.average = net, copy.deepcopy(net).requires_grad_(False)
        self.guided = max(1, round(shop.sizes.inpainting_batch * GUIDED / 32))  # `inpainting`'s share of its 32
        self.velocity, self.alone = inpainting.velocity, alone

    def compile_(self, on: bool) -> None:
        self.velocity, self.alone = (
            torch.compile(function, dynamic=False) if on else function for function in (inpainting.velocity, alone)
        )

    def learned(self) -> Learned:
        own, averaged = dict(self.net.named_parameters()), dict(self.average.named_parameters())
        matrices = [name for name, p in own.items() if "_blocks." in name and p.ndim == 2]
        rest = [name for name in own if name not in set(matrices)]
        kept = [averaged[name] for name in (*matrices, *rest)]
        return Learned([own[name] for name in rest], [own[name] for name in matrices], kept)

    def loss(self) -> Tensor:
        n, shop = self.shop.sizes.inpainting_batch, self.shop
        chosen = torch.randint(len(self.masked), (n,), device=shop.device)
        scenes, condition = self.masked.scenes[chosen], self.masked.conditions[chosen].float()
        clean = shop.catalogue.latents[scenes].float()
        t, noise = shifted_uniform(n, device=shop.device), torch.randn_like(clean)
        x, target = torch.lerp(clean, noise, t[:, None, None]), noise - clean
        usual, others = torch.rand(n, device=shop.device), torch.empty(n, device=shop.device).uniform_(*RANGE)
        guidance = torch.where(usual < USUAL, USUAL_GUIDANCE, others)
        captions = shop.captions.random(shop.catalogue.rows[scenes], WITHOUT)
        with shop.autocast():
            with torch.no_grad():
                text = shop.bundle.features(*shop.captions.tokens(captions))
                target = target + self.left_of_guidance(x, condition, text, t, guidance)
            found = self.velocity(self.net, shop.bundle.flux, x, condition, *text, t, guidance)
        return ((found.float() - target).square() * weights_of(condition)).mean()

    def left_of_guidance(
        self, x: Tensor, condition: Tensor, text: tuple[Tensor, Tensor], t: Tensor, guidance: Tensor
    ) -> Tensor:
        """As `inpainting.Trainer.left_of_guidance`."""
        hidden = 1 - condition[..., CONFIG.in_channels :].mean(dim=(1, 2))
        most = hidden.topk(self.guided).indices
        share = ((hidden[most] - HIDDEN[0]) / (HIDDEN[1] - HIDDEN[0])).clamp(0, 1)
        given = [torch.cat([part[most], part[most]]) for part in (x, *text, t)]
        both = torch.cat([guidance[most], guidance.new_ones(self.guided)])
        guided, plain = self.alone(self.shop.bundle, *given, both).float().chunk(2)
        return torch.zeros_like(x).index_copy_(0, most, share[:, None, None] * (guided - plain))


class Paintings:
    """Parts of pictures to be restored and emoji to be exchanged, of scenes to choose by; what is kept is put back."""

    def __init__(self, shop: Workshop) -> None:
        rng, count = np.random.default_rng(CHOOSING), min(shop.sizes.restored, len(shop.world) // 2)
        self.shop, world = shop, shop.world
        scenes = [world.sample(rng) for _ in range(shop.sizes.restored)]
        hidden = [PARTS[i % 3](rng, world, scene) for i, scene in enumerate(scenes)]
        emoji = rng.permutation(len(world)).tolist()
        old, new = (
            [Scene(e, "large", "in the centre", "green", False, 0) for e in part]
            for part in (emoji[:count], emoji[count : 2 * count])
        )
        self.new = [case(world, scene) for scene in new]
        self.restored = self.prepared(scenes, hidden, [world.caption(scene) for scene in scenes])
        around = [around_emoji(rng, world, scene) for scene in old]
        self.exchanged = self.prepared(old, around, [one.caption for one in self.new])

    def prepared(
        self, scenes: list[Scene], masks: list[np.ndarray], captions: list[str]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        rows = torch.tensor([row_of(scene) for scene in scenes]).to(self.shop.device)
        mask = torch.from_numpy(np.stack(masks)).float()[:, None].to(self.shop.device)
        return self.shop.painter(rows), mask, self.shop.text(captions)

    @torch.no_grad()
    def outcome(self, net: ControlNet | None) -> Outcome:
        pictures, masks, _ = self.restored
        db = masked_psnr(self.painted(net, *self.restored), pictures, masks)
        return Outcome(self.shop.judged(self.new, self.painted(net, *self.exchanged)).right, db.cpu())

    def painted(self, net: ControlNet | None, pictures: Tensor, masks: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        noise, found = noise_of(len(pictures), self.shop.device), []
        for rows in torch.arange(len(pictures), device=self.shop.device).split(DRAWN):
            given = (part[rows] for part in text)
            found.append(self.drawn(net, pictures[rows], masks[rows], tuple(given), noise[rows]))
        return composite(self.shop.pictures(torch.cat(found)), pictures, masks)

    def drawn(
        self, net: ControlNet | None, pictures: Tensor, masks: Tensor, text: tuple[Tensor, Tensor], noise: Tensor
    ) -> Tensor:
        """Packed latents."""
        shop, encode = self.shop, self.shop.autoencoder.encode
        condition = inpainting_tokens(pictures, masks, encode)
        known = inpainting_tokens(pictures, torch.zeros_like(masks), encode)[..., : CONFIG.in_channels]
        new = 1 - condition[..., CONFIG.in_channels :].repeat(1, 1, CONFIG.in_channels // 4)
        x, sigmas = noise, levels(shop.sizes.steps)
        guidance = torch.full((len(x),), GUIDANCE, device=shop.device)
        for now, after in zip(sigmas, sigmas[1:], strict=False):
            t = torch.full((len(x),), now, device=shop.device)
            if net is None:
                v = alone(shop.bundle, x, *text, t, guidance)
            else:
                v = inpainting.velocity(net, shop.bundle.flux, x, condition, *text, t, guidance)
            x = x + (after - now) * v
            x = new * x + (1 - new) * noised(known, noise, after)
        return x


def improve_inpainting(shop: Workshop, deadline: Deadline) -> dict[str, object]:
    """A net below OUT, in both forms, and whether it is better than the shipped one beside the best model so far."""
    paintings = Paintings(shop)
    net = float_net(NET).to(shop.device)
    without, begin = paintings.outcome(None), deadline.spent
    shipped = paintings.outcome(net)
    say(inpainting="shipped", **shipped.figures(), without=without.figures())
    check = 1.5 * (deadline.spent - begin)
    masked = Masked(shop, deadline.within(MASKS_IN * deadline.left))
    task = InpaintingTask(shop, net, masked)
    stepper = Stepper(task, task.learned(), shop.device)
    course = learn(stepper, Rates(RATE), deadline.within(deadline.left - check - WRITING), shop.sizes.least)
    candidate = float_net(write(shop, task.average)).to(shop.device)
    found = compare(shipped, paintings.outcome(candidate))
    return found | dict(without=without.figures(), masked=len(masked)) | course.figures()


def write(shop: Workshop, net: ControlNet) -> Path:
    """As `inpainting` saves it, and in the form that ships -> the latter."""
    plain, packed = shop.out / "net.safetensors", shop.out / "candidate/controlnet" / NET.name
    packed.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.bfloat16().cpu() for name, tensor in in_diffusers_names(net).items()}, plain)
    run(make_plan(Conversion(plain, packed, "q6_k", force=True, own_rows=OWN_ROWS)))
    return packed
