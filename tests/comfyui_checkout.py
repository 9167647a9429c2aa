"""A checkout of ComfyUI inside this process, on the CPU, with model folders of its own: for test_comfyui_real.py.

Its requirements have to be installed, except torchvision, torchaudio and others that a FLUX.1 workflow never calls:
where those are absent, modules of any content stand in for them.
"""

import asyncio
import importlib.abc
import importlib.util
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import torch

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
