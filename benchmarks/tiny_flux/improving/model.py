"""Transformer and text encoders go on from the best so far, as `train` does it; guidance stays distilled throughout."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flux_quant.benchmarks.tiny_flux.emoji import POSITIONS, Scene
from flux_quant.benchmarks.tiny_flux.evaluate import Case
from flux_quant.benchmarks.tiny_flux.export import export_model
from flux_quant.benchmarks.tiny_flux.improving.scenes import ENCODED, SMALL, encoded
from flux_quant.benchmarks.tiny_flux.improving.steps import Deadline, Learned, Rates, Stepper, learn
from flux_quant.benchmarks.tiny_flux.improving.verdict import Outcome, compare
from flux_quant.benchmarks.tiny_flux.improving.workshop import (
    Workshop,
    choosing_cases,
    noise_of,
    say,
)
from flux_quant.benchmarks.tiny_flux.networks import WIDTH, Appearance, Bundle
from flux_quant.benchmarks.tiny_flux.train import GUIDANCE, SMALL_WEIGHT, shifted_uniform
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.drawing.sampling import Conditioning

RATE = 7e-4  # of Adam; Muon's is twice it. `train` has 1e-3 from nothing
LOOKS = 0.5  # weight of the loss of `Appearance`
WITHOUT = 0.1  # share of empty captions
STEPS_BEFORE = "flux_quant.training_steps"
FITTED = 4096  # captions that the linear maps of `Appearance` are fitted to before the first step


def velocity(bundle: Bundle, x: Tensor, txt: Tensor, pooled: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
    return bundle(x, (txt, pooled), t, guidance)


def copy_of(shop: Workshop) -> Bundle:
    found = Bundle(shop.components.tokenizers)
    found.load_state_dict(shop.bundle.state_dict())
    return found.to(shop.device)


class ModelTask:
    def __init__(self, shop: Workshop) -> None:
        self.shop, self.sizes, self.catalogue = shop, shop.sizes, shop.catalogue
        self.bundle, self.average = copy_of(shop), copy_of(shop).requires_grad_(False)
        small = self.catalogue.rows[:, 1] == SMALL
        weights = torch.where(small, SMALL_WEIGHT, 1.0)
        self.weights = weights / (weights * self.catalogue.chances).sum() * self.catalogue.chances.sum()
        self.weights = self.weights.float()
        self.appearance = fitted_appearance(shop)
        self.velocity: Callable[..., Tensor] = velocity

    def compile_(self, on: bool) -> None:
        self.velocity = torch.compile(velocity, dynamic=False) if on else velocity

    def learned(self) -> Learned:
        named = dict(self.bundle.named_parameters())
        matrices = [name for name, p in named.items() if "_blocks." in name and p.ndim == 2]
        rest = [name for name in named if name not in set(matrices)]
        own, averaged = dict(self.bundle.named_parameters()), dict(self.average.named_parameters())
        looks = list(self.appearance.parameters())
        kept = [*(averaged[name] for name in (*matrices, *rest)), *(p.detach().clone() for p in looks)]
        return Learned([*(own[name] for name in rest), *looks], [own[name] for name in matrices], kept)

    def loss(self) -> Tensor:
        n, scenes = self.sizes.batch, self.catalogue
        chosen, others = scenes.draw(n), scenes.draw(self.sizes.captions)
        captions = self.shop.captions.random(scenes.rows[chosen], WITHOUT)
        more = self.shop.captions.random(scenes.rows[others])
        x0 = scenes.latents[chosen].float()
        noise, t = torch.randn_like(x0), shifted_uniform(n, device=x0.device)
        x, target = torch.lerp(x0, noise, t[:, None, None]), noise - x0
        guidance = torch.empty(n, device=x0.device).uniform_(*GUIDANCE)
        half = n // 2
        guidance = torch.cat([guidance[:half], torch.ones_like(guidance[half:])])
        with self.shop.autocast():
            guided = self.guided_difference(x[:half], captions[:half], t[:half], guidance[:half])
            target = torch.cat([target[:half] + guided, target[half:]])
            txt, pooled = self.bundle.features(*self.shop.captions.tokens(torch.cat([captions, more])))
            found = self.velocity(self.bundle, x, txt[:n], pooled[:n], t, guidance)
        error = (found.float() - target).square().mean(dim=(1, 2)) * self.weights[chosen]
        looks = self.appearance.loss((txt[n:].float(), pooled[n:].float()), scenes.rows[others][:, 0])
        return error.mean() + LOOKS * looks

    @torch.no_grad()
    def guided_difference(self, x: Tensor, captions: Tensor, t: Tensor, guidance: Tensor) -> Tensor:
        """(g - 1) (v(caption) - v(no caption)), by the averaged model at guidance 1."""
        both = torch.cat([captions, torch.full_like(captions, self.shop.captions.empty)])
        txt, pooled = self.average.features(*self.shop.captions.tokens(both))
        ones = torch.ones(len(both), device=x.device)
        v = self.velocity(self.average, torch.cat([x, x]), txt, pooled, torch.cat([t, t]), ones)
        with_caption, without = v.float().chunk(2)
        return (guidance - 1)[:, None, None] * (with_caption - without)


def fitted_appearance(shop: Workshop) -> Appearance:
    """The linear maps of `Appearance` for the text encoders as they are, by least squares: they are not shipped."""
    plain = shop.rows([Scene(e, "large", POSITIONS[0], "white", False, 0) for e in range(len(shop.world))])
    targets = encoded(plain, shop.painter, shop.autoencoder).float().flatten(1)
    appearance = Appearance(targets - targets.mean(dim=0)).to(shop.device)
    chosen = shop.catalogue.rows[shop.catalogue.draw(FITTED)]
    with torch.no_grad():
        txt, pooled = shop.bundle.features(*shop.captions.tokens(shop.captions.random(chosen)))
        wanted = appearance.targets[chosen[:, 0]]
        for linear, features in ((appearance.from_t5, txt.mean(dim=1)), (appearance.from_clip, pooled)):
            x = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
            gram = x.T @ x + 1e-3 * len(x) * torch.eye(WIDTH + 1, device=shop.device)
            solved = torch.linalg.solve(gram, x.T @ wanted)
            linear.weight.copy_(solved[:-1].T)
            linear.bias.copy_(solved[-1])
    return appearance


@torch.no_grad()
def rounded_(bundle: Bundle) -> Bundle:
    """As it will be shipped: bfloat16."""
    for p in bundle.parameters():
        p.copy_(p.bfloat16().float())
    return bundle


@torch.no_grad()
def texts_of(bundle: Bundle, cases: Sequence[Case]) -> Conditioning:
    """Of all captions, a few at a time."""
    texts = [one.caption for one in cases]
    found = [bundle.encode(texts[i : i + ENCODED]) for i in range(0, len(texts), ENCODED)]
    return Conditioning(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def outcome(shop: Workshop, bundle: Bundle) -> Outcome:
    """What a model draws for the captions to choose by."""
    cases = choosing_cases(shop.world, shop.sizes.choosing, shop.sizes.asked)
    noise = noise_of(len(cases), shop.device)
    drawn = shop.draw(bundle.flux, texts_of(bundle, cases), noise, shop.sizes.steps)
    return shop.judged(cases, shop.pictures(drawn))


def improve_model(shop: Workshop, deadline: Deadline) -> dict[str, object]:
    """The better model becomes the workshop's, and a model folder below OUT."""
    before = outcome(shop, shop.bundle)
    say(model="shipped", **before.figures())
    check = deadline.spent
    task = ModelTask(shop)
    folder = shop.out / "model"
    folder.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        torch.save({"average": task.average.state_dict()}, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(folder / "checkpoint.pt")

    stepper = Stepper(task, task.learned(), shop.device)
    course = learn(stepper, Rates(RATE), deadline.within(deadline.left - 1.5 * check), shop.sizes.least, keep)
    keep()
    candidate = rounded_(task.average)
    found = compare(before, outcome(shop, candidate)) | course.figures()
    if found["verdict"] == "candidate":
        shop.bundle = candidate
    with open_checkpoint(shop.components.transformer) as reader:
        steps = f"{reader.metadata.get(STEPS_BEFORE)} and {course.steps} of {shop.sizes.batch} pictures"
    export_model(candidate.state_dict(), shop.components.tokenizers, shop.out / "candidate", {STEPS_BEFORE: steps})
    return found
