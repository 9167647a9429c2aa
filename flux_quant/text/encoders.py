"""T5 and CLIP-L run over packed weights, on the CPU or another device, and are gone when they have run.

T5's hidden states pass 65504, so its residual stream is float32, or bfloat16 where that is wished for; never float16.
Its products may be computed in less than the residual stream has. The table of token vectors stays on the CPU.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_quant.converters.component import Component
from flux_quant.converters.lora_math import Adapters
from flux_quant.converters.lora_names import CLIP_L, T5
from flux_quant.errors import UserError
from flux_quant.loading import load_clip, open_t5
from flux_quant.lora import apply_

if TYPE_CHECKING:
    from transformers import T5EncoderModel

Attach = Callable[[nn.ModuleList, torch.device], AbstractContextManager]

PRECISIONS = {  # dtypes of the residual stream and of the products
    "float32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}
OWN_MEMORY = 2_000_000_000  # bytes that a process needs beside the encoder's file: libraries and activations


@dataclass(frozen=True)
class Placement:
    """Where T5 runs, and in which of PRECISIONS. CLIP-L always runs on the CPU in float32.

    at_once: prompts per pass; more of them read the weights less often, and round differently.
    ram_budget: bytes of this process that should not be exceeded; where the mapped file would do that, the pages of
    every block are given back after its use.
    attach: what brings the blocks to the device while they run, instead of moving all of them. Called with the list of
    blocks and the device; leaving its context undoes it.
    """

    device: torch.device | str = "cpu"
    precision: str = "float32"
    at_once: int = 1
    ram_budget: int | None = None
    attach: Attach | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"T5 in {self.precision}: choose one of {', '.join(PRECISIONS)}; it overflows in float16")


@torch.no_grad()
def t5_states(path: Path, ids: Tensor, placement: Placement = Placement(), loras: Adapters = ()) -> Tensor:
    """ids (B, T) -> states (B, T, context) on the CPU, in the dtype of the residual stream."""
    residual, products = PRECISIONS[placement.precision]
    device = torch.device(placement.device)
    model, reader = open_t5(path)
    apply_(model, loras, T5, products)
    set_products(model, products)
    with reader, placed(model, device, placement.attach), released(model, reader, placement.ram_budget):
        passes = []
        for some in ids.split(placement.at_once):
            vectors = model.shared(some).to(device, residual)
            passes.append(model.encoder(inputs_embeds=vectors).last_hidden_state.to("cpu", residual))
    del model, reader, vectors
    give_back()
    return torch.cat(passes)


@torch.no_grad()
def clip_states(path: Path, ids: Tensor, end_of_text: int, loras: Adapters = ()) -> Tensor:
    """ids (B, T) -> the state of the first end token (B, pooled) float32, prompt after prompt."""
    model = load_clip(path, end_of_text)
    apply_(model, loras, CLIP_L, torch.float32)
    return torch.cat([model(one).pooler_output for one in ids.split(1)])


def give_back() -> None:
    """Freed memory that glibc keeps for later goes back to the system: 350 MB of activations after T5-XXL.

    Other C libraries have no such function, and do it by themselves.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Cast(nn.Module):
    """A norm or a table whose output goes on in another dtype."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).to(self.dtype)


def set_products(model: "T5EncoderModel", dtype: torch.dtype) -> None:
    """Norms compute in float32 and hand on this dtype; sums with the residual stream have the residual stream's."""
    if dtype == torch.float32:
        return
    for block in model.encoder.block:
        for layer in block.layer:
            layer.layer_norm = Cast(layer.layer_norm, dtype)
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_bias = Cast(attention.relative_attention_bias, dtype)


@contextmanager
def placed(model: "T5EncoderModel", device: torch.device, attach: Attach | None) -> Iterator[None]:
    """The last norm on the device, and the blocks there or attached to something that brings them."""
    model.encoder.final_layer_norm.to(device)
    if attach is None:
        model.encoder.block.to(device)
        yield
    else:
        with attach(model.encoder.block, device):
            yield


@contextmanager
def released(model: "T5EncoderModel", reader: Component, budget: int | None) -> Iterator[None]:
    """Under a budget that the whole file does not fit, a block's pages leave the process when it has run."""
    if budget is None or sum(map(reader.nbytes, reader.tensors)) + OWN_MEMORY <= budget:
        yield
        return

    def forgetting(prefix: str) -> Callable[..., None]:
        names = [name for name in reader.tensors if name.startswith(prefix)]

        def hook(*_: object) -> None:
            for name in names:
                reader.forget(name)

        return hook

    blocks = enumerate(model.encoder.block)
    handles = [block.register_forward_hook(forgetting(f"encoder.block.{i}.")) for i, block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
