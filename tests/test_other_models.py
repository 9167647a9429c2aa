"""Conversion of what is no FLUX.1 transformer and no T5: ControlNet, CLIP, VAE, Redux, SDXL, in small."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.converters.verify import verify
from flux_quant.errors import UserError

PARTS = find_components(BUNDLED)
LARGEST_ERROR = {"q8_0": 0.006, "q4_k": 0.08, "q6_k": 0.02, "fp8": 0.03, "fp8_plain": 0.06, "f16": 1e-3, "bf16": 3e-3}


def controlnet(folder: Path) -> Path:
    from diffusers import FluxControlNetModel

    torch.manual_seed(0)
    sizes = dict(num_layers=1, num_single_layers=1, attention_head_dim=128, num_attention_heads=2)
    model = FluxControlNetModel(
        **sizes, joint_attention_dim=256, pooled_projection_dim=64, guidance_embeds=True, num_mode=3
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder / "controlnet")
    return folder / "controlnet"


def sdxl(folder: Path) -> Path:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=256,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=256,
        use_linear_projection=True,
    )
    model.save_pretrained(folder / "unet")
    return folder / "unet"


def redux(folder: Path) -> Path:
    torch.manual_seed(0)
    shapes = {
        "redux_up.weight": (96, 64),
        "redux_up.bias": (96,),
        "redux_down.weight": (64, 96),
        "redux_down.bias": (64,),
    }
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "redux.safetensors")
    return folder / "redux.safetensors"


CASES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "ControlNet Q4_K_S": (controlnet, "q4_k_s", ".gguf"),
    "ControlNet FP8": (controlnet, "fp8", ".safetensors"),
    "SDXL Q4_K_M": (sdxl, "q4_k_m", ".gguf"),
    "SDXL Q8_0": (sdxl, "q8_0", ".gguf"),
    "SDXL FP8": (sdxl, "fp8", ".safetensors"),
    "CLIP FP8": (lambda _: PARTS.clip, "fp8", ".safetensors"),
    "CLIP F16": (lambda _: PARTS.clip, "f16", ".safetensors"),
    "VAE F16": (lambda _: PARTS.vae, "f16", ".safetensors"),
    "VAE F32": (lambda _: PARTS.vae, "f32", ".safetensors"),
    "Redux BF16": (redux, "bf16", ".safetensors"),
}


def values(path: Path) -> dict[str, Tensor]:
    (component,) = components(open_checkpoint(path))
    return {name: load(component, name) for name in component.tensors}


@pytest.mark.parametrize(("make", "format_name", "suffix"), CASES.values(), ids=CASES)
def test_values_survive(tmp_path, make, format_name, suffix):
    """Every tensor is within its format's error, the bulk has the format, vectors are plain, and `verify` agrees."""
    source, target = make(tmp_path), tmp_path / f"out{suffix}"
    result = run(make_plan(Conversion(source, target, format_name)))
    originals, found = values(source), values(target)
    assert set(found) == set(originals)
    stored = open_checkpoint(target)
    for name, original in originals.items():
        kind = stored.stored_as(name) if name in stored.tensors else "f32"
        error = (found[name] - original).norm() / original.norm().clamp(min=1e-9)
        assert error <= LARGEST_ERROR.get(kind, 0.12 if kind not in ("f32", "bf16") else 1e-6), (name, kind)
        assert original.ndim > 1 or kind in ("f32", "f16", "bf16")
    largest = max(result.formats.items(), key=lambda item: item[1].parameters)[0]
    assert largest == {"q4_k_s": "q4_k", "q4_k_m": "q4_k"}.get(format_name, format_name)
    assert not verify(target, source).problems


def test_what_is_not_offered(tmp_path):
    for path, format_name, name, message in (
        (PARTS.clip, "q8_0", "x.gguf", "a CLIP-L is not written as .gguf"),
        (PARTS.vae, "fp8", "x.safetensors", "draws visible noise"),
        (redux(tmp_path), "q8_0", "x.gguf", "a FLUX Redux is not written as .gguf"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(Conversion(path, tmp_path / name, format_name))
