"""The node pack over a stand-in for ComfyUI: text, converting, planning, lists of files, and its workflows."""

import json
import sys
from pathlib import Path

import pytest
import torch
from comfyui_core_nodes import AFTER, CHOICE, CORE, LINKED, signature_of
from comfyui_stand_in import CLIP, CPU, PACK, Bar, Interrupted, apart, drawn, loaded, with_pack

import flux_quant
from flux_quant.errors import UserError


@pytest.fixture(scope="module")
def comfy(tiny_flux, tmp_path_factory):
    yield from with_pack(tiny_flux, tmp_path_factory)


# --- Text -------------------------------------------------------------------------------------------------------------


def text_encoders(comfy, **options: object) -> CLIP:
    given = dict(t5_name="t5.safetensors", clip_l_name="clip_l.safetensors", device="auto", disk_cache=False) | options
    (clip,) = comfy.run("FluxQuantTextEncoders", **given)
    return clip


def test_text(comfy):
    """T5's states of every token, CLIP's one vector; a weight moves states away from those of no text."""
    clip = text_encoders(comfy)
    ((plain, more),) = clip.encode_from_tokens_scheduled(clip.tokenize("a fox"))
    assert plain.shape[:2] == (1, 32) and more["pooled_output"].ndim == 2
    ((weighted, others),) = clip.encode_from_tokens_scheduled(clip.tokenize("a fox", weight=1.5))
    ((empty, _),) = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    expected = plain.clone()
    expected[:, 1:5] = (plain - empty)[:, 1:5] * 1.5 + empty[:, 1:5]
    assert torch.equal(weighted, expected) and torch.equal(more["pooled_output"], others["pooled_output"])


def test_cached_prompts_open_no_encoder(comfy, monkeypatch):
    clip = text_encoders(comfy, disk_cache=True)
    module = sys.modules[f"{PACK}.clip"]
    first = clip.encode_from_tokens_scheduled(clip.tokenize("an owl"))

    def never(*_: object) -> None:
        raise AssertionError("an encoder was opened")

    monkeypatch.setattr(module, "t5_states", never)
    monkeypatch.setattr(module, "clip_states", never)
    again = text_encoders(comfy, disk_cache=True).encode_from_tokens_scheduled(clip.tokenize("an owl"))
    assert torch.equal(first[0][0], again[0][0])
    with pytest.raises(AssertionError):
        clip.encode_from_tokens_scheduled(clip.tokenize("another owl"))


def test_what_text_encoders_refuse(comfy):
    clip = text_encoders(comfy)
    clip.layer_idx = -2
    with pytest.raises(UserError, match="another layer"):
        clip.encode_from_tokens_scheduled(clip.tokenize("a"))
    clip.layer_idx = None
    tokens = clip.tokenize("a")
    tokens["l"][0][1] = (torch.zeros(768), 1.0)
    with pytest.raises(UserError, match="embedding:NAME"):
        clip.encode_from_tokens_scheduled(tokens)
    with pytest.raises(UserError, match="Apply LoRA"):
        clip.patcher.add_patches({"a": 1})
    with pytest.raises(UserError, match="T5"):
        text_encoders(comfy, t5_name="clip_l.safetensors")


def test_devices(comfy, caplog):
    assert comfy.clip.device_for("cpu") == comfy.clip.device_for("auto") == CPU and not caplog.text
    assert comfy.clip.device_for("gpu") == CPU and "processor" in caplog.text
    for vram, ram in (("8GB", "16GB"), ("auto", ""), ("", "auto")):
        assert comfy.seat.memory_for(CPU, vram, ram, print) is None
    with pytest.raises(UserError, match="VRAM budget"):
        comfy.seat.memory_for(CPU, "eight", "auto", print)
    with pytest.raises(UserError, match="--cpu"):
        comfy.seat.memory_for(torch.device("mps"), "auto", "auto", print)


# --- Converting, planning, lists --------------------------------------------------------------------------------------

CONVERT = dict(source="tiny.safetensors", format="q8_0", name="", replace=False, lora_name="none", lora_strength=1.0)


def test_convert(comfy):
    Bar.seen.clear()
    found = comfy.run("FluxQuantConvert", **CONVERT)
    (target,) = found["result"]
    assert (
        Path(target) == comfy.models / "diffusion_models/tiny-Q8_0.gguf" and Path(target).name in found["ui"]["text"][0]
    )
    assert len(Bar.seen) > 10 and Bar.seen[-1][0] == Bar.seen[-1][1]
    assert apart(drawn(loaded(comfy, "tiny-Q8_0.gguf")), drawn(loaded(comfy))) < 0.05
    with pytest.raises(UserError, match="exists"):
        comfy.run("FluxQuantConvert", **CONVERT)
    Path(target).unlink()


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "a\\b"])
def test_names_that_are_paths(comfy, name):
    with pytest.raises(UserError, match="plain name"):
        comfy.run("FluxQuantConvert", **CONVERT | {"name": name})


def test_interrupted_conversion_leaves_nothing(comfy):
    before = sorted((comfy.models / "diffusion_models").iterdir())
    comfy.devices.interrupted = True
    with pytest.raises(Interrupted):
        comfy.run("FluxQuantConvert", **CONVERT | {"name": "halfway"})
    assert sorted((comfy.models / "diffusion_models").iterdir()) == before


def test_plan(comfy):
    given = dict(width=512, height=768, batch=1, steps=8, vram_budget="1GB", ram_budget="auto", compute="auto")
    found = comfy.run("FluxQuantPlan", model_name="tiny.safetensors", gpu="rtx-3060-12gb", **given)
    (text,) = found["result"]
    assert "5 blocks" in text and "8 steps" in text and "s a step" in text
    with pytest.raises(UserError, match="vram|--gpu|budget"):
        comfy.run("FluxQuantPlan", model_name="tiny.safetensors", gpu="this machine", **given | {"vram_budget": "3"})


def test_lists(comfy):
    """Models in several files once, by the first of them; only ours hold .gguf."""
    folder = comfy.models / "diffusion_models"
    names = ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "notes.txt"]
    for name in names:
        (folder / name).touch()
    (listed,) = comfy.nodes["FluxQuantLoader"].INPUT_TYPES()["required"]["model_name"]
    assert listed == ["tiny.safetensors", "x-00001-of-00002.gguf"]
    assert sys.modules["folder_paths"].get_filename_list("diffusion_models") == ["tiny.safetensors"]
    for name in names:
        (folder / name).unlink()


# --- Workflows --------------------------------------------------------------------------------------------------------

WORKFLOWS = Path(flux_quant.__file__).parent / "frontends/comfyui/workflows"
GRAPHS = sorted(path.stem for path in WORKFLOWS.glob("*.json"))


def signatures(comfy) -> dict[str, tuple]:
    return CORE | {name: signature_of(node) for name, node in comfy.nodes.items()}


def test_there_are_four_workflows_in_both_forms():
    assert GRAPHS == ["alimama-inpainting-turbo", "kontext", "text-to-image-8gb", "turbo-8-steps"]
    assert sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json")) == GRAPHS


@pytest.mark.parametrize("name", GRAPHS)
def test_workflow_for_the_api(comfy, name):
    """Every node is known, has all its inputs and no others, and wires carry what the other end takes."""
    known = signatures(comfy)
    graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    kinds = {"STRING": str, "INT": int, "FLOAT": float, "BOOLEAN": bool, CHOICE: str}
    for node in graph.values():
        inputs, _ = known[node["class_type"]]
        optional = {"clip"} if node["class_type"] == "FluxQuantLora" else set()
        assert set(inputs) - optional <= set(node["inputs"]) <= set(inputs)
        for key, value in node["inputs"].items():
            if inputs[key] in LINKED:
                source, slot = value
                assert known[graph[source]["class_type"]][1][slot] == inputs[key]
            else:
                assert type(value) is kinds[inputs[key]], (node["class_type"], key)


@pytest.mark.parametrize("name", GRAPHS)
def test_workflow_for_the_browser_is_the_same(comfy, name):
    """Nodes, wires and values of widgets, in the order in which the frontend gives them to inputs."""
    known = signatures(comfy)
    graph = json.loads((WORKFLOWS / f"{name}.json").read_text())
    wires = {link[0]: link for link in graph["links"]}
    rebuilt = {}
    for node in graph["nodes"]:
        kind, values, given = node["type"], list(node["widgets_values"]), {}
        for row in node["inputs"]:
            if row["link"] is not None:
                _, source, slot, target, place, sort = wires[row["link"]]
                assert target == node["id"] and node["inputs"][place] is row and sort == row["type"]
                given[row["name"]] = [str(source), slot]
        for key, sort in known[kind][0].items():
            if sort not in LINKED:
                given[key] = values.pop(0)
                if (kind, key) in AFTER:
                    assert values.pop(0) == AFTER[kind, key]
        assert not values and [row["type"] for row in node["outputs"]] == list(known[kind][1])
        rebuilt[str(node["id"])] = {"class_type": kind, "inputs": given}
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    assert rebuilt == {number: {"class_type": n["class_type"], "inputs": n["inputs"]} for number, n in api.items()}
