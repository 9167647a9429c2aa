"""The denoising loop: diffusers' pipelines as the judge, batches, callbacks, and values that stop being finite."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing.pictures import latent_mask
from flux_quant.drawing.request import Request
from flux_quant.drawing.sampling import Drawing, StepState, denoise, first_not_finite
from flux_quant.drawing.vae import encode as encode_picture
from flux_quant.errors import UserError
from flux_quant.frontends.pipelines import pipeline
from flux_quant.generation import Given, encode, make_drawing
from flux_quant.loading import load_flux, load_vae
from flux_quant.model import Flux, pack_latents
from flux_quant.text.encode import TextFeatures

PROMPT, AWAY = "large red apple on a white background", "octopus"
SIZE = (96, 80)
CLOSE = 1e-5  # relative, of latents; measured: 8e-7 against diffusers, 0 between batch and single pictures


@pytest.fixture(scope="module")
def bundled() -> Components:
    return find_components(BUNDLED)


@pytest.fixture(scope="module")
def engine(bundled: Components) -> Flux:
    return load_flux(bundled.transformer)


@pytest.fixture(scope="module")
def features(bundled: Components) -> TextFeatures:
    return encode(bundled, [Request(PROMPT), Request(AWAY)], guided=True)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """(1, 3, 80, 96): a disc on a gradient."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 80), torch.linspace(-1, 1, 96), indexing="ij")
    ground = torch.stack([x / 2 + 0.5, y / 2 + 0.5, torch.full_like(x, 0.4)])
    return torch.where(x**2 + y**2 < 0.4, torch.tensor([0.9, 0.2, 0.1])[:, None, None], ground)[None]


@pytest.fixture(scope="module")
def judge(bundled: Components):
    """(name of a pipeline, arguments) -> packed latents, from the bundled weights in diffusers' own transformer."""
    import diffusers
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    from flux_quant.converters.checkpoint import load, open_checkpoint
    from flux_quant.naming import to_diffusers

    pipe = pipeline(bundled, device="cpu")
    judged = diffusers.FluxTransformer2DModel(**pipe.transformer.engine.config.diffusers()).eval()
    with open_checkpoint(bundled.transformer) as reader:
        judged.load_state_dict(to_diffusers({name: load(reader, name) for name in reader.tensors}))
    parts = {**pipe.components, "transformer": judged}
    patch = pytest.MonkeyPatch()
    patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def draw(kind: str, **arguments: object) -> Tensor:
        given = dict(prompt=PROMPT, width=SIZE[0], height=SIZE[1], max_sequence_length=24, output_type="latent")
        generator = torch.Generator().manual_seed(4)
        return getattr(diffusers, kind)(**parts)(**{**given, **arguments}, generator=generator).images

    yield draw
    patch.undo()


def drawing_for(
    engine: Flux, features: TextFeatures, picture: Tensor | None = None, mask: Tensor | None = None, **changes: object
) -> Drawing:
    """As `generate` makes it; a picture makes it img2img."""
    given = None
    if picture is not None:
        changes = {"image": "given", "mask": None if mask is None else "given", **changes}
        given = Given(picture, encode_picture(load_vae(find_components(BUNDLED).vae), picture), mask)
    request = Request(PROMPT, **{"steps": 4, "guidance": 2.5, "seed": 4, "size": SIZE, **changes})
    texts = features if request.negative is not None else features[:1]
    return make_drawing(request.one_by_one(), engine.config, texts, given=given)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1
    assert (found - expected).norm() <= CLOSE * expected.norm()


def test_true_guidance_is_that_of_diffusers(engine: Flux, features: TextFeatures, judge):
    expected = judge(
        "FluxPipeline", negative_prompt=AWAY, true_cfg_scale=3.0, num_inference_steps=4, guidance_scale=2.5
    )
    assert_close(denoise(engine, drawing_for(engine, features, negative=AWAY, cfg=3.0)), expected)
    plain = denoise(engine, drawing_for(engine, features))
    assert (plain - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize(("steps", "strength"), [(5, 0.6), (5, 1.0), (3, 0.2), (7, 0.5)])
def test_img2img_is_that_of_diffusers(engine: Flux, features: TextFeatures, picture: Tensor, judge, steps, strength):
    arguments = dict(image=picture, strength=strength, num_inference_steps=steps, guidance_scale=2.5)
    drawing = drawing_for(engine, features, picture, steps=steps, strength=strength)
    assert_close(denoise(engine, drawing), judge("FluxImg2ImgPipeline", **arguments))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_is_that_of_diffusers(engine: Flux, features: TextFeatures, picture: Tensor, judge, strength):
    mask = torch.zeros(1, 1, 80, 96)
    mask[..., 16:60, 40:90] = 1
    arguments = dict(image=picture, mask_image=mask, strength=strength, num_inference_steps=4, guidance_scale=2.5)
    drawing = drawing_for(engine, features, picture, mask, strength=strength)
    found = denoise(engine, drawing)
    assert_close(found, judge("FluxInpaintPipeline", **arguments))
    kept = pack_latents(latent_mask(mask).expand(-1, 16, -1, -1).contiguous()) == 0
    assert 0.3 < kept.float().mean() < 0.9
    assert torch.equal(found[kept], drawing.known[kept]), "what is kept is the given picture, without noise"


def test_guidance_may_change_and_act_in_a_range(engine: Flux, features: TextFeatures):
    passes = []
    handle = engine.img_in.register_forward_hook(lambda *_: passes.append(1))
    base = drawing_for(engine, features, negative=AWAY, cfg=3.0)
    results = {}
    for limits, count in {(0.0, 1.0): 8, (0.0, 0.5): 6, (0.5, 1.0): 6, (0.2, 0.3): 5, (0.1, 0.2): 4}.items():
        passes.clear()
        results[limits] = denoise(engine, replace(base, cfg_range=limits))
        assert len(passes) == count, limits
    handle.remove()
    plain = denoise(engine, drawing_for(engine, features))
    assert torch.equal(results[0.1, 0.2], plain)
    assert not torch.equal(results[0.0, 0.5], results[0.5, 1.0])
    same = replace(drawing_for(engine, features), guidance=[2.5] * 4)
    assert torch.equal(denoise(engine, same), plain)
    changing = denoise(engine, replace(same, guidance=[2.5, 1.0, 1.0, 6.0]))
    assert (changing - plain).norm() > 1e-3 * plain.norm()


def test_each_picture_of_a_batch_is_that_of_its_seed(engine: Flux, features: TextFeatures, picture: Tensor):
    for given, changes in ((None, {}), (picture, {}), (None, {"negative": AWAY, "cfg": 2.0})):
        batch = denoise(engine, drawing_for(engine, features, given, seeds=(4, 9, 2), **changes))
        assert batch.shape[0] == 3
        for row, seed in zip(batch, (4, 9, 2), strict=True):
            assert_close(row, denoise(engine, drawing_for(engine, features, given, seed=seed, **changes))[0])
        assert (batch[0] - batch[1]).norm() > 0.1 * batch[0].norm()


def test_a_callback_sees_every_step(engine: Flux, features: TextFeatures):
    states: list[StepState] = []
    drawing = drawing_for(engine, features)
    result = denoise(engine, drawing, callback=states.append)
    assert torch.equal(result, denoise(engine, drawing))
    assert [state.step for state in states] == [0, 1, 2, 3] and {state.steps for state in states} == {4}
    assert [state.sigma for state in states] == drawing.levels[:-1]
    assert [state.next_sigma for state in states] == drawing.levels[1:]
    last = states[-1]
    assert last.latents.shape == last.estimate.shape == (1, 16, 10, 12)
    assert torch.equal(pack_latents(last.latents), result)
    torch.testing.assert_close(last.estimate, last.latents)  # at level 0 the estimate is the result
    errors = [(state.estimate - last.latents).norm().item() for state in states]
    assert errors == sorted(errors, reverse=True), "estimates come nearer"


def test_steps_are_summed_in_float32(features: TextFeatures, bundled: Components):
    engine = load_flux(bundled.transformer).to(torch.bfloat16)
    seen = []
    engine.img_in.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    drawing = drawing_for(engine, features)
    found = denoise(engine, drawing, torch.bfloat16)
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)} and found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    precise = denoise(load_flux(bundled.transformer), drawing)
    assert (found - precise).norm() < 0.1 * precise.norm()


# --- Values that are not finite ---------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(bundled: Components) -> Flux:
    return load_flux(bundled.transformer).to(torch.float32)


PLACES = ["double_blocks.1.img_mlp.2", "single_blocks.2.linear1", "txt_in", "final_layer.linear"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_step_and_the_module_are_named(poisoned: Flux, features: TextFeatures, place: str, value: float):
    poisoned.get_submodule(place).bias.data[3] = value
    with pytest.raises(UserError, match=rf"step 1 of 4 \(from noise level 1.0000 to 0.\d+\).*first are in {place}$"):
        denoise(poisoned, drawing_for(poisoned, features))


def test_the_modulation_is_named(poisoned: Flux, features: TextFeatures):
    poisoned.single_blocks[0].modulation.lin.bias.data[3] = float("nan")
    with pytest.raises(UserError, match="step 1 of 4 .* in the modulation$"):
        denoise(poisoned, drawing_for(poisoned, features))


def overflow_from(module: nn.Module, call: int) -> None:
    """From that call on the module gives an infinite value."""
    calls = []

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor:
        calls.append(1)
        return output if len(calls) < call else output.index_fill(-1, torch.tensor([0]), float("inf"))

    module.register_forward_hook(hook)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_later_step_is_named(poisoned: Flux, features: TextFeatures, step: int):
    overflow_from(poisoned.double_blocks[0].txt_attn.proj, step)
    with pytest.raises(UserError, match=rf"step {step} of 4 .* in double_blocks.0.txt_attn.proj$"):
        denoise(poisoned, drawing_for(poisoned, features))


def test_what_passes_is_said_to_have_passed(poisoned: Flux, features: TextFeatures):
    calls = []

    def hook(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else None

    poisoned.final_layer.register_forward_hook(hook)
    with pytest.raises(UserError, match="step 2 of 4 .*a second pass shows none"):
        denoise(poisoned, drawing_for(poisoned, features))


def test_inputs_are_named(engine: Flux, features: TextFeatures):
    drawing = drawing_for(engine, features)
    txt = drawing.text.txt.clone()
    txt[0, 2, 1] = float("nan")
    with pytest.raises(UserError, match="step 1 of 4 .* in the text$"):
        denoise(engine, replace(drawing, text=drawing.text._replace(txt=txt)))
    drawing.noise[0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="step 1 of 4 .* in the latents before it$"):
        denoise(engine, drawing)


def test_looking_leaves_no_hooks(engine: Flux, features: TextFeatures):
    handles = sum(len(module._forward_hooks) for module in engine.modules())
    drawing = drawing_for(engine, features)
    inputs = dict(
        img=drawing.noise,
        txt=drawing.text.txt,
        pooled=drawing.text.pooled,
        timestep=torch.ones(1),
        img_ids=torch.zeros(30, 3),
        txt_ids=torch.zeros(drawing.text.txt.shape[1], 3),
        guidance=torch.ones(1),
    )
    assert first_not_finite(engine, inputs) is None
    assert sum(len(module._forward_hooks) for module in engine.modules()) == handles


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"mask": torch.ones(1, 30, 64)}, "mask needs"), ({"guidance": [1.0, 2.0]}, "2 values of guidance for 4 steps")],
    ids=["mask without a picture", "guidance of other steps"],
)
def test_drawings_that_contradict_themselves(engine: Flux, features: TextFeatures, changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(drawing_for(engine, features), **changes)
