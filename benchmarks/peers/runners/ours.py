"""flux_quant: packed linear layers, the engine on a file, the converter."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def linear(given: dict, how: str, device: torch.device, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    from flux_quant.formats import FORMATS
    from flux_quant.linear import QuantLinear

    name, _, compute = how.partition(" as ")
    parts = tuple(part.to(device) for part in given["packed"][name])
    layer = QuantLinear.from_parts(FORMATS[name], parts, None)
    if device.type == "cuda":
        layer.repack_()
    if compute and not layer.set_compute_(compute, device):
        raise RuntimeError(f"this device or shape has no products in {compute}")
    return layer, sum(part.nbytes for part in layer.parts)


def step(task: dict) -> Callable[[], dict]:
    from flux_quant.loading import load_flux
    from flux_quant.model import image_ids, pack_latents, text_ids
    from flux_quant.runtime import prepare

    device, dtype = torch.device(task["device"]), getattr(torch, task["dtype"])
    model = load_flux(task["model"])
    prepare(model, device, "16-bit")
    model.to(device, dtype)
    rows, columns = task["height"] // 16, task["width"] // 16
    noise = torch.randn(16, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(task["seed"]))
    config, words = model.config, task["words"]
    img = pack_latents(noise[None]).to(device, dtype)
    txt = torch.zeros(1, words, config.context, device=device, dtype=dtype)
    pooled = torch.zeros(1, config.pooled, device=device, dtype=dtype)
    one = torch.ones(1, device=device)
    ids = image_ids(rows, columns, device), text_ids(words, device)

    def call() -> dict:
        return {"velocity": model(img, txt, pooled, one, *ids, task["guidance"] * one).float()}

    return call


def convert(task: dict) -> Callable[[], None]:
    from flux_quant.converters.conversion import Conversion
    from flux_quant.converters.convert import run
    from flux_quant.converters.plan import make_plan

    files = Path(task["source"]), Path(task["target"])
    asked = Conversion(*files, task["recipe"], force=True, search=task.get("search", True))

    def call() -> None:
        run(make_plan(asked))

    return call
