"""A dense linear layer of torch: what there is to win or lose."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    weight = given["weight"].to(device, dtype)
    return lambda x: F.linear(x, weight), weight.nbytes
