"""The nodes. Each is a thin door to a room below: loading, text, LoRAs, converting, planning."""

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch

from flux_quant.converters.component import open_component
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_report import check_complete
from flux_quant.converters.plan import make_plan
from flux_quant.converters.recipe import GGUF, OFFERED, SAFETENSORS
from flux_quant.errors import UserError
from flux_quant.frontends.comfyui import clip as text
from flux_quant.frontends.comfyui import files
from flux_quant.frontends.comfyui.patcher import EnginePatcher, activations_for, model_of
from flux_quant.frontends.comfyui.seat import AUTO, COMPUTES, Seat, memory_for
from flux_quant.loading import load_flux
from flux_quant.lora import shapes_in
from flux_quant.planner import plan as planner
from flux_quant.planner.footprint import Model, Work
from flux_quant.planner.gpus import GPUS
from flux_quant.planner.memory import amount
from flux_quant.planner.surroundings import surroundings
from flux_quant.text.prompt_cache import PromptCache

CATEGORY = "flux_quant"
NONE = "none"
HERE = "this machine"
FORMATS = list(dict.fromkeys((*OFFERED[GGUF], *OFFERED[SAFETENSORS])))
BUDGET = ("STRING", {"default": AUTO, "tooltip": "auto, or an amount such as 8GB"})
STRENGTH = ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01})


def whole(default: int, least: int, most: int, step: int = 1) -> tuple[str, dict[str, int]]:
    return "INT", {"default": default, "min": least, "max": most, "step": step}


class LoadFlux:
    """A FLUX.1 transformer: GGUF (also in several files), FP8 of any convention, 16 bits."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("MODEL",)
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        return {
            "required": {
                "model_name": (files.names(files.MODELS),),
                "vram_budget": BUDGET,
                "ram_budget": BUDGET,
                "compute": (list(COMPUTES), {"tooltip": "auto is 16-bit; int8 and fp8 are faster and less exact"}),
                "hoisted_modulation": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "a quarter of the weights is used once a picture, not once a step"},
                ),
            }
        }

    def load(
        self, model_name: str, vram_budget: str, ram_budget: str, compute: str, hoisted_modulation: bool
    ) -> tuple[EnginePatcher]:
        device = management.get_torch_device()
        memory = memory_for(device, vram_budget, ram_budget, logging.info)
        with torch.inference_mode(False), torch.no_grad():
            engine = load_flux(files.path_of(files.MODELS, model_name))
        limited = memory is not None and vram_budget not in ("", AUTO)
        seat = Seat(engine, memory, compute, hoisted_modulation, limited)
        return (model_of(seat, device, activations_for(engine, device)),)


class LoadTextEncoders:
    """T5 and CLIP-L for FLUX.1, GGUF or safetensors; prompts that were read before come from the disk."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("CLIP",)
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        found = files.names(files.ENCODERS)
        return {
            "required": {
                "t5_name": (found,),
                "clip_l_name": (found,),
                "device": (list(text.PLACES), {"tooltip": "of T5; auto is where ComfyUI puts text encoders"}),
                "disk_cache": ("BOOLEAN", {"default": True, "tooltip": "keep what prompts become, up to 1 GB"}),
            }
        }

    def load(self, t5_name: str, clip_l_name: str, device: str, disk_cache: bool) -> tuple[Any]:
        chosen = text.Files(files.path_of(files.ENCODERS, t5_name), files.path_of(files.ENCODERS, clip_l_name))
        return (text.clip_of(chosen, text.device_for(device), PromptCache.default() if disk_cache else None),)


class ApplyLora:
    """A LoRA beside the weights: exact on any format, and no weight is changed. Repeat the node for more."""

    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "apply", ("MODEL", "CLIP")
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        return {
            "required": {"model": ("MODEL",), "lora_name": (files.names(files.LORAS),), "strength": STRENGTH},
            "optional": {"clip": ("CLIP",)},
        }

    def apply(self, model: Any, lora_name: str, strength: float, clip: Any = None) -> tuple[Any, Any]:
        if not isinstance(model, EnginePatcher):
            raise UserError("this MODEL is not from Load FLUX (flux_quant); use ComfyUI's own LoRA node for it")
        path = files.path_of(files.LORAS, lora_name)
        with torch.inference_mode(False), torch.no_grad():
            lora = read_lora(path, shapes_in(model.seat.engine))
        check_complete(lora)
        if lora.unused:
            logging.warning("%s: %d keys have no place, %s among them", path, len(lora.unused), lora.unused[0])
        loras = ((lora, strength),)
        return model.with_loras(loras), None if clip is None else text.with_loras(clip, loras)


class ConvertModel:
    """A new file of a model in another format, beside the old one; interrupted, it leaves nothing behind."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "convert", ("STRING",), ("path",)
    OUTPUT_NODE = True
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        sources = [*files.names(files.MODELS), *files.names(files.ENCODERS)]
        return {
            "required": {
                "source": (sources,),
                "format": (FORMATS, {"default": "q8_0"}),
                "name": ("STRING", {"default": "", "tooltip": "of the new file; empty: the source's and the format"}),
                "replace": ("BOOLEAN", {"default": False, "tooltip": "a file of that name"}),
                "lora_name": ([NONE, *files.names(files.LORAS)], {"tooltip": "fused into a FLUX.1 transformer"}),
                "lora_strength": STRENGTH,
            }
        }

    def convert(
        self, source: str, format: str, name: str, replace: bool, lora_name: str, lora_strength: float
    ) -> dict[str, Any]:
        kind = files.MODELS if source in files.names(files.MODELS) else files.ENCODERS
        path = files.path_of(kind, source)
        suffix = SAFETENSORS if format in OFFERED[SAFETENSORS] else GGUF
        target = files.target_for(path, name or f"{path.stem}-{format.upper()}", suffix)
        loras = () if lora_name == NONE else ((files.path_of(files.LORAS, lora_name), lora_strength),)
        with torch.inference_mode(False), torch.no_grad():
            plan = make_plan(Conversion(path, target, format, replace, loras=loras))
            for note in plan.notes:
                logging.warning("%s", note)
            result = run(plan, progress())
        share = result.file_bytes / result.source_bytes
        said = f"{target.name}: {amount(result.file_bytes)}, {share:.1%} of the source's {amount(result.source_bytes)}"
        return {"ui": {"text": [said]}, "result": (str(target),)}


def progress() -> Callable[[str, int, int], None]:
    """Shown on the node, phase after phase; ends the work when the user interrupts it."""
    bar = comfy.utils.ProgressBar(1)

    def report(phase: str, done: int, total: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


class PlanModel:
    """What a picture would take on a card, which blocks stay there, and how long a step takes: predicted."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "plan", ("STRING",), ("plan",)
    OUTPUT_NODE = True
    DESCRIPTION = __doc__

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        return {
            "required": {
                "model_name": (files.names(files.MODELS),),
                "width": whole(1024, 16, 16384, 16),
                "height": whole(1024, 16, 16384, 16),
                "batch": whole(1, 1, 64),
                "steps": whole(20, 1, 1000),
                "vram_budget": BUDGET,
                "ram_budget": BUDGET,
                "gpu": ([HERE, *GPUS], {"tooltip": "another card, by the table of flux_quant"}),
                "compute": (list(COMPUTES),),
            }
        }

    def plan(
        self,
        model_name: str,
        width: int,
        height: int,
        batch: int,
        steps: int,
        vram_budget: str,
        ram_budget: str,
        gpu: str,
        compute: str,
    ) -> dict[str, Any]:
        reader = open_component(files.path_of(files.MODELS, model_name), "FLUX.1")
        model = Model.of({name: (info.shape, info.format) for name, info in reader.tensors.items()})
        products = "float" if compute in (AUTO, "16-bit") else compute
        words = 512 if model.config.guidance else 256
        work = Work((width, height), batch, words, steps, compute=products)
        vram, ram = (None if given in ("", AUTO) else given for given in (vram_budget, ram_budget))
        machine, budget, host, notes = surroundings(None if gpu == HERE else gpu, vram, ram)
        made = planner.plan(model, work, machine, budget, None, host)
        said = "\n".join([str(made), *notes])
        return {"ui": {"text": [said]}, "result": (said,)}


NODES = {
    "FluxQuantLoader": (LoadFlux, "Load FLUX (flux_quant)"),
    "FluxQuantTextEncoders": (LoadTextEncoders, "Load text encoders (flux_quant)"),
    "FluxQuantLora": (ApplyLora, "Apply LoRA (flux_quant)"),
    "FluxQuantConvert": (ConvertModel, "Convert (flux_quant)"),
    "FluxQuantPlan": (PlanModel, "Plan (flux_quant)"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
