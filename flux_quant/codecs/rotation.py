"""An orthonormal rotation within groups of input channels, so that no single channel decides an 8-bit scale.

y = x R and V = W R give y V^T = x W^T, and an outlier of x is spread over its group: with one channel at 60 times the
others, int8 steps shrink by about sqrt(group). R is a Hadamard matrix over sqrt(group), applied as a butterfly.

Which Hadamard matrix matters. Sylvester's, [[1, 1], [1, -1]] to the power, has a column of ones: the mean of a group
becomes one large number, and activations behind GELU or SiLU have a mean. Ours is the power of the regular matrix
J / 2 - I of order 4 (J: ones): every row and column sums to 1, so a constant group stays as it is. It is symmetric,
hence its own inverse, and one stage is cheaper than two of Sylvester's: half the sum of four, minus each. Groups are
powers of four for that reason; 0 and 1 mean no rotation. Measured: `benchmarks/results/*/*-eight_bit.json`.
"""

import torch
from torch import Tensor

GROUPS = (1, 4, 16, 64, 256)  # powers of 4 up to the largest that was measured
DEFAULT = 256


def group_for(channels: int, wish: int = DEFAULT) -> int:
    """The largest group up to `wish` that divides `channels`; 1 where none does."""
    return max(group for group in GROUPS if group <= max(wish, 1) and channels % group == 0)


def check_group(channels: int, group: int) -> int:
    """`group` with 0 as 1. ValueError unless it is a power of four up to 256 that divides `channels`."""
    group = group or 1
    if group not in GROUPS:
        raise ValueError(f"rotation group {group}: use one of 0 (none), {', '.join(map(str, GROUPS))}")
    if channels % group:
        raise ValueError(
            f"{channels} channels are not a multiple of the rotation group {group}; use {group_for(channels)}"
        )
    return group


def rotate(x: Tensor, group: int) -> Tensor:
    """x (..., K) -> x R (..., K) float32. Twice gives x again."""
    group = check_group(x.shape[-1], group)
    y = x.float()
    step = 1
    while step < group:
        four = y.reshape(*x.shape[:-1], x.shape[-1] // (4 * step), 4, step)
        y = 0.5 * four.sum(dim=-2, keepdim=True) - four
        step *= 4
    return y.reshape(x.shape)


def matrix(group: int) -> Tensor:
    """R (group, group) float32, for groups in GROUPS."""
    return rotate(torch.eye(group), group)
