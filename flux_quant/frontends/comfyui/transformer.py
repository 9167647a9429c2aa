"""ComfyUI's `diffusion_model`: the engine behind the call signature of `comfy.ldm.flux.model.Flux`.

The engine is no submodule: ComfyUI moves, counts and patches the tensors of a model that it finds, and ours are a
`Seat`'s to move. What the engine does not do, such as patches that replace blocks, is an error, never a picture
without it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import comfy.ldm.common_dit
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_management import throw_exception_if_processing_interrupted
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from flux_quant.errors import UserError
from flux_quant.frontends.comfyui.places import GRID, reference_places, token_ids
from flux_quant.frontends.comfyui.seat import Seat
from flux_quant.model import Attention, Residuals, pack_latents, text_ids, torch_attention, unpack_latents
from flux_quant.modulation import Call

OVERRIDE = "optimized_attention_override"  # looked up by ComfyUI's `wrap_attn`, around each of its attentions


class Transformer(nn.Module):
    """Stands in for comfy.ldm.flux.model.Flux."""

    def __init__(self, seat: Seat, dtype: torch.dtype) -> None:
        """dtype: of the activations, unless ComfyUI passes another."""
        super().__init__()
        self.seat, self.dtype, self.patch_size = seat, dtype, GRID
        config = seat.engine.config
        self.in_channels, self.out_channels = config.in_channels, config.out_channels
        self.place: dict[str, Any] = {}  # of the block that runs, in the words that ComfyUI has for it
        for kind, blocks in (("double", seat.engine.double_blocks), ("single", seat.engine.single_blocks)):
            for i, block in enumerate(blocks):
                place = {"block_type": kind, "block_index": i, "total_blocks": len(blocks)}
                block.register_forward_pre_hook(partial(begins, self.place, place))

    @property
    def img_in(self) -> nn.Linear:
        """Of no weights: ComfyUI reads off its shape how many channels are given beside the latents."""
        config = self.seat.engine.config
        return nn.Linear(config.in_channels, config.hidden, device="meta")

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: Sequence[Tensor] | None = None,
        control: Mapping[str, Sequence[Tensor | None]] | None = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> Tensor:
        """x (B, C, h, w) latents, timestep (B,) in 1-0, context (B, T, width), y (B, pooled), guidance (B,),
        ref_latents (B, 16, h', w') each; control's "input" and "output" hold (B, S, D) or None for each block."""
        executor = WrapperExecutor.new_class_executor(
            self.answer, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        )
        return executor.execute(x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs)

    def answer(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        guidance: Tensor | None = None,
        ref_latents: Sequence[Tensor] | None = None,
        control: Mapping[str, Sequence[Tensor | None]] | None = None,
        transformer_options: Mapping[str, Any] = {},
        **kwargs: Any,
    ) -> Tensor:
        config = self.seat.engine.config
        check_options(transformer_options, kwargs)
        check_inputs(x, config.in_channels)
        if config.guidance and guidance is None:
            raise UserError("this model is made for a guidance scale: FluxDisableGuidance cannot be used with it")
        batch, _, height, width = x.shape
        img, ids = packed(x), token_ids(height, width, rope=transformer_options.get("rope_options"))
        drawn = img.shape[1]
        places = reference_places((height, width), ref_latents or (), kwargs.get("ref_latents_method", "offset"))
        for reference, place in zip(ref_latents or (), places, strict=True):
            img = torch.cat([img, packed(reference.to(x)).expand(batch, -1, -1)], dim=1)
            ids = torch.cat([ids, token_ids(*reference.shape[-2:], *place)])
        pooled = x.new_zeros(batch, config.pooled) if y is None else y[:, : config.pooled]
        call = Call(timestep.float().expand(batch), pooled, guidance.expand(batch) if config.guidance else None)
        out = self.seat.draw(
            img,
            context,
            call,
            (ids.to(x.device), text_ids(context.shape[1], device=x.device)),
            residuals(control, config.double_blocks, config.single_blocks, img),
            lambda: ahead(call, transformer_options.get("sample_sigmas")),
            self.attention(transformer_options),
        )
        rows, columns = (height + 1) // GRID, (width + 1) // GRID
        return unpack_latents(out[:, :drawn], rows, columns)[:, :, :height, :width]

    def attention(self, options: Mapping[str, Any]) -> Attention:
        """The one that a node has chosen, called as by ComfyUI's own FLUX model; the engine's own without one."""
        if OVERRIDE not in options:
            return torch_attention

        def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """(B, H, L, C) each; ComfyUI gives (B, L, H C)."""
            heads, here = q.shape[1], {**options, **self.place}
            out = optimized_attention(q, k, v, heads, skip_reshape=True, mask=None, transformer_options=here)
            return out.unflatten(-1, (heads, -1)).transpose(1, 2)

        return chosen


def begins(now: dict[str, Any], place: Mapping[str, Any], *_: object) -> None:
    """Before a block: a step on a slow machine is not waited for."""
    throw_exception_if_processing_interrupted()
    now.update(place)


def check_options(options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """UserError for what would change the picture and is not done here."""
    patches = [name for name, given in options.get("patches", {}).items() if given]
    replaced = [f"{kind} {where}" for kind, given in options.get("patches_replace", {}).items() for where in given]
    if found := patches + replaced:
        raise UserError(
            f"a node has put patches into this model ({', '.join(map(str, found[:3]))}); flux_quant's engine runs "
            "none. Remove the node, or load the model with ComfyUI's own loader"
        )
    if more.get("attention_mask") is not None:
        raise UserError("flux_quant's engine takes no attention mask: set strength_type of the style model to multiply")


def check_inputs(x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] * GRID**2 != channels:
        raise UserError(
            f"this model takes {channels // GRID**2} channels of latents with what is given beside them, got "
            f"{list(x.shape)}; Fill models need InpaintModelConditioning, Canny and Depth InstructPixToPixConditioning"
        )


def packed(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, tokens, 4 C); an odd size is padded as ComfyUI does."""
    return pack_latents(comfy.ldm.common_dit.pad_to_patch_size(x, (GRID, GRID)).contiguous())


def residuals(
    control: Mapping[str, Sequence[Tensor | None]] | None, doubles: int, singles: int, img: Tensor
) -> Residuals:
    """What ControlNets give, for each block; they see the first tokens of the image only."""
    if control is None:
        return Residuals()
    nothing = img.new_zeros(1)

    def each(given: Sequence[Tensor | None] | None, blocks: int) -> list[Tensor]:
        if not given or all(sample is None for sample in given):
            return []
        rows = [nothing if sample is None else whole(sample) for sample in given[:blocks]]
        return rows + [nothing] * (blocks - len(rows))

    def whole(sample: Tensor) -> Tensor:
        return nn.functional.pad(sample.to(img), (0, 0, 0, img.shape[1] - sample.shape[1]))

    return Residuals(each(control.get("input"), doubles), each(control.get("output"), singles))


def ahead(call: Call, sigmas: Tensor | None) -> list[Call]:
    """The calls that follow if a sampler goes on through these noise levels, which are FLUX.1's timesteps."""
    if sigmas is None:
        return []
    times = sigmas.to(call.timestep)
    here = (times == call.timestep[0]).nonzero().flatten().tolist()
    later = times[here[0] + 1 : -1] if here else ()
    return [call._replace(timestep=time.expand(len(call.timestep))) for time in later]
