"""A small stand-in for the interfaces of ComfyUI that the node pack uses: enough to run its nodes without ComfyUI.

What it says of ComfyUI is held to the truth by test_comfyui_real.py, which runs the same nodes in a checkout.
"""

import importlib
import sys
import types
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_quant.components import BUNDLED

CPU = torch.device("cpu")
PACK = "flux_quant.frontends.comfyui"
VOCABULARY = 64  # of the tokenizers


class Interrupted(Exception):
    pass


class ModelType:
    FLUX, FLOW = "flux", "flow"


class Config:
    def __init__(self, state: dict[str, Tensor]) -> None:
        self.unet_config = {"in_channels": state["img_in.weight"].shape[1] // 4, "out_channels": 16}

    def set_inference_dtype(self, dtype: torch.dtype, manual_cast: torch.dtype | None) -> None:
        self.dtype = dtype


class FluxBase(nn.Module):
    def __init__(self, config: Config, model_type: str) -> None:
        super().__init__()
        assert config.unet_config["disable_unet_model_creation"]
        self.model_config, self.model_type = config, model_type

    def get_dtype(self) -> torch.dtype:
        return self.diffusion_model.dtype

    def memory_required(self, input_shape: list[int], cond_shapes: object = None) -> float:
        return 1.0


class ModelPatcher:
    def __init__(self, model, load_device, offload_device, size=0, **more) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches_uuid, self.model_options = uuid.uuid4(), {"transformer_options": {}}
        self.object_patches, self.is_clip, self.callbacks = {}, False, []

    def clone(self) -> "ModelPatcher":
        copy = type(self)(self.model, self.load_device, self.offload_device, self.model_size())
        copy.patches_uuid = self.patches_uuid
        copy.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        copy.object_patches = dict(self.object_patches)
        return copy

    def clone_has_same_weights(self, clone: "ModelPatcher") -> bool:
        return self.model is clone.model

    def model_size(self) -> int:
        return 0

    @contextmanager
    def use_ejected(self):
        yield

    def get_all_callbacks(self, kind: str) -> list:
        return self.callbacks

    def patch_model(self, load_weights: bool = True):
        assert not load_weights
        return self.model

    def unpatch_model(self, device=None, unpatch_weights: bool = True) -> None:
        assert not unpatch_weights, "the weights are the engine's own to move"

    def detach(self, unpatch_all: bool = True):
        self.unpatch_model(self.offload_device, unpatch_weights=unpatch_all)
        return self.model

    def add_object_patch(self, name: str, obj: object) -> None:
        self.object_patches[name] = obj


class Tokenizer:
    """A letter is a token."""

    end_token, pad_token = 1, 0

    def __init__(self, first: int | None, length: int) -> None:
        self.first, self.length, self.tokenizer = first, length, self

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY)}

    def tokens(self, text: str, weight: float) -> list[list[tuple[int, float]]]:
        ids = [2 + ord(letter) % (VOCABULARY - 4) for letter in text]
        ids = ([] if self.first is None else [self.first]) + ids[: self.length - 2] + [1]
        weights = [weight if 0 < i < len(ids) - 1 else 1.0 for i in range(len(ids))]
        return [list(zip(ids, weights, strict=True)) + [(0, 1.0)] * (self.length - len(ids))]


class FluxTokenizer:
    def __init__(self, embedding_directory: list[str]) -> None:
        self.clip_l, self.t5xxl = Tokenizer(0, 24), Tokenizer(None, 32)

    def tokenize_with_weights(self, text: str, weight: float = 1.0) -> dict[str, list]:
        return {"l": self.clip_l.tokens(text, 1.0), "t5xxl": self.t5xxl.tokens(text, weight)}


class CLIP:
    def __init__(self, no_init: bool = False) -> None:
        assert no_init

    def clone(self) -> "CLIP":
        copy = CLIP(no_init=True)
        vars(copy).update(vars(self))
        copy.patcher = self.patcher.clone()
        return copy

    def tokenize(self, text: str, **options: float) -> dict[str, list]:
        return self.tokenizer.tokenize_with_weights(text, **options)

    def encode_from_tokens_scheduled(self, tokens: dict[str, list]) -> list:
        self.cond_stage_model.reset_clip_options()
        if self.layer_idx is not None:
            self.cond_stage_model.set_clip_options({"layer": self.layer_idx})
        cond, pooled = self.cond_stage_model.encode_token_weights(tokens)
        return [[cond, {"pooled_output": pooled}]]


class Executor:
    def __init__(self, function, owner, wrappers) -> None:
        self.function, self.wrappers = function, wrappers

    @classmethod
    def new_class_executor(cls, function, owner, wrappers) -> "Executor":
        return cls(function, owner, wrappers)

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.function(*args, **kwargs)
        return self.wrappers[0](lambda *a, **k: self.function(*a, **k), *args, **kwargs)


def optimized_attention(q, k, v, heads, mask=None, skip_reshape=False, **options) -> Tensor:
    """(B, H, L, C) each -> (B, L, H C), or what a node has put in its place makes of the same arguments."""
    override = options.get("transformer_options", {}).get("optimized_attention_override")
    if override and not options.get("_inside_attn_wrapper"):
        more = options | {"mask": mask, "skip_reshape": skip_reshape, "_inside_attn_wrapper": True}
        return override(optimized_attention, q, k, v, heads, **more)
    assert skip_reshape and mask is None and q.shape[1] == heads
    return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Bar:
    seen: list[tuple[int, int]] = []

    def __init__(self, total: int) -> None:
        pass

    def update_absolute(self, value: int, total: int | None = None) -> None:
        self.seen.append((value, total))


def modules(models: Path, devices: SimpleNamespace) -> dict[str, types.ModuleType]:
    """By their names, for sys.modules. `devices.interrupted` makes the next question of that kind end the work."""

    def ask() -> None:
        if devices.interrupted:
            devices.interrupted = False
            raise Interrupted

    def listed(kind: str) -> list[str]:
        folders, suffixes = known[kind]
        found = (path for folder in map(Path, folders) for path in folder.rglob("*") if path.suffix in suffixes)
        return sorted(path.relative_to(models / path.relative_to(models).parts[0]).as_posix() for path in found)

    def full_path(kind: str, name: str) -> str | None:
        paths = (Path(folder) / name for folder in known[kind][0])
        return next((str(path) for path in paths if path.exists()), None)

    def pad(x: Tensor, patch: tuple[int, int]) -> Tensor:
        bottom, right = (-x.shape[2] % patch[0], -x.shape[3] % patch[1])
        return nn.functional.pad(x, (0, right, 0, bottom), mode="circular") if bottom or right else x

    known = {}
    for kind in ("diffusion_models", "checkpoints", "text_encoders", "loras"):
        (models / kind).mkdir(parents=True, exist_ok=True)
        known[kind] = ([str(models / kind)], {".safetensors"})
    content = {
        "comfy": {},
        "comfy.ldm": {},
        "comfy.ldm.common_dit": dict(pad_to_patch_size=pad),
        "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": dict(optimized_attention=optimized_attention),
        "comfy.model_base": dict(Flux=FluxBase, ModelType=ModelType),
        "comfy.model_detection": dict(model_config_from_unet=lambda state, prefix: Config(state)),
        "comfy.model_management": dict(
            throw_exception_if_processing_interrupted=ask,
            get_torch_device=lambda: CPU,
            text_encoder_device=lambda: CPU,
            intermediate_device=lambda: CPU,
            unet_offload_device=lambda: CPU,
            unet_dtype=lambda device, count, supported: torch.float32,
            current_loaded_models=[],
        ),
        "comfy.model_patcher": dict(ModelPatcher=ModelPatcher),
        "comfy.patcher_extension": dict(
            WrapperExecutor=Executor,
            WrappersMP=SimpleNamespace(DIFFUSION_MODEL="diffusion_model"),
            CallbacksMP=SimpleNamespace(ON_LOAD="on_load"),
            get_all_wrappers=lambda kind, options: options.get("wrappers", {}).get(kind, []),
        ),
        "comfy.sd": dict(CLIP=CLIP),
        "comfy.text_encoders": {},
        "comfy.text_encoders.flux": dict(FluxTokenizer=FluxTokenizer),
        "comfy.utils": dict(ProgressBar=Bar),
        "folder_paths": dict(
            folder_names_and_paths=known,
            get_filename_list=listed,
            get_full_path=full_path,
            get_folder_paths=lambda kind: [],
        ),
    }
    made = {}
    for name, values in content.items():
        made[name] = types.ModuleType(name)
        made[name].__spec__ = types.SimpleNamespace(name=name)
        vars(made[name]).update(values)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(made[parent], last, made[name])
    made["comfy"].__path__ = []
    return made


def with_pack(tiny_flux: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What a fixture of the scope of a module yields: the pack, its nodes, and a folder of models."""
    models, devices = tmp_path_factory.mktemp("models"), SimpleNamespace(interrupted=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules(models, devices).items():
            patch.setitem(sys.modules, name, module)
        save_file(tiny_flux, models / "diffusion_models/tiny.safetensors")
        for name in ("t5", "clip_l"):
            source = BUNDLED / f"text_encoders/{name}.safetensors"
            (models / f"text_encoders/{name}.safetensors").write_bytes(source.read_bytes())
        pack = importlib.import_module(PACK)
        parts = {name: importlib.import_module(f"{PACK}.{name}") for name in ("patcher", "seat", "places", "clip")}

        def run(kind: str, /, **inputs: object) -> object:
            node = pack.NODE_CLASS_MAPPINGS[kind]
            return getattr(node(), node.FUNCTION)(**inputs)

        yield SimpleNamespace(
            run=run, nodes=pack.NODE_CLASS_MAPPINGS, models=models, devices=devices, pack=pack, **parts
        )
    for name in [name for name in sys.modules if name.startswith(PACK)]:
        del sys.modules[name]


def loaded(comfy, name: str = "tiny.safetensors", **options: object) -> ModelPatcher:
    given = dict(vram_budget="auto", ram_budget="auto", compute="auto", hoisted_modulation=True) | options
    (model,) = comfy.run("FluxQuantLoader", model_name=name, **given)
    model.partially_load(model.load_device, 1e32)
    return model


def inputs(config, batch: int = 1, size: tuple[int, int] = (8, 6)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return dict(
        x=torch.randn(batch, config.in_channels // 4, *size, generator=generator),
        timestep=torch.full((batch,), 0.6),
        context=torch.randn(batch, 12, config.context, generator=generator),
        y=torch.randn(batch, config.pooled, generator=generator),
        guidance=torch.full((batch,), 3.5),
    )


@torch.no_grad()
def drawn(model, **more: object) -> Tensor:
    net = model.model.diffusion_model
    return net(**(inputs(net.seat.engine.config) | more))


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()
