"""A small picture of latents without their decoder: one pixel per position, a linear map of its 16 channels.

Rough, but free: a matrix product of 16 x 3. The factors belong to one VAE and say nothing of another's latents, so each
set is kept under the widths of the VAE's layers that it was made for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Widths = tuple[int, ...]  # channels of the VAE's levels, from full resolution down


@dataclass(frozen=True)
class Factors:
    """Latents (16,) as the transformer makes them -> red, green, blue in -1 to 1: rows of the map, what is added."""

    rows: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float]
    source: str


FACTORS: dict[Widths, Factors] = {
    (128, 256, 512, 512): Factors(
        (
            (-0.0346, 0.0244, 0.0681),
            (0.0034, 0.0210, 0.0687),
            (0.0275, -0.0668, -0.0433),
            (-0.0174, 0.0160, 0.0617),
            (0.0859, 0.0721, 0.0329),
            (0.0004, 0.0383, 0.0115),
            (0.0405, 0.0861, 0.0915),
            (-0.0236, -0.0185, -0.0259),
            (-0.0245, 0.0250, 0.1180),
            (0.1008, 0.0755, -0.0421),
            (-0.0515, 0.0201, 0.0011),
            (0.0428, -0.0012, -0.0036),
            (0.0817, 0.0765, 0.0749),
            (-0.1264, -0.0522, -0.1103),
            (-0.0280, -0.0881, -0.0499),
            (-0.1262, -0.0982, -0.0778),
        ),
        (-0.0329, -0.0718, -0.0851),
        "FLUX.1's VAE: ComfyUI, comfy/latent_formats.py, class Flux",
    ),
    (32, 32, 64, 96): Factors(
        (
            (-0.0037, 0.0911, 0.0445),
            (-0.0566, -0.0523, 0.0519),
            (0.0028, -0.029, -0.0038),
            (0.0548, 0.0134, 0.0785),
            (0.1296, -0.0721, -0.0168),
            (0.0441, 0.0058, 0.0473),
            (0.0539, -0.0178, 0.0053),
            (0.0344, -0.0501, -0.0164),
            (-0.18, -0.0662, 0.1762),
            (0.0126, -0.0064, -0.0066),
            (-0.0421, -0.0627, -0.0767),
            (0.0345, -0.0442, 0.028),
            (-0.104, -0.1009, -0.0973),
            (-0.0999, 0.017, -0.0023),
            (-0.0833, 0.0526, 0.0021),
            (-0.0105, 0.0393, 0.0002),
        ),
        (0.431, 0.3754, 0.2413),
        "the bundled model's VAE: fitted by benchmarks/preview_factors.py",
    ),
}


def to_rgb(latents: Tensor, widths: Widths) -> Tensor | None:
    """(B, 16, h, w) -> (B, 3, h, w) float32 in 0-1; None for a VAE of other widths, which has no factors."""
    factors = FACTORS.get(tuple(widths))
    if factors is None:
        return None
    rows, bias = (torch.tensor(values, device=latents.device) for values in (factors.rows, factors.bias))
    rgb = torch.einsum("bchw,cr->brhw", latents.float(), rows) + bias[:, None, None]
    return (rgb / 2 + 0.5).clamp(0, 1)


def fit(latents: Tensor, pictures: Tensor, source: str) -> Factors:
    """Least squares: latents (B, 16, h, w), pictures (B, 3, 8 h, 8 w) in 0-1 that they decode to."""
    small = torch.nn.functional.avg_pool2d(pictures, pictures.shape[-1] // latents.shape[-1]) * 2 - 1
    x, y = (t.movedim(1, -1).flatten(0, 2).double() for t in (latents, small))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1), y).solution
    *rows, bias = (tuple(round(value, 4) for value in row) for row in solution.tolist())
    return Factors(tuple(rows), bias, source)
