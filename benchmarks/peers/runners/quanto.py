"""optimum-quanto: weights quantized in place, activations left alone."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    from optimum import quanto

    rows, columns = given["weight"].shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=dtype, device=device))
    model[0].weight.copy_(given["weight"])
    quanto.quantize(model, weights=getattr(quanto, how))
    quanto.freeze(model)
    return model, sum(value.nbytes for value in model.state_dict().values() if isinstance(value, Tensor))
