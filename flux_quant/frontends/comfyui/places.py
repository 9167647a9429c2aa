"""Where tokens lie: the ids of latents that are drawn, and of pictures that Kontext sees beside them.

As comfy/ldm/flux/model.py places them, which differs from BFL's own for more than one picture. Imports no ComfyUI.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

GRID = 2  # latents on a token's side

Place = tuple[float, int, int]  # first axis, and how far down and right it lies, in latents


def token_ids(
    height: int,
    width: int,
    index: float = 0,
    down: int = 0,
    right: int = 0,
    rope: Mapping[str, float] | None = None,
) -> Tensor:
    """(tokens, 3) float32: (index, row, column) of a picture of height x width latents.

    rope: scale_y, shift_y, scale_x, shift_x, shift_t, as the node ScaleROPE sets them.
    """
    rope = rope or {}
    axes = []
    for name, length, offset in (("y", height, down), ("x", width, right)):
        count, first = (length + 1) // GRID, (offset + 1) // GRID + rope.get(f"shift_{name}", 0.0)
        last = (count - 1) * rope.get(f"scale_{name}", 1.0) + first
        axes.append(torch.linspace(first, last, steps=count))
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.full_like(rows, index + rope.get("shift_t", 0.0)), rows, columns], dim=-1).flatten(0, 1)


def reference_places(drawn: tuple[int, int], references: Sequence[Tensor], method: str) -> Iterator[Place]:
    """Of every picture (B, C, h, w), by the method that FluxKontextMultiReferenceLatentMethod names.

    offset: beside each other on a second layer; index: on layers of their own; uxo: diagonally behind what is drawn.
    """
    height = width = 0
    corner = [(side + 1) // GRID * GRID for side in drawn]
    for number, reference in enumerate(references, start=1):
        h, w = reference.shape[-2:]
        if method == "index":
            yield number, 0, 0
        elif method == "uxo":
            yield 0, corner[0] + height, corner[1] + width
            height, width = height + h, width + w
        else:
            down, right = (0, width) if h + height > w + width else (height, 0)
            yield 1, down, right
            height, width = max(height, h + down), max(width, w + right)
