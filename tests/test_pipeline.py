"""From prompt to picture with the bundled model: files found, phases in order, diffusers as the judge of the whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_quant.components import BUNDLED, Components, find_components, picture_size
from flux_quant.configs import vae_config
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.drawing.vae import decode
from flux_quant.errors import UserError
from flux_quant.frontends.diffusers import load as load_transformer
from flux_quant.frontends.pipelines import pipeline
from flux_quant.generation import Request, generate, save_png, starting_noise
from flux_quant.loading import load_vae
from flux_quant.naming import vae_to_diffusers

PROMPT = "large red apple on a white background"


@pytest.fixture(scope="module")
def bundled() -> Components:
    return find_components(BUNDLED)


def test_the_model_ships_complete_and_small(bundled: Components):
    sizes = {path: path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()}
    beside = sum(size for path, size in sizes.items() if path.parent.name in ("loras", "controlnet"))
    assert 0 < beside <= 6e6 and sum(sizes.values()) - beside <= 28e6
    with open_checkpoint(bundled.transformer) as reader:
        assert {info.format for info in reader.tensors.values()} == {"bf16"}


def test_same_picture_as_diffusers(bundled: Components):
    request = Request(PROMPT, steps=3, guidance=2.5, seed=4, size=(96, 80))
    ours = np.asarray(generate(bundled, request).image)
    theirs = pipeline(bundled, device="cpu")(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=2.5,
        width=96,
        height=80,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    assert ours.shape == (80, 96, 3)
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert ours.std() > 10


def test_two_prompts_differ_and_seeds_repeat(bundled: Components):
    def draw(**changes: object) -> np.ndarray:
        request = {"prompt": PROMPT, "steps": 2, "size": (96, 96), **changes}
        return np.asarray(generate(bundled, Request(**request)).image).astype(int)

    first = draw()
    assert (draw() == first).all()
    for changes in ({"seed": 1}, {"prompt": "octopus"}, {"prompt_t5": "octopus"}, {"guidance": 1.0}, {"steps": 3}):
        assert np.abs(draw(**changes) - first).mean() > 0.1, changes


def test_generation_reports_phases_and_settings(bundled: Components, tmp_path: Path):
    seen = []
    request = Request(PROMPT, steps=2, size=(32, 48))
    result = generate(bundled, request, progress=lambda steps: (seen.append(i) or i for i in steps))
    assert seen == [0, 1]
    assert set(result.seconds) == {"load", "text", "modulation", "denoise", "decode"}
    assert result.peak_ram > 1e8
    path = tmp_path / "picture.png"
    save_png(result.image, path, result.settings)
    saved = Image.open(path)
    assert saved.size == (32, 48)
    settings = json.loads(saved.text["flux_quant"])
    assert settings["prompt"] == PROMPT and settings["steps"] == 2 and settings["size"] == [32, 48]
    assert [p.name for p in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("changes", [{"size": (100, 96)}, {"size": (0, 16)}, {"steps": 0}], ids=str)
def test_impossible_requests(changes: dict):
    with pytest.raises(UserError):
        Request(PROMPT, **changes)


@pytest.mark.parametrize(
    ("text", "expected"), [("64x48", (64, 48)), ("128", (128, 128)), (" 32X16", (32, 16)), (None, (96, 96))]
)
def test_picture_size(text: str | None, expected: tuple[int, int], bundled: Components):
    assert picture_size(text, bundled.transformer) == expected


def test_bad_picture_size(bundled: Components):
    with pytest.raises(UserError, match="WIDTHxHEIGHT"):
        picture_size("64 by 48", bundled.transformer)


def test_noise_is_that_of_diffusers():
    from diffusers import FluxPipeline

    noise = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(9))
    expected = FluxPipeline._pack_latents(noise, 1, 16, 12, 8)
    assert torch.equal(starting_noise(Request("", seed=9, size=(64, 96)), 64), expected)


@torch.no_grad()
def test_vae_loads_as_diffusers_would(bundled: Components):
    from diffusers import AutoencoderKL

    with open_checkpoint(bundled.vae) as reader:
        tensors = {name: load(reader, name) for name in reader.tensors}
    judge = AutoencoderKL(**vae_config({name: tuple(t.shape) for name, t in tensors.items()})).eval()
    judge.load_state_dict(vae_to_diffusers(tensors))
    z = torch.randn(2, 16, 4, 6)
    ours = decode(load_vae(bundled.vae), (z - 0.1159) * 0.3611)
    expected = (judge.decode(z).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_components_beside_the_file_or_below_the_folder(bundled: Components, tmp_path: Path):
    assert find_components(bundled.transformer) == bundled
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (bundled.transformer, bundled.t5, bundled.clip, bundled.vae):
        shutil.copy(path, flat / path.name)
    shutil.copytree(bundled.tokenizers, flat / "tokenizers")
    found = find_components(flat)
    assert (found.t5, found.tokenizers) == (flat / bundled.t5.name, flat / "tokenizers")
    shutil.copy(bundled.transformer, flat / "second.safetensors")
    with pytest.raises(UserError, match="2 FLUX.1 files"):
        find_components(flat)
    (flat / bundled.vae.name).unlink()
    with pytest.raises(UserError, match="--vae"):
        find_components(flat / "second.safetensors")
    assert find_components(flat / "second.safetensors", vae=bundled.vae).vae == bundled.vae


@pytest.mark.parametrize("format_name", ["q8_0", "q4_0"])
def test_quantized_files_run_in_diffusers_pipelines(format_name: str, bundled: Components, tmp_path: Path):
    path = tmp_path / "model.gguf"
    run(make_plan(Conversion(bundled.transformer, path, format_name)))
    pipe = pipeline(bundled, device="cpu")
    pipe.transformer = load_transformer(path, device="cpu")
    arguments = {"num_inference_steps": 2, "width": 96, "height": 96, "max_sequence_length": 24}
    drawn = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **arguments).images[0]
    request = Request(PROMPT, steps=2, seed=0, size=(96, 96))
    ours = generate(find_components(path, bundled.t5, bundled.clip, bundled.vae, bundled.tokenizers), request).image
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(ours).astype(int)).max() <= 1


def test_engine_in_diffusers_refuses_what_it_cannot_do(bundled: Components):
    transformer = load_transformer(bundled.transformer, device="cpu")
    inputs = dict(
        hidden_states=torch.zeros(1, 4, 64),
        encoder_hidden_states=torch.zeros(1, 3, 128),
        pooled_projections=torch.zeros(1, 128),
        timestep=torch.ones(1),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        guidance=torch.ones(1),
    )
    (sample,) = transformer(**inputs, return_dict=False)
    assert torch.equal(transformer(**inputs).sample, sample)
    with pytest.raises(ValueError, match="ip_adapter_image_embeds"):
        transformer(**inputs, joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1)]})


def test_models_that_need_a_picture_are_refused(bundled: Components, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(bundled.transformer)
    weight = tensors["img_in.weight"]
    tensors["img_in.weight"] = torch.cat([weight] * 6, dim=1)  # 384 channels, as Fill
    save_file(tensors, tmp_path / "fill.safetensors")
    fill = dataclasses.replace(bundled, transformer=tmp_path / "fill.safetensors")
    with pytest.raises(UserError, match="a Fill model needs a picture and a mask"):
        generate(fill, Request(PROMPT, steps=1, size=(96, 96)))


@pytest.mark.gpu
def test_generate_on_cuda(bundled: Components):
    request = Request(PROMPT, steps=8, size=(96, 96))
    on_cpu = np.asarray(generate(bundled, request).image).astype(float)
    result = generate(bundled, request, "cuda", torch.float32)
    assert np.abs(np.asarray(result.image).astype(float) - on_cpu).mean() < 2
    assert result.peak_vram > 1e7
