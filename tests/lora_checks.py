"""LoRA files for the tests: written from tensors, read back, fused into a model, compared."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_math import fused, new_shape, touches
from flux_quant.converters.lora_records import Lora

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
HIDDEN = 256
MODULE, KEY = "double_blocks.1.img_mlp.0", "lora_unet_double_blocks_1_img_mlp_0"
FINAL, OUT = "final_layer.adaLN_modulation.1", "transformer.norm_out.linear"  # (shift, scale) and (scale, shift)


def floats(model: State) -> State:
    return {name: tensor.float() for name, tensor in model.items()}


def shapes_of(model: State) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.items()}


def reader(folder: Path, shapes: Shapes) -> Callable[..., Lora]:
    """Tensors -> the LoRA that is read from a file with them. No key is ever lost."""

    def read(tensors: State, metadata: dict[str, str] | None = None, unused: list[str] | None = None) -> Lora:
        path = folder / "lora.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
        lora = read_lora(path, shapes)
        used = [key for record in lora.records for key in record.sources]
        assert sorted({*used, *lora.unused}) == sorted(tensors) and not {*used} & {*lora.unused}
        assert sorted(lora.unused) == sorted(unused or [])
        return lora

    return read


def fuse(model: State, *adapters: tuple[Lora, float]) -> State:
    """All tensors through `fused`, which must not write into them."""
    after = {}
    for name, tensor in model.items():
        before = tensor.clone() if touches(name, adapters) else tensor
        after[name] = fused(name, tensor, adapters)
        assert torch.equal(tensor, before) and (after[name] is tensor) == (before is tensor)
        assert tuple(after[name].shape) == new_shape(name, tuple(tensor.shape), adapters)
        assert after[name].dtype == torch.float32
    return after


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if found[name] is not tensor:
            assert found[name].shape == tensor.shape, name
            worst = (found[name] - tensor).abs().max()
            assert worst <= 2e-5, f"{name} is wrong by {worst}"


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape) * 31)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def product(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    return up.double() @ down.double() * scale


def plus(model: State, changes: State) -> State:
    """The model with some tensors changed, in double."""
    assert changes.keys() <= model.keys()
    return model | {name: model[name].double() + change for name, change in changes.items()}
