"""A transformer's packed weights back into an ordinary file, in BFL names."""

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_quant.arch import running_order
from flux_quant.converters import gguf_io
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.linear import QuantLinear
from flux_quant.lora import applied_to

NAME = "diffusion_pytorch_model"  # as diffusers calls the weights in a folder
VECTORS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def save_transformer(engine: nn.Module, folder: Path) -> Path:
    """One file in the folder, in place of what is there by that name -> its path.

    Safetensors where every weight is 8-bit float or wider, GGUF otherwise. UserError for what neither can hold.
    """
    if applied_to(engine):
        raise UserError("LoRAs are on this transformer, and are not saved with it: unload them first")
    weights = packed_weights(engine)
    formats = Counter(name for name, parts in weights.values() if parts[0].ndim > 1)
    plain = all(FORMATS[name].block == 1 for name in formats)
    path = folder / f"{NAME}{'.safetensors' if plain else '.gguf'}"
    if not plain:  # readers of GGUF expect vectors in float32
        weights = {
            name: ("f32", (parts[0].float(),)) if parts[0].ndim < 2 else (fmt, parts)
            for name, (fmt, parts) in weights.items()
        }
    bulk = max(formats, key=lambda name: sum(p[0].nbytes for fmt, p in weights.values() if fmt == name))
    metadata = {} if plain else gguf_io.model_metadata("flux", bulk, bulk)
    names = sorted(weights, key=running_order)
    infos = [TensorInfo(name, shape_of(engine, name, weights[name][1]), weights[name][0]) for name in names]
    with create_checkpoint(path, infos, metadata, force=True) as writer:
        for name in names:
            writer.write(name, weights[name][1])
    return path


def packed_weights(engine: nn.Module) -> dict[str, tuple[str, tuple[Tensor, ...]]]:
    """Name -> format and parts, of every weight in the bytes that files hold."""
    found: dict[str, tuple[str, tuple[Tensor, ...]]] = {}
    for path, layer in engine.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(layer, QuantLinear):
            fmt = layer.fmt
            name = fmt.native or fmt.base or fmt.name
            if name not in FORMATS:
                raise UserError(f"{path}.weight was requantized to {fmt.name}; to save it, load it for 16-bit compute")
            state = layer.state_dict()
            found[f"{prefix}weight"] = name, tuple(state[part.suffix] for part in FORMATS[name].parts)
        for name, tensor in layer.named_parameters(recurse=False):
            found[f"{prefix}{name}"] = VECTORS[tensor.dtype], (tensor.detach(),)
    return found


def shape_of(engine: nn.Module, name: str, parts: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Of the unpacked weight."""
    layer = engine.get_submodule(name.rpartition(".")[0])
    if isinstance(layer, QuantLinear) and name.endswith(".weight"):
        return layer.out_features, layer.in_features
    return tuple(parts[0].shape)
