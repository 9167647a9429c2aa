"""Random ControlNets of diffusers for a small model, what they are given, and a drawing."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.controlnet import Control, combined
from flux_quant.drawing.sampling import Conditioning, Drawing
from flux_quant.model import Residuals, image_ids, text_ids

BASE = FluxConfig(64, 64, 64, 32, 256, 48, 40, 7, 9, True)
GRID = (3, 5)
NETS = {  # diffusers' arguments
    "double and single": dict(num_layers=3, num_single_layers=4, guidance_embeds=True),
    "6 + 0": dict(num_layers=6, num_single_layers=0, guidance_embeds=True),
    "Union": dict(num_layers=2, num_single_layers=2, guidance_embeds=True, num_mode=7),
    "unguided": dict(num_layers=1, num_single_layers=0),
    "as deep as the model": dict(num_layers=7, num_single_layers=9, guidance_embeds=True),
    "deeper": dict(num_layers=9, num_single_layers=0, guidance_embeds=True),
}


def randomise(model: nn.Module, seed: int = 3) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.06, generator=generator)
    return model.eval()


def diffusers_net(seed: int = 3, **changes: object) -> nn.Module:
    from diffusers import FluxControlNetModel

    config = {**BASE.diffusers(), **changes}
    config.pop("out_channels")
    if "guidance_embeds" not in changes:
        config["guidance_embeds"] = False
    return randomise(FluxControlNetModel(**config), seed)


def saved(net: nn.Module, folder: Path, name: str = "net") -> Path:
    save_file(net.state_dict(), folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def inputs(batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(7)
    tokens = GRID[0] * GRID[1]
    return dict(
        img=torch.randn(batch, tokens, 64, generator=g),
        txt=torch.randn(batch, 6, BASE.context, generator=g),
        pooled=torch.randn(batch, BASE.pooled, generator=g),
        timestep=torch.tensor([0.7, 0.2])[:batch],
        guidance=torch.tensor([3.5, 1.0])[:batch],
        img_ids=image_ids(*GRID),
        txt_ids=text_ids(6),
    )


def condition(seed: int = 11, channels: int = 64, batch: int = 2) -> Tensor:
    return torch.randn(batch, GRID[0] * GRID[1], channels, generator=torch.Generator().manual_seed(seed))


def in_diffusers_names(x: dict[str, Tensor]) -> dict[str, Tensor]:
    names = dict(img="hidden_states", txt="encoder_hidden_states", pooled="pooled_projections")
    return {names.get(name, name): value for name, value in x.items()}


def drawing(steps: int = 3, **changes: object) -> Drawing:
    x = inputs()
    levels = torch.linspace(1, 0, steps + 1).tolist()
    return Drawing(x["img"], Conditioning(x["txt"], x["pooled"]), GRID, levels, **changes)


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def residuals_of(net, x: dict[str, Tensor], cond: Tensor, scale: float = 1.0, mode: int | None = None) -> Residuals:
    vec = net.steering(x["pooled"], x["timestep"], x["guidance"], torch.float32)
    double, single = net(x["img"], cond, x["txt"], x["img_ids"], x["txt_ids"], vec, mode)
    control = Control(net, cond, scale)
    return Residuals(
        combined([(control, double)], BASE.double_blocks), combined([(control, single)], BASE.single_blocks)
    )
