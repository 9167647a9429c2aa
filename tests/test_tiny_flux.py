"""The training set and its judge, on drawn stand-ins for emoji: no font is needed."""

import numpy as np
import pytest
import torch
from figure_world import figure_world

from flux_quant.benchmarks.tiny_flux.emoji import COLOUR_NAMES, POSITIONS, SIZE, EmojiWorld, Scene
from flux_quant.benchmarks.tiny_flux.judge import Request, nearest


@pytest.fixture(scope="module")
def world() -> EmojiWorld:
    return figure_world(9)


def test_scenes_are_what_they_say(world: EmojiWorld):
    plain = Scene(3, "small", "in the centre", "white", False, 0)
    picture = world.render(plain)
    assert picture.shape == (SIZE, SIZE, 3) and picture.min() >= 0 and picture.max() <= 1
    assert np.allclose(picture[0], 1)
    left = world.render(Scene(3, "small", "on the left", "white", False, 0))
    np.testing.assert_allclose(np.roll(left, 16, axis=1), picture, atol=1e-6)
    mirrored = world.render(Scene(3, "small", "in the centre", "white", True, 0))
    np.testing.assert_allclose(mirrored[:, ::-1], picture, atol=1e-6)
    tilted = world.render(Scene(3, "small", "in the centre", "white", False, 15))
    counter = world.render(Scene(3, "small", "in the centre", "white", True, -15))
    np.testing.assert_allclose(counter[:, ::-1], tilted, atol=1e-6)
    assert np.abs(tilted - picture).mean() > 0.005
    ink = [
        (world.render(Scene(3, size, "in the centre", "white", False, 0)) < 0.99).mean() for size in ("small", "large")
    ]
    assert ink[1] > 1.9 * ink[0]


def test_held_out_combinations_are_never_drawn(world: EmojiWorld):
    rng = np.random.default_rng(0)
    scenes = [world.sample(rng) for _ in range(3000)]
    assert not any(world.held_out(scene) for scene in scenes)
    for emoji in range(len(world)):
        seen = [scene for scene in scenes if scene.emoji == emoji]
        assert {s.colour for s in seen} == set(COLOUR_NAMES) - {world.held_out_colour(emoji)}
        assert {s.position for s in seen} == set(POSITIONS) - {world.held_out_position(emoji)}


def test_captions(world: EmojiWorld):
    scene = Scene(2, "small", "at the top", "blue", False, 0)
    assert world.caption(scene) == "small figure 2 at the top on a blue background"
    assert world.caption(scene, False, False, False) == "figure 2"
    large = Scene(2, "large", POSITIONS[0], "red", False, 0)
    assert world.caption(large) == "large figure 2 on a red background"


@pytest.mark.parametrize(
    ("request_", "places"),
    [
        (Request(None, None, "red"), 6),
        (Request("small", None, "red"), 5),
        (Request("large", None, None), 1),
        (Request(None, "on the left", None), 1),
        (Request("small", "at the top", "red"), 1),
    ],
)
def test_a_request_allows_what_it_leaves_open(request_: Request, places: int):
    assert len(request_.places()) == places
    assert len(request_.colours()) == (1 if request_.colour else len(COLOUR_NAMES))


def test_the_judge_finds_the_emoji_under_noise(world: EmojiWorld):
    rng = np.random.default_rng(1)
    scenes = [Scene(e, "small", "on the right", "green", bool(e % 2), (0, 15, -15)[e % 3]) for e in range(9)]
    pictures = np.stack([world.render(scene) for scene in scenes])
    noisy = torch.from_numpy(pictures + rng.normal(0, 0.05, pictures.shape)).float().permute(0, 3, 1, 2)
    for request in (Request("small", "on the right", "green"), Request(None, None, None)):
        verdict = nearest(world, noisy, request)
        assert verdict.emoji.tolist() == list(range(9))
        assert (verdict.psnr - 26.0).abs().max() < 0.5  # noise of 0.05 is 26 dB
    elsewhere = nearest(world, noisy, Request("small", "on the left", "green"))
    assert elsewhere.psnr.max() < 22
