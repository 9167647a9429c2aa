"""The node pack inside real ComfyUI code, on the CPU: COMFYUI_DIR names a checkout, GGUF_NODE_DIR one of ComfyUI-GGUF.

ComfyUI has FLUX.1's 24 heads built in, so what it is compared with at full width is one double and one single block of
random weights; the other comparisons use small models, for which ComfyUI's detection is told the number of heads.
"""

import asyncio
import gc
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_core_nodes import CORE, signature_of
from safetensors.torch import save_file
from torch import Tensor

import flux_quant
from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.random_weights import DEV, SPREAD
from flux_quant.errors import UserError
from flux_quant.model import Flux

CHECKOUT, GGUF_NODE = (os.environ.get(name) for name in ("COMFYUI_DIR", "GGUF_NODE_DIR"))
PACK = Path(flux_quant.__file__).parent / "frontends/comfyui"
OURS = ("FluxQuantLoader", "FluxQuantTextEncoders", "FluxQuantLora", "FluxQuantConvert", "FluxQuantPlan")
LOADER = dict(vram_budget="auto", ram_budget="auto", compute="auto", hoisted_modulation=True)
FOLDER_OF = {
    "model_name": "diffusion_models",
    "t5_name": "text_encoders",
    "clip_l_name": "text_encoders",
    "lora_name": "loras",
    "vae_name": "vae",
    "control_net_name": "controlnet",
    "image": "../input",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_DIR names no checkout of ComfyUI"),
]

BOUND = 1e-3  # relative, of latents
USUAL, DEEP = "small.safetensors", "deep.safetensors"
SMALL = dict(in_channels=64, out_channels=64, hidden=256, head_dim=128, mlp=1024, context=96, pooled=64, guidance=True)


def weights(
    config: dict[str, object], blocks: int = 2, seed: int = 0, spread: float | None = None
) -> dict[str, Tensor]:
    """Random ones in BF16; activations neither vanish nor explode."""
    with torch.device("meta"):
        shapes = {
            k: v.shape
            for k, v in Flux(FluxConfig(**config, double_blocks=blocks, single_blocks=blocks)).state_dict().items()
        }
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, shape: torch.Size) -> Tensor:
        noise = torch.empty(shape).normal_(0, spread or shape[-1] ** -0.5, generator=generator)
        return (noise + name.endswith("scale")).bfloat16()

    return {name: values(name, shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    from comfyui_checkout import heads_from_shapes, run, start

    found = start(Path(CHECKOUT), tmp_path_factory.mktemp("comfyui") / "models")
    heads_from_shapes(found.detection)
    import flux_quant.frontends.comfyui as pack

    found.nodes |= pack.NODE_CLASS_MAPPINGS
    found.run = lambda kind, /, **inputs: run(found.nodes[kind], **inputs)
    for name, blocks in ((USUAL, 2), (DEEP, 6)):
        save_file(weights(SMALL, blocks), found.models / "diffusion_models" / name)
    with torch.inference_mode():
        yield found


def ours(comfy, name: str = USUAL, **options: object):
    return comfy.run("FluxQuantLoader", model_name=name, **LOADER | options)


def theirs(comfy, name: str = USUAL):
    return comfy.run("UNETLoader", unet_name=name, weight_dtype="default")


def conditioning(context: int, pooled: int, seed: int = 0, words: int = 16, **more: object) -> list:
    generator = torch.Generator().manual_seed(seed)
    extra = {"pooled_output": torch.randn(1, pooled, generator=generator), "guidance": 3.5, **more}
    return [[torch.randn(1, words, context, generator=generator), extra]]


def sampled(
    comfy, model, positive=None, negative=None, steps: int = 3, cfg: float = 1.0, size=(8, 8), **options
) -> Tensor:
    positive = positive or conditioning(SMALL["context"], SMALL["pooled"])
    given = dict(seed=7, sampler_name="euler", scheduler="simple", denoise=1.0) | options
    latent = {"samples": torch.zeros(1, 16, *size)}
    out = comfy.run(
        "KSampler",
        model=model,
        steps=steps,
        cfg=cfg,
        positive=positive,
        negative=negative or positive,
        latent_image=latent,
        **given,
    )
    return out["samples"]


def apart(one: Tensor, other: Tensor) -> float:
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def close(one: Tensor, other: Tensor, bound: float = BOUND) -> None:
    found = apart(one, other)
    print(f"apart: {found:.2e}")
    assert found < bound


def release(comfy) -> None:
    comfy.management.unload_all_models()
    gc.collect()


# --- Pictures ---------------------------------------------------------------------------------------------------------


def test_full_width_model(comfy):
    """Loads, samples, and agrees with ComfyUI's own loader on the BF16 file; nothing in between is small."""
    name = "full-width.safetensors"
    save_file(weights(DEV, 1, spread=SPREAD), comfy.models / "diffusion_models" / name)
    prompt = conditioning(4096, 768)
    expected = sampled(comfy, theirs(comfy, name), prompt)
    release(comfy)
    close(sampled(comfy, ours(comfy, name), prompt), expected)
    release(comfy)
    comfy.run(
        "FluxQuantConvert", source=name, format="q8_0", name="", replace=False, lora_name="none", lora_strength=1.0
    )
    close(sampled(comfy, ours(comfy, "full-width-Q8_0.gguf"), prompt), expected, 0.05)


@pytest.mark.parametrize("hoisted", [True, False])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_ksampler(comfy, hoisted, cfg):
    negative = conditioning(SMALL["context"], SMALL["pooled"], 1)
    expected = sampled(comfy, theirs(comfy), cfg=cfg, negative=negative, scheduler="beta", sampler_name="heun")
    found = ours(comfy, hoisted_modulation=hoisted)
    close(sampled(comfy, found, cfg=cfg, negative=negative, scheduler="beta", sampler_name="heun"), expected)


def test_modulation_is_evaluated_once_a_picture(comfy):
    model = ours(comfy)
    sampled(comfy, model, steps=5)
    seat = model.model.seat
    assert seat.modulation.evaluations == 1
    sampled(comfy, model, steps=5)
    assert seat.modulation.evaluations == 1  # the same prompt and levels again


@pytest.mark.parametrize("size", [(8, 12), (9, 7)], ids=["even", "odd"])
def test_sizes(comfy, size):
    close(sampled(comfy, ours(comfy), size=size), sampled(comfy, theirs(comfy), size=size))


def test_model_sampling(comfy):
    pair = []
    for model in (ours(comfy), theirs(comfy)):
        patched = comfy.run("ModelSamplingFlux", model=model, max_shift=1.3, base_shift=0.4, width=512, height=256)
        pair.append(sampled(comfy, patched))
    close(*pair)
    assert apart(pair[0], sampled(comfy, ours(comfy))) > 0.01


@pytest.mark.parametrize("method", ["offset", "index", "uxo"])
def test_kontext(comfy, method):
    generator = torch.Generator().manual_seed(3)
    seen = [torch.randn(1, 16, *size, generator=generator) for size in ((8, 6), (10, 8), (6, 14))]
    prompt = conditioning(SMALL["context"], SMALL["pooled"], reference_latents=seen, reference_latents_method=method)
    found = sampled(comfy, ours(comfy), prompt)
    close(found, sampled(comfy, theirs(comfy), prompt))
    assert apart(found, sampled(comfy, ours(comfy))) > 0.01


def test_fill(comfy):
    """InpaintModelConditioning gives a picture and its mask, which the model reads beside the latents."""
    save_file(weights(SMALL | {"in_channels": 384}), comfy.models / "diffusion_models/fill.safetensors")
    generator = torch.Generator().manual_seed(4)
    given = dict(
        concat_latent_image=torch.randn(1, 16, 8, 8, generator=generator), concat_mask=torch.ones(1, 1, 64, 64)
    )
    given["concat_mask"][..., :20] = 0
    prompt = conditioning(SMALL["context"], SMALL["pooled"], **given)
    close(
        sampled(comfy, ours(comfy, "fill.safetensors"), prompt),
        sampled(comfy, theirs(comfy, "fill.safetensors"), prompt),
    )


def test_style_model(comfy):
    """Redux appends tokens to those of the text."""
    from comfy.clip_vision import Output

    class Style:
        def get_cond(self, output):
            return output.last_hidden_state.clone()

    seen = Output()
    seen.last_hidden_state = torch.randn(1, 9, SMALL["context"], generator=torch.Generator().manual_seed(5))
    pair = []
    for model in (ours(comfy), theirs(comfy)):
        styled = comfy.run(
            "StyleModelApply",
            conditioning=conditioning(SMALL["context"], SMALL["pooled"]),
            style_model=Style(),
            clip_vision_output=seen,
            strength=0.7,
            strength_type="multiply",
        )
        pair.append(sampled(comfy, model, styled))
    close(*pair)


def test_controlnet(comfy):
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
    found = sampled(comfy, ours(comfy), prompt)
    close(found, sampled(comfy, theirs(comfy), prompt))
    without = conditioning(SMALL["context"], SMALL["pooled"], reference_latents=seen)
    assert apart(found, sampled(comfy, ours(comfy), without)) > 0.01


def test_rope_options(comfy):
    if "ScaleROPE" not in comfy.nodes:
        pytest.skip("this ComfyUI has no node ScaleROPE")
    given = dict(scale_x=1.5, shift_x=2.0, scale_y=0.5, shift_y=1.0, scale_t=1.0, shift_t=0.0)
    pair = [sampled(comfy, comfy.run("ScaleROPE", model=model, **given)) for model in (ours(comfy), theirs(comfy))]
    close(*pair)
    assert apart(pair[0], sampled(comfy, ours(comfy))) > 0.01


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(comfy) -> list[str]:
    """Two files in kohya's names, one of them on the modulation as well."""
    generator = torch.Generator().manual_seed(8)
    shapes = {
        "single_blocks_0_linear1": (SMALL["hidden"], 3 * SMALL["hidden"] + SMALL["mlp"]),
        "double_blocks_1_img_attn_qkv": (SMALL["hidden"], 3 * SMALL["hidden"]),
        "double_blocks_0_img_mod_lin": (SMALL["hidden"], 6 * SMALL["hidden"]),
    }
    for name, count in (("one.safetensors", 3), ("two.safetensors", 1)):
        tensors = {}
        for module, (inputs, outputs) in list(shapes.items())[:count]:
            tensors[f"lora_unet_{module}.lora_down.weight"] = torch.randn(4, inputs, generator=generator) * 0.1
            tensors[f"lora_unet_{module}.lora_up.weight"] = torch.randn(outputs, 4, generator=generator) * 0.1
            tensors[f"lora_unet_{module}.alpha"] = torch.tensor(2.0)
        save_file(tensors, comfy.models / "loras" / name)
    return ["one.safetensors", "two.safetensors"]


def with_loras(comfy, model, names: list[str], node: str = "FluxQuantLora"):
    for name, strength in zip(names, (0.8, -0.5), strict=False):
        if node == "FluxQuantLora":
            model = comfy.run(node, model=model, lora_name=name, strength=strength)
        else:
            model = comfy.run(node, model=model, lora_name=name, strength_model=strength)
    return model


@pytest.mark.parametrize("count", [1, 2])
def test_lora(comfy, loras, count):
    """Beside the weights here, in them there; a clone without it is as before, and the order of use does not matter."""
    model = ours(comfy)
    plain = sampled(comfy, model)
    adapted = with_loras(comfy, model, loras[:count])
    expected = sampled(comfy, with_loras(comfy, theirs(comfy), loras[:count], "LoraLoaderModelOnly"))
    close(sampled(comfy, adapted), expected)
    assert torch.equal(sampled(comfy, model), plain) and apart(plain, expected) > 0.01
    close(sampled(comfy, adapted), expected)


def test_comfyuis_own_lora_node_is_refused(comfy, loras):
    with pytest.raises(UserError, match="Apply LoRA"):
        with_loras(comfy, ours(comfy), loras, "LoraLoaderModelOnly")


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_interrupted(comfy):
    from comfy.sample import sample

    management = comfy.management
    model, prompt = ours(comfy), conditioning(SMALL["context"], SMALL["pooled"])
    expected = sampled(comfy, model)

    def stop(step: int, *_: object) -> None:
        management.interrupt_current_processing()

    latent, noise = torch.zeros(1, 16, 8, 8), torch.randn(1, 16, 8, 8)
    with pytest.raises(management.InterruptProcessingException):
        sample(model, noise, 4, 1.0, "euler", "simple", prompt, prompt, latent, callback=stop)
    assert torch.equal(sampled(comfy, model), expected)


def test_unloading_and_loading(comfy):
    model = ours(comfy)
    expected = sampled(comfy, model)
    assert model.loaded_size() == model.model_size() > 0
    loaded = comfy.management.loaded_models()
    assert any(one.is_clone(model) for one in loaded)
    comfy.management.unload_all_models()
    assert model.loaded_size() == 0 and not comfy.management.loaded_models()
    assert torch.equal(sampled(comfy, model), expected)


def test_two_models_and_their_clones(comfy):
    save_file(weights(SMALL, seed=1), comfy.models / "diffusion_models/other.safetensors")
    one, two = ours(comfy), ours(comfy, "other.safetensors")
    first, second = sampled(comfy, one), sampled(comfy, two)
    assert apart(first, second) > 0.01
    assert torch.equal(sampled(comfy, one.clone()), first) and torch.equal(sampled(comfy, two.clone()), second)
    assert len({id(found.model) for found in comfy.management.loaded_models()} & {id(one.model), id(two.model)}) == 2


def test_a_dropped_model_is_forgotten(comfy):
    release(comfy)
    model = ours(comfy)
    sampled(comfy, model)
    assert len(comfy.management.loaded_models()) == 1
    del model
    gc.collect()
    comfy.management.cleanup_models_gc()
    assert comfy.management.loaded_models() == []


@pytest.fixture
def streamed(comfy):
    """A MODEL whose device is a stand-in with a memory of its own."""
    from test_runtime import Budget, Host, Quiet, device, find_gpu

    from flux_quant.frontends.comfyui.patcher import model_of
    from flux_quant.frontends.comfyui.seat import Seat
    from flux_quant.loading import load_flux
    from flux_quant.runtime import Memory

    with torch.inference_mode(False):
        engine = load_flux(comfy.models / "diffusion_models" / DEEP)
    machine = find_gpu("rtx-3060-12gb").machine()
    memory = Memory(device(), machine, Budget(machine.total, "test"), Host(), Quiet())
    return model_of(Seat(engine, memory), torch.device("cpu"), torch.float32)


def test_streamed(comfy, streamed, loras):
    """As --lowvram does: as many bytes as are allowed, in any order; the picture stays the same bit for bit."""
    place, expected = streamed.load_device, sampled(comfy, ours(comfy, DEEP))
    size = streamed.model_size()
    allowed = [0.1, 0.7 * size, -0.3 * size, 2 * size]  # --novram, more, less, all
    held = []
    for extra in allowed:
        before = streamed.loaded_size()
        assert streamed.partially_load(place, extra) == streamed.loaded_size() - before
        held.append(streamed.loaded_size())
        assert torch.equal(sampled_as_loaded(streamed), sampled_as_loaded(streamed))
    assert held[0] < held[2] < held[1] <= held[3] == size
    freed = streamed.partially_unload(place, size // 3)
    assert freed >= size // 3 and streamed.loaded_size() == size - freed
    assert torch.equal(sampled(comfy, streamed), expected)
    adapted = with_loras(comfy, streamed, loras)
    close(sampled(comfy, adapted), sampled(comfy, with_loras(comfy, ours(comfy, DEEP), loras)), 1e-6)
    comfy.management.unload_all_models()
    assert streamed.loaded_size() == 0 and streamed.seat.residence is None


def sampled_as_loaded(model) -> Tensor:
    """One pass without ComfyUI's asking for memory first."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    ((context, more),) = conditioning(SMALL["context"], SMALL["pooled"])
    guidance = torch.tensor([3.5])
    return model.model.apply_model(
        x, torch.tensor([0.7]), c_crossattn=context, y=more["pooled_output"], guidance=guidance
    )


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM", "HIGH_VRAM", "NORMAL_VRAM"])
def test_states_of_memory(comfy, streamed, state, monkeypatch):
    """ComfyUI's own bookkeeping over the stand-in, as if it were a card with little memory."""
    management = comfy.management
    release(comfy)
    size = streamed.model_size()
    monkeypatch.setattr(management, "vram_state", management.VRAMState[state])
    monkeypatch.setattr(management, "lowvram_available", True)
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)

    def free_memory(device: object = None, torch_free_too: bool = False) -> float | tuple[float, float]:
        free = size * 0.6 - streamed.loaded_size()
        return (free, 0) if torch_free_too else free

    monkeypatch.setattr(management, "get_free_memory", free_memory)
    management.load_models_gpu([streamed], memory_required=size // 100, minimum_memory_required=size // 100)
    held = streamed.loaded_size()
    generous = "128 * 1024" in inspect.getsource(management.load_models_gpu)  # older versions always allow 128 MB
    assert (held == size) == (state == "HIGH_VRAM" or generous and state != "NO_VRAM")
    management.load_models_gpu([streamed], memory_required=size // 100, minimum_memory_required=size // 100)
    assert streamed.loaded_size() == held  # the same workflow again
    management.free_memory(free_memory() + held // 20, streamed.load_device)  # another model wants some of it
    assert streamed.loaded_size() < held
    monkeypatch.undo()
    assert torch.equal(sampled(comfy, streamed), sampled(comfy, ours(comfy, DEEP)))


# --- What is refused --------------------------------------------------------------------------------------------------


def test_patches_are_refused(comfy):
    given = dict(
        scale=3.0, start_percent=0.0, end_percent=1.0, double_layers="1", single_layers="1", rescaling_scale=0.0
    )
    model = comfy.run("SkipLayerGuidanceDiT", model=ours(comfy), **given)
    with pytest.raises(UserError, match="double_block"):
        sampled(comfy, model, cfg=2.0)
    model = ours(comfy)
    model.set_model_patch(lambda given: given, "post_input")
    with pytest.raises(UserError, match="post_input"):
        sampled(comfy, model)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [
        ("ModelMergeSimple", {"model2": None, "ratio": 0.5}),
        ("ModelSave", {"filename_prefix": "merged"}),
    ],
)
def test_changes_of_weights_are_refused(comfy, node, inputs):
    model = ours(comfy)
    target = "model1" if "model2" in inputs else "model"
    inputs = {name: model if value is None else value for name, value in inputs.items()} | {target: model}
    with pytest.raises(UserError, match="flux_quant cannot be"):
        comfy.run(node, **inputs)


def test_no_guidance_and_no_mask(comfy):
    prompt = conditioning(SMALL["context"], SMALL["pooled"], guidance=None)
    with pytest.raises(UserError, match="guidance"):
        sampled(comfy, ours(comfy), prompt)


# --- Text -------------------------------------------------------------------------------------------------------------

T5 = dict(d_model=128, d_kv=64, d_ff=256, num_heads=2, num_layers=3)
CLIP = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
PROMPTS = {
    "plain": "a red fox in the snow, morning light",
    "empty": "",
    "weights": "a (red:1.4) fox in ((deep)) snow, (dark:0.6) \\(old\\) trees",
    "long": "a fox and a hare and an owl in the snow, " * 30,
}


@pytest.fixture(scope="module")
def encoders(comfy) -> tuple[str, str]:
    """T5 of three small layers, CLIP-L of its own size, in BF16."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    with torch.inference_mode(False):
        t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5)).state_dict()
        clip = CLIPTextModel(CLIPTextConfig(**CLIP)).state_dict()
        t5 = {name: tensor for name, tensor in t5.items() if not name.endswith("embed_tokens.weight")}
        clip = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in clip.items()}
        for name, state in (("t5", t5), ("clip_l", clip)):
            state = {key: tensor.bfloat16().contiguous() for key, tensor in state.items() if "position_ids" not in key}
            save_file(state, comfy.models / f"text_encoders/{name}.safetensors")
    return "t5.safetensors", "clip_l.safetensors"


@pytest.fixture(scope="module")
def their_clip(comfy, encoders):
    paths = [str(comfy.models / "text_encoders" / name) for name in encoders]
    return comfy.sd.load_clip(paths, clip_type=comfy.sd.CLIPType.FLUX, model_options={"t5xxl_model_config": T5})


def text_encoders(comfy, names: tuple[str, str], disk_cache: bool = False):
    t5, clip_l = names
    return comfy.run("FluxQuantTextEncoders", t5_name=t5, clip_l_name=clip_l, device="auto", disk_cache=disk_cache)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_text(comfy, encoders, their_clip, text, cached):
    clip = text_encoders(comfy, encoders, disk_cache=cached)
    for _ in range(1 + cached):
        pair = [comfy.run("CLIPTextEncode", clip=one, text=text) for one in (clip, their_clip)]
        (found, more), (expected, others) = (given[0] for given in pair)
        close(found, expected)
        close(more["pooled_output"], others["pooled_output"])


def test_two_prompts_and_guidance(comfy, encoders, their_clip):
    clip = text_encoders(comfy, encoders)
    given = dict(clip_l="a fox", t5xxl="a red fox", guidance=2.5)
    pair = [comfy.run("CLIPTextEncodeFlux", clip=one, **given)[0] for one in (clip, their_clip)]
    close(pair[0][0], pair[1][0])
    close(pair[0][1]["pooled_output"], pair[1][1]["pooled_output"])
    assert pair[0][1]["guidance"] == pair[1][1]["guidance"] == 2.5


def test_packed_encoders(comfy, encoders, their_clip):
    """T5 in GGUF and CLIP in 16 bits; near what ComfyUI makes of BF16."""
    source, clip_l = encoders
    inputs = dict(name="t5-packed", replace=True, lora_name="none", lora_strength=1.0)
    comfy.run("FluxQuantConvert", source=source, format="q8_0", **inputs)
    clip = comfy.run(
        "FluxQuantTextEncoders", t5_name="t5-packed.gguf", clip_l_name=clip_l, device="cpu", disk_cache=False
    )
    pair = [comfy.run("CLIPTextEncode", clip=one, text="a red fox")[0][0] for one in (clip, their_clip)]
    close(*pair, 0.05)


def test_what_text_encoders_refuse(comfy, encoders, loras):
    clip = text_encoders(comfy, encoders)
    with pytest.raises(UserError, match="another layer"):
        comfy.run("CLIPTextEncode", clip=comfy.run("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2), text="a")
    with pytest.raises(UserError, match="no T5 encoder|not a T5|T5"):
        text_encoders(comfy, (encoders[1], encoders[1]))


# --- Our files in other loaders ---------------------------------------------------------------------------------------


def converted(comfy, format_name: str, target: str, **options: object) -> str:
    from flux_quant.converters.conversion import Conversion
    from flux_quant.converters.convert import run
    from flux_quant.converters.plan import make_plan

    folder = comfy.models / "diffusion_models"
    with torch.inference_mode(False):
        run(make_plan(Conversion(folder / USUAL, folder / target, format_name, force=True, **options)))
    return target


def test_fp8_in_comfyuis_loaders(comfy):
    """In the form that this ComfyUI knows: the current one, or the legacy one in older versions, which make FP8 of
    the activations too, on a processor as well."""
    from flux_quant.converters.bundle import merge

    legacy = not hasattr(comfy.utils, "convert_old_quants")
    name = converted(comfy, "fp8", "small-fp8.safetensors", legacy_fp8=legacy)
    expected = sampled(comfy, ours(comfy, name))
    bound = 0.06 if legacy else BOUND
    close(sampled(comfy, theirs(comfy, name)), expected, bound)
    if legacy:
        return  # all-in-one files are written in the current form only
    with torch.inference_mode(False):
        merge([comfy.models / "diffusion_models" / name], comfy.models / "checkpoints/whole-fp8.safetensors", True)
    close(sampled(comfy, comfy.run("CheckpointLoaderSimple", ckpt_name="whole-fp8.safetensors")), expected)
    close(sampled(comfy, ours(comfy, "whole-fp8.safetensors")), expected)


@pytest.mark.skipif(not GGUF_NODE, reason="GGUF_NODE_DIR names no checkout of ComfyUI-GGUF")
@pytest.mark.parametrize("format_name", ["q8_0", "q5_0", "q4_k_m", "bf16"])
def test_gguf_in_comfyui_gguf(comfy, format_name):
    """It unpacks in float16, hence the wider bound."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_gguf", Path(GGUF_NODE) / "__init__.py", submodule_search_locations=[GGUF_NODE]
    )
    pack = sys.modules.setdefault("comfyui_gguf", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(pack)
    name = converted(comfy, format_name, f"small-{format_name}.gguf")
    model = pack.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(name)[0]
    close(sampled(comfy, ours(comfy, name)), sampled(comfy, model), 5e-3)


def test_a_model_in_several_files(comfy):
    from flux_quant.converters.shards import sharding

    converted(comfy, "q8_0", "parts.gguf", sharding=sharding("2MB", None))
    listed = comfy.nodes["FluxQuantLoader"].INPUT_TYPES()["required"]["model_name"][0]
    (first,) = [name for name in listed if name.startswith("parts")]
    converted(comfy, "q8_0", "one.gguf")
    assert torch.equal(sampled(comfy, ours(comfy, first)), sampled(comfy, ours(comfy, "one.gguf")))
    assert not any("gguf" in name for name in comfy.nodes["UNETLoader"].INPUT_TYPES()["required"]["unet_name"][0])


# --- Converting and planning ------------------------------------------------------------------------------------------


def test_interrupted_conversion_leaves_nothing(comfy, monkeypatch):
    folder = comfy.models / "diffusion_models"
    before = sorted(folder.iterdir())
    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: seen.append(values[:2]))
    inputs = dict(source=USUAL, format="q4_0", name="halfway", replace=False, lora_name="none", lora_strength=1.0)
    comfy.management.interrupt_current_processing()
    with pytest.raises(comfy.management.InterruptProcessingException):
        comfy.run("FluxQuantConvert", **inputs)
    assert sorted(folder.iterdir()) == before
    comfy.run("FluxQuantConvert", **inputs)
    assert (folder / "halfway.gguf").exists() and len(seen) > 10


def test_plan(comfy):
    inputs = dict(width=1024, height=1024, batch=1, steps=20, vram_budget="1GB", ram_budget="auto", compute="auto")
    found = comfy.run("FluxQuantPlan", model_name=USUAL, gpu="rtx-3060-12gb", **inputs)
    text = found["result"][0]
    assert "4 blocks" in text and "s a step" in text and found["ui"]["text"] == [text]


# --- Installing, workflows, whole prompts -----------------------------------------------------------------------------


def test_comfyui_finds_the_installed_pack(comfy, tmp_path):
    """By its own search of custom_nodes, whether a link or a loader lies there."""
    from flux_quant.verbs.comfyui import NAME, put_in

    for copy in (False, True):
        place = tmp_path / str(copy) / NAME
        place.parent.mkdir()
        put_in(place, copy)
        for name in OURS:
            comfy.nodes.pop(name, None)
        assert asyncio.run(comfy.module.load_custom_node(str(place)))
        assert set(OURS) <= set(comfy.nodes)
        assert comfy.module.NODE_DISPLAY_NAME_MAPPINGS["FluxQuantLora"] == "Apply LoRA (flux_quant)"


def test_signatures_of_comfyuis_nodes(comfy):
    found = {name: signature_of(comfy.nodes[name]) for name in CORE}
    assert found == CORE


@pytest.mark.parametrize("name", sorted(path.stem for path in (PACK / "workflows/api").glob("*.json")))
def test_comfyui_accepts_the_workflow(comfy, name):
    import execution

    prompt = json.loads((PACK / "workflows/api" / f"{name}.json").read_text())
    places = {key: comfy.models / folder for key, folder in FOLDER_OF.items()}
    for node in prompt.values():
        for key, value in node["inputs"].items():
            if key in places and isinstance(value, str):
                (places[key] / value).touch()
    valid, error, outputs, problems = asyncio.run(execution.validate_prompt(name, prompt, None))
    assert valid and outputs == ["22"], (error, problems)
    for key, place in places.items():
        for node in prompt.values():
            if isinstance(node["inputs"].get(key), str):
                (place / node["inputs"][key]).unlink(missing_ok=True)


def node(kind: str, **inputs: object) -> dict[str, object]:
    return {"class_type": kind, "inputs": inputs}


def test_whole_prompts(comfy, encoders, loras):
    """Executed as ComfyUI executes them: twice, with a change, interrupted, and again."""
    import execution

    widths = SMALL | {"context": T5["d_model"], "pooled": CLIP["hidden_size"]}
    save_file(weights(widths), comfy.models / "diffusion_models/reads.safetensors")
    said: list[str] = []
    server = SimpleNamespace(client_id="test", last_node_id=None, last_prompt_id=None)
    server.send_sync = lambda kind, *_: said.append(kind)
    text = dict(t5_name=encoders[0], clip_l_name=encoders[1], device="cpu", disk_cache=False)
    drawing = dict(seed=1, steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0)
    wires = dict(model=["2", 0], positive=["4", 0], negative=["4", 0], latent_image=["5", 0])
    prompt = {
        "1": node("FluxQuantLoader", model_name="reads.safetensors", **LOADER),
        "2": node("FluxQuantLora", model=["1", 0], lora_name=loras[0], strength=0.5),
        "3": node("FluxQuantTextEncoders", **text),
        "4": node("CLIPTextEncode", clip=["3", 0], text="a fox"),
        "5": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "6": node("KSampler", **drawing, **wires),
        "7": node("SaveLatent", samples=["6", 0], filename_prefix="whole"),
    }
    more = inspect.signature(execution.PromptExecutor).parameters
    executor = execution.PromptExecutor(server, **({"cache_args": {"ram": 0}} if "cache_args" in more else {}))

    def execute(number: int) -> list[str]:
        said.clear()
        executor.execute(prompt, f"prompt {number}", {"client_id": "test"}, ["7"])
        return said

    assert "execution_success" in execute(1)
    assert "execution_success" in execute(2)
    prompt["2"]["inputs"]["strength"] = -0.5
    assert "execution_success" in execute(3)
    prompt["6"]["inputs"]["seed"] = 2
    model = next(one.model for one in comfy.management.loaded_models() if hasattr(one.model, "seat"))
    stop = comfy.management.interrupt_current_processing
    handle = model.seat.engine.double_blocks[0].register_forward_hook(lambda *_: stop())
    assert "execution_interrupted" in execute(4)
    handle.remove()
    assert "execution_success" in execute(5)
