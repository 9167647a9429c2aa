"""T5 and CLIP-L as `text_encoder_2=` and `text_encoder=` of pipelines.

    t5 = load_text_encoder("t5-v1_1-xxl-encoder-Q8_0.gguf", vram="8GB")
    pipe = FluxPipeline.from_pretrained("FLUX.1-dev", text_encoder_2=t5)

They are transformers' own models with packed layers inside. `.to(dtype)` chooses the dtype of the products; T5's sums
stay in float32. With a budget of VRAM T5 stays in RAM wherever it is moved, and its blocks pass through the GPU while a
prompt is encoded.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.component import components, describe
from flux_quant.errors import UserError
from flux_quant.frontends.diffusers import Log, memory_of
from flux_quant.frontends.plugins import attach_quantizer_, packed_layers
from flux_quant.generation import choose_device
from flux_quant.loading import load_clip, load_t5, open_t5
from flux_quant.planner import phases
from flux_quant.planner.footprint import TextEncoder, Work
from flux_quant.runtime import Memory, prepare
from flux_quant.text.encoders import placed
from flux_quant.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, T5EncoderModel

KINDS = {"t5": "T5 encoder", "clip": "CLIP-L"}


class StreamedT5(nn.Module):
    """What a T5EncoderModel does otherwise that stays in RAM, wherever it is moved."""

    memory: Memory | None  # where its blocks stream; None: it works on the processor

    @property
    def device(self) -> torch.device:
        """Where it was moved to: of what comes in and goes out."""
        return vars(self).get("told", torch.device("cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StreamedT5":
        shown = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        vars(self)["told"] = shown.device
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).dtype), recurse)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: object) -> object:
        """As T5EncoderModel.forward, of ids. Results are where the ids are."""
        place, home = self.memory.place if self.memory else torch.device("cpu"), input_ids.device
        vectors = self.shared(input_ids.cpu()).to(place)
        mask = None if attention_mask is None else attention_mask.to(place)
        try:
            with placed(self, place, lambda blocks, _: self.memory.streaming(blocks)) if self.memory else nullcontext():
                found = self.encoder(inputs_embeds=vectors, attention_mask=mask, **options)
        finally:
            self.encoder.final_layer_norm._apply(lambda tensor: tensor.cpu())
        return type(found)(**{name: moved(value, home) for name, value in found.items()})


def moved(value: object, device: torch.device) -> object:
    if isinstance(value, tuple):
        return tuple(moved(one, device) for one in value)
    return value.to(device) if isinstance(value, Tensor) else value


@cache
def streamed_t5() -> "type[T5EncoderModel]":
    """It is saved as what it is one of."""
    from transformers import T5EncoderModel

    return type("T5EncoderModel", (StreamedT5, T5EncoderModel), {"__module__": T5EncoderModel.__module__})


def load_text_encoder(
    path: str | Path,
    kind: str | None = None,
    vram: str | None = None,
    ram: str | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    tokenizers: str | Path | None = None,
    log: Log = lambda line: None,
) -> "PreTrainedModel":
    """A T5EncoderModel or a CLIPTextModel from a file of any naming and format that can be read.

    kind: "t5" or "clip", where the file holds both. vram, ram, device, dtype, log: as in `frontends.diffusers.load`; a
    T5 that does not fit the budget, or is faster on the processor, stays there. tokenizers: a folder with CLIP's
    tokenizer, where that ends prompts with another token than CLIP-L's. UserError for a file that holds neither.
    """
    kind = kind_of(path, kind)
    place, usual = choose_device(device)
    dtype = usual if dtype is None else dtype
    if kind == "clip":
        end = None if tokenizers is None else load_tokenizer(Path(tokenizers), "clip").eos_token_id
        model = load_clip(path, end)
    else:
        memory = memory_of(place, vram, ram, log)
        model = load_t5(path) if memory is None else t5_for(path, memory)
    attach_quantizer_(model, Counter(packed_layers(model).values()).most_common(1)[0][0])
    return nn.Module.to(model, dtype)


def t5_for(path: str | Path, memory: Memory) -> "T5EncoderModel":
    """Streamed, or on the processor if a plan for the budget leaves T5 there."""
    model, reader = open_t5(path, streamed_t5())
    encoder = TextEncoder.of({name: (info.shape, info.format) for name, info in reader.tensors.items()})
    phase = phases.text(encoder, Work(), memory.machine, memory.budget, memory.host)
    memory.log(phase.how)
    if phase.parts:
        prepare(model, memory.place, "16-bit", memory.host.pinned)
    model.memory = memory if phase.parts else None
    return model


def kind_of(path: str | Path, wanted: str | None) -> str:
    """What the file holds of KINDS."""
    if wanted is not None and wanted not in KINDS:
        raise UserError(f"kind {wanted} is unknown; choose one of {', '.join(KINDS)}")
    with open_checkpoint(path) as reader:
        found = components(reader)
        families = {component.family.name for component in found}
        held = [kind for kind, family in KINDS.items() if family in families and wanted in (None, kind)]
        if len(held) == 1:
            return held[0]
        if held:
            raise UserError(f'{path} holds both text encoders; say kind="t5" or kind="clip"')
        needed = KINDS[wanted] if wanted else " or ".join(KINDS.values())
        raise UserError(f"{path} is {describe(reader, found)}; {needed} is needed here")
