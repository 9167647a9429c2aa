"""Scenes, captions and masks as tensors, for training on a GPU: the same as those of `EmojiWorld`, one by one."""

from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from figure_world import figure_world

from flux_quant.benchmarks.tiny_flux.autoencoder import load_autoencoder
from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld
from flux_quant.benchmarks.tiny_flux.evaluate_turbo import tasks_of
from flux_quant.benchmarks.tiny_flux.improving.inpainting import unpacked
from flux_quant.benchmarks.tiny_flux.improving.rows import COLUMNS, make_sprites, mapped, packed_masks, row_of, scene_of
from flux_quant.benchmarks.tiny_flux.improving.scenes import (
    Captions,
    Catalogue,
    Painter,
)
from flux_quant.benchmarks.tiny_flux.improving.workshop import COMMITTED, choosing_cases
from flux_quant.benchmarks.tiny_flux.masks import LEAST
from flux_quant.benchmarks.tiny_flux.networks import Bundle
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing import vae
from flux_quant.loading import load_vae

CPU = torch.device("cpu")
COMPONENTS = find_components(BUNDLED)


@pytest.fixture(scope="module")
def world() -> EmojiWorld:
    return figure_world(5)


@pytest.fixture(scope="module")
def catalogue(world: EmojiWorld) -> Catalogue:
    return Catalogue(world, CPU)


def test_the_catalogue_is_all_that_training_may_show(world: EmojiWorld, catalogue: Catalogue):
    """By emoji: 7 backgrounds, mirrored or not, 3 tilts; large, or small in 4 places."""
    assert len(catalogue) == len(world) * 7 * 2 * 3 * (1 + 4)
    scenes = [scene_of(row) for row in catalogue.rows.tolist()]
    assert len(set(scenes)) == len(scenes) and not any(world.held_out(scene) for scene in scenes)
    assert all(scene.size == "small" or scene.position == "in the centre" for scene in scenes)
    assert [row_of(scene) for scene in scenes] == catalogue.rows.tolist()


@pytest.mark.parametrize("column", range(6), ids=["emoji", *COLUMNS])
def test_scenes_come_as_often_as_the_world_draws_them(world: EmojiWorld, catalogue: Catalogue, column: int):
    rng, count = np.random.default_rng(3), 6000
    found = Counter(row_of(world.sample(rng))[column] for _ in range(count))
    torch.manual_seed(3)
    drawn = Counter(catalogue.rows[catalogue.draw(count)][:, column].tolist())
    for value in range(int(catalogue.rows[:, column].max()) + 1):
        chance = (catalogue.chances[catalogue.rows[:, column] == value].sum() / catalogue.chances.sum()).item()
        for seen in (found[value], drawn[value]):
            assert abs(seen - count * chance) < 4.5 * (count * chance * (1 - chance)) ** 0.5, value


def test_some_of_the_scenes_are_the_likely_ones(world: EmojiWorld, catalogue: Catalogue):
    few = Catalogue(world, CPU, most=100)
    assert len(few) == 100 and few.chances.mean() > 1.5 * catalogue.chances.mean()
    rows = set(map(tuple, catalogue.rows.tolist()))
    assert set(map(tuple, few.rows.tolist())) < rows


def test_pictures_are_those_of_the_world(world: EmojiWorld, catalogue: Catalogue):
    rows = catalogue.rows[torch.randperm(len(catalogue), generator=torch.Generator().manual_seed(1))[:40]]
    pictures = Painter(world.sprites, CPU)(rows)
    wanted = np.stack([world.render(scene_of(row)) for row in rows.tolist()])
    torch.testing.assert_close(pictures, torch.from_numpy(wanted).permute(0, 3, 1, 2), rtol=0, atol=1e-6)


def test_workers_draw_the_same(world: EmojiWorld, catalogue: Catalogue, tmp_path: Path):
    """Sprites of emoji, and masks of scenes, by two processes and by this one."""
    assert (make_sprites(figure_world(5), 2) == world.sprites).all()
    np.save(tmp_path / "sprites.npy", world.sprites)
    pieces = [(seed, catalogue.rows[seed * 20 : seed * 20 + 20].tolist()) for seed in range(3)]
    one, two = (mapped(n, partial(packed_masks, tmp_path / "sprites.npy"), pieces, chunk=1) for n in (1, 2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    masks = unpacked(torch.from_numpy(np.concatenate(one)))
    assert masks.shape == (60, 1, 96, 96) and masks.unique().tolist() == [0, 1]
    assert masks.mean(dim=(1, 2, 3)).min() >= LEAST
    assert (np.packbits(masks[3].bool().numpy().ravel()) == one[0][3]).all()


def test_captions_have_the_tokens_that_the_tokenizers_give(world: EmojiWorld, catalogue: Catalogue):
    bundle = Bundle(COMPONENTS.tokenizers)
    captions = Captions(world, bundle, CPU)
    assert len(captions.texts) == len(world) * 13 * 9 + 1 == len(set(captions.texts))
    generator = torch.Generator().manual_seed(5)
    rows = catalogue.rows[torch.randint(len(catalogue), (300,), generator=generator)]
    named = torch.rand(300, 3, generator=generator) < 0.5
    numbers = captions.numbers(rows, named)
    texts = [world.caption(scene_of(row), *flags) for row, flags in zip(rows.tolist(), named.tolist(), strict=True)]
    assert [captions.texts[i] for i in numbers.tolist()] == texts
    t5, clip = captions.tokens(torch.cat([numbers, torch.tensor([captions.empty])]))
    wanted_t5, wanted_clip = bundle.tokens([*texts, ""])
    assert torch.equal(t5, wanted_t5) and torch.equal(clip[:, : wanted_clip.shape[1]], wanted_clip)
    assert (clip[:, wanted_clip.shape[1] :] == 1).all(), "nothing but padding"


def test_a_share_of_the_captions_is_empty(world: EmojiWorld, catalogue: Catalogue):
    captions = Captions(world, Bundle(COMPONENTS.tokenizers), CPU)
    torch.manual_seed(0)
    numbers = captions.random(catalogue.rows.repeat(4, 1), 0.1)
    share = (numbers == captions.empty).double().mean().item()
    assert abs(share - 0.1) < 4 * (0.09 / len(numbers)) ** 0.5
    assert not (captions.random(catalogue.rows) == captions.empty).any()


def test_what_chooses_is_no_caption_of_the_evaluation():
    world = figure_world(200)
    cases = choosing_cases(world, 2)
    assert len(cases) == len(set(cases)) > 60 and any(world.held_out(one.scene) for one in cases)
    assert not {one.caption for one in cases} & {task.case.caption for task in tasks_of(world, COMMITTED)}


def test_the_autoencoder_is_that_of_diffusers():
    judge, own = load_vae(COMPONENTS.vae), load_autoencoder(COMPONENTS.vae)
    pictures = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = own.encode(pictures)
        drawn = own.decode(latents).clamp(0, 1)
    torch.testing.assert_close(latents, vae.encode(judge, pictures), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn, vae.decode(judge, latents), rtol=1e-5, atol=1e-5)
