"""bitsandbytes: LLM.int8() without outliers, and NF4 in blocks of 64."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    import bitsandbytes

    rows, columns = given["weight"].shape
    if how == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.LinearNF4(columns, rows, bias=False, compute_dtype=dtype)
    layer.load_state_dict({"weight": given["weight"].to(dtype)})
    model = nn.Sequential(layer).to(device).eval()
    layer(torch.zeros(1, columns, dtype=dtype, device=device))  # packs its weight when it is first called
    scales = layer.state.SCB if how == "int8" else layer.weight.quant_state.absmax
    return model, layer.weight.nbytes + (0 if scales is None else scales.nbytes)
