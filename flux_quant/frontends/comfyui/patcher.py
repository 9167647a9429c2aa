"""ComfyUI's MODEL around the engine: a BaseModel, and the ModelPatcher that its memory management talks to.

What ComfyUI finds in the model's state dict has the names and shapes of FLUX.1 and no memory: nodes that look for
layers find them, and what they would do to the weights is refused with the node to use instead.
"""

import uuid
import weakref
from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any, NoReturn

import comfy.model_base
import comfy.model_detection
import comfy.model_management as management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from flux_quant.errors import UserError
from flux_quant.frontends.comfyui.seat import Loras, Seat, same
from flux_quant.frontends.comfyui.transformer import Transformer
from flux_quant.lora import shapes_in
from flux_quant.model import Flux
from flux_quant.planner.footprint import PATCH, Work

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
WORDS = 512  # tokens of text that memory is asked for
LATENT = 8  # pixels of a latent's side
CPU = torch.device("cpu")


class FluxQuant(comfy.model_base.Flux):
    """ComfyUI's FLUX.1 with the engine as its diffusion model."""

    def __init__(self, seat: Seat, dtype: torch.dtype) -> None:
        shapes = shapes_in(seat.engine)
        config = comfy.model_detection.model_config_from_unet(meta(shapes), "")
        config.unet_config["disable_unet_model_creation"] = True
        config.set_inference_dtype(dtype, None)
        kinds = comfy.model_base.ModelType
        super().__init__(config, kinds.FLUX if seat.engine.config.guidance else kinds.FLOW)
        self.diffusion_model = Transformer(seat, dtype).eval()
        self.seat, self.shapes = seat, shapes
        self.device = CPU

    def state_dict(self, *args: object, prefix: str = "", **kwargs: object) -> dict[str, Tensor]:
        return meta(self.shapes, f"{prefix}diffusion_model.")

    def state_dict_for_saving(self, *args: object, **kwargs: object) -> NoReturn:
        refuse("saved", "convert its file with Convert (flux_quant)")

    def memory_required(self, input_shape: list[int], cond_shapes: Mapping[str, list] = {}) -> float:
        """Bytes beside the weights that a pass over latents (B, 16, h, w) takes on the device; predicted."""
        if self.seat.memory is None:
            return super().memory_required(input_shape, cond_shapes)
        batch, _, height, width = input_shape
        seen = max((prod(shape[2:]) for shape in cond_shapes.get("ref_latents", ())), default=0)
        size = tuple(ceil(side * LATENT / PATCH) * PATCH for side in (width, height))
        tokens = ceil(seen * LATENT**2 / PATCH**2)
        return self.seat.working_bytes(Work(size=size, batch=batch, words=WORDS, reference=tokens))


def meta(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def refuse(what: str, instead: str) -> NoReturn:
    raise UserError(f"a model of flux_quant cannot be {what}; {instead}")


class EnginePatcher(comfy.model_patcher.ModelPatcher):
    """Clones share the model, and with it the seat; each has LoRAs of its own, which are put on when it is loaded."""

    loras: Loras = ()

    def clone(self, *args: Any, **kwargs: Any) -> "EnginePatcher":
        copy = super().clone(*args, **kwargs)
        copy.loras = self.loras
        return copy

    def with_loras(self, loras: Loras) -> "EnginePatcher":
        copy = self.clone()
        copy.loras = (*self.loras, *loras)
        copy.patches_uuid = uuid.uuid4()
        return copy

    def clone_has_same_weights(self, clone: "EnginePatcher", *args: Any, **kwargs: Any) -> bool:
        return same(self.loras, clone.loras) and bool(super().clone_has_same_weights(clone, *args, **kwargs))

    # Memory: what ComfyUI asks, and what it tells.

    @property
    def seat(self) -> Seat:
        return self.model.seat

    def model_size(self) -> int:
        """Bytes on the device at most."""
        return self.seat.whole

    def loaded_size(self) -> int:
        return self.seat.held

    def get_ram_usage(self) -> int:
        """Of the whole engine, most of it pages of its file."""
        return self.seat.sizes.nbytes

    def lowvram_patch_counter(self) -> int:
        return 0

    def load(
        self, device_to: torch.device | None = None, lowvram_model_memory: float = 0, *args: Any, **kw: Any
    ) -> None:
        """lowvram_model_memory: bytes of weights that the device may hold; 0 is all of them."""
        with self.use_ejected():
            self.settle(device_to or self.load_device, lowvram_model_memory or float("inf"))
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, False, not lowvram_model_memory)

    def partially_load(
        self, device_to: torch.device, extra_memory: float = 0, force_patch_weights: bool = False
    ) -> int:
        """May hold `extra_memory` bytes more than now, or, below zero, that many less -> how many more it holds."""
        before = self.loaded_size()
        super().unpatch_model(self.offload_device, unpatch_weights=False)
        self.patch_model(load_weights=False)
        self.load(device_to, max(before + extra_memory, 0.1))
        return self.loaded_size() - before

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *args: Any, **kwargs: Any) -> int:
        """Give back so many bytes -> how many were."""
        before = self.loaded_size()
        if self.seat.residence is not None:
            self.settle(self.load_device, max(before - memory_to_free, 0.1))
        return before - self.loaded_size()

    def unpatch_model(self, device_to: torch.device | None = None, unpatch_weights: bool = True) -> None:
        super().unpatch_model(device_to, unpatch_weights=False)
        if unpatch_weights:
            self.seat.leave()
            self.note(CPU)

    def settle(self, device: torch.device, allowance: float) -> None:
        try:
            self.seat.settle(self.loras, allowance, self.model.get_dtype())
        except BaseException:
            self.note(CPU)
            raise
        self.note(device)

    def note(self, device: torch.device) -> None:
        """What ComfyUI reads off the model itself."""
        self.model.device = device
        self.model.model_loaded_weight_memory = self.seat.held
        self.model.model_lowvram = self.seat.present and self.seat.held < self.seat.whole
        self.model.current_weight_patches_uuid = self.patches_uuid if self.seat.present else None

    # What changes weights, or layers.

    def add_patches(self, patches: Mapping, *args: Any, **kwargs: Any) -> list:
        if patches:
            refuse("patched by ComfyUI's own LoRA nodes", "use Apply LoRA (flux_quant), which is exact on any format")
        return []

    def add_hook_patches(self, hook: object, patches: Mapping, *args: Any, **kwargs: Any) -> list:
        return self.add_patches(patches)

    def get_key_patches(self, filter_prefix: str | None = None) -> NoReturn:
        refuse("merged or saved", "convert its file with Convert (flux_quant), which fuses LoRAs if asked to")

    def add_weight_wrapper(self, name: str, function: Callable) -> NoReturn:
        refuse("given other weights", "load it with ComfyUI's own loader for that")

    def add_object_patch(self, name: str, obj: object) -> None:
        if name.split(".")[0] == "diffusion_model":
            refuse(f"changed in {name}", "load it with ComfyUI's own loader for that")
        super().add_object_patch(name, obj)


def activations_for(engine: Flux, device: torch.device) -> torch.dtype:
    """As ComfyUI chooses for a model of so many values, and for its --fp16-unet and the like."""
    count = sum(prod(shape) for shape in shapes_in(engine).values())
    supported = list(ACTIVATIONS)
    dtype = management.unet_dtype(device, count, supported)
    if dtype not in ACTIVATIONS:
        dtype = management.unet_manual_cast(dtype, device, supported)
    return dtype or torch.float32


def others_on(device: torch.device, model: torch.nn.Module) -> int:
    """Bytes of ComfyUI's other models there."""
    loaded = (one for one in management.current_loaded_models if one.device == device and one.model is not None)
    return sum(one.model_loaded_memory() for one in loaded if one.model.model is not model)


def model_of(seat: Seat, device: torch.device, dtype: torch.dtype) -> EnginePatcher:
    """ComfyUI's MODEL. Whatever is on the device leaves it with the last clone."""
    model = FluxQuant(seat, dtype)
    weakref.finalize(model, seat.leave).atexit = False
    gone = weakref.ref(model)
    seat.others = lambda: others_on(device, gone())
    return EnginePatcher(model, load_device=device, offload_device=management.unet_offload_device())
