"""The node pack's MODEL over a stand-in for ComfyUI: drawing, LoRAs, memory.

test_comfyui_real.py runs it inside ComfyUI's own code.
"""

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from comfyui_stand_in import CPU, PACK, Interrupted, ModelPatcher, apart, drawn, inputs, loaded, with_pack
from safetensors.torch import save_file
from test_runtime import GB, Budget, Host, Quiet, device, find_gpu
from torch import Tensor

from flux_quant.errors import UserError
from flux_quant.loading import load_flux
from flux_quant.model import image_ids, pack_latents, text_ids, unpack_latents
from flux_quant.planner.footprint import Work
from flux_quant.runtime import Memory


@pytest.fixture(scope="module")
def comfy(tiny_flux, tmp_path_factory):
    yield from with_pack(tiny_flux, tmp_path_factory)


@torch.no_grad()
def by_engine(path: Path) -> Tensor:
    engine = load_flux(path)
    given = inputs(engine.config)
    x, ids = pack_latents(given["x"]), (image_ids(4, 3), text_ids(12))
    out = engine(x, given["context"], given["y"], given["timestep"], *ids, given["guidance"])
    return unpack_latents(out, 4, 3)


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


def overridden(seen: list, scale: float = 1.0) -> dict:
    """Options of a model whose attention a node has chosen: ComfyUI's own, times `scale`."""

    def override(func, *args, **options):
        where = options["transformer_options"]
        seen.append((where["block_type"], where["block_index"], where["total_blocks"], where["of a node"]))
        return scale * func(*args, **options)

    return {"optimized_attention_override": override, "of a node": 7}


def test_an_attention_that_a_node_chooses(comfy):
    model, seen = loaded(comfy), []
    config, plain = model.seat.engine.config, drawn(model)
    options = overridden(seen)
    assert apart(drawn(model, transformer_options=options), plain) < 1e-5
    blocks = {"double": config.double_blocks, "single": config.single_blocks}
    assert seen == [(kind, i, count, 7) for kind, count in blocks.items() for i in range(count)]
    assert set(options) == {"optimized_attention_override", "of a node"}, "the node's options are its own"
    assert apart(drawn(model, transformer_options=overridden([], 0.5)), plain) > 0.01
    assert torch.equal(drawn(model), plain), "the next picture without the node is as before"


def test_an_attention_of_a_nodes_own_shape(comfy):
    """Laid out in memory as it likes, in one piece or not."""
    model = loaded(comfy)

    def override(func, q, k, v, heads, **options):
        out = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
        return out.permute(1, 3, 2, 0).contiguous().permute(3, 2, 0, 1).flatten(2)

    given = {"optimized_attention_override": override}
    assert apart(drawn(model, transformer_options=given), drawn(model)) < 1e-5


REFUSED = {
    "patches of blocks": (
        dict(transformer_options={"patches_replace": {"dit": {("double_block", 0): print}}}),
        "double_block",
    ),
    "patches of attention": (dict(transformer_options={"patches": {"attn1_patch": [print]}}), "attn1_patch"),
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


def streamed(comfy, budget: int | None = None, hoisted: bool = True, compute: str = "auto") -> ModelPatcher:
    """A MODEL on a stand-in for a card."""
    machine = find_gpu("rtx-3060-12gb").machine()
    memory = Memory(device(), machine, Budget(budget or machine.total, "test"), Host(), Quiet())
    engine = load_flux(comfy.models / "diffusion_models/tiny.safetensors")
    seat = comfy.seat.Seat(engine, memory, compute, hoisted, limited=budget is not None, work=Work((64, 64)))
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


def test_what_a_pass_takes(comfy):
    """ComfyUI asks before it loads; more pixels, more pictures and more references take more."""
    model = streamed(comfy).model
    usual = model.memory_required([1, 16, 128, 128])
    assert usual < model.memory_required([1, 16, 128, 160]) < model.memory_required([2, 16, 128, 128])
    assert usual < model.memory_required([1, 16, 128, 128], {"ref_latents": [[1, 16, 128 * 128]]})
    assert model.seat.work.size == (1024, 1024) and model.seat.work.reference == 4096


def test_products_that_a_card_lacks(comfy):
    with pytest.raises(UserError, match="no fp8 products"):
        streamed(comfy, compute="fp8")
    model = streamed(comfy, compute="int8")
    model.partially_load(CPU, 0.1)
    assert 0 < apart(drawn(model), drawn(loaded(comfy))) < 0.1
    model.detach()


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
