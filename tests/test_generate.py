"""`generate` and `decode` with everything that can be asked of them, on the bundled model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_quant import generation, runtime
from flux_quant.cli import main
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing import latents, vae
from flux_quant.drawing.latents import load_latents
from flux_quant.drawing.request import Request
from flux_quant.drawing.sampling import modulation_rows, steering_calls
from flux_quant.drawing.vae import Memory
from flux_quant.errors import UserError
from flux_quant.generation import LatentFiles, generate
from flux_quant.loading import load_flux, load_vae
from flux_quant.modulation import hoisted_modules

PROMPT = "large red apple on a white background"
GENERATE = ["generate", "--model", str(BUNDLED), "--prompt", PROMPT, "--steps", "3", "--no-prompt-cache"]
SMALL = ["--size", "96x80"]


@pytest.fixture(scope="module")
def bundled() -> Components:
    return find_components(BUNDLED)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a picture and masks."""
    monkeypatch.chdir(tmp_path)
    x = np.linspace(0, 255, 96 * 80 * 3).reshape(80, 96, 3).astype(np.uint8)
    Image.fromarray(x).save("given.png")
    mask = np.zeros((80, 96), np.uint8)
    mask[:, 48:] = 255
    Image.fromarray(mask).save("mask.png")
    Image.fromarray(mask * 0).save("black.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(x).save("cut.png")
    data = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    return tmp_path


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_batch_of_seeds(folder: Path, capsys: pytest.CaptureFixture):
    before = names(folder)
    assert main([*GENERATE, *SMALL, "-o", "fox.png", "--batch", "2", "--seed", "5"]) == 0
    assert names(folder) - before == {"fox-5.png", "fox-6.png"}
    printed = capsys.readouterr().out
    assert "fox-5.png: 96 x 80, 3 steps" in printed and "fox-6.png" in printed and "modulation" in printed
    assert main([*GENERATE, *SMALL, "-o", "alone.png", "--seed", "6"]) == 0
    assert np.array_equal(pixels("fox-6.png"), pixels("alone.png"))
    assert not np.array_equal(pixels("fox-5.png"), pixels("fox-6.png"))
    settings = [json.loads(Image.open(name).text["flux_quant"]) for name in ("fox-6.png", "alone.png")]
    assert settings[0] == settings[1] and settings[0]["seed"] == 6
    assert main([*GENERATE, *SMALL, "-o", "fox.png", "--seeds", "1,6", "--force"]) == 0
    assert np.array_equal(pixels("fox-6.png"), pixels("alone.png"))


def test_size_is_rounded_with_a_notice(folder: Path, capsys: pytest.CaptureFixture):
    assert main([*GENERATE, "-o", "a.png", "--width", "100", "--height", "75"]) == 0
    assert capsys.readouterr().err == "warning: size 100x75 becomes 96x80: sides are multiples of 16\n"
    assert Image.open("a.png").size == (96, 80)


def test_every_option_changes_the_picture(folder: Path):
    given = ["--image", "given.png"]
    drawn = {}
    for options in (
        [],
        ["--scheduler", "beta"],
        ["--scheduler", "simple"],
        ["--negative", "octopus", "--cfg", "3"],
        ["--negative", "octopus", "--cfg", "3", "--cfg-range", "0:0.4"],
        given,
        [*given, "--strength", "0.3"],
        [*given, "--denoise", "0.6"],
        [*given, "--mask", "mask.png"],
    ):
        assert main([*GENERATE, *SMALL, *options, "-o", "a.png", "--force"]) == 0
        picture = pixels("a.png")
        for other, before in drawn.items():
            same = "simple" in options and other == ()  # 3 steps of both lists are the same to 4 digits
            assert same or np.abs(picture - before).mean() > 0.05, (options, other)
        drawn[tuple(options)] = picture
    kept = drawn["--image", "given.png", "--mask", "mask.png"][:, :48]
    assert np.array_equal(kept, pixels("given.png")[:, :48]), "what the mask keeps is untouched"


def test_latents_are_decoded_later(folder: Path, capsys: pytest.CaptureFixture):
    arguments = [*SMALL, "--image", "given.png", "--mask", "mask.png", "--seeds", "3,4"]
    assert main([*GENERATE, *arguments, "-o", "a.png", "--save-latent", "a.safetensors"]) == 0
    saved = load_latents(Path("a.safetensors"))
    assert saved.latents.shape == (2, 16, 10, 12) and saved.settings["seeds"] == [3, 4]
    for path in (BUNDLED / "vae/ae.safetensors", None):
        options = ["--vae", str(path)] if path else []
        assert main(["decode", "a.safetensors", "-o", "b.png", "--force", *options]) == 0
        for seed in (3, 4):
            assert np.array_equal(pixels(f"a-{seed}.png"), pixels(f"b-{seed}.png"))
            texts = [json.loads(Image.open(f"{name}-{seed}.png").text["flux_quant"]) for name in "ab"]
            assert texts[0] == texts[1]
    assert "b-3.png: 96 x 80" in capsys.readouterr().out


def test_a_failed_decode_keeps_the_latents(folder: Path, monkeypatch, capsys: pytest.CaptureFixture):
    assert main([*GENERATE, *SMALL, "-o", "right.png"]) == 0
    before = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(generation, "decode_latents", fail_with(torch.OutOfMemoryError("no memory")))
        for name in ("a.latent.safetensors", "a.latent-2.safetensors"):
            capsys.readouterr()
            assert main([*GENERATE, *SMALL, "-o", "a.png"]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line == (f"error: decoding failed: no memory; the latents are in {name}: flux-quant decode {name}")
    assert names(folder) - before == {"a.latent.safetensors", "a.latent-2.safetensors"}
    assert main(["decode", "a.latent.safetensors", "-o", "b.png"]) == 0
    assert np.array_equal(pixels("b.png"), pixels("right.png"))


def test_a_full_disk_does_not_cost_the_picture(folder: Path, monkeypatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(latents, "save_latents", fail_with(UserError("no space for a.latent.safetensors")))
    assert main([*GENERATE, *SMALL, "-o", "a.png"]) == 0
    assert capsys.readouterr().err == "warning: the latents were not saved: no space for a.latent.safetensors\n"
    assert Image.open("a.png").size == (96, 80)


def fail_with(error: BaseException):
    def fail(*_: object) -> None:
        raise error

    return fail


def test_an_interruption_while_decoding_leaves_nothing(folder: Path, bundled: Components, monkeypatch):
    seen = []

    def interrupt(*_: object) -> None:
        seen.append((folder / "x.safetensors").exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "decode_latents", interrupt)
    before = names(folder)
    request = Request(PROMPT, steps=1, size=(64, 64))
    with pytest.raises(KeyboardInterrupt):
        generate(bundled, request, files=LatentFiles(rescue=Path("x.safetensors")))
    assert names(folder) == before and seen == [True]
    with pytest.raises(KeyboardInterrupt):
        generate(bundled, request, files=LatentFiles(keep=Path("x.safetensors")))
    assert names(folder) - before == {"x.safetensors"}, "what was asked for stays"


def test_preview(folder: Path):
    assert main([*GENERATE, *SMALL, "-o", "a.png", "--preview", "small.png", "--batch", "2"]) == 0
    small, picture = pixels("small.png"), pixels("a-0.png")
    assert small.shape == (10, 24, 3), "the pictures of a batch beside each other"
    assert json.loads(Image.open("small.png").text["flux_quant"]) == {"step": 3}
    means = picture.reshape(10, 8, 12, 8, 3).mean(axis=(1, 3))
    assert np.corrcoef(small[:, :12].ravel(), means.ravel())[0, 1] > 0.9


REFUSED = {
    "no mask": ([*SMALL, "--image", "given.png", "--mask", "absent.png"], "absent.png: no such file"),
    "no image": (["--image", "absent.png"], "absent.png: no such file"),
    "no picture": (["--image", "text.png"], "text.png: not a picture"),
    "cut picture": (["--image", "cut.png"], "cut.png: image file is truncated"),
    "folder as picture": (["--image", "."], "directory"),
    "black mask": ([*SMALL, "--image", "given.png", "--mask", "black.png"], "nothing would be drawn anew"),
    "mask alone": (["--mask", "mask.png"], "needs a given picture"),
    "strength alone": (["--strength", "0.5"], "needs a given picture"),
    "strength": (["--image", "given.png", "--strength", "1.5"], "strength 1.5: choose more than 0, up to 1"),
    "denoise": (["--image", "given.png", "--denoise", "0"], "denoise 0.0: choose more than 0, up to 1"),
    "both": (["--image", "given.png", "--denoise", "0.5", "--strength", "0.5"], "exclude each other"),
    "cfg alone": (["--cfg", "3"], "give both"),
    "negative alone": (["--negative", "octopus"], "give both"),
    "range": (["--negative", "octopus", "--cfg", "3", "--cfg-range", "0.5"], "FROM:TO"),
    "range turned": (["--negative", "octopus", "--cfg", "3", "--cfg-range", "0.5:0.1"], "cfg range 0.5 to 0.1"),
    "scheduler": (["--scheduler", "karras"], "choose one of euler, simple, beta"),
    "seeds": (["--seeds", "1,b"], "numbers with commas"),
    "seeds and batch": (["--seeds", "1,2", "--batch", "2"], "exclude each other"),
    "no batch": (["--batch", "0"], "--batch"),
    "one of a batch exists": (["--seeds", "1,7", "-o", "old.png"], "old-7.png exists"),
    "width alone": (["--width", "64"], "--width and --height together"),
    "two sizes": (["--width", "64", "--height", "64", "--size", "64"], "--width and --height together, or --size"),
    "negative size": (["--width", "-64", "--height", "64"], "must be positive"),
    "preview exists": (["--preview", "given.png"], "given.png exists; use --force"),
    "preview name": (["--preview", "small.jpg"], "written as .png"),
    "latents exist": (["--save-latent", "old.safetensors"], "old.safetensors exists; use --force"),
    "latents name": (["--save-latent", "a.bin"], "written as .safetensors"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_generate_refuses_in_one_line(options: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture):
    Path("old-7.png").write_text("old")
    Path("old.safetensors").write_text("old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main([*GENERATE, "-o", "new.png", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line, line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_values_that_are_not_finite_are_one_line(folder: Path, monkeypatch, capsys: pytest.CaptureFixture):
    def poisoned(path: Path):
        model = load_flux(path)
        model.double_blocks[0].img_mlp[2].bias.data[0] = float("nan")
        return model

    monkeypatch.setattr(generation, "load_flux", poisoned)
    before = names(folder)
    assert main([*GENERATE, *SMALL, "-o", "a.png"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "step 1 of 3" in line and line.endswith("double_blocks.0.img_mlp.2")
    assert names(folder) == before


# --- The same picture, however it is made -----------------------------------------------------------------------------


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.square(a.astype(float) - b).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def test_hoisting_changes_no_pixel(bundled: Components, monkeypatch: pytest.MonkeyPatch):
    request = Request(PROMPT, steps=8, size=(96, 96), negative="octopus", cfg=2.0, seeds=(1, 2))
    hoisted = generate(bundled, request)
    with monkeypatch.context() as patch:
        forward = generation.Flux.forward

        def step_by_step(self, img, txt, pooled, timestep, img_ids, txt_ids, steering, residuals):
            assert not any(residuals)
            call = calls.pop(0)
            return forward(self, img, txt, call.pooled, call.timestep, img_ids, txt_ids, call.guidance)

        calls = []

        def remember(model, drawing, *rest):
            calls[:] = steering_calls(drawing, model.config.guidance)
            return modulation_rows(model, drawing, *rest)

        patch.setattr(generation, "modulation_rows", remember)
        patch.setattr(generation.Flux, "forward", step_by_step)
        plain = generate(bundled, request)
        assert not calls, "every pass was made step by step"
    for a, b in zip(hoisted.images, plain.images, strict=True):
        assert psnr(np.asarray(a), np.asarray(b)) > 60  # measured: 88 and bit-equal


def test_the_modulation_stays_where_it_was(bundled: Components, monkeypatch: pytest.MonkeyPatch):
    """Only the rest of the model is brought to the device: a move to `meta` stands for one."""
    moved = {}

    def watch(model, device, left):
        moved.update(left=left, all=set(model.modules()), device=device)
        return model

    monkeypatch.setattr(runtime, "move_without_", watch)
    generate(bundled, Request(PROMPT, steps=1, size=(64, 64)))
    assert moved["device"] == "cpu" and {type(part).__name__ for part in moved["left"]} == {"Embedder", "QuantLinear"}
    model = load_flux(bundled.transformer)
    assert len(moved["left"]) == len(hoisted_modules(model))


def test_tiling_keeps_the_picture(bundled: Components, monkeypatch: pytest.MonkeyPatch):
    request = Request(PROMPT, steps=8, size=(288, 192))
    whole = np.asarray(generate(bundled, request).image)
    model = load_vae(bundled.vae)
    enough = vae.estimate(model, vae.DECODE).nbytes(24, 21) / (1 - vae.RESERVE)
    monkeypatch.setattr(vae, "free_memory", lambda device: int(enough) + 1)
    tiled = np.asarray(generate(bundled, request).image)
    assert not np.array_equal(tiled, whole)
    assert psnr(tiled, whole) > 42  # measured: 44.2, with two tiles


def test_a_memory_line_can_be_given(bundled: Components):
    model = load_vae(bundled.vae)
    z = torch.randn(1, 16, 20, 20, generator=torch.Generator().manual_seed(0))
    whole = vae.decode(model, z)
    assert torch.equal(vae.decode(model, z, free=400_000, memory=Memory(100.0)), whole)
    assert not torch.equal(vae.decode(model, z, free=400, memory=Memory(1.0)), whole)


def test_decode_refuses(folder: Path, capsys: pytest.CaptureFixture, bundled: Components):
    assert main([*GENERATE, *SMALL, "-o", "a.png", "--save-latent", "a.safetensors"]) == 0
    data = Path("a.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(data[:-100])
    capsys.readouterr()
    for arguments, message in {
        ("absent.safetensors", "-o", "b.png"): "absent.safetensors: no such file",
        ("cut.safetensors", "-o", "b.png"): "truncated",
        (str(bundled.vae), "-o", "b.png"): "holds no saved latents, but",
        ("given.png", "-o", "b.png"): "neither safetensors",
        ("a.safetensors", "-o", "a.png"): "a.png exists; use --force",
        ("a.safetensors", "-o", "b.jpg"): "written as .png",
        ("a.safetensors", "-o", "b.png", "--vae", "absent.safetensors"): "give one with --vae",
        ("a.safetensors", "-o", "b.png", "--vae", str(bundled.clip)): "is a CLIP",
    }.items():
        before = names(folder)
        assert main(["decode", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line, line
        assert names(folder) == before


def test_an_unknown_vae_has_no_preview(bundled: Components, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generation.preview, "FACTORS", {})
    with pytest.raises(UserError, match="no linear preview for a VAE of widths 32, 32, 64, 96"):
        generation.previewer(Path("a.png"), bundled.vae)
