"""int8 rows: a weight or activations rotated in groups of channels, with one scale per row.

Codes are symmetric, -127 to 127: there is no zero point. A row with NaN or infinity gets the scale NaN (its codes mean
nothing), so that what is computed from it is NaN.
"""

import torch
from torch import Tensor

from flux_quant.codecs.rotation import rotate

TOP = 127.0
TINY = 1e-30  # rows of smaller magnitudes count as zeros: their inverse scale would overflow


def quantize_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x (M, K) float -> codes of x R (M, K) int8, scale (M, 1) float32; R rotates groups of `group` channels.

    Rounds half to even. The largest magnitude of a row is 127 steps.
    """
    y = rotate(x, group)
    largest = y.abs().amax(dim=1, keepdim=True).clamp(min=TINY) if y.numel() else y.new_full((len(x), 1), TINY)
    sound = largest.isfinite()
    codes = torch.where(sound, (y * (TOP / largest)).round(), 0)
    return codes.to(torch.int8), torch.where(sound, largest / TOP, torch.nan)


def unpack_rows(codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """codes (M, K) int8 of x R, scale (M,) or (M, 1) -> x (M, K) float32, in its own channels again."""
    return rotate(codes.float() * scale.view(-1, 1), group)
