"""LoRAs where pictures are made: streamed with their blocks, in plans, by step, in text encoders, in `generate`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_runtime import drawing, drawn, memory, planned
from torch import Tensor

from flux_quant import runtime
from flux_quant.cli import main
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_math import fused
from flux_quant.drawing.request import Request
from flux_quant.drawing.sampling import denoise
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.generation import encode, generate
from flux_quant.kernels import dispatch
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_clip, load_flux, load_t5
from flux_quant.lora import applied_to, apply_, remove_, set_strength_, shapes_in
from flux_quant.model import pack_latents
from flux_quant.modulation import HoistedModulation
from flux_quant.text.encode import TextOptions
from lora_checks import random


@pytest.fixture(scope="module")
def bundled() -> Components:
    return find_components(BUNDLED)


@pytest.fixture
def model(bundled):
    return load_flux(bundled.transformer)


def everywhere(model, rank: int = 4, seed: int = 0, size: float = 0.3) -> dict[str, Tensor]:
    """On every linear: blocks, modulation, embedders, the last layer; a bias in one."""
    tensors = {}
    for i, (name, shape) in enumerate(shapes_in(model).items()):
        if len(shape) == 2:
            module = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = random(rank, shape[1], seed=seed + i)
            tensors[f"{module}.lora_B.weight"] = size * random(shape[0], rank, seed=seed - i)
    return tensors | {"diffusion_model.double_blocks.0.img_attn.proj.diff_b": random(*shapes_in(model)["img_in.bias"])}


def saved(folder: Path, tensors: dict[str, Tensor], name: str = "lora") -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture
def lora(model, tmp_path):
    return read_lora(saved(tmp_path, everywhere(model)), shapes_in(model))


def test_the_whole_model_is_that_of_merged_weights(bundled, lora, model):
    """Every family of layers at once, against weights that are changed in float32."""
    merged = load_flux(bundled.transformer)
    for name, layer in merged.named_modules():
        if isinstance(layer, QuantLinear):
            weight, bias = dispatch.dequantize(layer.fmt, layer.parts, torch.float32), layer.bias.detach()
            layer.replace_parts(FORMATS["f32"], (fused(f"{name}.weight", weight, [(lora, 0.7)]),))
            layer.bias = torch.nn.Parameter(fused(f"{name}.bias", bias, [(lora, 0.7)]), requires_grad=False)
    expected, plain = drawn(merged), drawn(model)
    apply_(model, [(lora, 0.7)])
    found = drawn(model)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (found - plain).norm() > 0.05 * plain.norm()
    remove_(model)
    assert torch.equal(drawn(model), plain)


@pytest.mark.parametrize("resident", [0, 3])
def test_factors_stream_with_their_block(model, lora, resident):
    applied = apply_(model, [(lora, 0.7)])
    expected = drawn(model)
    factors = [(t, t.clone()) for _, path in applied.paths.values() for t in path.tensors]
    plan = planned(model, resident)  # of sizes without factors: `Residence` fits it
    with runtime.Residence(model, plan, memory(model)) as residence:
        streamed = {id(t) for layout in residence.streamer.layouts[:-1] for t in layout.tensors}
        blocks = [path for name, (_, path) in applied.paths.items() if "_blocks" in name and "mod" not in name]
        assert blocks and all(id(t) in streamed for path in blocks for t in path.tensors)
        assert torch.equal(residence.run(lambda: drawn(model, residence.after_step)), expected)
        assert residence.metrics()["misses"] == 0
        set_strength_(model, 0, -0.3)
        other = residence.run(lambda: drawn(model))
    assert torch.equal(drawn(model), other) and not torch.equal(other, expected)
    assert all(torch.equal(t, before) and t.device.type == "cpu" for t, before in factors)


def test_plans_count_factors_with_their_block(model, lora):
    before = runtime.sizes_of(model)
    applied = apply_(model, [(lora, 1.0)])
    after = runtime.sizes_of(model)
    assert (
        0
        <= after.nbytes - before.nbytes - applied.nbytes
        <= 256 * sum(len(path.tensors) for _, path in applied.paths.values())
    )
    assert all(b.nbytes > a.nbytes for a, b in zip(before.blocks, after.blocks, strict=True))
    fitted = runtime.fitted(planned(model, 0), model).stream.sizes
    assert fitted == tuple(block.nbytes for block in after.blocks)


def test_strengths_by_step(model, lora):
    """Two phases are two drawings, one begun where the other ended; the modulation of each is its own."""
    apply_(model, [(lora, [0.8, 0.8, 0.0])])
    seen = []
    modulation = HoistedModulation(model)
    whole = drawing(model)
    denoise(model, whole, modulation=modulation, callback=lambda state: seen.append(state.latents))
    evaluations = modulation.evaluations
    denoise(model, whole, modulation=modulation)
    assert evaluations == 2 == modulation.evaluations, "one for each strength, kept for the next drawing"
    constant = []
    apply_(model, [(lora, 0.8)])
    denoise(model, whole, callback=lambda state: constant.append(state.latents))
    assert torch.equal(seen[0], constant[0]) and torch.equal(seen[1], constant[1])
    assert not torch.equal(seen[2], constant[2])
    remove_(model)
    last = replace(whole, noise=pack_latents(seen[1]), levels=whole.levels[2:])
    assert torch.allclose(pack_latents(seen[2]), denoise(model, last), atol=1e-5)


CLIP_KEY = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
T5_KEYS = {
    "te3": "lora_te3_encoder_block_1_layer_1_DenseReluDense_wo",
    "te2": "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
}


def text_lora(*keys: str) -> dict[str, Tensor]:
    shapes = {CLIP_KEY: (256, 128), T5_KEYS["te3"]: (128, 256), T5_KEYS["te2"]: (128, 128)}
    tensors = {}
    for key in keys:
        n, k = shapes[key]
        tensors |= {f"{key}.lora_down.weight": random(4, k), f"{key}.lora_up.weight": random(n, 4, seed=1)}
    return tensors


@pytest.mark.parametrize("keys", [(CLIP_KEY,), (T5_KEYS["te3"],), (T5_KEYS["te2"],), (CLIP_KEY, *T5_KEYS.values())])
def test_text_encoders(bundled, model, tmp_path, keys):
    """Against encoders whose weights are changed."""
    lora = read_lora(saved(tmp_path, text_lora(*keys)), shapes_in(model))
    request = [Request("a smiling cat", size=(64, 64))]
    plain = encode(bundled, request, True)
    found = encode(bundled, request, True, TextOptions(loras=((lora, 0.5),)))
    assert torch.equal(plain.pooled, found.pooled) == (CLIP_KEY not in keys)
    assert torch.equal(plain.txt, found.txt) == (keys == (CLIP_KEY,))
    for component, encoder in (("t5", load_t5(bundled.t5)), ("clip_l", load_clip(bundled.clip, 3))):
        records = [record for record in lora.records if record.component == component]
        applied = apply_(encoder, [(lora, 0.5)], component)
        assert (applied is None) == (not records)
        for record in records:
            layer, path = applied.paths[record.module]
            x = random(3, layer.in_features)
            change = 0.5 * (x @ record.factors["down"].T) @ record.factors["up"].T
            torch.testing.assert_close(layer(x), layer.product(x) + change)


def test_pictures_change(bundled, model, tmp_path):
    """In `generate`: transformer and text together; what the file says that no model has is warned of."""
    tensors = everywhere(model) | text_lora(CLIP_KEY, T5_KEYS["te3"])
    path = saved(tmp_path, tensors | {"bundle_emb.x": torch.ones(1)})
    request = Request("a smiling cat", steps=2, size=(64, 64))
    plain = generate(bundled, request)
    with pytest.warns(UserWarning, match=r"1 keys of .*lora.safetensors have no place, bundle_emb.x among them"):
        found = generate(bundled, replace(request, loras=((path, 0.5), (path, 0.25))))
    assert found.image.tobytes() != plain.image.tobytes()
    assert found.settings["loras"] == [f"{path}:0.5", f"{path}:0.25"]
    off = generate(bundled, replace(request, loras=((saved(tmp_path, tensors, "b"), lambda step: 0.0),)))
    assert off.image.tobytes() == plain.image.tobytes()


def test_command_line(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FLUX_QUANT_CACHE", str(tmp_path / "cache"))
    path = saved(tmp_path, everywhere(model))
    common = ["generate", "-m", str(BUNDLED), "-p", "cat", "--size", "32x32", "--force", "-o", str(tmp_path / "x.png")]
    assert main([*common, "--lora", f"{path}:0.5", "--lora", str(path), "--preset", "turbo"]) == 0
    from PIL import Image

    text = str(Image.open(tmp_path / "x.png").text)
    assert "lora.safetensors:0.5" in text and '"steps": 8' in text and '"guidance": 3.5' in text
    capsys.readouterr()
    half = {"lora_unet_input_blocks_1.lora_up.weight": torch.ones(2, 2)}
    for options, message in {
        ("--lora", f"{path}:x"): "'x' is not a strength",
        ("--lora", str(tmp_path / "none.safetensors")): "none.safetensors",
        ("--preset", "fast"): "--preset fast is unknown; choose one of turbo",
        ("--lora", str(saved(tmp_path, half, "sdxl"))): "no key belongs to a LoRA for this model",
        (
            "--lora",
            str(saved(tmp_path, half | text_lora(CLIP_KEY), "xl")),
        ): "blocks_1.lora_up.weight has no other half",
    }.items():
        assert main([*common, *options]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out


def test_a_lora_for_another_width(tmp_path, model):
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 3072), f"{name}.lora_B.weight": torch.ones(3072, 2)}
    with pytest.raises(UserError, match=r"lora_A\.weight .* the LoRA was made for another model"):
        read_lora(saved(tmp_path, tensors), shapes_in(model))
    wrong = text_lora(CLIP_KEY)
    wrong[f"{CLIP_KEY}.lora_up.weight"] = torch.ones(7, 4)
    lora = read_lora(saved(tmp_path, wrong), shapes_in(model))
    encoder = load_clip(find_components(BUNDLED).clip, 3)
    with pytest.raises(UserError, match=r"lora_down\.weight changes 7 x 128 values .* made for another model"):
        apply_(encoder, [(lora, 1.0)], "clip_l")
    assert applied_to(encoder) is None
