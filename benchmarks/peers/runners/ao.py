"""torchao: `quantize_` with one of its configurations, as it is or compiled, which it is meant to be."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

COMPILED = ", compiled"


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    from torchao import quantization

    rows, columns = given["weight"].shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=dtype, device=device))
    model[0].weight.copy_(given["weight"])
    quantization.quantize_(model, configuration(how.removesuffix(COMPILED)))
    weight = model[0].weight
    if not hasattr(weight, "__tensor_flatten__"):
        raise RuntimeError(f"torchao left a weight of {rows} x {columns} as it was")
    names, _ = weight.__tensor_flatten__()
    nbytes = sum(getattr(weight, name).nbytes for name in names)
    if not how.endswith(COMPILED):
        return model, nbytes
    torch._dynamo.reset()  # of the task before
    return torch.compile(model, dynamic=False), nbytes


def configuration(how: str) -> object:
    """ "Name", or "Name, option" with one of the options below."""
    from torchao import quantization

    name, _, option = how.partition(", ")
    options = {
        "": {},
        "per row": lambda: {"granularity": quantization.PerRow()},
        "per tensor": lambda: {"granularity": quantization.PerTensor()},
        "tile packed": lambda: {"int4_packing_format": "tile_packed_to_4d"},  # torch's own kernels, no more packages
    }
    chosen = options[option]
    return getattr(quantization, name)(**(chosen() if callable(chosen) else chosen))
