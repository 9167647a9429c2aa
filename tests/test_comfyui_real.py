"""The node pack inside real ComfyUI code (see `comfyui_checkout`): pictures, LoRAs, and what is refused."""

import pytest
import torch
from comfyui_checkout import (
    BOUND,
    SMALL,
    apart,
    close,
    conditioning,
    loras_for,
    needs_comfyui,
    ours,
    release,
    sampled,
    theirs,
    weights,
    with_comfyui,
    with_loras,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_quant.benchmarks.random_weights import DEV, SPREAD
from flux_quant.errors import UserError

pytestmark = [pytest.mark.slow, needs_comfyui]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    yield from with_comfyui(tmp_path_factory)


@pytest.fixture(scope="module")
def loras(comfyui):
    return loras_for(comfyui)


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_full_width_model(comfyui):
    """Loads, samples, and agrees with ComfyUI's own loader on the BF16 file; nothing in between is small."""
    name = "full-width.safetensors"
    save_file(weights(DEV, 1, spread=SPREAD), comfyui.models / "diffusion_models" / name)
    prompt = conditioning(4096, 768)
    expected = sampled(comfyui, theirs(comfyui, name), prompt)
    release(comfyui)
    close(sampled(comfyui, ours(comfyui, name), prompt), expected)
    release(comfyui)
    comfyui.run(
        "FluxQuantConvert", source=name, format="q8_0", name="", replace=False, lora_name="none", lora_strength=1.0
    )
    close(sampled(comfyui, ours(comfyui, "full-width-Q8_0.gguf"), prompt), expected, 0.05)


@pytest.mark.parametrize("hoisted", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_ksampler(comfyui, hoisted, cfg):
    negative = conditioning(SMALL["context"], SMALL["pooled"], 1)
    expected = sampled(comfyui, theirs(comfyui), cfg=cfg, negative=negative, scheduler="beta", sampler_name="heun")
    found = ours(comfyui, hoisted_modulation=hoisted)
    close(sampled(comfyui, found, cfg=cfg, negative=negative, scheduler="beta", sampler_name="heun"), expected)


def test_modulation_is_evaluated_once_a_picture(comfyui):
    model = ours(comfyui)
    sampled(comfyui, model, steps=5)
    seat = model.model.seat
    assert seat.modulation.evaluations == 1
    sampled(comfyui, model, steps=5)
    assert seat.modulation.evaluations == 1  # the same prompt and levels again


@pytest.mark.parametrize("size", [(8, 12), (9, 7)], ids=["even", "odd"])
def test_sizes(comfyui, size):
    close(sampled(comfyui, ours(comfyui), size=size), sampled(comfyui, theirs(comfyui), size=size))


def test_model_sampling(comfyui):
    pair = []
    for model in (ours(comfyui), theirs(comfyui)):
        patched = comfyui.run("ModelSamplingFlux", model=model, max_shift=1.3, base_shift=0.4, width=512, height=256)
        pair.append(sampled(comfyui, patched))
    close(*pair)
    assert apart(pair[0], sampled(comfyui, ours(comfyui))) > 0.01


@pytest.mark.parametrize("method", ["offset", "index", "uxo"])
def test_kontext(comfyui, method):
    generator = torch.Generator().manual_seed(3)
    seen = [torch.randn(1, 16, *size, generator=generator) for size in ((8, 6), (10, 8), (6, 14))]
    prompt = conditioning(SMALL["context"], SMALL["pooled"], reference_latents=seen, reference_latents_method=method)
    found = sampled(comfyui, ours(comfyui), prompt)
    close(found, sampled(comfyui, theirs(comfyui), prompt))
    assert apart(found, sampled(comfyui, ours(comfyui))) > 0.01


def test_fill(comfyui):
    """InpaintModelConditioning gives a picture and its mask, which the model reads beside the latents."""
    save_file(weights(SMALL | {"in_channels": 384}), comfyui.models / "diffusion_models/fill.safetensors")
    generator = torch.Generator().manual_seed(4)
    given = dict(
        concat_latent_image=torch.randn(1, 16, 8, 8, generator=generator), concat_mask=torch.ones(1, 1, 64, 64)
    )
    given["concat_mask"][..., :20] = 0
    prompt = conditioning(SMALL["context"], SMALL["pooled"], **given)
    close(
        sampled(comfyui, ours(comfyui, "fill.safetensors"), prompt),
        sampled(comfyui, theirs(comfyui, "fill.safetensors"), prompt),
    )


def test_style_model(comfyui):
    """Redux appends tokens to those of the text."""
    from comfy.clip_vision import Output

    class Style:
        def get_cond(self, output):
            return output.last_hidden_state.clone()

    seen = Output()
    seen.last_hidden_state = torch.randn(1, 9, SMALL["context"], generator=torch.Generator().manual_seed(5))
    pair = []
    for model in (ours(comfyui), theirs(comfyui)):
        styled = comfyui.run(
            "StyleModelApply",
            conditioning=conditioning(SMALL["context"], SMALL["pooled"]),
            style_model=Style(),
            clip_vision_output=seen,
            strength=0.7,
            strength_type="multiply",
        )
        pair.append(sampled(comfyui, model, styled))
    close(*pair)


def test_controlnet(comfyui):
    """Residuals for some of the blocks, and for the drawn tokens only where a reference follows them."""
    from comfy.controlnet import ControlBase

    class Net(ControlBase):
        def get_control(self, x, timestep, cond, batched, *more):
            generator = torch.Generator().manual_seed(6)
            made = [torch.randn(len(x), 16, SMALL["hidden"], generator=generator) * 0.3 for _ in range(3)]
            return {"input": [made[0], None], "output": made[1:2]}

        def get_models(self):
            return []

        def inference_memory_requirements(self, dtype):
            return 0

    seen = [torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(3))]
    more = dict(reference_latents=seen, control=Net(), control_apply_to_uncond=True)
    prompt = conditioning(SMALL["context"], SMALL["pooled"], **more)
    found = sampled(comfyui, ours(comfyui), prompt)
    close(found, sampled(comfyui, theirs(comfyui), prompt))
    without = conditioning(SMALL["context"], SMALL["pooled"], reference_latents=seen)
    assert apart(found, sampled(comfyui, ours(comfyui), without)) > 0.01


def test_controlnet_from_a_file(comfyui):
    """ComfyUI's own ControlNet beside the engine, loaded, applied and asked at every step as for its own model."""
    from diffusers import FluxControlNetModel

    torch.manual_seed(11)
    with torch.inference_mode(False):
        net = FluxControlNetModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=1,
            attention_head_dim=SMALL["head_dim"],
            num_attention_heads=SMALL["hidden"] // SMALL["head_dim"],
            joint_attention_dim=SMALL["context"],
            pooled_projection_dim=SMALL["pooled"],
            guidance_embeds=True,
            axes_dims_rope=(16, 56, 56),
        )
        state = {name: torch.randn_like(t) * 0.05 if "norm" not in name else t for name, t in net.state_dict().items()}
        save_file(state, comfyui.models / "controlnet/net.safetensors")

    class Vae:
        def spacial_compression_encode(self) -> int:
            return 8

        def encode(self, pixels: Tensor) -> Tensor:
            return nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8).repeat(1, 6, 1, 1)[:, :16]

    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(12))
    prompt = conditioning(SMALL["context"], SMALL["pooled"])
    applied = comfyui.run(
        "ControlNetApplyAdvanced",
        positive=prompt,
        negative=prompt,
        control_net=comfyui.run("ControlNetLoader", control_net_name="net.safetensors"),
        image=hint,
        strength=0.8,
        start_percent=0.0,
        end_percent=1.0,
        vae=Vae(),
    )
    found = sampled(comfyui, ours(comfyui), applied)
    close(found, sampled(comfyui, theirs(comfyui), applied))
    assert apart(found, sampled(comfyui, ours(comfyui), prompt)) > 0.01


def test_rope_options(comfyui):
    if "ScaleROPE" not in comfyui.nodes:
        pytest.skip("this ComfyUI has no node ScaleROPE")
    given = dict(scale_x=1.5, shift_x=2.0, scale_y=0.5, shift_y=1.0, scale_t=1.0, shift_t=0.0)
    pair = [
        sampled(comfyui, comfyui.run("ScaleROPE", model=model, **given)) for model in (ours(comfyui), theirs(comfyui))
    ]
    close(*pair)
    assert apart(pair[0], sampled(comfyui, ours(comfyui))) > 0.01


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_lora(comfyui, loras, count):
    """Beside the weights here, in them there; a clone without it is as before, and the order of use does not matter."""
    model = ours(comfyui)
    plain = sampled(comfyui, model)
    adapted = with_loras(comfyui, model, loras[:count])
    expected = sampled(comfyui, with_loras(comfyui, theirs(comfyui), loras[:count], "LoraLoaderModelOnly"))
    close(sampled(comfyui, adapted), expected)
    assert torch.equal(sampled(comfyui, model), plain) and apart(plain, expected) > 0.01
    close(sampled(comfyui, adapted), expected)


def test_comfyuis_own_lora_node_is_refused(comfyui, loras):
    with pytest.raises(UserError, match="Apply LoRA"):
        with_loras(comfyui, ours(comfyui), loras, "LoraLoaderModelOnly")


def attention_of_a_node(seen: list):
    """Sharper than ComfyUI's, to be told from it."""

    def override(func, q, k, v, heads, **options):
        seen.append((options["skip_reshape"], q.shape[1] == heads))
        return func(1.5 * q, k, v, heads, **options)

    return override


def test_an_attention_that_a_node_chooses(comfyui):
    """Both models answer it alike, and differently from the picture without it."""
    found, seen = [], []
    for model in (ours(comfyui), theirs(comfyui)):
        chosen = model.clone()
        chosen.model_options["transformer_options"]["optimized_attention_override"] = attention_of_a_node(seen)
        found.append(sampled(comfyui, chosen))
        assert apart(found[-1], sampled(comfyui, model)) > 0.01
    assert apart(*found) < BOUND and set(seen) == {(True, True)}


# --- What is refused --------------------------------------------------------------------------------------------------


def test_patches_are_refused(comfyui):
    given = dict(
        scale=3.0, start_percent=0.0, end_percent=1.0, double_layers="1", single_layers="1", rescaling_scale=0.0
    )
    model = comfyui.run("SkipLayerGuidanceDiT", model=ours(comfyui), **given)
    with pytest.raises(UserError, match="double_block"):
        sampled(comfyui, model, cfg=2.0)
    model = ours(comfyui)
    model.set_model_patch(lambda given: given, "post_input")
    with pytest.raises(UserError, match="post_input"):
        sampled(comfyui, model)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("ModelMergeSimple", {"model2": None, "ratio": 0.5}),
        ("ModelSave", {"filename_prefix": "merged"}),
    ],
)
def test_changes_of_weights_are_refused(comfyui, node, inputs):
    model = ours(comfyui)
    target = "model1" if "model2" in inputs else "model"
    inputs = {name: model if value is None else value for name, value in inputs.items()} | {target: model}
    with pytest.raises(UserError, match="flux_quant cannot be"):
        comfyui.run(node, **inputs)


def test_no_guidance_and_no_mask(comfyui):
    prompt = conditioning(SMALL["context"], SMALL["pooled"], guidance=None)
    with pytest.raises(UserError, match="guidance"):
        sampled(comfyui, ours(comfyui), prompt)
