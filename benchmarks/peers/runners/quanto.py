"""optimum-quanto: weights quantized in place, activations left alone.

On CUDA it would compile kernels of its own at their first use, with nvcc, which takes minutes. It runs without them
here, as where there is no compiler: int8 and FP8 weights are unpacked by torch, int4 ones multiplied by torch's kernel.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

COMPILED_AT_RUN_TIME = "quanto_cuda"


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    from optimum import quanto
    from optimum.quanto.library.extensions import extension

    extension._extensions.pop(COMPILED_AT_RUN_TIME, None)
    rows, columns = given["weight"].shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False, dtype=dtype, device=device))
    model[0].weight.copy_(given["weight"])
    quanto.quantize(model, weights=getattr(quanto, how))
    quanto.freeze(model)
    return model, nbytes_of(model[0].weight)


def nbytes_of(weight: Tensor) -> int:
    """Of the tensors within tensors that it keeps."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(nbytes_of(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
