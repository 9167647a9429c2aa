"""The reference, the floor below which nothing can be told apart, and every format against them: as rows.

One format's file exists at a time, in a temporary folder (TMPDIR). Models are mapped from their files, so that a block
exchanged for the scan costs no memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux_quant.benchmarks import metrics
from flux_quant.benchmarks.bench.record import Row, Scalar
from flux_quant.benchmarks.quality import figures
from flux_quant.benchmarks.quality.prompts import SHIPPED
from flux_quant.benchmarks.quality.retrieval import Judge, open_judge
from flux_quant.benchmarks.quality.runs import Outcome, joined, placed, velocities, walk, watched
from flux_quant.benchmarks.quality.subject import Subject
from flux_quant.benchmarks.quality.weights import weight_figures
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run as convert
from flux_quant.converters.plan import make_plan
from flux_quant.drawing.vae import LATENT_SCALE, LATENT_SHIFT, decode
from flux_quant.loading import load_flux, load_vae
from flux_quant.model import Flux, unpack_latents

WEIGHTS = "weight SNR is the error of the weights alone and says nothing of pictures"
SMALL = 256  # pixels of a side up to which pictures are decoded together


@dataclass(frozen=True)
class Way:
    """How the BF16 model, or a converted one, is run."""

    format: str = "bf16"
    compute: str = "16-bit"  # what the products of the blocks multiply, see `linear.set_compute_`
    activations: str = "float32"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.activations)


@contextmanager
def plain_attention() -> Iterator[None]:
    """torch's attention written out in matrix products, instead of its own choice."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def other_threads() -> Iterator[None]:
    """Half as many threads, or two instead of one: sums are cut into other pieces."""
    count = torch.get_num_threads()
    torch.set_num_threads(count // 2 or 1 if count > 1 else 2)
    try:
        yield
    finally:
        torch.set_num_threads(count)


FLOORS: dict[str, Callable[[], object]] = {"attention MATH": plain_attention, "other threads": other_threads}


class Study:
    """Of one subject. What is costly is made when it is first asked for, and kept."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.kept: tuple[str, Path] | None = None  # the format that has been converted to, and its file

    @property
    def steps(self) -> tuple[int, ...]:
        """At whose beginning velocities are compared."""
        return watched(self.subject.setting.steps, self.subject.setting.states)

    @cached_property
    def reference(self) -> Outcome:
        """Of the file as it is, with activations in float32. Its way is what all others are asked along."""
        return self.run(self.load(Way()), teacher=None)

    @cached_property
    def pictures(self) -> Tensor:
        return self.decoded(self.reference.latents)

    @cached_property
    def judge(self) -> tuple[Judge | None, str]:
        return open_judge() if self.subject.kind == "shipped" else (None, "")

    @cached_property
    def floors(self) -> dict[str, tuple[dict[str, Scalar], dict[str, list[float]]]]:
        """The reference's model again, its sums in another order: values and samples of each."""
        found, reference = {}, self.reference  # which is not to be made under what is changed
        for name, changed in FLOORS.items():
            self.subject.say(f"noise floor: {name}")
            with changed():
                outcome = self.run(self.load(Way()), reference)
            found[name] = self.compared(outcome, reference)
        return found

    @property
    def floor(self) -> dict[str, Scalar]:
        return figures.worse_of([values for values, _ in self.floors.values()])

    def load(self, way: Way) -> Flux:
        """The subject's own file for bf16 (whatever it is stored in), else the converted one."""
        return load_flux(self.subject.path if way.format == "bf16" else self.converted(way.format))

    def converted(self, name: str) -> Path:
        if self.kept is None or self.kept[0] != name:
            self.forget()
            suffix = "safetensors" if name == "fp8" else "gguf"
            path = Path(self.subject.folder.name) / f"{name}.{suffix}"
            self.subject.say(f"converting to {name}")
            convert(make_plan(Conversion(self.subject.path, path, name, force=True)))
            self.kept = name, path
        return self.kept[1]

    def forget(self) -> None:
        if self.kept is not None:
            self.kept[1].unlink(missing_ok=True)
            self.kept = None

    def close(self) -> None:
        self.kept = None
        self.subject.folder.cleanup()

    def run(
        self,
        model: Flux,
        teacher: Outcome | None,
        way: Way = Way(),
        steps: Sequence[int] | None = None,
        prompts: int | None = None,
    ) -> Outcome:
        """The model's answers at the teacher's states, or at its own; and its own way, where pictures are compared."""
        steps, found, first = self.steps if steps is None else steps, [], 0
        drawings = self.subject.drawings(prompts)
        with placed(model, self.subject.device, way.compute):
            for i, drawing in enumerate(drawings):
                self.subject.say(f"prompts {i + 1} of {len(drawings)}")
                rows = slice(first, first := first + len(drawing.noise))
                own = walk(model, drawing, way.dtype) if teacher is None or self.subject.draws else None
                given = own if teacher is None else teacher.way[:, rows]
                found.append(Outcome(velocities(model, drawing, given, steps, way.dtype), own))
        return joined(found)

    @cached_property
    def vae(self) -> torch.nn.Module:
        return load_vae(self.subject.components.vae).to(self.subject.device)

    def decoded(self, tokens: Tensor) -> Tensor:
        """(N, S, C) -> pictures (N, 3, height, width) in 0-1 on the CPU, in float32."""
        latents = unpack_latents(tokens, *self.subject.requests[0].grid)
        if max(self.subject.setting.size) > SMALL:
            return decode(self.vae, latents)
        with torch.no_grad():
            pictures = self.vae.decode((latents / LATENT_SCALE + LATENT_SHIFT).to(self.subject.device)).sample
        return (pictures.cpu() / 2 + 0.5).clamp(0, 1)

    def compared(
        self, outcome: Outcome, reference: Outcome, steps: Sequence[int] | None = None
    ) -> tuple[dict[str, Scalar], dict[str, list[float]]]:
        """Values and samples of one run at the beginning of those steps, of all or the first prompts."""
        errors = figures.relative_errors(outcome.velocities, reference.velocities)
        samples = {"velocity_error": errors.mean(dim=0).tolist()}
        for step, row in zip(self.steps if steps is None else steps, errors.tolist(), strict=True):
            samples[f"velocity_error_step_{step + 1}"] = row
        if outcome.way is not None and self.subject.draws:
            cosines = figures.cosines(outcome.way, reference.way)
            samples |= {"cosine_last": cosines[-1].tolist(), "cosine_by_step": cosines.mean(dim=1).tolist()}
            found = self.decoded(outcome.latents)
            samples |= pictured(found, self.pictures[: len(found)])
            if self.judge[0] is not None and len(found) == len(self.pictures):  # fewer say too little
                samples["accuracy"] = self.judge[0].right(found, SHIPPED[: len(found)])
        by_step = [name for name in samples if name.startswith("velocity_error_step_")]
        values: dict[str, Scalar] = {}
        for name in (*(name for name in figures.WORSE if name in samples), *by_step):
            values |= figures.summary(name, samples[name], worst=name in figures.WORSE and name != "accuracy")
        return values, samples

    def note(self) -> str:
        """What has to be known to read a row."""
        subject = self.subject
        notes = [WEIGHTS]
        if subject.obstacle:
            notes.append(f"no image figures: {subject.obstacle}")
        elif not subject.draws:
            notes.append("no image figures: on a CPU a large model is compared at given states alone")
        else:
            notes += [metrics.lpips_obstacle(), self.judge[1]]
        return "; ".join(filter(None, notes))

    def floor_row(self, name: str) -> Row:
        values, samples = self.floors[name]
        return Row(values=values, samples=samples, note=self.note())

    def format_row(self, way: Way) -> Row:
        values, samples = self.compared(self.run(self.load(way), self.reference, way), self.reference)
        values |= self.floor
        if way == Way(way.format) != Way():
            values |= weight_figures(self.subject.path, self.converted(way.format))
        if self.judge[0] is not None:
            right = self.judge[0].right(self.pictures, SHIPPED[: len(self.pictures)])
            values["accuracy_reference"] = sum(right) / len(right)
        return Row(values=values, samples=samples, note=self.note())

    def block_row(self, name: str, block: str) -> Row:
        """One block from the converted file, all others as they are; fewer prompts and states than for a format."""
        subject, (prompts, count) = self.subject, self.subject.setting.few
        chosen = watched(len(self.steps), count)
        steps, reference = [self.steps[i] for i in chosen], self.reference[chosen, prompts]
        model = with_block(self.load(Way()), self.load(Way(name)), block)
        outcome = self.run(model, reference, Way(), steps, prompts)
        values, samples = self.compared(outcome, reference, steps)
        shapes = (info.shape for path, info in subject.reader.tensors.items() if path.startswith(f"{block}."))
        values |= self.floor | {"parameters": sum(map(prod, shapes))}
        return Row(values=values, samples=samples, note=self.note())


def pictured(found: Tensor, expected: Tensor) -> dict[str, list[float]]:
    """How alike pictures are, by figure."""
    samples = {"psnr_db": metrics.psnr(found, expected).tolist(), "ssim": metrics.ssim(found, expected).tolist()}
    return samples if metrics.lpips_obstacle() else samples | {"lpips": metrics.lpips(found, expected).tolist()}


def with_block(model: Flux, other: Flux, block: str) -> Flux:
    model.set_submodule(block, other.get_submodule(block))
    return model
