"""The engine inside diffusers' FLUX pipelines.

    pipe = load_pipeline(find_components(Path("models/diffusion_models/flux1-dev-Q8_0.gguf")))
    image = pipe("a red fox", num_inference_steps=20).images[0]

`EngineTransformer` has the call signature and the attributes of diffusers' FluxTransformer2DModel that its pipelines
use, so it is passed as `transformer=`. It is a plain module around the engine: moving it moves the packed weights,
and `.to(torch.bfloat16)` chooses the dtype of the activations, which never changes the packed weights.

A pipeline asks step by step. At the first step the modulation of all that follow is evaluated too, if the scheduler is
known, and kept for the next picture with the same prompt, guidance and steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flux_quant.components import Components
from flux_quant.controlnet import served
from flux_quant.drawing.sampling import make_scheduler
from flux_quant.loading import load_clip, load_flux, load_t5, load_vae
from flux_quant.model import Flux, Residuals, StepModulation
from flux_quant.modulation import Call, HoistedModulation
from flux_quant.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from diffusers.models.modeling_outputs import Transformer2DModelOutput


class EngineTransformer(nn.Module):
    """Stands in for FluxTransformer2DModel."""

    def __init__(self, engine: Flux, scheduler: "FlowMatchEulerDiscreteScheduler | None" = None) -> None:
        """`scheduler` is the pipeline's own: it is asked which timesteps follow."""
        super().__init__()
        self.engine, self.scheduler = engine, scheduler
        self.modulation = HoistedModulation(engine)
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
        controlnet_block_samples: Sequence[Tensor] | None = None,
        controlnet_single_block_samples: Sequence[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
        **unsupported: Any,
    ) -> "Transformer2DModelOutput | tuple[Tensor]":
        """As FluxTransformer2DModel.forward: timestep (B,) in 0-1, ids (S, 3) and (T, 3). ValueError for what the
        engine does not do, such as an IP adapter, rather than a picture without it."""
        if joint_attention_kwargs:
            unsupported = unsupported | joint_attention_kwargs
        if given := [name for name, value in unsupported.items() if value is not None and value is not False]:
            raise ValueError(f"the flux_quant engine does not support {', '.join(given)}")
        dtype = self.dtype
        inputs = (tensor.to(dtype) for tensor in (hidden_states, encoder_hidden_states, pooled_projections))
        ids = (one[0] if one.ndim == 3 else one for one in (img_ids, txt_ids))
        rows = None if torch.is_grad_enabled() else self.rows(timestep, pooled_projections, guidance)
        blocks, repeat = self.engine.config, controlnet_blocks_repeat
        residuals = Residuals(
            served([x.to(dtype) for x in controlnet_block_samples or ()], blocks.double_blocks, repeat),
            served([x.to(dtype) for x in controlnet_single_block_samples or ()], blocks.single_blocks),
        )
        sample = self.engine(*inputs, timestep.float(), *ids, guidance, rows, residuals).to(hidden_states.dtype)
        if not return_dict:
            return (sample,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)

    def rows(self, timestep: Tensor, pooled: Tensor, guidance: Tensor | None) -> StepModulation:
        """The modulation of this step, looked up by the values that it depends on."""
        call = Call(timestep.float(), pooled, guidance if self.engine.config.guidance else None)
        return self.modulation.rows([call], self.device, self.dtype, lambda: self.ahead(call, timestep.dtype))[0]

    def ahead(self, call: Call, dtype: torch.dtype) -> list[Call]:
        """The calls that follow if a pipeline goes on through its scheduler's timesteps, which it passes in `dtype`."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if timesteps is None:
            return []
        times = (timesteps.to(call.timestep.device, dtype) / 1000).float()
        here = (times == call.timestep[0]).nonzero().flatten().tolist()
        later = times[here[0] + 1 :] if here else ()
        return [call._replace(timestep=time.expand(len(call.timestep))) for time in later]


def load_transformer(path: str | Path) -> EngineTransformer:
    """A FLUX.1 transformer file (BFL names; safetensors or GGUF) for any FLUX pipeline of diffusers."""
    return EngineTransformer(load_flux(path))


def load_pipeline(components: Components) -> "FluxPipeline":
    """The whole pipeline from files, on the CPU in float32."""
    from diffusers import FluxPipeline

    transformer = load_transformer(components.transformer)
    transformer.scheduler = make_scheduler(transformer.config.guidance_embeds)
    tokenizer = load_tokenizer(components.tokenizers, "clip")
    return FluxPipeline(
        scheduler=transformer.scheduler,
        vae=load_vae(components.vae),
        text_encoder=load_clip(components.clip, tokenizer.eos_token_id),
        tokenizer=tokenizer,
        text_encoder_2=load_t5(components.t5),
        tokenizer_2=load_tokenizer(components.tokenizers, "t5"),
        transformer=transformer,
    )
