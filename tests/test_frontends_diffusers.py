"""Our transformer in diffusers' pipelines: theirs as the judge, whole and streamed; moving, offloading, callbacks."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_device import half_memory
from torch import Tensor, nn

import flux_quant
from flux_quant.components import BUNDLED, find_components
from flux_quant.errors import UserError
from flux_quant.frontends.diffusers import EngineTransformer, load, transformer_class
from flux_quant.loading import load_flux
from flux_quant.naming import to_diffusers
from given_files import NET, PROMPT, SIZE, random_net, rgb, write_files

CLOSE = 1e-4  # relative, of latents
FILES = find_components(BUNDLED)

Given = Callable[[Path], dict[str, object]]


def picture(files: Path, **more: object) -> dict[str, object]:
    return {"image": rgb(files / "given.png"), **more}


def masked(files: Path) -> dict[str, object]:
    return picture(files, mask_image=Image.open(files / "mask.png").convert("L"), strength=0.7)


def hint(files: Path) -> dict[str, object]:
    return {"control_image": rgb(files / "hint.png")}


PIPELINES: dict[str, tuple[str, Given]] = {  # class -> transformer's file, what it is called with
    "FluxPipeline": ("flux1-tiny", lambda files: {}),
    "FluxImg2ImgPipeline": ("flux1-tiny", lambda files: picture(files, strength=0.7)),
    "FluxInpaintPipeline": ("flux1-tiny", masked),
    "FluxFillPipeline": ("fill", masked),
    "FluxControlPipeline": ("control", hint),
    "FluxControlNetPipeline": ("flux1-tiny", hint),
    "FluxKontextPipeline": ("flux1-tiny", lambda files: picture(files, _auto_resize=False, max_area=SIZE[0] * SIZE[1])),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def parts():
    """Everything but the transformer."""
    pipe = flux_quant.pipeline(BUNDLED, device="cpu")
    net = random_net(seed=1, **NET)
    return {**pipe.components, "controlnet": net}


def their_transformer(path: Path) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    judge = FluxTransformer2DModel(**load_flux(path).config.diffusers()).eval()
    judge.load_state_dict(to_diffusers({name: tensor.float() for name, tensor in load_file(path).items()}))
    return judge


def model_file(files: Path, name: str) -> Path:
    return FILES.transformer if name == "flux1-tiny" else files / f"{name}.safetensors"


def streamed(path: Path) -> EngineTransformer:
    return transformer_class()(load_flux(path), None, half_memory())


def pipeline_of(parts: dict, kind: str, transformer: nn.Module):
    import diffusers

    cls = getattr(diffusers, kind)
    given = {**parts, "transformer": transformer}
    pipe = cls(**{name: given[name] for name in inspect.signature(cls).parameters if name in given})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **given: object) -> Tensor:
    common = dict(prompt=PROMPT, width=SIZE[0], height=SIZE[1], num_inference_steps=3, guidance_scale=2.5)
    more = dict(max_sequence_length=24, output_type="latent", generator=torch.Generator().manual_seed(4))
    return pipe(**{**common, **more, **given}).images


def error(found: Tensor, expected: Tensor) -> float:
    assert expected.norm() > 1
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_pipeline_draws_as_with_its_own_transformer(kind: str, parts: dict, files: Path):
    name, call = PIPELINES[kind]
    path = model_file(files, name)
    expected = drawn(pipeline_of(parts, kind, their_transformer(path)), **call(files))
    whole = drawn(pipeline_of(parts, kind, load(path, device="cpu")), **call(files))
    assert error(whole, expected) < CLOSE
    moving = streamed(path)
    assert torch.equal(drawn(pipeline_of(parts, kind, moving), **call(files)), whole)
    assert moving.streamed.residence.metrics()["total_bytes"] > 0


def test_a_second_picture_evaluates_its_modulation_once(parts: dict):
    """Without the scheduler, the timesteps of the picture before tell which follow."""
    transformer = load(FILES.transformer, device="cpu")
    pipe = pipeline_of(parts, "FluxPipeline", transformer)
    drawn(pipe)
    assert transformer.modulation.evaluations == 3
    drawn(pipe, prompt="penguin")
    assert transformer.modulation.evaluations == 4
    drawn(pipe, prompt="penguin")
    assert transformer.modulation.evaluations == 4


def test_callbacks_see_and_change_latents(parts: dict):
    pipe = pipeline_of(parts, "FluxPipeline", streamed(FILES.transformer))
    seen = []

    def callback(pipe, step: int, timestep: Tensor, tensors: dict) -> dict:
        seen.append(step)
        return {"latents": tensors["latents"] * 0} if step == 2 else tensors

    assert not drawn(pipe, callback_on_step_end=callback).any()
    assert seen == [0, 1, 2]
    pipe._interrupt = True
    pipe.set_progress_bar_config(disable=False)
    pipe.set_progress_bar_config(disable=True)


@pytest.mark.parametrize("make", [lambda path: load(path, device="cpu"), streamed], ids=["whole", "streamed"])
def test_moving_and_casting(make, parts: dict):
    """`.to` leaves packed weights alone; what streams is paused on the CPU and draws the same afterwards."""
    transformer = make(FILES.transformer)
    pipe = pipeline_of(parts, "FluxPipeline", transformer)
    before = drawn(pipe)
    weights = [part.clone() for layer in transformer.engine.double_blocks for part in layer.img_attn.qkv.parts]
    pipe.to("cpu")
    if transformer.streamed:
        assert transformer.streamed.residence.streamer.plan is None, "paused"
    assert torch.equal(drawn(pipe), before)
    nn.Module.to(transformer, torch.bfloat16)
    assert transformer.dtype == torch.bfloat16 and transformer.device.type == "cpu"
    after = drawn(pipe)
    assert 0 < error(after, before) < 0.1 and after.dtype == torch.float32
    nn.Module.to(transformer, torch.float32)
    now = [part for layer in transformer.engine.double_blocks for part in layer.img_attn.qkv.parts]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))


@pytest.mark.parametrize("make", [lambda path: load(path, device="cpu"), streamed], ids=["whole", "streamed"])
def test_model_offload(make, parts: dict):
    """What enable_model_cpu_offload installs: a model's turn ends when the next one's begins."""
    from accelerate import cpu_offload_with_hook

    transformer = make(FILES.transformer)
    pipe = pipeline_of(parts, "FluxPipeline", transformer)
    before = drawn(pipe)
    _, hook = cpu_offload_with_hook(transformer, "cpu")
    assert torch.equal(drawn(pipe), before)
    hook.offload()
    if transformer.streamed:
        assert transformer.streamed.residence.streamer.plan is None
    assert torch.equal(drawn(pipe), before)
    hook.remove()


@pytest.mark.parametrize("make", [lambda path: load(path, device="cpu"), streamed], ids=["whole", "streamed"])
def test_offloading_of_single_layers_is_refused_with_what_to_do(make, parts: dict):
    from accelerate import cpu_offload
    from diffusers.hooks import HookRegistry

    transformer = make(FILES.transformer)
    cpu_offload(transformer, torch.device("cpu"), offload_buffers=True)
    with pytest.raises(UserError, match="enable_sequential_cpu_offload does not know .* vram="):
        drawn(pipeline_of(parts, "FluxPipeline", transformer))
    transformer = make(FILES.transformer)
    HookRegistry.check_if_exists_or_initialize(transformer.engine.double_blocks[0])  # as group offloading does
    with pytest.raises(UserError, match="group offloading does not know .* vram="):
        drawn(pipeline_of(parts, "FluxPipeline", transformer))


def test_larger_pictures_get_a_new_plan(parts: dict):
    lines = []
    transformer = transformer_class()(load_flux(FILES.transformer), None, half_memory(lines.append))
    pipe = pipeline_of(parts, "FluxPipeline", transformer)
    for width in (96, 64, 128):
        drawn(pipe, width=width)
        assert transformer.streamed.work.size == {96: (96, 80), 64: (96, 80), 128: (128, 80)}[width]
    assert len(lines) == 2 and all("predicted" in line for line in lines)
    transformer.streamed.leave()
    assert transformer.streamed.residence is None


def test_what_pipelines_ask_of_a_transformer(parts: dict, tmp_path: Path):
    from diffusers import FluxPipeline, ModelMixin

    transformer = load(FILES.transformer, device="cpu")
    assert isinstance(transformer, ModelMixin) and transformer.config["in_channels"] == transformer.config.in_channels
    pipe = pipeline_of(parts, "FluxPipeline", transformer)
    expected = drawn(pipe)
    pipe.save_pretrained(tmp_path)
    again = FluxPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(again), expected)
    passed = FluxPipeline.from_pretrained(tmp_path, transformer=streamed(FILES.transformer))
    passed.set_progress_bar_config(disable=True)
    assert torch.equal(drawn(passed), expected)


def test_what_the_engine_does_not_do_is_an_error(parts: dict):
    pipe = pipeline_of(parts, "FluxPipeline", load(FILES.transformer, device="cpu"))
    with pytest.raises(ValueError, match="ip_adapter_image_embeds"):
        drawn(pipe, joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1)]})


def test_bad_arguments():
    for options, message in (
        ({"compute": "int4"}, "compute int4"),
        ({"device": "nonsense"}, "device nonsense"),
    ):
        with pytest.raises(UserError, match=message):
            load(FILES.transformer, **options)
    with pytest.raises(UserError, match="FLUX.1 is needed"):
        load(FILES.vae)
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="nothing streams"):
            assert load(FILES.transformer, vram="8GB").streamed is None
