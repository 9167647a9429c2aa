"""torchao: `quantize_` with one of its configurations."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    from torchao import quantization

    rows, columns = given["weight"].shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=dtype, device=device))
    model[0].weight.copy_(given["weight"])
    quantization.quantize_(model, getattr(quantization, how)())
    weight = model[0].weight
    names, _ = weight.__tensor_flatten__()
    return model, sum(getattr(weight, name).nbytes for name in names)
