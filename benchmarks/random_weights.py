"""Random weights of any size and format, made where they are used: for measuring, where values only need to be real."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.gguf_io import model_metadata
from flux_quant.converters.writer import create_checkpoint
from flux_quant.formats import FORMATS, IN_MEMORY, QuantFormat
from flux_quant.linear import QuantLinear
from flux_quant.model import Flux

SOURCE_ROWS = 64  # that are packed; larger weights repeat them in a random order
SPREAD = 0.02  # standard deviation, as trained weights have it
DEV = dict(
    in_channels=64, out_channels=64, hidden=3072, head_dim=128, mlp=12288, context=4096, pooled=768, guidance=True
)
DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
PLAIN = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}  # the format of a dtype


def on_device(name: str, device: torch.device) -> QuantFormat:
    """The form in which a file's format is kept on a device: planar on GPUs where that exists."""
    return IN_MEMORY.get(f"{name} planar", FORMATS[name]) if device.type == "cuda" else FORMATS[name]


@cache
def source_parts(fmt: QuantFormat, columns: int) -> tuple[Tensor, ...]:
    weight = torch.randn(SOURCE_ROWS, columns, generator=torch.Generator().manual_seed(columns)) * SPREAD
    return fmt.pack(weight)


def random_parts(fmt: QuantFormat, shape: tuple[int, int], device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """Parts of a weight (N, K): packed Gaussian rows, drawn with repetition."""
    rows = torch.randint(SOURCE_ROWS, shape[:1], generator=torch.Generator().manual_seed(seed)).to(device)
    return tuple(gathered(part.to(device), rows) for part in source_parts(fmt, shape[1]))


def gathered(part: Tensor, rows: Tensor) -> Tensor:
    if part.ndim == 0:
        return part.clone()
    kind = torch.uint8 if part.itemsize == 1 else part.dtype  # there is no FP8 indexing
    return part.view(kind).index_select(0, rows).view(part.dtype)


def random_flux(
    name: str, device: torch.device, dtype: torch.dtype, config: FluxConfig, target: torch.device | None = None
) -> Flux:
    """The engine with its linears in format `name`, those of K that is no multiple of its blocks in `dtype`.

    target: the device whose form the weights are in, where that is not the one they lie on.
    """
    with torch.device("meta"):
        model = Flux(config)
    for seed, (path, layer) in enumerate(list(model.named_modules())):
        if isinstance(layer, nn.Linear):
            shape = tuple(layer.weight.shape)
            fmt = on_device(name, target or device) if FORMATS[name].fits(shape) else FORMATS[PLAIN[dtype]]
            bias = torch.randn(shape[0], device=device, dtype=dtype) * SPREAD
            model.set_submodule(path, QuantLinear.from_parts(fmt, random_parts(fmt, shape, device, seed), bias))
        else:
            for own, parameter in list(layer.named_parameters(recurse=False)):
                value = torch.ones(parameter.shape, device=device, dtype=dtype)
                setattr(layer, own, nn.Parameter(value, requires_grad=False))
    return model.eval()


def write_random(path: Path, config: FluxConfig, name: str) -> None:
    """A file of the engine's tensors in BFL's names: matrices in format `name` where it fits; vectors are ones."""
    with torch.device("meta"):
        shapes = {key: tuple(parameter.shape) for key, parameter in Flux(config).named_parameters()}
    infos = [
        TensorInfo(key, shape, name if len(shape) == 2 and FORMATS[name].fits(shape) else "f32")
        for key, shape in shapes.items()
    ]
    metadata = model_metadata("flux", name) if path.suffix == ".gguf" else {}
    with create_checkpoint(path, infos, metadata, force=True) as writer:
        for seed, info in enumerate(infos):
            if len(info.shape) == 2:
                writer.write(info.name, random_parts(FORMATS[info.format], info.shape, torch.device("cpu"), seed))
            else:
                writer.write(info.name, (torch.ones(info.shape),))
