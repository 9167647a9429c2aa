"""diffusers on GGUF: `from_single_file` with a GGUFQuantizationConfig, and the linear layer that it puts in."""

from collections.abc import Callable

import torch
from torch import Tensor


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    (data,) = given["packed"][how]
    rows, columns = given["weight"].shape
    with torch.device("meta"):
        layer = GGUFLinear(columns, rows, bias=False, compute_dtype=dtype)
    layer.weight = GGUFParameter(data.to(device), quant_type=gguf.GGMLQuantizationType[how.upper()])
    return layer, data.nbytes


def step(task: dict) -> Callable[[], dict]:
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    device, dtype = torch.device(task["device"]), getattr(torch, task["dtype"])
    model = FluxTransformer2DModel.from_single_file(
        task["model"],
        config=task["config"],
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
    ).to(device)
    rows, columns = task["height"] // 16, task["width"] // 16
    noise = torch.randn(1, 16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(task["seed"]))
    img = noise.view(1, 16, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, 64)
    places = torch.zeros(rows, columns, 3)
    places[..., 1] += torch.arange(rows)[:, None]
    places[..., 2] += torch.arange(columns)[None]
    config, words = model.config, task["words"]
    given = dict(
        hidden_states=img,
        encoder_hidden_states=torch.zeros(1, words, config.joint_attention_dim),
        pooled_projections=torch.zeros(1, config.pooled_projection_dim),
        timestep=torch.ones(1),
        img_ids=places.flatten(0, 1),
        txt_ids=torch.zeros(words, 3),
        guidance=torch.full((1,), float(task["guidance"])),
    )
    given = {name: value.to(device, dtype) for name, value in given.items()}
    return lambda: {"velocity": model(**given, return_dict=False)[0].float()}
