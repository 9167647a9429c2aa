"""Packed models saved and read again; quantization_config; stock readers of the files that are written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import flux_quant
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.errors import UserError
from flux_quant.frontends.diffusers import load
from flux_quant.linear import QuantLinear

FILES = find_components(BUNDLED)
IDS = torch.arange(2, 26)[None]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(
    ("name", "written"),
    [("q8_0", ".gguf"), ("q4_k_m", ".gguf"), ("fp8", ".safetensors"), ("bf16", ".safetensors")],
)
def test_the_engine_is_saved_as_an_ordinary_file(name: str, written: str, tmp_path: Path):
    source = FILES.transformer
    if name != "bf16":
        source = tmp_path / f"model{written}"
        run(make_plan(Conversion(FILES.transformer, source, name)))
    own, folder = load(source, device="cpu"), tmp_path / "saved"
    own.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", f"diffusion_pytorch_model{written}"]
    assert_same(own, type(own).from_pretrained(folder))
    with open_checkpoint(source) as before, open_checkpoint(folder) as after:
        assert after.tensors.keys() == before.tensors.keys()
        formats = {n: (before.tensors[n].format, info.format) for n, info in after.tensors.items()}
    assert all(old == new for n, (old, new) in formats.items() if n.endswith("weight") and "_blocks" in n), formats


def test_what_is_not_saved_is_said(tmp_path: Path):
    from flux_quant.linear import set_compute_

    transformer = load(FILES.transformer, device="cpu", compute="int8")
    with pytest.raises(UserError, match="requantized to int8_rows"):
        transformer.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert set_compute_(transformer.engine, "int8") == {}


def tiny_flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=64,
        pooled_projection_dim=32, in_channels=16, axes_dims_rope=(4, 14, 14),
    ).eval()  # fmt: skip


def tiny_t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config).eval()


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.mark.parametrize("make", [tiny_flux, tiny_t5, tiny_llama], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "fp8"])
def test_quantization_config(make, name: str, tmp_path: Path):
    """from_pretrained packs as `quantize_` does; what it gives is saved packed, and read again without a config."""
    own = make()
    cls = type(own)
    own.save_pretrained(tmp_path / "own")
    config = flux_quant.FluxQuantConfig(name, keep=("*.1.*",))
    packed = cls.from_pretrained(tmp_path / "own", quantization_config=config)
    replaced = flux_quant.quantize_(own, name, keep=["*.1.*"])
    assert_same(packed, own)
    assert any(isinstance(layer, QuantLinear) for layer in packed.modules())
    for i, model in enumerate((packed, own)):
        folder = tmp_path / str(i)
        model.save_pretrained(folder)
        kinds = {path.suffix for path in folder.iterdir()}
        assert kinds <= {".json", ".safetensors"}
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert settings["quant_method"] == "flux_quant" and settings["formats"] == replaced
        again = cls.from_pretrained(folder, torch_dtype=torch.float32)
        assert_same(again, own)
        again.to(torch.bfloat16)
        assert again.dtype == torch.bfloat16


@torch.no_grad()
def test_text_encoders_of_files_are_saved_packed(tmp_path: Path):
    from transformers import CLIPTextModel, T5EncoderModel

    path = tmp_path / "t5.gguf"
    run(make_plan(Conversion(FILES.t5, path, "q8_0")))
    for source, cls in ((path, T5EncoderModel), (FILES.t5, T5EncoderModel), (FILES.clip, CLIPTextModel)):
        own = flux_quant.load_text_encoder(source, device="cpu")
        folder = tmp_path / f"{source.stem}-{cls.__name__}"
        own.save_pretrained(folder)
        assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
        again = cls.from_pretrained(folder)
        assert_same(own, again)
        torch.testing.assert_close(again(IDS)[0], own(IDS)[0], rtol=1e-4, atol=1e-5)


def test_bad_configs(tmp_path: Path):
    with pytest.raises(UserError, match="format q9 is unknown"):
        flux_quant.FluxQuantConfig("q9")
    model = tiny_t5()
    flux_quant.quantize_(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"]["formats"]["encoder.block.9.wo"] = "q8_0"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="packs encoder.block.9.wo, which T5EncoderModel does not have"):
        type(model).from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def full_width(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of each kind, as wide as FLUX.1: diffusers' reader knows no other width. Random, 1 GB."""
    from flux_quant.arch import FluxConfig
    from flux_quant.model import Flux

    with torch.device("meta"):
        model = Flux(FluxConfig(64, 64, 3072, 128, 12288, 64, 64, 1, 1, True))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5).bfloat16()
        for name, p in model.named_parameters()
    }
    path = tmp_path_factory.mktemp("wide") / "model.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "close"), [("q8_0", 5e-4), ("fp8_plain", 1e-4)])  # it unpacks GGUF in float16
@torch.no_grad()
def test_the_stock_reader_of_diffusers_loads_our_files(name: str, close: float, full_width: Path, tmp_path: Path):
    """`from_single_file` gives the same step as our engine."""
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    path = tmp_path / ("model.safetensors" if name == "fp8_plain" else "model.gguf")
    run(make_plan(Conversion(full_width, path, name)))
    own = load(path, device="cpu")
    with torch.device("meta"):
        FluxTransformer2DModel(**own.engine.config.diffusers()).save_config(tmp_path / "config")
    options = dict(config=str(tmp_path / "config"), torch_dtype=torch.float32, local_files_only=True)
    if path.suffix == ".gguf":
        options["quantization_config"] = GGUFQuantizationConfig(compute_dtype=torch.float32)
    theirs = FluxTransformer2DModel.from_single_file(str(path), **options).eval()
    g = torch.Generator().manual_seed(0)
    given = dict(
        hidden_states=torch.randn(1, 12, 64, generator=g),
        encoder_hidden_states=torch.randn(1, 8, 64, generator=g),
        pooled_projections=torch.randn(1, 64, generator=g),
        timestep=torch.tensor([0.7]),
        img_ids=torch.zeros(12, 3),
        txt_ids=torch.zeros(8, 3),
        guidance=torch.tensor([3.5]),
        return_dict=False,
    )
    found, expected = theirs(**given)[0], own(**given)[0]
    assert float((found - expected).norm() / expected.norm()) < close
