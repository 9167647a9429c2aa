"""Small pictures, models with more input channels and ControlNets, for tests of what drawings are given."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing.request import ControlRequest
from flux_quant.loading import load_flux

PROMPT = "large red apple on a white background"
SIZE = (96, 80)
CLOSE = 1e-5  # relative, of latents
STEPS = dict(num_inference_steps=3, guidance_scale=2.5)
ASKED = dict(steps=3, guidance=2.5, seed=4, size=SIZE)
NET = dict(num_layers=2, num_single_layers=3, guidance_embeds=True)


def write_files(folder: Path) -> Path:
    """Pictures of one size (one is not), masks, and the bundled transformer with more input channels."""
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 255, (2, 10, 12, 3), dtype=np.uint8)
    for name, values in zip(("given", "hint"), coarse, strict=True):
        Image.fromarray(values).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    Image.open(folder / "hint.png").resize((128, 64)).save(folder / "wide.png")
    mask = np.zeros((80, 96), np.uint8)
    mask[13:60, 30:77] = 255
    mask[13:60, 77:81] = 100  # grey, on the side that is kept
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:64]).save(folder / "short-mask.png")
    tensors = load_file(BUNDLED / "diffusion_models" / "flux1-tiny.safetensors")
    g = torch.Generator().manual_seed(2)
    for name, channels in (("control", 64), ("fill", 320)):
        own = tensors["img_in.weight"]
        more = torch.randn(len(own), channels, generator=g).to(own.dtype) / 16
        save_file(tensors | {"img_in.weight": torch.cat([own, more], dim=1)}, folder / f"{name}.safetensors")
    save_file(random_net(seed=1).state_dict(), folder / "net.safetensors")
    save_file(random_net(seed=2, num_mode=5).state_dict(), folder / "union.safetensors")
    save_file(alimama().state_dict(), folder / "inpainting.safetensors")
    other = random_net(seed=1, attention_head_dim=32)
    save_file(other.state_dict(), folder / "narrow.safetensors")
    return folder


def random_net(seed: int, **changes: object) -> nn.Module:
    from diffusers import FluxControlNetModel

    base = load_flux(find_components(BUNDLED).transformer).config
    arguments = {**base.diffusers(), **NET, **changes}
    arguments.pop("out_channels")
    arguments["axes_dims_rope"] = (8, 28, 28) if "attention_head_dim" not in changes else (4, 14, 14)
    net = FluxControlNetModel(**arguments).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    return net


def alimama() -> nn.Module:
    """diffusers' net with the wider condition, as Alimama publishes it; 3 double blocks serve the 2 of the model."""
    net = random_net(seed=3, num_layers=3, num_single_layers=0)
    wide = nn.Linear(68, net.inner_dim)
    nn.init.normal_(wide.weight, 0, 0.05, generator=torch.Generator().manual_seed(4))
    nn.init.zeros_(wide.bias)
    net.controlnet_x_embedder = wide
    return net.eval()


def rgb(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def control(files: Path, name: str = "net", **changes: object) -> ControlRequest:
    return ControlRequest(files / f"{name}.safetensors", **{"image": files / "hint.png", **changes})
