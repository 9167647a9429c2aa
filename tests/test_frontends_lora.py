"""LoRAs on our transformer in a pipeline: our methods, and those that pipelines call with PEFT and without."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_device import half_memory
from torch import Tensor

from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.lora_io import read_lora
from flux_quant.errors import UserError
from flux_quant.frontends.diffusers import EngineTransformer, load, transformer_class
from flux_quant.loading import load_flux
from flux_quant.lora import apply_, shapes_in

FILE = find_components(BUNDLED).transformer


def write_lora(path: Path, seed: int, rank: int = 4) -> Path:
    """In diffusers' names: some attention and feed-forward layers of both kinds of block."""
    generator = torch.Generator().manual_seed(seed)
    hidden = load_flux(FILE).config.hidden
    modules = {"transformer_blocks.0.attn.to_q": hidden, "transformer_blocks.1.ff.net.0.proj": 4 * hidden}
    modules |= {"single_transformer_blocks.1.attn.to_v": hidden, "transformer_blocks.0.norm1.linear": 6 * hidden}
    tensors = {}
    for name, rows in modules.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, hidden, generator=generator) / hidden**0.5
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) / rank**0.5
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loras")
    return [write_lora(folder / f"{name}.safetensors", i) for i, name in enumerate(("style", "face"))]


@pytest.fixture(params=["whole", "streamed"])
def transformer(request: pytest.FixtureRequest) -> EngineTransformer:
    return load(FILE, device="cpu") if request.param == "whole" else fresh(half_memory())


def fresh(memory=None) -> EngineTransformer:
    return transformer_class()(load_flux(FILE), None, memory)


@torch.no_grad()
def step(transformer: EngineTransformer, **more: object) -> Tensor:
    g, config = torch.Generator().manual_seed(0), transformer.config
    given = dict(
        hidden_states=torch.randn(1, 12, 64, generator=g),
        encoder_hidden_states=torch.randn(1, 8, config.joint_attention_dim, generator=g),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=g),
        timestep=torch.tensor([0.7]),
        img_ids=torch.zeros(12, 3),
        txt_ids=torch.zeros(8, 3),
        guidance=torch.tensor([3.5]),
    )
    return transformer(**given, **more, return_dict=False)[0]


def expected(*rows: tuple[Path, float]) -> Tensor:
    """By `lora.apply_`, which `test_lora*` hold to diffusers and PEFT."""
    transformer = fresh()
    shapes = shapes_in(transformer.engine)
    apply_(transformer.engine, [(read_lora(path, shapes), strength) for path, strength in rows], dtype=torch.float32)
    return step(transformer)


def test_files(transformer: EngineTransformer, files: list[Path]):
    before = step(transformer)
    assert transformer.load_lora(files[0], 0.8) == "style"
    assert torch.equal(step(transformer), expected((files[0], 0.8)))
    transformer.load_lora(files[1], 0.5, name="other")
    assert torch.equal(step(transformer), expected((files[0], 0.8), (files[1], 0.5)))
    transformer.set_lora("style", 0.1)
    assert torch.equal(step(transformer), expected((files[0], 0.1), (files[1], 0.5)))
    transformer.set_lora("other", 0)
    assert torch.equal(step(transformer), expected((files[0], 0.1)))
    transformer.unload_lora()
    assert torch.equal(step(transformer), before) and not transformer.peft_config


def test_scale_of_a_call(transformer: EngineTransformer, files: list[Path]):
    transformer.load_lora(files[0], 0.8)
    whole = step(transformer)
    half = step(transformer, joint_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(half, expected((files[0], 0.4)), rtol=1e-5, atol=1e-5)
    assert torch.equal(step(transformer), whole) and not torch.equal(half, whole)


def test_what_pipelines_call(transformer: EngineTransformer, files: list[Path]):
    before = step(transformer)
    for path in files:
        transformer.load_lora_adapter(load_file(path), adapter_name=path.stem)
    assert list(transformer.peft_config) == ["style", "face"]
    assert torch.equal(step(transformer), expected((files[0], 1.0), (files[1], 1.0)))
    transformer.set_adapters(["face"], [0.3])
    assert torch.equal(step(transformer), expected((files[1], 0.3)))
    transformer.disable_lora()
    assert torch.equal(step(transformer), before)
    transformer.enable_lora()
    assert torch.equal(step(transformer), expected((files[1], 0.3)))
    transformer.delete_adapters("face")
    transformer.set_adapters("style")
    assert torch.equal(step(transformer), expected((files[0], 1.0)))


def test_what_cannot_be_says_what_to_call(files: list[Path], tmp_path: Path):
    transformer = fresh()
    transformer.load_lora(files[0])
    before = step(transformer)
    tensors = load_file(files[0])
    wide = {**tensors, "transformer.x_embedder.lora_A.weight": torch.ones(2, 128)}
    wide["transformer.x_embedder.lora_B.weight"] = torch.ones(transformer.engine.config.hidden, 2)
    for call, message in (
        (lambda: transformer.fuse_lora(lora_scale=1.0), "flux-quant convert MODEL --lora FILE"),
        (lambda: transformer.unfuse_lora(), "flux-quant convert MODEL --lora FILE"),
        (lambda: transformer.load_lora(files[0]), "there is a LoRA style already"),
        (lambda: transformer.set_lora("face", 1), "no LoRA face here; loaded: style"),
        (lambda: transformer.set_adapters(["style"], [{"transformer": 1}]), "is not one number"),
        (lambda: transformer.load_lora_adapter(wide), r"control LoRA.*transformer.load_lora\(FILE"),
        (lambda: transformer.load_lora_adapter(tensors, hotswap=True), "hotswap"),
        (lambda: transformer.load_lora_adapter("style.safetensors"), r"transformer.load_lora\(FILE"),
        (lambda: transformer.save_pretrained(tmp_path), "unload them first"),
    ):
        with pytest.raises(UserError, match=message):
            call()
        assert torch.equal(step(transformer), before)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="pipelines load LoRAs with PEFT only")
def test_pipelines_with_peft(transformer: EngineTransformer, files: list[Path]):
    import flux_quant

    pipe = flux_quant.pipeline(BUNDLED, device="cpu")
    pipe.transformer = transformer
    before = step(transformer)
    for path in files:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
    assert pipe.get_list_adapters() == {"transformer": ["style", "face"]}
    pipe.set_adapters(["style", "face"], adapter_weights=[0.8, 0.5])
    assert torch.equal(step(transformer), expected((files[0], 0.8), (files[1], 0.5)))
    with pytest.raises(UserError, match="flux-quant convert"):
        pipe.fuse_lora(components=["transformer"])
    pipe.delete_adapters("style")
    assert torch.equal(step(transformer), expected((files[1], 0.5)))
    pipe.unload_lora_weights()
    assert torch.equal(step(transformer), before)
