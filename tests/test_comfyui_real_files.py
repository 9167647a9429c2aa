"""The node pack inside real ComfyUI code (see `comfyui_checkout`): text, files in other loaders, workflows."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from comfyui_checkout import (
    BOUND,
    GGUF_NODE,
    T5,
    USUAL,
    close,
    encoders_for,
    needs_comfyui,
    ours,
    sampled,
    theirs,
    with_comfyui,
)
from comfyui_core_nodes import CORE, signature_of

import flux_quant
from flux_quant.errors import UserError

pytestmark = [pytest.mark.slow, needs_comfyui]

PACK = Path(flux_quant.__file__).parent / "frontends/comfyui"
OURS = ("FluxQuantLoader", "FluxQuantTextEncoders", "FluxQuantLora", "FluxQuantConvert", "FluxQuantPlan")
FOLDER_OF = {
    "model_name": "diffusion_models",
    "t5_name": "text_encoders",
    "clip_l_name": "text_encoders",
    "lora_name": "loras",
    "vae_name": "vae",
    "control_net_name": "controlnet",
    "image": "../input",
}


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    yield from with_comfyui(tmp_path_factory)


@pytest.fixture(scope="module")
def encoders(comfyui):
    return encoders_for(comfyui)


# --- Text -------------------------------------------------------------------------------------------------------------

PROMPTS = {
    "plain": "a red fox in the snow, morning light",
    "empty": "",
    "weights": "a (red:1.4) fox in ((deep)) snow, (dark:0.6) \\(old\\) trees",
    "long": "a fox and a hare and an owl in the snow, " * 30,
}


@pytest.fixture(scope="module")
def their_clip(comfyui, encoders):
    paths = [str(comfyui.models / "text_encoders" / name) for name in encoders]
    return comfyui.sd.load_clip(paths, clip_type=comfyui.sd.CLIPType.FLUX, model_options={"t5xxl_model_config": T5})


def text_encoders(comfyui, names: tuple[str, str], disk_cache: bool = False):
    t5, clip_l = names
    return comfyui.run("FluxQuantTextEncoders", t5_name=t5, clip_l_name=clip_l, device="auto", disk_cache=disk_cache)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_text(comfyui, encoders, their_clip, text, cached):
    clip = text_encoders(comfyui, encoders, disk_cache=cached)
    for _ in range(1 + cached):
        pair = [comfyui.run("CLIPTextEncode", clip=one, text=text) for one in (clip, their_clip)]
        (found, more), (expected, others) = (given[0] for given in pair)
        close(found, expected)
        close(more["pooled_output"], others["pooled_output"])


def test_two_prompts_and_guidance(comfyui, encoders, their_clip):
    clip = text_encoders(comfyui, encoders)
    given = dict(clip_l="a fox", t5xxl="a red fox", guidance=2.5)
    pair = [comfyui.run("CLIPTextEncodeFlux", clip=one, **given)[0] for one in (clip, their_clip)]
    close(pair[0][0], pair[1][0])
    close(pair[0][1]["pooled_output"], pair[1][1]["pooled_output"])
    assert pair[0][1]["guidance"] == pair[1][1]["guidance"] == 2.5


def test_packed_encoders(comfyui, encoders, their_clip):
    """T5 in GGUF and CLIP in 16 bits; near what ComfyUI makes of BF16."""
    source, clip_l = encoders
    inputs = dict(name="t5-packed", replace=True, lora_name="none", lora_strength=1.0)
    comfyui.run("FluxQuantConvert", source=source, format="q8_0", **inputs)
    clip = comfyui.run(
        "FluxQuantTextEncoders", t5_name="t5-packed.gguf", clip_l_name=clip_l, device="cpu", disk_cache=False
    )
    pair = [comfyui.run("CLIPTextEncode", clip=one, text="a red fox")[0][0] for one in (clip, their_clip)]
    close(*pair, 0.05)


def test_what_text_encoders_refuse(comfyui, encoders):
    clip = text_encoders(comfyui, encoders)
    with pytest.raises(UserError, match="another layer"):
        comfyui.run("CLIPTextEncode", clip=comfyui.run("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=-2), text="a")
    with pytest.raises(UserError, match="T5"):
        text_encoders(comfyui, (encoders[1], encoders[1]))


# --- Our files in other loaders ---------------------------------------------------------------------------------------


def converted(comfyui, format_name: str, target: str, **options: object) -> str:
    from flux_quant.converters.conversion import Conversion
    from flux_quant.converters.convert import run
    from flux_quant.converters.plan import make_plan

    folder = comfyui.models / "diffusion_models"
    with torch.inference_mode(False):
        run(make_plan(Conversion(folder / USUAL, folder / target, format_name, force=True, **options)))
    return target


def test_fp8_in_comfyuis_loaders(comfyui):
    """In the form that this ComfyUI knows: the current one, or the legacy one in older versions, which make FP8 of
    the activations too, on a processor as well."""
    from flux_quant.converters.bundle import merge

    legacy = not hasattr(comfyui.utils, "convert_old_quants")
    name = converted(comfyui, "fp8", "small-fp8.safetensors", legacy_fp8=legacy)
    expected = sampled(comfyui, ours(comfyui, name))
    bound = 0.06 if legacy else BOUND
    close(sampled(comfyui, theirs(comfyui, name)), expected, bound)
    if legacy:
        return  # all-in-one files are written in the current form only
    with torch.inference_mode(False):
        merge([comfyui.models / "diffusion_models" / name], comfyui.models / "checkpoints/whole-fp8.safetensors", True)
    close(sampled(comfyui, comfyui.run("CheckpointLoaderSimple", ckpt_name="whole-fp8.safetensors")), expected)
    close(sampled(comfyui, ours(comfyui, "whole-fp8.safetensors")), expected)


@pytest.mark.skipif(not GGUF_NODE, reason="GGUF_NODE_DIR names no checkout of ComfyUI-GGUF")
@pytest.mark.parametrize("format_name", ["q8_0", "q5_0", "q4_k_m", "bf16"])
def test_gguf_in_comfyui_gguf(comfyui, format_name):
    """It unpacks in float16, hence the wider bound."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_gguf", Path(GGUF_NODE) / "__init__.py", submodule_search_locations=[GGUF_NODE]
    )
    pack = sys.modules.setdefault("comfyui_gguf", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(pack)
    name = converted(comfyui, format_name, f"small-{format_name}.gguf")
    model = pack.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]().load_unet(name)[0]
    close(sampled(comfyui, ours(comfyui, name)), sampled(comfyui, model), 5e-3)


def test_a_model_in_several_files(comfyui):
    from flux_quant.converters.shards import sharding

    converted(comfyui, "q8_0", "parts.gguf", sharding=sharding("2MB", None))
    listed = comfyui.nodes["FluxQuantLoader"].INPUT_TYPES()["required"]["model_name"][0]
    (first,) = [name for name in listed if name.startswith("parts")]
    converted(comfyui, "q8_0", "one.gguf")
    assert torch.equal(sampled(comfyui, ours(comfyui, first)), sampled(comfyui, ours(comfyui, "one.gguf")))
    assert not any("gguf" in name for name in comfyui.nodes["UNETLoader"].INPUT_TYPES()["required"]["unet_name"][0])


# --- Converting and planning ------------------------------------------------------------------------------------------


def test_interrupted_conversion_leaves_nothing(comfyui, monkeypatch):
    folder = comfyui.models / "diffusion_models"
    before = sorted(folder.iterdir())
    seen = []
    monkeypatch.setattr(comfyui.utils, "PROGRESS_BAR_HOOK", lambda *values, **_: seen.append(values[:2]))
    inputs = dict(source=USUAL, format="q4_0", name="halfway", replace=False, lora_name="none", lora_strength=1.0)
    comfyui.management.interrupt_current_processing()
    with pytest.raises(comfyui.management.InterruptProcessingException):
        comfyui.run("FluxQuantConvert", **inputs)
    assert sorted(folder.iterdir()) == before
    comfyui.run("FluxQuantConvert", **inputs)
    assert (folder / "halfway.gguf").exists() and len(seen) > 10


def test_plan(comfyui):
    inputs = dict(width=1024, height=1024, batch=1, steps=20, vram_budget="1GB", ram_budget="auto", compute="auto")
    found = comfyui.run("FluxQuantPlan", model_name=USUAL, gpu="rtx-3060-12gb", **inputs)
    text = found["result"][0]
    assert "4 blocks" in text and "s a step" in text and found["ui"]["text"] == [text]


# --- Installing, workflows, whole prompts -----------------------------------------------------------------------------


def test_comfyui_finds_the_installed_pack(comfyui, tmp_path):
    """By its own search of custom_nodes, whether a link or a loader lies there."""
    from flux_quant.verbs.comfyui import NAME, put_in

    for copy in (False, True):
        place = tmp_path / str(copy) / NAME
        place.parent.mkdir()
        put_in(place, copy)
        for name in OURS:
            comfyui.nodes.pop(name, None)
        assert asyncio.run(comfyui.module.load_custom_node(str(place)))
        assert set(OURS) <= set(comfyui.nodes)
        assert comfyui.module.NODE_DISPLAY_NAME_MAPPINGS["FluxQuantLora"] == "Apply LoRA (flux_quant)"


def test_signatures_of_comfyuis_nodes(comfyui):
    found = {name: signature_of(comfyui.nodes[name]) for name in CORE}
    assert found == CORE


@pytest.mark.parametrize("name", sorted(path.stem for path in (PACK / "workflows/api").glob("*.json")))
def test_comfyui_accepts_the_workflow(comfyui, name):
    import execution

    prompt = json.loads((PACK / "workflows/api" / f"{name}.json").read_text())
    places = {key: comfyui.models / folder for key, folder in FOLDER_OF.items()}
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
