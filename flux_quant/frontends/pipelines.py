"""A whole diffusers pipeline from files as people have them.

    pipe = pipeline("ComfyUI/models", vram="8GB", ram="16GB")
    image = pipe("a red fox", num_inference_steps=20).images[0]

Under a budget of VRAM transformer, T5 and VAE never share the GPU: diffusers' `enable_model_cpu_offload`, which is
called here, says whose turn it is, the blocks of the first two stream, and the VAE works in tiles that fit.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_quant.components import Components, find_components
from flux_quant.drawing.sampling import make_scheduler
from flux_quant.drawing.vae import DECODE, ENCODE, estimate, in_tiles, vae_dtype
from flux_quant.errors import UserError
from flux_quant.frontends.diffusers import Log, load, memory_of
from flux_quant.frontends.transformers import load_text_encoder
from flux_quant.generation import choose_device
from flux_quant.loading import load_vae
from flux_quant.runtime import Memory
from flux_quant.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

BY_CHANNELS = {64: "FluxPipeline", 384: "FluxFillPipeline", 128: "FluxControlPipeline"}  # inputs of the transformer


class TiledVae(nn.Module):
    """What an AutoencoderKL does otherwise under a budget: it works in as few tiles as fit."""

    memory: Memory

    def room(self) -> int:
        self.memory.readings.forget()
        return self.memory.free

    @property
    def unit(self) -> int:
        """Pixels to a position of the latent, in each direction."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def _decode(self, z: Tensor, return_dict: bool = True) -> object:
        from diffusers.models.autoencoders.vae import DecoderOutput

        whole = super()._decode

        def run(part: Tensor) -> Tensor:
            return whole(part, return_dict=False)[0]

        pictures = self.tiled(run, z, (1, self.unit), self.config.out_channels, DECODE)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)

    def _encode(self, x: Tensor) -> Tensor:
        return self.tiled(super()._encode, x, (self.unit, 1), 2 * self.config.latent_channels, ENCODE)

    def tiled(
        self, run: Callable[[Tensor], Tensor], x: Tensor, units: tuple[int, int], channels: int, per_position: int
    ) -> Tensor:
        memory, free = estimate(self, per_position), self.room()
        parts = x.to(self.dtype).split(1)
        return torch.cat([in_tiles(self, run, one, units, channels, memory, free) for one in parts]).to(x)


@cache
def tiled_vae() -> type:
    """It is saved as what it is one of."""
    from diffusers import AutoencoderKL

    return type("AutoencoderKL", (TiledVae, AutoencoderKL), {"__module__": AutoencoderKL.__module__})


def pipeline(
    source: str | Path | Components,
    vram: str | None = None,
    ram: str | None = None,
    cls: "type[DiffusionPipeline] | None" = None,
    compute: str = "16-bit",
    device: str = "auto",
    dtype: torch.dtype | None = None,
    log: Log = lambda line: None,
    **more: object,
) -> "DiffusionPipeline":
    """A pipeline from a ComfyUI models folder, an all-in-one file, a transformer with the rest beside it, or a folder
    of a diffusers pipeline.

    `more`: t5, clip, vae, tokenizers are paths of what does not lie there; anything else is passed to `cls`, as
    controlnet=. cls: FluxPipeline, FluxFillPipeline or FluxControlPipeline by the transformer's inputs if not given
    (Kontext has the shapes of dev, so it has to be). vram, ram, compute, device, dtype, log: as in
    `frontends.diffusers.load`. Without vram everything is on the CPU, for `.to("cuda")`. UserError that names what is
    missing and where it was looked for.
    """
    import diffusers

    paths = {name: Path(more.pop(name)) for name in ("t5", "clip", "vae", "tokenizers") if name in more}
    files = replace(source, **paths) if isinstance(source, Components) else find_components(Path(source), **paths)
    place, usual = choose_device(device)
    dtype = usual if dtype is None else dtype
    memory = memory_of(place, vram, ram, log)
    common = dict(device=device, dtype=dtype)
    if memory is not None:
        common |= dict(vram=vram, ram=ram, log=log)
    transformer = load(files.transformer, compute=compute, **common)
    if cls is None:
        channels = transformer.config.in_channels
        if channels not in BY_CHANNELS:
            raise UserError(f"{files.transformer}: no pipeline is known for {channels} input channels; give cls=")
        cls = getattr(diffusers, BY_CHANNELS[channels])
    transformer.scheduler = scheduler_for(source, transformer.config.guidance_embeds)
    pipe = cls(
        scheduler=transformer.scheduler,
        vae=vae_for(files.vae, place, dtype, memory),
        text_encoder=load_text_encoder(files.clip, "clip", tokenizers=files.tokenizers, device=device, dtype=dtype),
        tokenizer=load_tokenizer(files.tokenizers, "clip"),
        text_encoder_2=load_text_encoder(files.t5, "t5", **common),
        tokenizer_2=load_tokenizer(files.tokenizers, "t5"),
        transformer=transformer,
        **more,
    )
    if memory is not None:
        pipe.enable_model_cpu_offload(device=place)
    return pipe


def scheduler_for(source: object, guided: bool) -> "FlowMatchEulerDiscreteScheduler":
    """That of the pipeline's folder, else as published."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = None if isinstance(source, Components) else Path(source) / "scheduler"
    if folder is not None and (folder / "scheduler_config.json").is_file():
        return FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    return make_scheduler(guided)


def vae_for(path: Path, place: torch.device, dtype: torch.dtype, memory: Memory | None) -> nn.Module:
    model = load_vae(path, None if memory is None else tiled_vae())
    if memory is not None:
        model.memory = memory
    return nn.Module.to(model, vae_dtype(place, dtype) if memory else dtype)
