"""The Turbo LoRA goes on from the shipped one, for the best model so far, as `turbo` does it.

The student's weights are those of the model plus the products of the factors, made once a step: the same changes as
those of the side paths, in a tenth of the launches. Teacher and student multiply in TF32: bfloat16 would move the many
steps further than the LoRA is to come near to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flux_quant.benchmarks.metrics import psnr
from flux_quant.benchmarks.tiny_flux import turbo
from flux_quant.benchmarks.tiny_flux.evaluate_turbo import TURBO
from flux_quant.benchmarks.tiny_flux.improving.model import texts_of
from flux_quant.benchmarks.tiny_flux.improving.steps import Course, Deadline, Learned, Rates, Stepper, learn
from flux_quant.benchmarks.tiny_flux.improving.verdict import Outcome, compare
from flux_quant.benchmarks.tiny_flux.improving.workshop import (
    GUIDANCE,
    Workshop,
    choosing_cases,
    noise_of,
    products_in_tf32,
    say,
)
from flux_quant.benchmarks.tiny_flux.turbo import (
    FINE,
    METADATA,
    ON_THE_WAY,
    RANGE,
    STEPS,
    Trajectories,
    flow,
    levels,
    own_path,
    robust,
    single_steps,
)
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_write import Factors, kohya, write_lora
from flux_quant.drawing.sampling import Conditioning
from flux_quant.model import Flux

PARTS = {"single steps": (0.4, 1e-3), "own path": (0.6, 4e-4)}  # share of the time, highest rate
TEACHING = 0.25  # of the whole time, at most
NOISE = 815_000  # seed of the noise to choose by


@dataclass
class Student:
    """The model with a LoRA of rank r beside its linears: down (r, K) and up (N, r) by module."""

    flux: Flux
    down: dict[str, Tensor]
    up: dict[str, Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.down.values(), *self.up.values()]

    def weights(self) -> dict[str, Tensor]:
        own = dict(self.flux.named_parameters())
        return own | {f"{name}.weight": own[f"{name}.weight"] + self.up[name] @ self.down[name] for name in self.down}

    def rounded(self) -> "Student":
        """As it is written: bfloat16."""
        parts = ({n: t.detach().bfloat16().float() for n, t in part.items()} for part in (self.down, self.up))
        return Student(self.flux, *parts)

    def merged(self) -> Callable[..., Tensor]:
        """Called as a Flux, with the weights as they are now."""
        weights = self.weights()
        return lambda *given: functional_call(self.flux, weights, given)


def shipped_student(flux: Flux) -> Student:
    """The shipped LoRA beside a model; what it lacks would be an error."""
    device = flux.img_in.weight.device
    shapes = {name: tuple(p.shape) for name, p in flux.named_parameters()}
    records = {record.module: record for record in read_lora(TURBO, shapes).records}
    linears = [name for name, layer in flux.named_modules() if isinstance(layer, nn.Linear)]
    down = {name: records[name].factors["down"].float().to(device) for name in linears}
    up = {name: records[name].factors["up"].float().to(device) * records[name].scale for name in linears}
    return Student(flux, down, up)


def called(flux: Flux, weights: dict[str, Tensor], given: tuple[Tensor, ...]) -> Tensor:
    """The model with other weights; a function of ours, as the compiler does not begin with one of torch's."""
    return functional_call(flux, weights, given)


class TurboTask:
    """`part` is that of PARTS which is learned."""

    def __init__(self, shop: Workshop, student: Student, data: Trajectories, part: str) -> None:
        self.shop, self.student, self.data, self.part = shop, student, data, part
        self.sigmas = torch.tensor(levels(STEPS)).to(shop.device)
        self.call: Callable[..., Tensor] = called

    def compile_(self, on: bool) -> None:
        self.call = torch.compile(called, dynamic=False) if on else called

    def loss(self) -> Tensor:
        weights, device = self.student.weights(), self.shop.device

        def model(*given: Tensor) -> Tensor:
            return self.call(self.student.flux, weights, given)

        count = self.shop.sizes.single_steps if self.part == "single steps" else self.shop.sizes.paths
        rows = torch.randint(len(self.data), (count,), device=device)
        if self.part == "single steps":
            places = torch.randint(STEPS, (count,), device=device)
            return robust(single_steps(model, self.data, rows, places, self.sigmas)).mean()
        errors = robust(own_path(model, self.data, rows)).mean(dim=1)
        return errors[-1] + ON_THE_WAY * errors[:-1].mean()


@torch.no_grad()
def teach(shop: Workshop, deadline: Deadline) -> Trajectories:
    """What the best model does in many steps, for captions of the training: as many as the time allows."""
    found, piece = [], min(1024, shop.sizes.trajectories)
    while sum(map(len, found)) < shop.sizes.trajectories and (deadline.left > 0 or not found):
        rows = shop.catalogue.rows[shop.catalogue.draw(piece)]
        text = Conditioning(*shop.bundle.features(*shop.captions.tokens(shop.captions.random(rows))))
        guidance = torch.full((piece,), GUIDANCE, device=shop.device)
        guidance[piece // 2 :].uniform_(*RANGE)
        noise = torch.randn(piece, turbo.TOKENS, turbo.CHANNELS, device=shop.device)
        states = [noise]
        for i, x in enumerate(flow(shop.bundle.flux, noise, text, guidance, levels(FINE)), start=1):
            if i % (FINE // STEPS) == 0:
                states.append(x)
        found.append(Trajectories(*text, guidance, torch.stack(states, dim=1)))
        found[-1].states[0, 0, 0, 0].item()  # the clock runs with the device
    names = [field.name for field in fields(Trajectories)]
    return Trajectories(*(torch.cat([getattr(one, name) for one in found]) for name in names))


@dataclass
class Bench:
    """Captions and noise to choose by, and what the model draws for them in many steps."""

    shop: Workshop

    def __post_init__(self) -> None:
        self.cases = choosing_cases(self.shop.world, self.shop.sizes.choosing, self.shop.sizes.asked)
        self.text = texts_of(self.shop.bundle, self.cases)
        self.noise = noise_of(len(self.cases), self.shop.device, NOISE)
        self.many = self.pictures(self.shop.bundle.flux, FINE)

    def pictures(self, flux: Callable[..., Tensor], steps: int) -> Tensor:
        return self.shop.pictures(self.shop.draw(flux, self.text, self.noise, steps))

    def outcome(self, student: Student | None) -> Outcome:
        """In STEPS steps, with or without a LoRA: right emoji, and dB to many steps without."""
        flux = self.shop.bundle.flux if student is None else student.merged()
        with torch.no_grad():
            pictures = self.pictures(flux, STEPS)
        return Outcome(self.shop.judged(self.cases, pictures).right, psnr(pictures, self.many).cpu())


def improve_turbo(shop: Workshop, deadline: Deadline) -> dict[str, object]:
    """A LoRA below OUT, and whether it is better than the shipped one for the best model so far."""
    flux, bench = shop.bundle.flux, Bench(shop)
    alone, begin = bench.outcome(None), deadline.spent
    shipped = bench.outcome(shipped_student(flux))
    say(turbo="shipped", **shipped.figures(), without=alone.figures())
    check = 1.5 * (deadline.spent - begin)
    with products_in_tf32():
        data = teach(shop, deadline.within(TEACHING * deadline.left))
        student, courses = shipped_student(flux), {}
        for tensor in student.parameters:
            tensor.requires_grad_()
        until = deadline.left - check
        for i, (part, (share, rate)) in enumerate(PARTS.items()):
            task = TurboTask(shop, student, data, part)
            learned = Learned(student.parameters, weight_decay=0.0)
            seconds = share * until if i == 0 else deadline.left - check
            courses[part] = learn(
                Stepper(task, learned, shop.device), Rates(rate, 30, 0.1), deadline.within(seconds), shop.sizes.least
            )
    candidate = student.rounded()
    found = compare(shipped, bench.outcome(candidate))
    write(shop, candidate)
    return found | dict(without=alone.figures(), trajectories=len(data)) | figures_of(courses)


def figures_of(courses: dict[str, Course]) -> dict[str, object]:
    return {name: course.figures() for name, course in courses.items()}


def write(shop: Workshop, student: Student) -> None:
    factors = {name: Factors(student.down[name].cpu(), student.up[name].cpu()) for name in student.down}
    path = shop.out / "candidate/loras/turbo.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(path, kohya(factors, {}), "bf16", METADATA, force=True)
