"""`inpaint`, and `generate` with ControlNets: verbs, mistakes, nets beside streamed blocks."""

import json
import re
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from stream_backends import ThreadDevice

from flux_quant import placing, runtime
from flux_quant.cli import main
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing.given import kind_of, load_nets
from flux_quant.drawing.request import Request, parse_controls
from flux_quant.drawing.sampling import denoise
from flux_quant.errors import UserError
from flux_quant.generation import encode, generate, make_drawing
from flux_quant.loading import load_flux
from flux_quant.model import Flux
from flux_quant.modulation import hoisted_modules
from flux_quant.planner.gpus import find_gpu
from flux_quant.planner.memory import Budget
from flux_quant.planner.steptime import Host
from flux_quant.text.encode import TextFeatures
from flux_quant.verbs import generate as generate_verb
from flux_quant.verbs import inpaint as inpaint_verb
from given_files import ASKED, PROMPT, SIZE, control, rgb, write_files

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # within diffusers


@pytest.fixture(scope="module")
def bundled() -> Components:
    return find_components(BUNDLED)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def features(bundled: Components) -> TextFeatures:
    return encode(bundled, [Request(PROMPT)], guided=True)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(rgb(path)).astype(int)


def common(output: Path) -> list[str]:
    options = ["--prompt", PROMPT, "--steps", "2", "--no-prompt-cache", "--force", "-o", str(output)]
    return ["--model", str(BUNDLED), *options]


def test_inpaint_keeps_what_is_black(files: Path, tmp_path: Path):
    """With the ControlNet and without one, in the picture's own size."""
    given = ["--image", str(files / "given.png"), "--mask", str(files / "mask.png")]
    kept = np.asarray(Image.open(files / "mask.png")) == 0
    drawn = []
    for name, more in {"plain": [], "net": ["--controlnet", f"{files / 'inpainting.safetensors'}:0.9"]}.items():
        output = tmp_path / f"{name}.png"
        assert main(["inpaint", *common(output), *given, *more]) == 0
        drawn.append(pixels(output))
        assert drawn[-1].shape == (80, 96, 3)
        assert np.array_equal(drawn[-1][kept], pixels(files / "given.png")[kept])
    assert np.abs(drawn[0] - drawn[1])[~kept].mean() > 1
    settings = json.loads(Image.open(tmp_path / "net.png").text["flux_quant"])
    assert settings["controls"] == ["inpainting.safetensors:0.9:0-1"]


def test_turbo_with_a_net_in_one_command(files: Path, tmp_path: Path):
    """A LoRA beside the weights and an inpainting net together: both act, black keeps its pixels."""
    g, lora = torch.Generator().manual_seed(8), {}
    for i in range(5):
        name = f"lora_unet_single_blocks_{i}_linear2"
        lora[f"{name}.lora_down.weight"] = torch.randn(4, 1280, generator=g) / 16
        lora[f"{name}.lora_up.weight"] = torch.randn(256, 4, generator=g) / 4
        lora[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(lora, tmp_path / "turbo.safetensors")
    net, side = ["--controlnet", str(files / "inpainting.safetensors")], ["--lora", str(tmp_path / "turbo.safetensors")]
    given = ["--image", str(files / "given.png"), "--mask", str(files / "mask.png"), "--preset", "turbo"]
    kept = np.asarray(Image.open(files / "mask.png")) == 0
    drawn = []
    for i, more in enumerate((net, side, net + side)):
        options = [option for option in common(tmp_path / f"{i}.png") if option not in ("--steps", "2")]
        assert main(["inpaint", *options, *given, *more]) == 0
        drawn.append(pixels(tmp_path / f"{i}.png"))
        assert np.array_equal(drawn[-1][kept], pixels(files / "given.png")[kept])
    assert json.loads(Image.open(tmp_path / "2.png").text["flux_quant"])["steps"] == 8
    assert all(np.abs(drawn[2] - other)[~kept].mean() > 1 for other in drawn[:2])


def test_generate_takes_nets(files: Path, tmp_path: Path):
    plain, led, late = (tmp_path / f"{name}.png" for name in ("plain", "led", "late"))
    size, hint = ["--size", "96x80"], ["--control-image", str(files / "hint.png")]
    net = str(files / "net.safetensors")
    assert main(["generate", *common(plain), *size]) == 0
    assert main(["generate", *common(led), *size, *hint, "--controlnet", f"{net}:0.8:0-0.5"]) == 0
    assert main(["generate", *common(late), *size, *hint, "--controlnet", f"{net}:0.8:0.6-0.9"]) == 0
    assert np.abs(pixels(plain) - pixels(led)).mean() > 1
    assert np.array_equal(pixels(plain), pixels(late)), "no step lies within 0.6 to 0.9 of two"


REFUSED = {
    "no such net": (["--controlnet", "{}/none.safetensors:0.5"], "none.safetensors: No such file"),
    "not a net": (["--controlnet", "{}/control.safetensors"], r"control.safetensors is a FLUX.1 .*; FLUX ControlNet"),
    "no hint": (["--controlnet", "{}/net.safetensors"], "net.safetensors needs a hint"),
    "another width": (
        ["--controlnet", "{}/narrow.safetensors", "--control-image", "{}/hint.png"],
        "narrow.safetensors: a ControlNet for other models: its width is 128, that of the model 256",
    ),
    "no picture": (["--controlnet", "{}/inpainting.safetensors"], "inpainting.safetensors paints a picture in"),
    "a hint beside": (
        ["--controlnet", "{}/inpainting.safetensors", "--image", "{}/given.png", "--mask", "{}/mask.png",
         "--control-image", "{}/hint.png"],
        "hint.png: .*inpainting.safetensors sees the given picture",
    ),
    "no mode": (
        ["--controlnet", "{}/union.safetensors", "--control-image", "{}/hint.png"],
        "union.safetensors: a Union net needs a mode it knows: canny, tile, depth, blur, pose or a number below 5",
    ),
    "mode of none": (
        ["--controlnet", "{}/net.safetensors", "--control-image", "{}/hint.png", "--control-mode", "depth"],
        r"net.safetensors: a mode \(depth\) is for Union nets",
    ),
    "three hints": (
        ["--controlnet", "{0}/net.safetensors", *["--control-image", "{}/hint.png"] * 3],
        "3 control images for 1 ControlNets",
    ),
    "span": (
        ["--controlnet", "{}/net.safetensors:1:0.8-0.2", "--control-image", "{}/hint.png"],
        "acts from 0.8 to 0.2 of the steps",
    ),
    "scale": (["--controlnet", "{}/net.safetensors:1.2.3"], "write it as FILE:SCALE:START-END"),
    "nothing looks": (["--control-image", "{}/hint.png"], "hint.png: nothing reads a control image"),
    "mask of another size": (
        ["--image", "{}/given.png", "--mask", "{}/short-mask.png"],
        r"short-mask.png is 96 x 64, .*given.png is 96 x 80: a mask has the size of its picture",
    ),
    "net and reference": (
        ["--controlnet", "{}/net.safetensors", "--control-image", "{}/hint.png", "--reference", "{}/hint.png"],
        "exclude each other",
    ),
    "Fill without": (["--model", "{}/fill.safetensors"], "a Fill model needs a picture and a mask"),
    "Depth without": (["--model", "{}/control.safetensors"], "a Canny or Depth model needs a hint"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    options, message = REFUSED[name]
    parts = find_components(BUNDLED)
    beside = ["--t5", parts.t5, "--clip", parts.clip, "--vae", parts.vae, "--tokenizers", parts.tokenizers]
    output = tmp_path / "x.png"
    given = [option.format(files) for option in options]
    assert main(["generate", *common(output), "--size", "96x80", *map(str, beside), *given]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("warning")]
    assert len(lines) == 1 and re.search(message, lines[0]), error
    assert not output.exists()


def test_every_option_of_inpaint_is_one_of_generate():
    """It hands all of them on; what differs in its default is given."""
    ours, all_of_them = (signature(verb).parameters for verb in (inpaint_verb.inpaint, generate_verb.generate))
    assert set(ours) < set(all_of_them)
    others = {name for name in ours if ours[name].default != all_of_them[name].default}
    assert others == {"image", "mask", "strength"}


def test_what_inpaint_hands_on(monkeypatch: pytest.MonkeyPatch, files: Path):
    handed = {}
    monkeypatch.setattr(generate_verb, "generate", lambda **given: handed.update(given))
    names = ("model", "image", "mask", "prompt", "output")
    given = dict(zip(names, (BUNDLED, files / "given.png", files / "mask.png", "an owl", Path("x.png")), strict=True))
    inpaint_verb.inpaint(**given, seed=7, threads=3)
    assert {name: handed[name] for name in names} == given
    assert (handed["seed"], handed["threads"], handed["strength"], handed["scheduler"]) == (7, 3, 1.0, "euler")
    width, height = Image.open(files / "given.png").size
    assert handed["size"] == f"{width}x{height}" and set(handed) == set(signature(inpaint_verb.inpaint).parameters)
    inpaint_verb.inpaint(**given, size="32x48")
    assert handed["size"] == "32x48"


def test_options_of_several_nets():
    nets = ["a.gguf:0.5:0-0.6", "C:\\models\\b.safetensors", "c:1"]
    a, b, c = parse_controls(nets, [Path("x.png")], ["canny", "depth", "1"])
    assert (a.net, a.scale, a.span, a.mode) == (Path("a.gguf"), 0.5, (0.0, 0.6), "canny")
    assert (b.net, b.scale, b.span) == (Path("C:\\models\\b.safetensors"), 1.0, (0.0, 1.0))
    assert c.net == Path("c") and {one.image for one in (a, b, c)} == {Path("x.png")}


def test_kinds_of_models(bundled: Components):
    config = load_flux(bundled.transformer).config
    kinds = {64: "text", 128: "hint", 384: "Fill"}
    assert {n: kind_of(replace(config, in_channels=n)) for n in kinds} == kinds
    with pytest.raises(UserError, match="reads 96 channels and writes 64"):
        kind_of(replace(config, in_channels=96))


def test_a_batch_with_a_net(bundled: Components, files: Path):
    asked = Request(PROMPT, steps=2, size=SIZE, seeds=(3, 4), controls=(control(files),))
    pictures = generate(bundled, asked).images
    alone = generate(bundled, replace(asked, seeds=(4,))).image
    first, second = (np.abs(np.asarray(picture, float) - np.asarray(alone)) for picture in pictures)
    assert second.max() <= 2 < first.mean(), "several threads may add in another order"


def test_the_engine_without_nets_is_untouched(bundled: Components, features: TextFeatures):
    """No residual is asked for or added."""
    model = load_flux(bundled.transformer)
    seen = []
    original = Flux.forward

    def watch(self, **inputs):
        seen.append(inputs["residuals"])
        return original(self, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux, "forward", watch)
        denoise(model, make_drawing([Request(PROMPT, **ASKED)], model.config, features))
    assert len(seen) == 3 and not any(any(residuals) for residuals in seen)


# --- Beside streamed blocks -------------------------------------------------------------------------------------------


def test_nets_are_counted_and_freed(bundled: Components, files: Path):
    """A net beside blocks on a stand-in for a GPU: the plan knows its bytes, the picture is the same."""
    works, lines = [], []

    class Noted(runtime.Memory):
        def plan(self, model, work, encoder):
            works.append(work)
            return super().plan(model, work, encoder)

    machine = find_gpu("rtx-3060-12gb").machine()
    budget = Budget(8 * 10**9, "test")
    small = Noted(ThreadDevice(lazy=False, compute_is_host=True), machine, budget, Host(), Roomy(), log=lines.append)
    request = Request(PROMPT, steps=3, size=SIZE, controls=(control(files, span=(0.0, 0.7)),))
    streamed = generate(bundled, request, memory=small)
    assert streamed.image.tobytes() == generate(bundled, request).image.tobytes()
    ((_, net),) = load_nets(request, load_flux(bundled.transformer).config)
    hoisted = {id(x) for part in hoisted_modules(net) for x in (*part.parameters(), *part.buffers())}
    weights = sum(x.nbytes for x in (*net.parameters(), *net.buffers()) if id(x) not in hoisted)
    assert works[0].controlnets == weights + (2 + 3) * 30 * 256 * 2
    generate(bundled, replace(request, controls=()), memory=small)
    assert works[1].controlnets == 0
    generate(bundled, replace(request, controls=(), reference=files / "wide.png"), memory=small)
    assert works[2].image_tokens - works[1].image_tokens == works[2].reference == 32


def test_nets_that_do_not_fit_stream(bundled: Components, files: Path):
    """The plan refuses the whole net: its blocks pass through two slots, the picture is the same."""
    lines, tried = [], []

    class Tight(runtime.Memory):
        def plan(self, model, work, encoder):
            tried.append(work.controlnets)
            if len(tried) == 1:
                raise UserError("too much")
            return super().plan(model, work, encoder)

    machine, budget = find_gpu("rtx-3060-12gb").machine(), Budget(8 * 10**9, "test")
    tight = Tight(ThreadDevice(lazy=False, compute_is_host=True), machine, budget, Host(), Roomy(), log=lines.append)
    request = Request(PROMPT, steps=3, size=SIZE, controls=(control(files, span=(0.3, 1.0)),))
    streamed = generate(bundled, request, memory=tight)
    assert streamed.image.tobytes() == generate(bundled, request).image.tobytes()
    assert tried[1] < tried[0] and any("two slots" in line for line in lines)
    ((_, net),) = load_nets(request, load_flux(bundled.transformer).config)
    with placing.streaming(tight)(net) as streamer:
        plan = streamer.plan
        assert plan.streamed_bytes == sum(plan.sizes[2:]) > 0, "two double blocks have a slot each"
        saved = sum(plan.sizes) - plan.slot_bytes
        assert abs(tried[0] - tried[1] - saved) < 0.01 * saved


class Roomy:
    """What a device says that is large enough."""

    def free(self) -> int:
        return 8 * 10**9

    def held(self) -> int:
        return 0

    now = held

    def forget(self) -> None:
        pass
