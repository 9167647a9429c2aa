"""Given pictures and masks, latents on the disk, and the linear preview."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_quant.benchmarks.preview_factors import samples
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.drawing.latents import Latents, load_latents, save_latents
from flux_quant.drawing.pictures import composite, latent_mask, read_mask, read_picture, to_images
from flux_quant.drawing.preview import FACTORS, fit, to_rgb
from flux_quant.errors import UserError

# --- Pictures ---------------------------------------------------------------------------------------------------------


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return values if channels > 1 else values[..., 0]


def test_a_picture_of_the_right_size_is_read_as_it_is(tmp_path: Path):
    values = noise(48, 64)
    Image.fromarray(values).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png", (64, 48))
    assert picture.shape == (1, 3, 48, 64) and picture.dtype == torch.float32
    assert np.array_equal(np.asarray(to_images(picture)[0]), values)


def test_pictures_are_resized_as_in_diffusers(tmp_path: Path):
    from diffusers.image_processor import VaeImageProcessor

    Image.fromarray(noise(50, 70)).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match="a.png is 70 x 50 and is distorted to 96 x 64"):
        ours = read_picture(tmp_path / "a.png", (96, 64))
    theirs = VaeImageProcessor(vae_scale_factor=16).preprocess(Image.open(tmp_path / "a.png"), height=64, width=96)
    torch.testing.assert_close(ours, theirs / 2 + 0.5)


def test_masks_are_those_of_diffusers(tmp_path: Path):
    from diffusers.image_processor import VaeImageProcessor

    values = noise(40, 56, 1)
    Image.fromarray(values).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", (96, 64))
    judge = VaeImageProcessor(16, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = judge.preprocess(Image.open(tmp_path / "m.png"), height=64, width=96)
    assert torch.equal((mask >= 0.5).float(), theirs)
    found = latent_mask(mask)
    assert found.shape == (1, 1, 8, 12) and set(found.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(found, torch.nn.functional.interpolate(theirs, size=(8, 12)))


KINDS = {  # how a picture may be stored -> its left upper pixel as it is drawn
    "grey": (lambda: Image.new("L", (32, 32), 51), (51, 51, 51)),
    "palette": (lambda: Image.new("RGB", (32, 32), (10, 200, 30)).quantize(4), (10, 200, 30)),
    "transparent": (lambda: Image.new("RGBA", (32, 32), (255, 0, 0, 0)), (255, 255, 255)),
    "half transparent": (lambda: Image.new("LA", (32, 32), (0, 128)), (127, 127, 127)),
    "16 bits": (lambda: Image.new("I;16", (32, 32), 51 * 257), (51, 51, 51)),
    "black and white": (lambda: Image.new("1", (32, 32), 1), (255, 255, 255)),
}


@pytest.mark.parametrize(("make", "expected"), KINDS.values(), ids=KINDS)
def test_kinds_of_pictures(make, expected: tuple[int, int, int], tmp_path: Path):
    make().save(tmp_path / "a.png")
    drawn = to_images(read_picture(tmp_path / "a.png", (32, 32)))[0]
    assert drawn.getpixel((0, 0)) == pytest.approx(expected, abs=1)


def test_exif_turns_the_picture(tmp_path: Path):
    values = np.zeros((32, 64, 3), np.uint8)
    values[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn by 90 degrees, clockwise
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png", (32, 64))
    assert picture[..., :32, :].min() == 1 and picture[..., 32:, :].max() == 0


def test_composite_mixes_by_grey():
    drawn, given = torch.ones(2, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    mask = torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(1, 1, 4, 4)
    assert torch.equal(composite(drawn, given, mask), mask.expand(2, 3, 4, 4))


# --- Latents ----------------------------------------------------------------------------------------------------------


def saved(batch: int = 2, masked: bool = True) -> Latents:
    generator = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (1, 3, 32, 48), generator=generator) / 255 if masked else None
    mask = torch.rand(1, 1, 32, 48, generator=generator) if masked else None
    return Latents(torch.randn(batch, 16, 4, 6, generator=generator), picture, mask, {"prompt": "füchse", "steps": 3})


@pytest.mark.parametrize("masked", [True, False])
def test_latents_survive_the_disk(masked: bool, tmp_path: Path):
    path, before = tmp_path / "a.safetensors", saved(masked=masked)
    save_latents(path, before)
    after = load_latents(path)
    assert torch.equal(after.latents, before.latents) and after.settings == before.settings
    if masked:
        levels = [(picture * 255).round() for picture in (after.picture, before.picture)]
        assert torch.equal(*levels), "float16 holds every value of a pixel"
        torch.testing.assert_close(after.mask, before.mask, atol=5e-4, rtol=0)
    else:
        assert after.picture is None and after.mask is None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        assert set(file.metadata()) == {"format", "flux_quant"}
        assert torch.equal(file.get_tensor("latents"), before.latents)
    with pytest.raises(UserError, match="use --force"):
        save_latents(path, before)
    save_latents(path, saved(batch=1), force=True)
    assert load_latents(path).latents.shape[0] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


DAMAGES = {
    "shape": (lambda s: dict(latents=s.latents[0]), "not of a saved drawing"),
    "channels": (lambda s: dict(latents=s.latents[:, :4]), "not of a saved drawing"),
    "empty": (lambda s: dict(latents=s.latents[:0]), "not of a saved drawing"),
    "values": (lambda s: dict(latents=s.latents / 0), "not finite"),
    "no mask": (lambda s: dict(latents=s.latents, picture=s.picture), "belong together"),
    "another size": (lambda s: dict(latents=s.latents, picture=s.picture[..., 8:], mask=s.mask), "picture"),
    "other tensors": (lambda s: dict(latents=s.latents, weight=s.latents + 1), "holds no saved latents"),
    "no latents": (lambda s: dict(picture=s.picture), "holds no saved latents"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_latents_are_refused(damage, message: str, tmp_path: Path):
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    save_file({name: value.contiguous() for name, value in damage(saved()).items()}, path)
    with pytest.raises(UserError, match=message):
        load_latents(path)


@pytest.mark.parametrize("settings", ["{", "[1]", "7"])
def test_damaged_settings_are_refused(settings: str, tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"latents": saved().latents}, tmp_path / "a.safetensors", {"flux_quant": settings})
    with pytest.raises(UserError, match="settings in its metadata are damaged"):
        load_latents(tmp_path / "a.safetensors")
    save_file({"latents": saved().latents}, tmp_path / "b.safetensors")
    assert load_latents(tmp_path / "b.safetensors").settings == {}


# --- Preview ----------------------------------------------------------------------------------------------------------


def test_the_bundled_factors_are_what_the_fit_gives():
    """A smaller sample of other seeds: the same map, nearly, and pictures that are recognisable."""
    latents, pictures, widths = samples(seeds=2, steps=4)
    fitted, kept = fit(latents, pictures, ""), FACTORS[widths]
    a, b = (torch.tensor([*factors.rows, factors.bias]) for factors in (fitted, kept))
    assert (a - b).norm() < 0.3 * b.norm()
    small = torch.nn.functional.avg_pool2d(pictures, 8)
    error = (to_rgb(latents, widths) - small).square().mean().sqrt()
    spread = (small - small.mean(dim=(0, 2, 3), keepdim=True)).square().mean().sqrt()
    assert error < 0.5 * spread, (error, spread)


def test_fit_finds_a_linear_map():
    generator = torch.Generator().manual_seed(3)
    rows, bias = torch.randn(16, 3, generator=generator) / 20, torch.tensor([0.1, -0.2, 0.05])
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    rgb = torch.einsum("bchw,cr->brhw", latents, rows) + bias[:, None, None]
    found = fit(latents, torch.nn.functional.interpolate(rgb / 2 + 0.5, scale_factor=8), "")
    torch.testing.assert_close(torch.tensor(found.rows), rows, atol=6e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(found.bias), bias, atol=6e-5, rtol=0)


@pytest.mark.parametrize("widths", FACTORS, ids=str)
def test_every_preview_has_its_place(widths: tuple[int, ...]):
    factors = FACTORS[widths]
    assert len(factors.rows) == 16 and factors.source
    grey = to_rgb(torch.zeros(1, 16, 2, 3), widths)
    torch.testing.assert_close(grey, (torch.tensor(factors.bias) / 2 + 0.5)[:, None, None].expand(1, 3, 2, 3))
    assert to_rgb(torch.full((1, 16, 2, 3), 1e4), widths).max() <= 1


def test_a_strange_vae_has_no_preview():
    assert to_rgb(torch.zeros(1, 16, 2, 2), (64, 64)) is None


def test_a_latents_file_is_an_ordinary_checkpoint(tmp_path: Path):
    save_latents(tmp_path / "a.safetensors", saved())
    with open_checkpoint(tmp_path / "a.safetensors") as reader:
        assert {name: info.format for name, info in reader.tensors.items()} == {
            "latents": "f32",
            "picture": "f16",
            "mask": "f16",
        }
