"""Pictures that models and ControlNets see: diffusers' pipelines as the judge, on the bundled model and wider ones."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from stream_backends import ThreadDevice
from torch import Tensor, nn

from flux_quant import placing, runtime
from flux_quant.cli import main
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing import vae
from flux_quant.drawing.given import check_given, from_noise, kind_of, load_nets, read_given
from flux_quant.drawing.request import ControlRequest, Request, parse_controls
from flux_quant.drawing.sampling import denoise
from flux_quant.errors import UserError
from flux_quant.frontends.diffusers import load_pipeline, load_transformer
from flux_quant.loading import load_flux, load_vae
from flux_quant.model import Flux
from flux_quant.modulation import hoisted_modules
from flux_quant.naming import to_diffusers
from flux_quant.pipeline import encode, generate, make_drawing
from flux_quant.planner.gpus import find_gpu
from flux_quant.planner.memory import Budget
from flux_quant.planner.steptime import Host
from flux_quant.text.encode import TextFeatures

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # within diffusers
PROMPT = "large red apple on a white background"
SIZE = (96, 80)
CLOSE = 1e-5  # relative, of latents
STEPS = dict(num_inference_steps=3, guidance_scale=2.5)
ASKED = dict(steps=3, guidance=2.5, seed=4, size=SIZE)
NET = dict(num_layers=2, num_single_layers=3, guidance_embeds=True)


@pytest.fixture(scope="module")
def bundled() -> Components:
    return find_components(BUNDLED)


@pytest.fixture(scope="module")
def features(bundled: Components) -> TextFeatures:
    return encode(bundled, [Request(PROMPT)], guided=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of one size (one is not), masks, and the bundled transformer with more input channels."""
    folder = tmp_path_factory.mktemp("given")
    generator = np.random.default_rng(1)
    coarse = generator.integers(0, 255, (2, 10, 12, 3), dtype=np.uint8)
    for name, values in zip(("given", "hint"), coarse, strict=True):
        Image.fromarray(values).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    Image.open(folder / "hint.png").resize((128, 64)).save(folder / "wide.png")
    mask = np.zeros((80, 96), np.uint8)
    mask[13:60, 30:77] = 255
    mask[13:60, 77:81] = 100  # grey, on the side that is kept
    Image.fromarray(mask).save(folder / "mask.png")
    Image.fromarray(mask[:64]).save(folder / "short-mask.png")
    tensors = load_file(BUNDLED / "diffusion_models" / "flux1-tiny.safetensors")
    g = torch.Generator().manual_seed(2)
    for name, channels in (("control", 64), ("fill", 320)):
        own = tensors["img_in.weight"]
        more = torch.randn(len(own), channels, generator=g).to(own.dtype) / 16
        save_file(tensors | {"img_in.weight": torch.cat([own, more], dim=1)}, folder / f"{name}.safetensors")
    save_file(random_net(seed=1).state_dict(), folder / "net.safetensors")
    save_file(random_net(seed=2, num_mode=5).state_dict(), folder / "union.safetensors")
    save_file(alimama().state_dict(), folder / "inpainting.safetensors")
    other = random_net(seed=1, attention_head_dim=32)
    save_file(other.state_dict(), folder / "narrow.safetensors")
    return folder


def random_net(seed: int, **changes: object) -> nn.Module:
    from diffusers import FluxControlNetModel

    base = load_flux(find_components(BUNDLED).transformer).config
    arguments = {**base.diffusers(), **NET, **changes}
    arguments.pop("out_channels")
    arguments["axes_dims_rope"] = (8, 28, 28) if "attention_head_dim" not in changes else (4, 14, 14)
    net = FluxControlNetModel(**arguments).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.05, generator=generator)
    return net


def alimama() -> nn.Module:
    """diffusers' net with the wider condition, as Alimama publishes it; 3 double blocks serve the 2 of the model."""
    net = random_net(seed=3, num_layers=3, num_single_layers=0)
    wide = nn.Linear(68, net.inner_dim)
    nn.init.normal_(wide.weight, 0, 0.05, generator=torch.Generator().manual_seed(4))
    nn.init.zeros_(wide.bias)
    net.controlnet_x_embedder = wide
    return net.eval()


@pytest.fixture(scope="module")
def parts(bundled: Components):
    """Components of diffusers' pipelines; their VAE gives the mean."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    patch = pytest.MonkeyPatch()
    patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    yield load_pipeline(bundled).components
    patch.undo()


def their_transformer(path: Path) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    from flux_quant.converters.checkpoint import load, open_checkpoint

    judged = FluxTransformer2DModel(**load_flux(path).config.diffusers()).eval()
    with open_checkpoint(path) as reader:
        judged.load_state_dict(to_diffusers({name: load(reader, name) for name in reader.tensors}))
    return judged


def theirs(parts: dict, kind: str, transformer: Path, more: dict | None = None, **arguments: object) -> Tensor:
    import diffusers

    parts = {**parts, "transformer": their_transformer(transformer), **(more or {})}
    pipeline = getattr(diffusers, kind)
    pipe = pipeline(**{name: parts[name] for name in inspect.signature(pipeline).parameters if name in parts})
    given = dict(prompt=PROMPT, width=SIZE[0], height=SIZE[1], max_sequence_length=24, output_type="latent", **STEPS)
    return pipe(**{**given, **arguments}, generator=torch.Generator().manual_seed(4)).images


def ours(features: TextFeatures, transformer: Path, **asked: object) -> Tensor:
    model, request = load_flux(transformer), Request(PROMPT, **{**ASKED, **asked})
    nets = load_nets(request, model.config)
    check_given(request, model.config, nets)
    encoder = load_vae(find_components(BUNDLED).vae)
    given = read_given(request, model.config, nets, lambda picture: vae.encode(encoder, picture))
    levels = request.levels(True, from_noise(request, model.config, nets))
    return denoise(model, make_drawing([request], model.config, features, levels=levels, given=given))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1
    assert (found - expected).norm() <= CLOSE * expected.norm()


def rgb(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


# --- Models that see pictures -----------------------------------------------------------------------------------------


def test_canny_and_depth_models_are_those_of_diffusers(parts, features, files: Path):
    model = files / "control.safetensors"
    expected = theirs(parts, "FluxControlPipeline", model, control_image=rgb(files / "hint.png"))
    found = ours(features, model, control_image=files / "hint.png")
    assert_close(found, expected)
    assert (ours(features, model, control_image=files / "given.png") - found).norm() > 0.01 * found.norm()


@pytest.mark.parametrize("strength", [None, 0.7])
def test_fill_is_that_of_diffusers(parts, features, files: Path, strength: float | None):
    model, picture, mask = files / "fill.safetensors", files / "given.png", files / "mask.png"
    more = {} if strength is None else {"strength": strength}
    expected = theirs(
        parts, "FluxFillPipeline", model, image=rgb(picture), mask_image=Image.open(mask).convert("L"), **more
    )
    assert_close(ours(features, model, image=picture, mask=mask, **more), expected)


def test_kontext_is_that_of_diffusers(parts, features, bundled: Components, files: Path):
    """The reference has another shape than the drawing, and its area."""
    expected = theirs(
        parts,
        "FluxKontextPipeline",
        bundled.transformer,
        image=rgb(files / "wide.png").resize((128, 64), Image.Resampling.LANCZOS),
        _auto_resize=False,
        max_area=SIZE[0] * SIZE[1],
    )
    found = ours(features, bundled.transformer, reference=files / "wide.png")
    assert_close(found, expected)
    assert (ours(features, bundled.transformer) - found).norm() > 0.01 * found.norm()


# --- ControlNets ------------------------------------------------------------------------------------------------------


def control(files: Path, name: str = "net", **changes: object) -> ControlRequest:
    return ControlRequest(files / f"{name}.safetensors", **{"image": files / "hint.png", **changes})


def their_net(files: Path, **changes: object) -> nn.Module:
    net = random_net(seed=0, **changes)
    name = "union" if "num_mode" in changes else "net"
    net.load_state_dict(load_file(files / f"{name}.safetensors"))
    return net


def test_controlnets_are_those_of_diffusers(parts, features, bundled: Components, files: Path):
    expected = theirs(
        parts,
        "FluxControlNetPipeline",
        bundled.transformer,
        {"controlnet": their_net(files)},
        control_image=rgb(files / "hint.png"),
        controlnet_conditioning_scale=0.7,
        control_guidance_end=0.7,
    )
    asked = control(files, scale=0.7, span=(0.0, 0.7))
    found = ours(features, bundled.transformer, controls=(asked,))
    assert_close(found, expected)
    assert (ours(features, bundled.transformer) - found).norm() > 0.01 * found.norm()


@pytest.mark.parametrize("repeat", [False, True])
@torch.no_grad()
def test_the_engine_takes_residuals_from_diffusers(bundled: Components, repeat: bool):
    """Of a ControlNet in diffusers' own pipelines, where the engine stands in for the transformer."""
    g = torch.Generator().manual_seed(5)
    given = dict(
        hidden_states=torch.randn(2, 6, 64, generator=g),
        encoder_hidden_states=torch.randn(2, 3, 128, generator=g),
        pooled_projections=torch.randn(2, 128, generator=g),
        timestep=torch.tensor([0.9, 0.4]),
        img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(3, 3),
        guidance=torch.tensor([2.0, 3.5]),
        controlnet_block_samples=[torch.randn(2, 6, 256, generator=g) for _ in range(3)],
        controlnet_single_block_samples=[torch.randn(2, 6, 256, generator=g) for _ in range(2)],
        controlnet_blocks_repeat=repeat,
    )
    found = load_transformer(bundled.transformer)(**given).sample
    assert_close(found, their_transformer(bundled.transformer)(**given).sample)


def test_union_nets_are_those_of_diffusers(parts, features, bundled: Components, files: Path):
    expected = theirs(
        parts,
        "FluxControlNetPipeline",
        bundled.transformer,
        {"controlnet": their_net(files, num_mode=5)},
        control_image=rgb(files / "hint.png"),
        control_mode=2,
    )
    found = ours(features, bundled.transformer, controls=(control(files, "union", mode="depth"),))
    assert_close(found, expected)
    other = ours(features, bundled.transformer, controls=(control(files, "union", mode="pose"),))
    assert (other - found).norm() > 1e-3 * found.norm()


def test_two_hints_for_one_union_net_are_those_of_diffusers(parts, features, bundled: Components, files: Path):
    from diffusers import FluxMultiControlNetModel

    expected = theirs(
        parts,
        "FluxControlNetPipeline",
        bundled.transformer,
        {"controlnet": FluxMultiControlNetModel([their_net(files, num_mode=5)])},
        control_image=[rgb(files / "hint.png"), rgb(files / "given.png")],
        control_mode=[0, 4],
        controlnet_conditioning_scale=[0.5, 0.9],
        control_guidance_start=[0.0, 0.0],  # as lists: diffusers would drop the second hint without them
        control_guidance_end=[1.0, 1.0],
    )
    controls = (
        control(files, "union", mode="canny", scale=0.5),
        control(files, "union", mode="pose", scale=0.9, image=files / "given.png"),
    )
    assert_close(ours(features, bundled.transformer, controls=controls), expected)


def test_masks_beside_controlnets_are_those_of_diffusers(parts, features, bundled: Components, files: Path):
    picture, mask = files / "given.png", files / "mask.png"
    expected = theirs(
        parts,
        "FluxControlNetInpaintPipeline",
        bundled.transformer,
        {"controlnet": their_net(files)},
        image=rgb(picture),
        mask_image=Image.open(mask).convert("L"),
        control_image=rgb(files / "hint.png"),
        strength=0.7,
    )
    asked = dict(image=picture, mask=mask, strength=0.7, controls=(control(files),))
    assert_close(ours(features, bundled.transformer, **asked), expected)


@torch.no_grad()
def test_alimama_inpainting_step_by_step(parts, features, bundled: Components, files: Path):
    """As its authors' pipeline does it: black fill, inverted mask, pure noise; diffusers' modules do the arithmetic."""
    from diffusers import FluxPipeline

    picture = torch.from_numpy(np.asarray(rgb(files / "given.png"), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    mask = torch.from_numpy(np.asarray(Image.open(files / "mask.png"), np.float32))[None, None] / 255
    picture[(mask > 0.5).expand_as(picture)] = -1
    latents = (parts["vae"].encode(picture).latent_dist.mode() - 0.1159) * 0.3611
    keep = 1 - (torch.nn.functional.interpolate(mask, size=(10, 12)) > 0.5).float()
    condition = FluxPipeline._pack_latents(torch.cat([latents, keep], dim=1), 1, 17, 10, 12)
    net = alimama()
    judged = their_transformer(bundled.transformer)
    request = Request(PROMPT, **ASKED)
    levels = request.levels(True)
    x = make_drawing([request], load_flux(bundled.transformer).config, features).noise
    for now, later in zip(levels, levels[1:], strict=False):
        given = dict(
            hidden_states=x,
            encoder_hidden_states=features.txt,
            pooled_projections=features.pooled,
            timestep=torch.tensor([now]),
            guidance=torch.tensor([2.5]),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, 5, 6, "cpu", torch.float32),
            txt_ids=torch.zeros(features.txt.shape[1], 3),
        )
        samples = net(controlnet_cond=condition, **given).controlnet_block_samples
        x = x + (later - now) * judged(**given, controlnet_block_samples=samples).sample
    asked = dict(image=files / "given.png", mask=files / "mask.png")
    found = ours(features, bundled.transformer, controls=(control(files, "inpainting", image=None),), **asked)
    assert_close(found, x)


# --- The verbs --------------------------------------------------------------------------------------------------------


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
    assert np.array_equal(np.asarray(pictures[1]), np.asarray(alone))


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
