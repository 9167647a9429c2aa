"""The node pack over a stand-in for ComfyUI's interfaces; test_comfyui_real.py runs it inside ComfyUI's own code."""

import gc
import importlib
import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_core_nodes import AFTER, CHOICE, CORE, LINKED, signature_of
from comfyui_stand_in import CLIP, Bar, Interrupted, ModelPatcher, modules
from safetensors.torch import save_file
from test_runtime import GB, Budget, Host, Quiet, device, find_gpu
from torch import Tensor

import flux_quant
from flux_quant.components import BUNDLED
from flux_quant.errors import UserError
from flux_quant.loading import load_flux
from flux_quant.model import image_ids, pack_latents, text_ids, unpack_latents
from flux_quant.planner.footprint import Work
from flux_quant.runtime import Memory

PACK = "flux_quant.frontends.comfyui"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def comfy(tiny_flux, tmp_path_factory):
    """The pack, its nodes, and a folder of models."""
    models, devices = tmp_path_factory.mktemp("models"), SimpleNamespace(interrupted=False)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules(models, devices).items():
            patch.setitem(sys.modules, name, module)
        save_file(tiny_flux, models / "diffusion_models/tiny.safetensors")
        for name in ("t5", "clip_l"):
            source = BUNDLED / f"text_encoders/{name}.safetensors"
            (models / f"text_encoders/{name}.safetensors").write_bytes(source.read_bytes())
        pack = importlib.import_module(PACK)
        parts = {
            name: importlib.import_module(f"{PACK}.{name}") for name in ("patcher", "seat", "transformer", "places")
        }

        def run(kind: str, /, **inputs: object) -> object:
            node = pack.NODE_CLASS_MAPPINGS[kind]
            return getattr(node(), node.FUNCTION)(**inputs)

        yield SimpleNamespace(
            run=run, nodes=pack.NODE_CLASS_MAPPINGS, models=models, devices=devices, pack=pack, **parts
        )
    for name in [name for name in sys.modules if name.startswith(PACK)]:
        del sys.modules[name]


def loaded(comfy, name: str = "tiny.safetensors", **options: object) -> ModelPatcher:
    given = dict(vram_budget="auto", ram_budget="auto", compute="auto", hoisted_modulation=True) | options
    (model,) = comfy.run("FluxQuantLoader", model_name=name, **given)
    model.partially_load(model.load_device, 1e32)
    return model


def inputs(config, batch: int = 1, size: tuple[int, int] = (8, 6)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return dict(
        x=torch.randn(batch, config.in_channels // 4, *size, generator=generator),
        timestep=torch.full((batch,), 0.6),
        context=torch.randn(batch, 12, config.context, generator=generator),
        y=torch.randn(batch, config.pooled, generator=generator),
        guidance=torch.full((batch,), 3.5),
    )


@torch.no_grad()
def drawn(model, **more: object) -> Tensor:
    net = model.model.diffusion_model
    return net(**(inputs(net.seat.engine.config) | more))


@torch.no_grad()
def by_engine(path: Path) -> Tensor:
    engine = load_flux(path)
    given = inputs(engine.config)
    x, ids = pack_latents(given["x"]), (image_ids(4, 3), text_ids(12))
    out = engine(x, given["context"], given["y"], given["timestep"], *ids, given["guidance"])
    return unpack_latents(out, 4, 3)


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# --- Loading and drawing ----------------------------------------------------------------------------------------------


def test_without_comfyui_one_line_says_so():
    done = subprocess.run([sys.executable, "-I", "-c", f"import {PACK}"], capture_output=True, text=True)
    assert done.returncode == 1 and "install-comfyui" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("hoisted", [True, False])
def test_the_engine_behind_comfyuis_signature(comfy, hoisted):
    model = loaded(comfy, hoisted_modulation=hoisted)
    found = drawn(model)
    assert apart(found, by_engine(comfy.models / "diffusion_models/tiny.safetensors")) < 1e-5
    assert (model.model.seat.modulation.evaluations == 1) == hoisted


def test_shapes_that_comfyui_looks_at(comfy, tiny_flux):
    model = loaded(comfy).model
    state = model.state_dict()
    assert {name.removeprefix("diffusion_model."): tuple(t.shape) for name, t in state.items()} == {
        name: tuple(t.shape) for name, t in tiny_flux.items()
    }
    assert all(tensor.is_meta for tensor in state.values()) and not list(model.parameters())
    assert model.diffusion_model.img_in.weight.shape[1] == 64 and model.model_type == "flux"


def test_the_rest_of_the_steps_is_evaluated_at_the_first(comfy):
    model = loaded(comfy)
    levels = torch.tensor([1.0, 0.6, 0.3, 0.1, 0.0])
    modulation = model.model.seat.modulation
    for level in levels[:-1]:
        drawn(model, timestep=level[None], transformer_options={"sample_sigmas": levels})
    assert modulation.evaluations == 1 and len(modulation.kept) == 4


def test_wrappers_run(comfy):
    def twice(run, *args, **kwargs):
        return 2 * run(*args, **kwargs)

    model = loaded(comfy)
    options = {"wrappers": {"diffusion_model": [twice]}}
    assert torch.equal(drawn(model, transformer_options=options), 2 * drawn(model))


def test_batches_and_missing_text(comfy):
    model = loaded(comfy)
    config = model.seat.engine.config
    given = inputs(config, batch=2, size=(7, 9))
    with torch.no_grad():
        out = model.model.diffusion_model(**given)
        rows = [model.model.diffusion_model(**{name: t[i : i + 1] for name, t in given.items()}) for i in (0, 1)]
    assert out.shape == (2, 16, 7, 9) and apart(out, torch.cat(rows)) < 1e-5
    assert torch.equal(drawn(model, y=None), drawn(model, y=torch.zeros(1, config.pooled)))


def test_controls_for_some_blocks(comfy):
    model = loaded(comfy)
    sample = torch.randn(1, 12, model.seat.engine.config.hidden, generator=torch.Generator().manual_seed(1))
    plain = drawn(model)
    assert torch.equal(drawn(model, control={"input": [None], "output": []}), plain)
    moved = drawn(model, control={"input": [None, sample], "output": [sample, None]})
    assert apart(moved, plain) > 0.01


def test_references_lie_where_they_are_put(comfy):
    seen = [torch.zeros(1, 16, *size) for size in ((4, 6), (8, 2))]
    places = comfy.places
    assert list(places.reference_places((7, 9), seen, "offset")) == [(1, 0, 0), (1, 0, 6)]
    assert list(places.reference_places((7, 9), seen, "index")) == [(1, 0, 0), (2, 0, 0)]
    assert list(places.reference_places((7, 9), seen, "uxo")) == [(0, 8, 10), (0, 12, 16)]
    assert torch.equal(places.token_ids(8, 6), image_ids(4, 3))
    model = loaded(comfy)
    assert (
        drawn(model, ref_latents=seen).shape == (1, 16, 8, 6)
        and apart(drawn(model, ref_latents=seen), drawn(model)) > 1e-3
    )


REFUSED = {
    "patches of blocks": (
        dict(transformer_options={"patches_replace": {"dit": {("double_block", 0): print}}}),
        "double_block",
    ),
    "patches of inputs": (dict(transformer_options={"patches": {"post_input": [print]}}), "post_input"),
    "a mask": (dict(attention_mask=torch.ones(1, 1)), "attention mask"),
    "no guidance": (dict(guidance=None), "FluxDisableGuidance"),
    "too few channels": (dict(x=torch.zeros(1, 4, 8, 6)), "16 channels"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_done_is_refused(comfy, given, said):
    with pytest.raises(UserError, match=said):
        drawn(loaded(comfy), **given)


CHANGES = {
    "patches": lambda model: model.add_patches({"diffusion_model.img_in.weight": 1}),
    "hooks": lambda model: model.add_hook_patches(None, {"diffusion_model.img_in.weight": 1}),
    "merging": lambda model: model.get_key_patches("diffusion_model."),
    "wrapped weights": lambda model: model.add_weight_wrapper("diffusion_model.img_in.weight", print),
    "layers": lambda model: model.add_object_patch("diffusion_model.img_in", None),
    "saving": lambda model: model.model.state_dict_for_saving(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_weights_are_refused(comfy, change):
    with pytest.raises(UserError, match="flux_quant cannot be"):
        change(loaded(comfy))


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def lora(comfy, name: str, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    module = "lora_unet_double_blocks_1_img_attn_qkv"
    tensors = {f"{module}.lora_down.weight": torch.randn(4, 256, generator=generator) * 0.1}
    tensors[f"{module}.lora_up.weight"] = torch.randn(768, 4, generator=generator) * 0.1
    save_file(tensors, comfy.models / "loras" / name)
    return name


def test_each_clone_has_its_own_loras(comfy):
    model = loaded(comfy)
    plain = drawn(model)
    names = [lora(comfy, f"{seed}.safetensors", seed) for seed in (1, 2)]
    one, _ = comfy.run("FluxQuantLora", model=model, lora_name=names[0], strength=0.5)
    both, _ = comfy.run("FluxQuantLora", model=one, lora_name=names[1], strength=-1.0)
    assert not model.clone_has_same_weights(one) and one.clone_has_same_weights(one.clone())
    again, _ = comfy.run("FluxQuantLora", model=model, lora_name=names[0], strength=0.5)
    assert not one.clone_has_same_weights(again)  # read again: it may be another file by now
    found = {}
    for number, clone in ((2, both), (0, model), (1, one), (2, both.clone()), (1, again)):
        clone.partially_load(CPU, 1e32)
        picture = drawn(clone)
        assert number not in found or torch.equal(found[number], picture)
        found[number] = picture
    assert torch.equal(found[0], plain) and min(apart(found[1], plain), apart(found[2], found[1])) > 0.01
    assert [path.path.name for path, _ in both.loras] == names and len(model.loras) == 0


# --- Memory -----------------------------------------------------------------------------------------------------------


def streamed(comfy, budget: int | None = None, hoisted: bool = True, **options: object) -> ModelPatcher:
    """A MODEL on a stand-in for a card."""
    machine = find_gpu("rtx-3060-12gb").machine()
    memory = Memory(device(**options), machine, Budget(budget or machine.total, "test"), Host(), Quiet())
    engine = load_flux(comfy.models / "diffusion_models/tiny.safetensors")
    seat = comfy.seat.Seat(engine, memory, hoisted=hoisted, limited=budget is not None, work=Work((64, 64)))
    return comfy.patcher.model_of(seat, CPU, torch.float32)


@pytest.mark.parametrize("hoisted", [True, False])
def test_as_many_bytes_as_are_allowed(comfy, hoisted):
    model = streamed(comfy, hoisted=hoisted)
    expected, size = drawn(loaded(comfy, hoisted_modulation=hoisted)), model.model_size()
    assert model.loaded_size() == 0 and model.model.device == CPU
    held = []
    for extra in (0.1, 0.8 * size, -0.2 * size, 2 * size):
        before = model.loaded_size()
        assert model.partially_load(CPU, extra) == model.loaded_size() - before
        held.append(model.loaded_size())
        assert torch.equal(drawn(model), expected)
        assert model.model.model_lowvram == (held[-1] < size)
    assert held[0] < held[1] <= held[3] == size and held[2] < held[1]
    freed = model.partially_unload(CPU, size // 4)
    assert freed >= size // 4 and model.loaded_size() == size - freed
    assert torch.equal(drawn(model), expected)
    model.detach()
    assert model.loaded_size() == 0 and model.seat.residence is None and not model.seat.modulation.kept
    model.load(CPU)
    assert model.loaded_size() == size and torch.equal(drawn(model), expected)
    model.detach()


def test_true_sizes(comfy):
    """What is on the device, to the byte of the plan's alignment; modulation only if it is not hoisted."""
    sizes = {}
    for hoisted in (True, False):
        model = streamed(comfy, hoisted=hoisted)
        model.partially_load(CPU, 1e32)
        streamer = model.seat.residence.streamer
        assert model.loaded_size() == sum(layout.nbytes for layout in streamer.layouts)
        assert streamer.metrics().resident_bytes == model.loaded_size()
        sizes[hoisted] = model.loaded_size()
        model.detach()
    assert sizes[True] < 0.8 * sizes[False] and model.get_ram_usage() == sizes[False]


def test_a_budget_of_the_users_own(comfy):
    """Beside what ComfyUI allows, and other models count in it."""
    free = streamed(comfy)
    total, blocks = free.seat.memory.machine.total, sum(block.nbytes for block in free.seat.sizes.blocks)
    fixed = int(0.98 * total) - free.seat.own_room()
    budget = int((fixed + 0.7 * blocks) / 0.98)
    model = streamed(comfy, budget)
    model.partially_load(CPU, 1e32)
    assert 0 < model.loaded_size() <= model.model_size() < free.model_size()
    assert torch.equal(drawn(model), drawn(loaded(comfy)))
    model.seat.others = lambda: GB
    with pytest.raises(UserError, match="leaves"):
        model.partially_load(CPU, 1e32)
    assert model.loaded_size() == 0


def test_interrupted_between_two_blocks(comfy):
    model = streamed(comfy)
    model.partially_load(CPU, 0.1)
    expected = drawn(model)
    blocks = model.seat.engine.single_blocks
    handle = blocks[0].register_forward_hook(lambda *_: setattr(comfy.devices, "interrupted", True))
    with pytest.raises(Interrupted):
        drawn(model)
    handle.remove()
    assert torch.equal(drawn(model), expected)
    model.detach()


def test_out_of_memory_while_drawing(comfy):
    """A smaller plan, and the same picture."""
    model = streamed(comfy)
    model.partially_load(CPU, 1e32)
    expected, size, failures = drawn(model), model.loaded_size(), []

    def fail(*_: object) -> None:
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("test")

    handle = model.seat.engine.single_blocks[1].register_forward_hook(fail)
    assert torch.equal(drawn(model), expected) and failures
    handle.remove()
    assert model.loaded_size() < size
    model.detach()


def test_memory_is_given_back_with_the_last_clone(comfy):
    model = streamed(comfy)
    model.partially_load(CPU, 1e32)
    clone, seat = model.clone(), model.seat
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert seat.residence is not None
    del clone
    assert gone() is None and seat.residence is None


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
