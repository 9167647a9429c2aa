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
from flux_quant.benchmarks.tiny_flux import emoji
from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import (
    NET,
    TURBO,
    Way,
    kept,
    painted_all,
    part_cases,
    restored,
    table,
)
from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import ways as all_ways
from flux_quant.benchmarks.tiny_flux.inpainting import fresh_net, in_diffusers_names
from flux_quant.benchmarks.tiny_flux.masks import half_plane
from flux_quant.benchmarks.tiny_flux.networks import CONFIG
from flux_quant.cli import main
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.drawing.given import load_nets, read_given
from flux_quant.drawing.request import ControlRequest, Request
from flux_quant.drawing.vae import encode
from flux_quant.generation import make_drawing
from flux_quant.loading import load_controlnet, load_flux, load_vae
from flux_quant.model import Flux
from flux_quant.text.encode import TextFeatures

MOST = 4.5e6, 6e6  # bytes of the net, and of net and LoRA together
SEED = 90_000  # of neither the training nor the evaluation
COMPONENTS = find_components(BUNDLED)


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads((RESULTS / "tiny_inpainting.json").read_text())


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
    with open_checkpoint(NET) as reader:
        shipped = {name: info.shape for name, info in reader.tensors.items()}
    blocks = sum(name.endswith(".norm1.linear.weight") for name in shipped)
    made = in_diffusers_names(fresh_net(Flux(CONFIG), blocks))
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shipped


@pytest.mark.slow
@pytest.mark.skipif(not emoji.FONT.exists(), reason="needs Noto Color Emoji")
def test_parts_are_restored_and_the_rest_is_kept():
    """By 8 steps of the model alone, with the net and without it."""
    pytest.importorskip("fontTools")
    world = emoji.EmojiWorld()
    cases = part_cases(world, 4, SEED)
    found = {name: painted_all(world, cases, Way(8, net)) for name, net in (("net", NET), ("none", None))}
    assert all(kept(world, cases, pictures) == 1 for pictures in found.values())
    figures = {name: restored(world, cases, pictures) for name, pictures in found.items()}
    assert figures["net"]["psnr"] > figures["none"]["psnr"] and figures["net"]["seam"] < figures["none"]["seam"]


def test_what_is_kept_is_put_back_where_a_strength_is_given(tmp_path: Path):
    """As `inpaint` does; without a strength the net draws alone, as its authors do."""
    given, mask = tmp_path / "given.png", tmp_path / "mask.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(given)
    Image.fromarray(half_plane(0, 0).astype(np.uint8) * 255).save(mask)
    model, net = load_flux(COMPONENTS.transformer), ControlRequest(NET)
    request = Request("large owl", size=(96, 96), image=given, mask=mask, controls=(net,))
    vae = load_vae(COMPONENTS.vae)
    for strength, back in ((None, False), (1.0, True)):
        asked = replace(request, strength=strength)
        seen = read_given(asked, model.config, load_nets(asked, model.config), lambda x: encode(vae, x))
        features = TextFeatures(torch.zeros(1, 4, model.config.context), torch.zeros(1, model.config.pooled))
        drawing = make_drawing([asked], model.config, features, given=seen)
        assert (drawing.mask is not None) == back and len(drawing.controls) == 1


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
