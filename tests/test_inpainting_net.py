"""The ControlNet for inpainting that ships with the bundled model: complete, small, of use; its committed figures."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch
from PIL import Image

from flux_quant.benchmarks.machine import RESULTS
from flux_quant.benchmarks.readme import ROOT
from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import NET, TURBO, table
from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import ways as all_ways
from flux_quant.benchmarks.tiny_flux.inpainting import in_diffusers_names, masked_psnr
from flux_quant.benchmarks.tiny_flux.masks import half_plane
from flux_quant.cli import main
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.drawing.request import ControlRequest, Request
from flux_quant.loading import load_controlnet, load_flux
from flux_quant.pipeline import generate

MOST = 4.5e6, 6e6  # bytes of the net, and of net and LoRA together
CAPTIONS = {  # with the side that is drawn anew, as the angle that it lies in
    "large owl on a blue background": 0.0,
    "large strawberry on a white background": 0.5,
    "small rocket on the left on a green background": 1.0,
    "large guitar on a red background": 0.0,
    "small penguin at the top on a purple background": 1.5,
}
SEED = 90_000  # of neither the training nor the evaluation
COMPONENTS = find_components(BUNDLED)


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads((RESULTS / "tiny_inpainting.json").read_text())


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


def test_the_file_is_complete_and_small():
    config = load_flux(COMPONENTS.transformer).config
    net = load_controlnet(NET, config)
    assert net.config.inpaints and not net.config.flux.single_blocks and config.guidance == net.config.flux.guidance
    assert NET.stat().st_size <= MOST[0]
    if TURBO.is_file():
        assert NET.stat().st_size + TURBO.stat().st_size < MOST[1]
    with open_checkpoint(NET) as reader:
        stored = {name: load(reader, name) for name in reader.tensors}
    assert all(tensor.isfinite().all() for tensor in stored.values())
    assert all(tensor.any() for name, tensor in stored.items() if name.startswith("controlnet_")), "it was trained"


def test_it_is_told_from_the_model_beside_it(capsys: pytest.CaptureFixture):
    assert COMPONENTS.transformer.name == "flux1-tiny.safetensors"
    assert main(["inspect", str(NET)]) == 0
    assert "FLUX ControlNet inpainting, diffusers names" in capsys.readouterr().out


def test_everything_is_installed(monkeypatch: pytest.MonkeyPatch):
    arguments: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
    runpy.run_path(str(ROOT / "setup.py"))
    package = ROOT / "flux_quant"
    listed = {path for pattern in arguments["package_data"]["flux_quant"] for path in package.glob(pattern)}
    assert {path for path in (package / "tiny_flux").rglob("*") if path.is_file()} <= listed


def test_what_is_trained_has_the_names_of_what_is_shipped():
    from flux_quant.benchmarks.tiny_flux.inpainting import fresh_net
    from flux_quant.benchmarks.tiny_flux.train import CONFIG
    from flux_quant.model import Flux

    with open_checkpoint(NET) as reader:
        shipped = {name: info.shape for name, info in reader.tensors.items()}
    blocks = sum(name.endswith(".norm1.linear.weight") for name in shipped)
    made = in_diffusers_names(fresh_net(Flux(CONFIG), blocks))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shipped


def test_parts_are_restored_and_the_rest_is_kept(tmp_path: Path):
    """Halves of the model's own pictures, painted in from other noise."""
    gained = []
    for i, (caption, angle) in enumerate(CAPTIONS.items()):
        size = (96, 96)
        plain = Request(caption, steps=12, seed=SEED + i, size=size)
        given, mask = tmp_path / "given.png", tmp_path / "mask.png"
        original = generate(COMPONENTS, plain).image
        original.save(given)
        hidden = half_plane(angle * np.pi, 0)
        Image.fromarray(hidden.astype(np.uint8) * 255).save(mask)
        asked = replace(plain, seed=SEED + 100 + i, image=given, mask=mask, strength=1.0)
        found = {}
        for name, request in {
            "net": replace(asked, controls=(ControlRequest(NET),)),
            "none": replace(asked, controls=()),
        }.items():
            picture = generate(COMPONENTS, request).image
            np.testing.assert_array_equal(np.asarray(picture)[~hidden], np.asarray(original)[~hidden])
            region = torch.from_numpy(hidden)[None, None].float()
            found[name] = masked_psnr(pixels(picture), pixels(original), region).item()
        gained.append(found["net"] - found["none"])
    assert np.mean(gained) > 0.5 and np.sum(np.array(gained) > 0) >= len(gained) - 1, gained


def test_the_committed_figures_are_those_of_the_documents(figures: dict):
    assert figures["net"] == dict(file=NET.name, bytes=NET.stat().st_size), "run evaluate_inpainting again"
    assert table(figures) in (ROOT / "docs" / "controlnet.md").read_text()


def test_the_committed_figures_meet_the_bar(figures: dict):
    ways = figures["ways"]
    assert list(ways) == list(all_ways(TURBO, NET)), "run evaluate_inpainting again"
    assert all(way["kept"] == 1 for way in ways.values())
    none, net, turbo = (ways[name] for name in ("no net, 20 steps", "net, 20 steps", "net and turbo, 8 steps"))
    for kind in ("restored", "restored_emoji_named_only"):
        assert net[kind]["psnr"] > none[kind]["psnr"] and turbo[kind]["psnr"] > none[kind]["psnr"] - 0.5
    assert net["exchanged"] >= 0.85 and turbo["exchanged"] >= net["exchanged"] - 0.1
    assert abs(ways["net in bfloat16, 20 steps"]["restored"]["psnr"] - net["restored"]["psnr"]) < 0.3
