"""The denoising loop: flow-matching Euler steps around the engine, in float32 whatever the model computes in.

The model says v = noise - x0 at x = sigma noise + (1 - sigma) x0; a step to the next level is x += (next - sigma) v.
Nothing in the loop waits for the device but the look back, one step late, whether all values are still finite.

Letters: B pictures of one size, S image tokens, C channels of a token, T text tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from flux_quant.controlnet import Control, Controls
from flux_quant.drawing import schedules
from flux_quant.errors import UserError
from flux_quant.lora import at_step_, steps_by_strength
from flux_quant.model import Flux, Residuals, StepModulation, image_ids, text_ids, unpack_latents
from flux_quant.modulation import Call, HoistedModulation

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


class Conditioning(NamedTuple):
    """txt (B, T, context) of T5, pooled (B, pooled) of CLIP."""

    txt: Tensor
    pooled: Tensor


class Reference(NamedTuple):
    """A picture that Kontext sees: clean tokens (1 or B, R, C) behind the drawn ones, and their ids (R, 3)."""

    tokens: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Drawing:
    """What is drawn, and by which steps; all tensors on one device."""

    noise: Tensor  # (B, S, C) packed
    text: Conditioning
    grid: tuple[int, int]  # rows and columns of tokens
    levels: Sequence[float]  # from `schedules`: one more than steps, the last is 0
    guidance: float | Sequence[float] = 3.5  # of all steps, or of each; for guided models
    negative: Conditioning | None = None
    cfg: float = 1.0  # scale of true classifier-free guidance, away from `negative`; 1 is none
    cfg_range: tuple[float, float] = (0.0, 1.0)  # where it acts, in parts of the steps
    known: Tensor | None = None  # (1 or B, S, C) clean latents of a given picture
    mask: Tensor | None = None  # (1 or B, S, C): 1 where that picture is drawn anew, 0 where it is kept
    controls: Sequence[Control] = ()
    beside: Tensor | None = None  # (1 or B, S, channels) that Fill, Canny and Depth read beside the latents
    reference: Reference | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.known is None:
            raise ValueError("a mask needs the latents of the picture that it keeps")
        if self.controls and self.reference is not None:
            raise ValueError("ControlNets have nothing to say of the tokens of a reference")
        if not isinstance(self.guidance, float | int) and len(self.guidance) != self.steps:
            raise ValueError(f"{len(self.guidance)} values of guidance for {self.steps} steps")

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def passes(self, step: int) -> list[Conditioning]:
        """With what the model is asked in a step: the text, and the negative one where it acts."""
        first, last = self.cfg_range
        acts = self.negative is not None and self.cfg > 1 and first <= step / self.steps < last
        return [self.text, self.negative] if acts else [self.text]

    def guidance_at(self, step: int) -> float:
        return float(self.guidance if isinstance(self.guidance, float | int) else self.guidance[step])


@dataclass(frozen=True)
class StepState:
    """What a callback sees after a step."""

    step: int  # from 0
    steps: int
    sigma: float  # the level that the step began at
    next_sigma: float
    latents: Tensor  # (B, channels, height / 8, width / 8) float32, after the step
    estimate: Tensor  # the same shape: what the model takes the clean latents to be


Callback = Callable[[StepState], None]
Inputs = Mapping[str, Tensor | StepModulation | Residuals | None]  # of one forward pass, by the engine's names


def no_progress(steps: Iterable[int]) -> Iterable[int]:
    return steps


def steering_calls(drawing: Drawing, guided: bool) -> list[Call]:
    """Everything that steers the model in this drawing: step by step, the negative text after the other."""
    return [call for calls in calls_of_steps(drawing, guided) for call in calls]


def calls_of_steps(drawing: Drawing, guided: bool) -> list[list[Call]]:
    batch = len(drawing.noise)
    return [
        [
            Call(
                torch.full((batch,), drawing.levels[step]),
                conditioning.pooled.expand(batch, -1),
                torch.full((batch,), drawing.guidance_at(step)) if guided else None,
            )
            for conditioning in drawing.passes(step)
        ]
        for step in range(drawing.steps)
    ]


def modulation_rows(
    model: Flux, drawing: Drawing, modulation: HoistedModulation, device: torch.device | str, dtype: torch.dtype
) -> list[StepModulation]:
    """Of all `steering_calls`. Where LoRAs have other strengths in some steps, these are evaluated by themselves."""
    calls, rows = calls_of_steps(drawing, model.config.guidance), {}
    for steps in steps_by_strength(model, drawing.steps):
        at_step_(model, steps[0])
        found = iter(modulation.rows([call for step in steps for call in calls[step]], device, dtype))
        rows |= {step: [next(found) for _ in calls[step]] for step in steps}
    return [row for step in range(drawing.steps) for row in rows[step]]


def controls_of(model: Flux, drawing: Drawing, device: torch.device | str, dtype: torch.dtype) -> Controls:
    """The nets of a drawing, their modulation evaluated. It is kept: a second call costs nothing."""
    return Controls(
        drawing.controls, model.config, lambda guided: calls_of_steps(drawing, guided), torch.device(device), dtype
    )


@torch.no_grad()
def denoise(
    model: Flux,
    drawing: Drawing,
    dtype: torch.dtype = torch.float32,
    modulation: HoistedModulation | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = no_progress,
    callback: Callback | None = None,
) -> Tensor:
    """Clean latents (B, S, C) float32. The model computes in `dtype`.

    `progress` wraps the iteration over the steps. UserError with the step and the module if values are not finite.
    """
    modulation = modulation or HoistedModulation(model)
    device = drawing.noise.device
    rows = iter(modulation_rows(model, drawing, modulation, device, dtype))
    noise, levels = drawing.noise.float(), drawing.levels
    x = noise if drawing.known is None else noised(drawing.known, noise, levels[0])
    with controls_of(model, drawing, device, dtype) as controls:
        watch = Watch(model, drawing, controls)
        for step in progress(range(drawing.steps)):
            at_step_(model, step)
            passes = [
                model_inputs(drawing, x, conditioning, next(rows), dtype) for conditioning in drawing.passes(step)
            ]
            velocity = guided_velocity(
                [
                    model(**inputs, residuals=controls.residuals(step, i, inputs))[:, : x.shape[1]].float()
                    for i, inputs in enumerate(passes)
                ],
                drawing.cfg,
            )
            controls.after(step)
            before, x = x, x + (levels[step + 1] - levels[step]) * velocity
            if drawing.mask is not None:
                x = drawing.mask * x + (1 - drawing.mask) * noised(drawing.known, noise, levels[step + 1])
            watch.after(step, x, passes)
            if callback is not None:
                estimate = before - levels[step] * velocity
                pictures = (unpack_latents(tokens, *drawing.grid) for tokens in (x, estimate))
                callback(StepState(step, drawing.steps, levels[step], levels[step + 1], *pictures))
        watch.finish()
    return x


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    return sigma * noise + (1 - sigma) * clean.float()


def guided_velocity(velocities: list[Tensor], cfg: float) -> Tensor:
    """Of the text alone, or led away from that of the negative text."""
    if len(velocities) == 1:
        return velocities[0]
    positive, negative = velocities
    return negative + cfg * (positive - negative)


def model_inputs(
    drawing: Drawing, x: Tensor, conditioning: Conditioning, rows: StepModulation, dtype: torch.dtype
) -> dict[str, Tensor | StepModulation | None]:
    img, ids = x.to(dtype), image_ids(*drawing.grid, device=x.device)
    if drawing.beside is not None:
        img = torch.cat([img, drawing.beside.to(dtype).expand(len(x), -1, -1)], dim=2)
    if drawing.reference is not None:
        img = torch.cat([img, drawing.reference.tokens.to(dtype).expand(len(x), -1, -1)], dim=1)
        ids = torch.cat([ids, drawing.reference.ids.to(ids)])
    return dict(
        img=img,
        txt=conditioning.txt.to(dtype).expand(len(x), -1, -1),
        pooled=None,
        timestep=None,
        img_ids=ids,
        txt_ids=text_ids(conditioning.txt.shape[1], device=x.device),
        steering=rows,
    )


class Watch:
    """Stops a drawing whose latents are no longer finite. It looks one step back, so that the device never idles."""

    def __init__(self, model: nn.Module, drawing: Drawing, controls: Controls) -> None:
        self.model, self.drawing, self.controls = model, drawing, controls
        self.pending: tuple[int, Tensor, list[Inputs]] | None = None

    def after(self, step: int, x: Tensor, passes: list[Inputs]) -> None:
        finite = x.isfinite().all()
        self.finish()
        self.pending = step, finite, passes

    def finish(self) -> None:
        if self.pending is None:
            return
        step, finite, passes = self.pending
        if finite:
            return
        again = ({**given, "residuals": self.controls.residuals(step, i, given)} for i, given in enumerate(passes))
        found = (first_not_finite(self.model, inputs) for inputs in again)
        where = next((name for name in found if name), "the sum of the step: a second pass shows none")
        levels = self.drawing.levels
        raise UserError(
            f"step {step + 1} of {self.drawing.steps} (from noise level {levels[step]:.4f} to {levels[step + 1]:.4f}) "
            f"gave values that are not finite; the first are in {where}"
        )


def first_not_finite(model: nn.Module, inputs: Inputs) -> str | None:
    """The first input, or the first module in order of work, that has values which are not finite. One more pass."""
    names = {"img": "the latents before it", "txt": "the text", "steering": "the modulation"}
    names["residuals"] = "what ControlNets add"
    for name, value in inputs.items():
        if not all(tensor.isfinite().all() for tensor in tensors_in(value)):
            return names.get(name, name)
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def look(_: nn.Module, __: tuple[object, ...], output: object) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in tensors_in(output)):
                found.append(name)

        return look

    handles = [part.register_forward_hook(hook(name)) for name, part in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def tensors_in(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | Mapping):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(part)


def make_scheduler(guided: bool) -> "FlowMatchEulerDiscreteScheduler":
    """diffusers' own, as published with FLUX.1 [dev] (guided: shifted by the tokens) and [schnell] (not shifted)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if guided else 1.0,
        use_dynamic_shifting=guided,
        base_shift=schedules.BASE_SHIFT,
        max_shift=schedules.MAX_SHIFT,
        base_image_seq_len=schedules.BASE_TOKENS,
        max_image_seq_len=schedules.MAX_TOKENS,
    )
