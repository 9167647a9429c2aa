"""As GGUF loaders do it today: a chain of torch operations unpacks the weight at every call; or that chain compiled."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

COMPILED = ", compiled"


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    from flux_quant.benchmarks.kernels import eager_weight
    from flux_quant.formats import FORMATS

    name = how.removesuffix(COMPILED)
    parts = tuple(part.to(device) for part in given["packed"][name])

    def chain(*parts: Tensor) -> Tensor:
        return eager_weight(FORMATS[name], parts, dtype)

    if how.endswith(COMPILED):
        torch._dynamo.reset()  # of the task before
        chain = torch.compile(chain, dynamic=False)
    return lambda x: F.linear(x, chain(*parts)), sum(part.nbytes for part in parts)
