"""One model at work for the judges: its velocities at given states, and its own way from noise to latents.

Letters: N prompts, K states that are looked at, S tokens, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux_quant.drawing.resources import release
from flux_quant.drawing.sampling import Drawing, StepState, denoise, model_inputs, modulation_rows
from flux_quant.linear import QuantLinear
from flux_quant.model import Flux, pack_latents
from flux_quant.modulation import HoistedModulation
from flux_quant.runtime import Whole, hoisted_globs, prepare
from flux_quant.streaming import BlockStreamer, StreamPlan, block_bytes, rings_for
from flux_quant.streaming.device import StreamDevice

ROOM = 4e9  # bytes beside the weights, for activations in float32


@dataclass(frozen=True)
class Outcome:
    """What one model did, in float32 on the CPU; without a way of its own it was asked at given states alone."""

    velocities: Tensor  # (K, N, S, C)
    way: Tensor | None = None  # (steps, N, S, C), after every step

    @property
    def latents(self) -> Tensor:
        return self.way[-1]

    def __getitem__(self, rows: tuple[Sequence[int], int]) -> "Outcome":
        """Some of the states, and the first prompts."""
        states, prompts = rows
        return Outcome(self.velocities[list(states), :prompts], None if self.way is None else self.way[:, :prompts])


def joined(outcomes: Sequence[Outcome]) -> Outcome:
    """Of prompts that were drawn one after the other."""
    free = outcomes[0].way is not None
    way = torch.cat([outcome.way for outcome in outcomes], dim=1) if free else None
    return Outcome(torch.cat([outcome.velocities for outcome in outcomes], dim=1), way)


def walk(model: Flux, drawing: Drawing, dtype: torch.dtype = torch.float32) -> Tensor:
    """(steps, N, S, C): the latents after every step of the model's own way."""
    way: list[Tensor] = []

    def keep(state: StepState) -> None:
        way.append(pack_latents(state.latents).cpu())

    denoise(model, drawing, dtype, callback=keep)
    return torch.stack(way)


@torch.no_grad()
def velocities(
    model: Flux, drawing: Drawing, way: Tensor, steps: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """(K, N, S, C): what the model answers at the beginning of those steps of `way` (steps, N, S, C).

    Teacher-forced: every model that is compared is asked at the same latents and noise levels, so that errors do not
    add up over the steps.
    """
    device = drawing.noise.device
    rows = modulation_rows(model, drawing, HoistedModulation(model), device, dtype)
    states = [way[step - 1].to(device) if step else drawing.noise.float() for step in steps]
    return torch.stack(
        [
            model(**model_inputs(drawing, x, drawing.text, rows[step], dtype))[:, : x.shape[1]].float().cpu()
            for step, x in zip(steps, states, strict=True)
        ]
    )


def watched(steps: int, count: int) -> tuple[int, ...]:
    """`count` of the steps at equal distances, the first and the last among them."""
    return tuple(dict.fromkeys(round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)))


def bytes_of(model: nn.Module) -> int:
    return sum(part.nbytes for layer in model.modules() if isinstance(layer, QuantLinear) for part in layer.parts)


def placed(model: Flux, device: torch.device, compute: str) -> AbstractContextManager[object]:
    """The model, ready to run in `compute`; block by block through two slots where the device cannot hold it whole."""
    release(device)  # what the model before this one held
    prepare(model, device, compute)
    if device.type == "cuda" and bytes_of(model) + ROOM > torch.cuda.mem_get_info(device)[0]:
        return streamed(model, device)
    return Whole(model, device)


@contextmanager
def streamed(model: Flux, device: torch.device | StreamDevice) -> Iterator[None]:
    names = [f"double_blocks.{i}" for i in range(len(model.double_blocks))]
    names += [f"single_blocks.{i}" for i in range(len(model.single_blocks))]
    sizes, _ = block_bytes(model, names, exclude=hoisted_globs(model))
    plan = StreamPlan(tuple(names), sizes, frozenset(), rings_for(sizes))
    with BlockStreamer(model, plan, device, exclude=hoisted_globs(model)):
        yield
