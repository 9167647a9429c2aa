"""ComfyUI's CLIP around our text encoders: its tokens in, what its own encoders would give out.

Tokens, weights and the interface are ComfyUI's own; T5 and CLIP-L are opened for prompts that no cache holds and
dropped again, so that nothing of them stays on the device or counts in its memory. T5's file is mapped: its pages are
the system's to keep.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_management as management
import comfy.model_patcher
import comfy.sd
import comfy.text_encoders.flux
import folder_paths
import torch
from torch import Tensor, nn

from flux_quant.configs import clip_config, t5_config
from flux_quant.converters.component import Component, open_component
from flux_quant.converters.lora_names import CLIP_L, T5
from flux_quant.errors import UserError
from flux_quant.frontends.comfyui.patcher import refuse
from flux_quant.frontends.comfyui.seat import AUTO, Loras, memory_for
from flux_quant.loading import shapes_of
from flux_quant.planner.footprint import TextEncoder, Work
from flux_quant.text.encode import finite
from flux_quant.text.encoders import Placement, clip_states, t5_states
from flux_quant.text.identity import identity
from flux_quant.text.prompt_cache import Entry, PromptCache

CPU = torch.device("cpu")
VERSION = 1  # of what the cache holds
PLACES = (AUTO, "cpu", "gpu")

Tokens = Sequence[Sequence[tuple]]  # sections of (token, weight), as ComfyUI's tokenizers give them


@dataclass(frozen=True)
class Files:
    """Both encoders, and what changes them."""

    t5: Path
    clip: Path
    loras: Loras = ()

    def check(self, tokenizer: "comfy.text_encoders.flux.FluxTokenizer") -> None:
        """UserError for files of other models than ComfyUI's tokens are for."""
        rows = t5_config(shapes_of(open_component(self.t5, "T5 encoder")))["vocab_size"]
        words = clip_config(shapes_of(open_component(self.clip, "CLIP-L")))["vocab_size"]
        for path, vocabulary, own in ((self.t5, rows, tokenizer.t5xxl), (self.clip, words, tokenizer.clip_l)):
            if vocabulary <= max(own.tokenizer.get_vocab().values()):
                raise UserError(f"{path} knows {vocabulary} tokens, ComfyUI's tokenizer for it has more")


class TextEncoders(nn.Module):
    """ComfyUI's `cond_stage_model`: what comfy.text_encoders.flux.FluxClipModel offers, over packed files."""

    def __init__(
        self,
        files: Files,
        tokenizer: "comfy.text_encoders.flux.FluxTokenizer",
        device: torch.device,
        cache: PromptCache | None,
    ) -> None:
        super().__init__()
        self.files, self.tokenizer, self.device, self.cache = files, tokenizer, device, cache

    def set_clip_options(self, options: Mapping[str, object]) -> None:
        if options.get("layer") is not None:
            refuse("read at another layer (CLIP Set Last Layer)", "FLUX.1 is made for the last one")

    def reset_clip_options(self) -> None:
        pass

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode_token_weights(self, tokens: Mapping[str, Tokens]) -> tuple[Tensor, Tensor]:
        """(1, T, width of T5), all sections in a row, and CLIP-L's vector (1, pooled) of the first; float32."""
        words = self.words(tokens["t5xxl"])
        management.throw_exception_if_processing_interrupted()
        pooled = self.pooled(ids_of(tokens["l"][0]))
        place = management.intermediate_device()
        return words.to(place), pooled.to(place)

    def words(self, sections: Tokens) -> Tensor:
        """Weights act as in ComfyUI: z' = (z - z0) * weight + z0, z0 the states of no text."""
        texts = [ids_of(section) for section in sections]
        longest = max(map(len, texts))
        own = self.tokenizer.t5xxl
        none = (own.end_token, *[own.pad_token] * (longest - 1))
        weighted = any(weight != 1 for section in sections for _, weight, *_ in section)
        found = self.states([*texts, none] if weighted else texts)
        out = []
        for ids, section in zip(texts, sections, strict=True):
            states = found[ids]
            if weighted:
                weights = torch.tensor([weight for _, weight, *_ in section])[:, None]
                empty = found[none][: len(states)]
                states = torch.where(weights == 1, states, (states - empty) * weights + empty)
            out.append(finite(states, "with these weights"))
        return torch.cat(out)[None]

    def states(self, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """T5's (T, width) float32 of each; one pass for those of equal length that no cache holds."""
        placement = self.placement(texts)
        loras = self.loras_of(T5)
        key = dict(encoder="t5", precision=placement.precision, loras=loras)
        found = {ids: self.recall(self.files.t5, {**key, "ids": ids}, "states") for ids in texts}
        missing = [ids for ids, states in found.items() if states is None]
        for length in dict.fromkeys(map(len, missing)):
            alike = [ids for ids in missing if len(ids) == length]
            for ids, states in zip(alike, self.run_t5(alike, placement), strict=True):
                found[ids] = finite(states, "as tokens")
                self.keep(self.files.t5, {**key, "ids": ids}, "states", found[ids])
        return found

    def run_t5(self, texts: Sequence[tuple[int, ...]], placement: Placement) -> Tensor:
        if self.device == CPU:
            return t5_states(self.files.t5, torch.tensor(texts), placement, self.files.loras).float()
        encoder = encoder_of(open_component(self.files.t5, "T5 encoder"))
        working = encoder.activation_bytes(Work(words=len(texts[0])))
        management.free_memory(encoder.nbytes + working + management.minimum_inference_memory(), self.device)
        if management.get_free_memory(self.device) < encoder.nbytes + working:
            memory = memory_for(self.device, AUTO, AUTO, lambda line: None)
            placement = replace(placement, attach=memory.streaming)
        try:
            return t5_states(self.files.t5, torch.tensor(texts), placement, self.files.loras).float()
        finally:
            management.soft_empty_cache()

    def placement(self, texts: Sequence[tuple[int, ...]]) -> Placement:
        if self.device == CPU:
            return Placement()
        precision = "mixed" if management.should_use_bf16(self.device) else "float32"
        return Placement(self.device, precision, at_once=len(texts))

    def pooled(self, ids: tuple[int, ...]) -> Tensor:
        """CLIP-L's vector (1, pooled) float32, always from the processor."""
        key = dict(encoder="clip", ids=ids, loras=self.loras_of(CLIP_L))
        found = self.recall(self.files.clip, key, "pooled")
        if found is None:
            found = clip_states(self.files.clip, torch.tensor([ids]), self.tokenizer.clip_l.end_token, self.files.loras)
            self.keep(self.files.clip, key, "pooled", finite(found, "as tokens"))
        return found

    def loras_of(self, component: str) -> list[list[object]]:
        """Identity and strength of what changes an encoder."""
        if self.cache is None:
            return []
        touching = ((lora, s) for lora, s in self.files.loras if any(r.component == component for r in lora.records))
        return [[identity(lora.path, self.cache.models), float(strength)] for lora, strength in touching]

    def key(self, path: Path, key: Mapping[str, object]) -> dict[str, object]:
        return {**key, "frontend": "comfyui", "version": VERSION, "model": identity(path, self.cache.models)}

    def recall(self, path: Path, key: Mapping[str, object], name: str) -> Tensor | None:
        entry = self.cache and self.cache.get(self.key(path, key))
        return entry.tensors[name] if entry else None

    def keep(self, path: Path, key: Mapping[str, object], name: str, value: Tensor) -> None:
        if self.cache is not None:
            self.cache.put(self.key(path, key), Entry({name: value}))


def ids_of(section: Sequence[tuple]) -> tuple[int, ...]:
    """UserError for a textual inversion, which is no token."""
    if any(isinstance(token, Tensor | Mapping) for token, *_ in section):
        raise UserError("a prompt of flux_quant's text encoders cannot hold embedding:NAME; take it out")
    return tuple(int(token) for token, *_ in section)


def encoder_of(reader: Component) -> TextEncoder:
    return TextEncoder.of({name: (info.shape, info.format) for name, info in reader.tensors.items()})


class EncoderPatcher(comfy.model_patcher.ModelPatcher):
    """Of a model without weights of its own."""

    def add_patches(self, patches: Mapping, *args: object, **kwargs: object) -> list:
        if patches:
            refuse("patched by ComfyUI's own LoRA nodes", "give this CLIP to Apply LoRA (flux_quant)")
        return []


def device_for(place: str) -> torch.device:
    """`auto` as ComfyUI places text encoders."""
    if place == "cpu":
        return CPU
    device = management.text_encoder_device() if place == AUTO else management.get_torch_device()
    if device.type == "cuda":
        return device
    if place != AUTO:
        logging.warning("T5 runs on the processor: there is no CUDA device, ComfyUI uses %s", device)
    return CPU


def clip_of(files: Files, device: torch.device, cache: PromptCache | None) -> "comfy.sd.CLIP":
    """ComfyUI's CLIP. UserError for files of other models."""
    clip = comfy.sd.CLIP(no_init=True)
    clip.tokenizer = comfy.text_encoders.flux.FluxTokenizer(folder_paths.get_folder_paths("embeddings"))
    files.check(clip.tokenizer)
    clip.layer_idx, clip.use_clip_schedule, clip.tokenizer_options, clip.apply_hooks_to_conds = None, False, {}, None
    return with_encoders(clip, TextEncoders(files, clip.tokenizer, device, cache))


def with_encoders(clip: "comfy.sd.CLIP", encoders: TextEncoders) -> "comfy.sd.CLIP":
    clip.cond_stage_model = encoders
    clip.patcher = EncoderPatcher(encoders, load_device=encoders.device, offload_device=CPU)
    clip.patcher.is_clip = True
    return clip


def with_loras(clip: "comfy.sd.CLIP", loras: Loras) -> "comfy.sd.CLIP":
    """A clone that reads with these LoRAs as well. UserError if it is not one of ours."""
    encoders = clip.cond_stage_model
    if not isinstance(encoders, TextEncoders):
        raise UserError("this CLIP is not from Load text encoders (flux_quant); use ComfyUI's own LoRA node for it")
    files = replace(encoders.files, loras=(*encoders.files.loras, *loras))
    return with_encoders(clip.clone(), TextEncoders(files, encoders.tokenizer, encoders.device, encoders.cache))
