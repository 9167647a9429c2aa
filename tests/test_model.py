"""The engine against diffusers' transformer, and over packed weights against the same weights unpacked."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.errors import UserError
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux
from flux_quant.model import Flux, image_ids, pack_latents, text_ids, unpack_latents
from flux_quant.naming import to_diffusers

CONFIGS = {
    "dev": FluxConfig(64, 64, 256, 64, 1024, 128, 96, 2, 5, True),
    "dev, heads of 128": FluxConfig(64, 64, 256, 128, 1024, 128, 96, 1, 2, True),
    "schnell": FluxConfig(64, 64, 128, 32, 512, 64, 32, 2, 3, False),
    "Fill": FluxConfig(384, 64, 128, 64, 512, 96, 48, 1, 1, True),
}


def random_inputs(config: FluxConfig, rows: int, columns: int, tokens: int, batch: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return dict(
        img=torch.randn(batch, rows * columns, config.in_channels, generator=g),
        txt=torch.randn(batch, tokens, config.context, generator=g),
        pooled=torch.randn(batch, config.pooled, generator=g),
        timestep=torch.rand(batch, generator=g),
        img_ids=image_ids(rows, columns),
        txt_ids=text_ids(tokens),
        guidance=torch.tensor([1.0, 3.5, 6.0])[:batch] if config.guidance else None,
    )


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.06, generator=generator)
    return model.eval()


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grid", [(5, 7), (1, 1)], ids=str)
@torch.no_grad()
def test_engine_equals_diffusers(name: str, grid: tuple[int, int]):
    from diffusers import FluxTransformer2DModel

    config = CONFIGS[name]
    model = randomise(Flux(config))
    judge = FluxTransformer2DModel(**config.diffusers()).eval()
    judge.load_state_dict(to_diffusers(model.state_dict()))
    x = random_inputs(config, *grid, tokens=11)
    expected = judge(
        hidden_states=x["img"],
        encoder_hidden_states=x["txt"],
        pooled_projections=x["pooled"],
        timestep=x["timestep"],
        img_ids=x["img_ids"],
        txt_ids=x["txt_ids"],
        guidance=x["guidance"],
    ).sample
    assert expected.norm() > 1
    assert relative_error(model(**x), expected) < 1e-5


@torch.no_grad()
def test_config_comes_from_shapes():
    for config in CONFIGS.values():
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in Flux(config).state_dict().items()}
        assert FluxConfig.from_shapes(shapes) == config


@pytest.mark.parametrize("target", ["q8_0.gguf", "q5_0.gguf", "q4_0.gguf", "fp8.safetensors", "bf16.safetensors"])
@torch.no_grad()
def test_packed_engine_equals_unpacked(target: str, tiny_flux_file: Path, tmp_path: Path):
    path = tmp_path / f"model-{target}"
    run(make_plan(Conversion(tiny_flux_file, path, target.split(".")[0])))
    packed = load_flux(path)
    linears = [module for module in packed.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == sum(isinstance(module, nn.Linear) for module in Flux(packed.config).modules())
    with open_checkpoint(path) as reader:
        plain = Flux(packed.config).eval()
        plain.load_state_dict({name: load(reader, name) for name in reader.tensors})
    x = random_inputs(packed.config, 3, 5, tokens=7)
    assert relative_error(packed(**x), plain(**x)) < 1e-5


@torch.no_grad()
def test_bfloat16_activations_leave_packed_weights_alone(tiny_flux_file: Path, tmp_path: Path):
    path = tmp_path / "model.gguf"
    run(make_plan(Conversion(tiny_flux_file, path, "q8_0")))
    precise, cast = load_flux(path), load_flux(path).to(torch.bfloat16)
    x = random_inputs(precise.config, 4, 4, tokens=6)
    y = cast(**{k: v.bfloat16() if k in ("img", "txt", "pooled") else v for k, v in x.items()})
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), precise(**x)) < 0.05


def test_guided_model_wants_guidance(tiny_flux_file: Path):
    model = load_flux(tiny_flux_file)
    x = random_inputs(model.config, 2, 2, tokens=3) | {"guidance": None}
    with pytest.raises(ValueError, match="guidance"):
        model(**x)


def test_latents_pack_as_in_diffusers():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 6, 10)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack_latents(packed, 3, 5), latents)
    expected = FluxPipeline._prepare_latent_image_ids(1, 3, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(3, 5), expected)


@pytest.mark.parametrize("damage", ["missing", "shape", "extra"])
def test_wrong_tensors_are_named(damage: str, tiny_flux: dict[str, Tensor], tmp_path: Path):
    from safetensors.torch import save_file

    tensors, name = dict(tiny_flux), "single_blocks.1.linear2.bias"
    if damage == "missing":
        del tensors[name]
    else:
        name = name if damage == "shape" else "single_blocks.1.linear3.bias"
        tensors[name] = torch.zeros(7, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=name):
        load_flux(tmp_path / "model.safetensors")


@pytest.mark.gpu
@pytest.mark.parametrize("target", ["q8_0.gguf", "q4_0.gguf", "fp8.safetensors", "bf16.safetensors"])
@torch.no_grad()
def test_engine_on_cuda_equals_cpu(target: str, tiny_flux_file: Path, tmp_path: Path):
    path = tmp_path / f"model-{target}"
    run(make_plan(Conversion(tiny_flux_file, path, target.split(".")[0])))
    expected_model, model = load_flux(path), load_flux(path).to("cuda")
    x = random_inputs(model.config, 3, 5, tokens=7)
    expected = expected_model(**x)
    moved = {name: value.cuda() for name, value in x.items()}
    assert relative_error(model(**moved).cpu(), expected) < 1e-3  # matrix products may use TF32
    half = {k: v.bfloat16() if k in ("img", "txt", "pooled") else v for k, v in moved.items()}
    assert relative_error(model.to(torch.bfloat16)(**half).float().cpu(), expected) < 0.05
