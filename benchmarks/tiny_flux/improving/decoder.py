"""The autoencoder's decoder goes on alone, as `train_vae --decoder-only`: latents, and all that reads them, stay."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from flux_quant.benchmarks.metrics import psnr
from flux_quant.benchmarks.tiny_flux.autoencoder import Autoencoder
from flux_quant.benchmarks.tiny_flux.export import write
from flux_quant.benchmarks.tiny_flux.improving.steps import Deadline, Learned, Rates, Stepper, learn
from flux_quant.benchmarks.tiny_flux.improving.verdict import Outcome, compare
from flux_quant.benchmarks.tiny_flux.improving.workshop import CHOOSING, DRAWN, Workshop, say
from flux_quant.benchmarks.tiny_flux.networks import GRID
from flux_quant.benchmarks.tiny_flux.train_vae import loss_of
from flux_quant.model import unpack_latents

RATE = 8e-4  # that of the shipped decoder's last run


class DecoderTask:
    def __init__(self, shop: Workshop) -> None:
        self.shop = shop
        self.decoder = copy.deepcopy(shop.autoencoder.decoder).requires_grad_(True)
        self.average = copy.deepcopy(shop.autoencoder.decoder)
        if shop.device.type == "cuda":  # how its convolutions like it best
            self.decoder.to(memory_format=torch.channels_last)
            self.average.to(memory_format=torch.channels_last)
        self.decode: Callable[[Tensor], Tensor] = self.decoder

    def compile_(self, on: bool) -> None:
        self.decode = torch.compile(self.decoder, dynamic=False) if on else self.decoder

    def loss(self) -> Tensor:
        chosen = self.shop.catalogue.draw(self.shop.sizes.decoder_batch)
        pictures = self.shop.painter(self.shop.catalogue.rows[chosen])
        latents = unpack_latents(self.shop.catalogue.latents[chosen].float(), *GRID)
        with self.shop.autocast():
            found = self.decode(self.shop.autoencoder.unscaled(latents))
        return loss_of(found.float(), pictures * 2 - 1)


@torch.no_grad()
def outcome(shop: Workshop, model: Autoencoder) -> Outcome:
    """dB of pictures that are encoded and decoded, scenes that training draws; all of them are `right`."""
    generator = torch.Generator().manual_seed(CHOOSING)
    count = shop.sizes.decoded
    chosen = torch.randint(len(shop.catalogue), (count,), generator=generator).to(shop.device)
    db = []
    for rows in shop.catalogue.rows[chosen].split(DRAWN):
        pictures = shop.painter(rows)
        db.append(psnr(model.decode(model.encode(pictures)).clamp(0, 1), pictures))
    found = torch.cat(db).cpu()
    return Outcome(torch.ones(count, dtype=torch.bool), found)


@torch.no_grad()
def improve_decoder(shop: Workshop, deadline: Deadline) -> dict[str, object]:
    """The better autoencoder becomes the workshop's, and a file below OUT."""
    before = outcome(shop, shop.autoencoder)
    say(decoder="shipped", **before.figures())
    check = deadline.spent
    task = DecoderTask(shop)
    learned = Learned(list(task.decoder.parameters()), averages=list(task.average.parameters()), betas=(0.9, 0.99))
    with torch.enable_grad():
        stepper = Stepper(task, learned, shop.device)
        course = learn(stepper, Rates(RATE), deadline.within(deadline.left - 1.5 * check), shop.sizes.least)
    candidate = copy.deepcopy(shop.autoencoder)
    candidate.decoder.load_state_dict({name: t.bfloat16().float() for name, t in task.average.state_dict().items()})
    found = compare(before, outcome(shop, candidate)) | course.figures()
    if found["verdict"] == "candidate":
        shop.autoencoder = candidate
    write(shop.out / "candidate/vae/ae.safetensors", candidate.state_dict(), {})
    return found
