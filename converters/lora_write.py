"""LoRA files as trainers write them: kohya's, with one pair of factors for a fused module, and diffusers' (PEFT).

Both are given modules in BFL names with their factors, and alphas are 1 : 1 with the ranks, so that every reader takes
a scale of 1. In diffusers' names a fused module becomes its parts, which share the first factor, and the halves of the
last modulation change places.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flux_quant.arch import BLOCK
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.layouts import KEY_MAP, SWAPPED_HALVES

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
KOHYA_PREFIX, PEFT_PREFIX = "lora_unet_", "transformer."


class Factors(NamedTuple):
    """down (r, K), up (N, r): the change is up @ down."""

    down: Tensor
    up: Tensor


def kohya(changes: Mapping[str, Factors], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """extras: changes of biases and of norm scales, by the names of those tensors."""
    tensors = {}
    for module, (down, up) in changes.items():
        name = KOHYA_PREFIX + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
    for tensor, change in extras.items():
        module, _, kind = tensor.rpartition(".")
        end = "diff_b" if kind == "bias" else "w_norm"
        tensors[f"{KOHYA_PREFIX}{module.replace('.', '_')}.{end}"] = change
    return tensors


def peft(changes: Mapping[str, Factors], hidden: int) -> dict[str, Tensor]:
    """hidden: the model's width, by which rows of fused modules are told apart."""
    tensors = {}
    for module, (down, up) in changes.items():
        number = BLOCK.search(module)
        index = number[0].rpartition(".")[2] if number else ""
        pattern = module.replace(f"_blocks.{index}.", "_blocks.{}.", 1) if number else module
        parts = KEY_MAP[pattern]
        if module == SWAPPED_HALVES:
            up = torch.cat(up.chunk(2)[::-1])
        for i, part in enumerate(parts):
            rows = slice(i * hidden, None if i == len(parts) - 1 else (i + 1) * hidden)
            name = PEFT_PREFIX + part.format(index)
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up[rows]}
    return tensors


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], dtype: str, metadata: Mapping[str, str], force: bool = False
) -> None:
    """A safetensors file; alphas stay float32. UserError for another suffix, or if the file exists."""
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path}: a LoRA is written as .safetensors")
    kept = {name: "f32" if name.endswith(".alpha") else dtype for name in tensors}
    infos = [TensorInfo(name, tuple(tensor.shape), kept[name]) for name, tensor in tensors.items()]
    with create_checkpoint(path, infos, metadata, force) as writer:
        for name, tensor in tensors.items():
            writer.write(name, (tensor.detach().to("cpu", DTYPES[kept[name]]).contiguous(),))
