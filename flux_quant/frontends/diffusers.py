"""The engine inside diffusers' FLUX pipelines.

    pipe = load_pipeline(find_components(Path("models/diffusion_models/flux1-dev-Q8_0.gguf")))
    image = pipe("a red fox", num_inference_steps=20).images[0]

`EngineTransformer` has the call signature and the attributes of diffusers' FluxTransformer2DModel that its pipelines
use, so it is passed as `transformer=`. It is a plain module around the engine: moving it moves the packed weights,
and `.to(torch.bfloat16)` chooses the dtype of the activations, which never changes the packed weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flux_quant.components import Components
from flux_quant.loading import load_clip, load_flux, load_t5, load_vae
from flux_quant.model import Flux
from flux_quant.sampling import make_scheduler
from flux_quant.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from diffusers import FluxPipeline
    from diffusers.models.modeling_outputs import Transformer2DModelOutput


class EngineTransformer(nn.Module):
    """Stands in for FluxTransformer2DModel."""

    def __init__(self, engine: Flux) -> None:
        super().__init__()
        self.engine = engine
        self.config = SimpleNamespace(**engine.config.diffusers())

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations: that of the biases, which `.to(dtype)` casts."""
        return self.engine.final_layer.linear.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.engine.final_layer.linear.bias.device

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """diffusers marks conditional and unconditional calls for its step caches; the engine keeps none."""
        yield

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **unsupported: Any,
    ) -> "Transformer2DModelOutput | tuple[Tensor]":
        """As FluxTransformer2DModel.forward: timestep (B,) in 0-1, ids (S, 3) and (T, 3). ValueError for what the
        engine does not do, such as ControlNet residuals, rather than a picture without it."""
        if joint_attention_kwargs:
            unsupported = unsupported | joint_attention_kwargs
        if given := [name for name, value in unsupported.items() if value is not None and value is not False]:
            raise ValueError(f"the flux_quant engine does not support {', '.join(given)}")
        dtype = self.dtype
        inputs = (tensor.to(dtype) for tensor in (hidden_states, encoder_hidden_states, pooled_projections))
        ids = (one[0] if one.ndim == 3 else one for one in (img_ids, txt_ids))
        sample = self.engine(*inputs, timestep.float(), *ids, guidance).to(hidden_states.dtype)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)


def load_transformer(path: str | Path) -> EngineTransformer:
    """A FLUX.1 transformer file (BFL names; safetensors or GGUF) for any FLUX pipeline of diffusers."""
    return EngineTransformer(load_flux(path))


def load_pipeline(components: Components) -> "FluxPipeline":
    """The whole pipeline from files, on the CPU in float32."""
    from diffusers import FluxPipeline

    transformer = load_transformer(components.transformer)
    tokenizer = load_tokenizer(components.tokenizers, "clip")
    return FluxPipeline(
        scheduler=make_scheduler(transformer.config.guidance_embeds),
        vae=load_vae(components.vae),
        text_encoder=load_clip(components.clip, tokenizer.eos_token_id),
        tokenizer=tokenizer,
        text_encoder_2=load_t5(components.t5),
        tokenizer_2=load_tokenizer(components.tokenizers, "t5"),
        transformer=transformer,
    )
