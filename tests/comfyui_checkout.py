"""A checkout of ComfyUI inside this process, on the CPU, with model folders of its own: for test_comfyui_real*.py.

COMFYUI_DIR names the checkout, GGUF_NODE_DIR one of ComfyUI-GGUF. ComfyUI has FLUX.1's 24 heads built in, so what it is
compared with at full width is one double and one single block of random weights; the other comparisons use small
models, for which ComfyUI's detection is told the number of heads.

Its requirements have to be installed, except torchvision, torchaudio and others that a FLUX.1 workflow never calls:
where those are absent, modules of any content stand in for them.
"""

import asyncio
import gc
import importlib.abc
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.model import Flux

CHECKOUT, GGUF_NODE = (os.environ.get(name) for name in ("COMFYUI_DIR", "GGUF_NODE_DIR"))
needs_comfyui = pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_DIR names no checkout of ComfyUI")
BOUND = 1e-3  # relative, of latents
USUAL, DEEP = "small.safetensors", "deep.safetensors"
SMALL = dict(in_channels=64, out_channels=64, hidden=256, head_dim=128, mlp=1024, context=96, pooled=64, guidance=True)
LOADER = dict(vram_budget="auto", ram_budget="auto", compute="auto", hoisted_modulation=True)
T5 = dict(d_model=128, d_kv=64, d_ff=256, num_heads=2, num_layers=3)
CLIP = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
ABSENT = ("torchvision", "torchaudio", "kornia", "spandrel", "comfyui_frontend_package", "av", "comfy_kitchen")
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders", "loras", "vae", "controlnet")


class Anything(types.ModuleType):
    """Every attribute is a class that takes whatever it is given."""

    __path__: list[str] = []
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.names else None

    def create_module(self, spec: ModuleSpec) -> Anything:
        return Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def start(checkout: Path, models: Path) -> SimpleNamespace:
    """ComfyUI's modules by their last names, and `nodes` of all its own nodes; `models` gets its model folders."""
    import transformers

    for name in ("CLIPTokenizer", "T5TokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "ByT5Tokenizer"):
        getattr(transformers, name, None)  # it asks whether torchvision is there: before something stands in for it
    missing = {name for name in ABSENT if importlib.util.find_spec(name) is None}
    sys.meta_path.append(StandIns(missing))
    sys.path.insert(0, str(checkout))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.base_directory = str(models.parent)
    for name in FOLDERS:
        (models / name).mkdir(parents=True, exist_ok=True)
    os.makedirs(models.parent / "input", exist_ok=True)
    import comfy.model_detection
    import comfy.model_management
    import comfy.sd
    import comfy.utils
    import folder_paths
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    known = nodes.NODE_CLASS_MAPPINGS
    return SimpleNamespace(
        detection=comfy.model_detection,
        management=comfy.model_management,
        sd=comfy.sd,
        utils=comfy.utils,
        folders=folder_paths,
        nodes=known,
        module=nodes,
        models=models,
    )


def run(node: type, **inputs: object) -> object:
    """What a node gives for these inputs: its first output, or what it returns if that is no tuple."""
    if hasattr(node, "GET_SCHEMA"):  # the newer kind of node: a class method, in which outputs have a wrapper
        answer = node.EXECUTE_NORMALIZED(**inputs)
        return answer.result[0] if hasattr(answer, "result") else answer[0]
    answer = getattr(node(), node.FUNCTION)(**inputs)
    return answer[0] if isinstance(answer, tuple) else answer


def heads_from_shapes(detection: types.ModuleType) -> None:
    """ComfyUI takes 24 heads for granted (and in older versions all widths); then small models would not run there."""
    own = detection.detect_unet_config

    def detect(state: dict[str, torch.Tensor], prefix: str, *args: object, **kwargs: object) -> dict | None:
        config = own(state, prefix, *args, **kwargs)
        if config and config.get("image_model") == "flux":
            head = state[f"{prefix}double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
            hidden = state[f"{prefix}img_in.bias"].shape[0]
            config |= dict(
                hidden_size=hidden,
                context_in_dim=state[f"{prefix}txt_in.weight"].shape[1],
                num_heads=hidden // head,
                axes_dim=[head // 8, head * 7 // 16, head * 7 // 16],
            )
        return config

    detection.detect_unet_config = detect


@cache
def comfyui_at(checkout: str, folder: Path) -> SimpleNamespace:
    """ComfyUI with the node pack and two small models; `run(name of a node, ...)` gives its first output."""
    found = start(Path(checkout), folder / "models")
    heads_from_shapes(found.detection)
    import flux_quant.frontends.comfyui as pack

    found.nodes |= pack.NODE_CLASS_MAPPINGS
    found.run = lambda kind, /, **inputs: run(found.nodes[kind], **inputs)
    for name, blocks in ((USUAL, 2), (DEEP, 6)):
        save_file(weights(SMALL, blocks), found.models / "diffusion_models" / name)
    return found


def with_comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What a fixture yields: the one ComfyUI of this process, in the mode in which its nodes run."""
    with torch.inference_mode():
        yield comfyui_at(CHECKOUT, tmp_path_factory.getbasetemp() / "comfyui")


def weights(
    config: dict[str, object], blocks: int = 2, seed: int = 0, spread: float | None = None
) -> dict[str, Tensor]:
    """Random ones in BF16; activations neither vanish nor explode."""
    with torch.device("meta"):
        shapes = {
            k: v.shape
            for k, v in Flux(FluxConfig(**config, double_blocks=blocks, single_blocks=blocks)).state_dict().items()
        }
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, shape: torch.Size) -> Tensor:
        noise = torch.empty(shape).normal_(0, spread or shape[-1] ** -0.5, generator=generator)
        return (noise + name.endswith("scale")).bfloat16()

    return {name: values(name, shape) for name, shape in shapes.items()}


def ours(comfyui, name: str = USUAL, **options: object):
    return comfyui.run("FluxQuantLoader", model_name=name, **LOADER | options)


def theirs(comfyui, name: str = USUAL):
    return comfyui.run("UNETLoader", unet_name=name, weight_dtype="default")


def conditioning(context: int, pooled: int, seed: int = 0, words: int = 16, **more: object) -> list:
    generator = torch.Generator().manual_seed(seed)
    extra = {"pooled_output": torch.randn(1, pooled, generator=generator), "guidance": 3.5, **more}
    return [[torch.randn(1, words, context, generator=generator), extra]]


def sampled(
    comfyui, model, positive=None, negative=None, steps: int = 3, cfg: float = 1.0, size=(8, 8), **options
) -> Tensor:
    positive = positive or conditioning(SMALL["context"], SMALL["pooled"])
    given = dict(seed=7, sampler_name="euler", scheduler="simple", denoise=1.0) | options
    latent = {"samples": torch.zeros(1, 16, *size)}
    out = comfyui.run(
        "KSampler",
        model=model,
        steps=steps,
        cfg=cfg,
        positive=positive,
        negative=negative or positive,
        latent_image=latent,
        **given,
    )
    return out["samples"]


def apart(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def close(one: Tensor, other: Tensor, bound: float = BOUND) -> None:
    found = apart(one, other)
    print(f"apart: {found:.2e}")
    assert found < bound


def release(comfyui) -> None:
    comfyui.management.unload_all_models()
    gc.collect()


def loras_for(comfyui: SimpleNamespace) -> list[str]:
    """Two files in kohya's names, one of them on the modulation as well."""
    generator = torch.Generator().manual_seed(8)
    shapes = {
        "single_blocks_0_linear1": (SMALL["hidden"], 3 * SMALL["hidden"] + SMALL["mlp"]),
        "double_blocks_1_img_attn_qkv": (SMALL["hidden"], 3 * SMALL["hidden"]),
        "double_blocks_0_img_mod_lin": (SMALL["hidden"], 6 * SMALL["hidden"]),
    }
    for name, count in (("one.safetensors", 3), ("two.safetensors", 1)):
        tensors = {}
        for module, (inputs, outputs) in list(shapes.items())[:count]:
            tensors[f"lora_unet_{module}.lora_down.weight"] = torch.randn(4, inputs, generator=generator) * 0.1
            tensors[f"lora_unet_{module}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator) * 0.1
            tensors[f"lora_unet_{module}.alpha"] = torch.tensor(2.0)
        save_file(tensors, comfyui.models / "loras" / name)
    return ["one.safetensors", "two.safetensors"]


def with_loras(comfyui, model, names: list[str], node: str = "FluxQuantLora"):
    for name, strength in zip(names, (0.8, -0.5), strict=False):
        if node == "FluxQuantLora":
            model = comfyui.run(node, model=model, lora_name=name, strength=strength)
        else:
            model = comfyui.run(node, model=model, lora_name=name, strength_model=strength)
    return model


def encoders_for(comfyui: SimpleNamespace) -> tuple[str, str]:
    """T5 of three small layers, CLIP-L of its own size, in BF16."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    with torch.inference_mode(False):
        t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5)).state_dict()
        clip = CLIPTextModel(CLIPTextConfig(**CLIP)).state_dict()
        t5 = {name: tensor for name, tensor in t5.items() if not name.endswith("embed_tokens.weight")}
        clip = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
        for name, state in (("t5", t5), ("clip_l", clip)):
            state = {key: tensor.bfloat16().contiguous() for key, tensor in state.items() if "position_ids" not in key}
            save_file(state, comfyui.models / f"text_encoders/{name}.safetensors")
    return "t5.safetensors", "clip_l.safetensors"
