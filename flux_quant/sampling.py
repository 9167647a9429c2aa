"""The denoising loop: FLUX.1's schedule (diffusers' flow-matching Euler scheduler) around any velocity model."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flux_quant.model import Flux, image_ids, text_ids

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


def make_scheduler(guided: bool) -> "FlowMatchEulerDiscreteScheduler":
    """As published with FLUX.1 [dev] (guided: shifted by the number of image tokens) and [schnell] (not shifted)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0 if guided else 1.0,
        use_dynamic_shifting=guided,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def schedule(scheduler: "FlowMatchEulerDiscreteScheduler", steps: int, tokens: int) -> Tensor:
    """Set the scheduler to `steps` for `tokens` image tokens; its noise levels (steps,), from 1 down."""
    c = scheduler.config
    slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    mu = c.base_shift + (tokens - c.base_image_seq_len) * slope
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=mu)
    return scheduler.sigmas[:-1]


def no_progress(steps: Iterable[int]) -> Iterable[int]:
    return steps


@torch.no_grad()
def denoise(
    model: Flux,
    noise: Tensor,
    txt: Tensor,
    pooled: Tensor,
    grid: tuple[int, int],
    steps: int,
    guidance: float,
    progress: Callable[[Iterable[int]], Iterable[int]] = no_progress,
) -> Tensor:
    """noise (B, S, C) packed, txt (B, T, context), pooled (B, pooled); grid (rows, columns) of patches -> (B, S, C).

    `progress` wraps the iteration over the steps.
    """
    scheduler = make_scheduler(model.config.guidance)
    sigmas = schedule(scheduler, steps, noise.shape[1])
    batch, device = len(noise), noise.device
    img_ids, txt_ids = image_ids(*grid, device=device), text_ids(txt.shape[1], device=device)
    scale = torch.full((batch,), guidance, device=device) if model.config.guidance else None
    x = noise
    for i in progress(range(steps)):
        velocity = model(x, txt, pooled, sigmas[i].expand(batch).to(device), img_ids, txt_ids, scale)
        x = scheduler.step(velocity, scheduler.timesteps[i], x, return_dict=False)[0]
    return x
