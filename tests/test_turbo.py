"""The Turbo LoRA that ships with the bundled model: complete, small, and of use; and the figures committed for it."""

import json

import pytest
import torch

from flux_quant.benchmarks.machine import RESULTS
from flux_quant.benchmarks.metrics import psnr
from flux_quant.benchmarks.tiny_flux import emoji
from flux_quant.benchmarks.tiny_flux.evaluate import Generator, case, judged
from flux_quant.benchmarks.tiny_flux.evaluate_turbo import TURBO, VARIANTS
from flux_quant.benchmarks.tiny_flux.turbo import FINE, STEPS, fresh, levels
from flux_quant.components import BUNDLED, find_components
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_report import describe
from flux_quant.drawing.request import Request
from flux_quant.generation import generate
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux
from flux_quant.lora import shapes_in

PROMPTS = (
    "large owl on a blue background",
    "small rocket at the top on a white background",
    "large strawberry",
    "small fox face on the left on a green background",
    "penguin",
    "large guitar on a purple background",
)
COMPONENTS = find_components(BUNDLED)
MARGIN = 1.0  # dB that the LoRA brings a picture nearer to that of many steps, at least


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    return {"base": Generator(COMPONENTS), "turbo": Generator(COMPONENTS, [TURBO])}


def test_the_file_is_complete_and_small():
    model = load_flux(COMPONENTS.transformer)
    lora = read_lora(TURBO, shapes_in(model))
    linears = {name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    assert not lora.unused and {record.module for record in lora.records} == linears
    assert all(record.factors["up"].abs().max() > 0 for record in lora.records)
    assert TURBO.stat().st_size <= 1.4e6
    found = describe(TURBO)
    assert found is not None and found.family == "kohya" and found.ranks == (12, 12)
    assert not (found.unmatched or found.partial or found.colliding)
    assert {record.module for record in fresh(model, 2).records} == linears, "what is trained is what is shipped"


def test_its_levels_are_some_of_the_teachers():
    torch.testing.assert_close(levels(STEPS), levels(FINE)[:: FINE // STEPS])


def test_eight_steps_are_nearer_to_many(generators):
    """Noise of its own: neither of the training nor of the evaluation."""
    many, coarse, turbo = (
        generators[who](PROMPTS, steps, 3.5, 70_000) for who, steps in (("base", 20), ("base", 8), ("turbo", 8))
    )
    without, with_lora = psnr(coarse, many), psnr(turbo, many)
    assert with_lora.mean() > without.mean() + MARGIN
    assert (with_lora > without).sum() >= len(PROMPTS) - 1


def test_the_command_line_and_the_figures_draw_the_same(generators):
    request = Request(PROMPTS[0], steps=8, seed=70_000, size=(96, 96), loras=((TURBO, 1.0),))
    image = generate(COMPONENTS, request).image
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(96, 96, 3).permute(2, 0, 1) / 255
    drawn = generators["turbo"](PROMPTS[:1], 8, 3.5, 70_000)
    assert psnr(pixels[None], drawn) > 50, "but for rounding to 8 bits"


@pytest.mark.slow
@pytest.mark.skipif(not emoji.FONT.exists(), reason="needs Noto Color Emoji")
def test_eight_steps_show_what_is_asked_for(generators):
    pytest.importorskip("fontTools")
    world = emoji.EmojiWorld()
    scenes = [emoji.Scene(e, "large", "in the centre", "yellow", False, 0) for e in range(3, len(world), 80)]
    cases = [case(world, scene) for scene in scenes]
    pictures = generators["turbo"]([case.caption for case in cases], 8, 3.5, 70_100)
    right, _ = judged(world, cases, pictures)
    assert right.double().mean() >= 0.8


def test_the_committed_figures_meet_the_bar():
    """Within 5 points of 20 steps, for both kinds of captions and every format; nearer to many steps than without."""
    figures = json.loads((RESULTS / "tiny_turbo.json").read_text())
    assert figures["lora"]["bytes"] == TURBO.stat().st_size, "run evaluate_turbo again"
    variants = figures["variants"]
    assert list(variants) == list(VARIANTS)
    for group in (variants, *figures["formats"].values()):
        turbo, many, coarse = (group[name] for name in ("turbo 8", "base 20", "base 8"))
        assert turbo["accuracy"] >= many["accuracy"] - 0.05
        assert turbo["psnr_to_base_40"] > coarse["psnr_to_base_40"] + MARGIN
        for kind in ("trained_captions", "held_out_combinations"):
            assert turbo[kind]["accuracy"] >= many[kind]["accuracy"] - 0.05
    assert figures["nearer_to_base_40"]["8"] > 0.8
