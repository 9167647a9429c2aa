"""Pictures that models and ControlNets see: diffusers' pipelines as the judge, on the bundled model and wider ones."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing import vae
from flux_quant.drawing.given import check_given, from_noise, load_nets, read_given
from flux_quant.drawing.request import Request
from flux_quant.drawing.sampling import denoise
from flux_quant.frontends.diffusers import load
from flux_quant.frontends.pipelines import pipeline as load_pipeline
from flux_quant.generation import encode, make_drawing
from flux_quant.loading import load_flux, load_vae
from flux_quant.naming import to_diffusers
from flux_quant.text.encode import TextFeatures
from given_files import ASKED, CLOSE, PROMPT, SIZE, STEPS, alimama, control, random_net, rgb, write_files

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


@pytest.fixture(scope="module")
def parts(bundled: Components):
    """Components of diffusers' pipelines; their VAE gives the mean."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    patch = pytest.MonkeyPatch()
    patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    yield load_pipeline(bundled, device="cpu").components
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
    found = load(bundled.transformer, device="cpu")(**given).sample
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
