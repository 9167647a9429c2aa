"""The node pack inside real ComfyUI code (see `comfyui_checkout`): memory management, whole prompts, interruptions."""

import gc
import inspect
from types import SimpleNamespace

import pytest
import torch
from comfyui_checkout import (
    CLIP,
    DEEP,
    LOADER,
    SMALL,
    T5,
    apart,
    close,
    conditioning,
    encoders_for,
    loras_for,
    needs_comfyui,
    ours,
    release,
    sampled,
    weights,
    with_comfyui,
    with_loras,
)
from safetensors.torch import save_file
from torch import Tensor

pytestmark = [pytest.mark.slow, needs_comfyui]


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    yield from with_comfyui(tmp_path_factory)


@pytest.fixture(scope="module")
def loras(comfyui):
    return loras_for(comfyui)


@pytest.fixture(scope="module")
def encoders(comfyui):
    return encoders_for(comfyui)


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_interrupted(comfyui):
    from comfy.sample import sample

    management = comfyui.management
    model, prompt = ours(comfyui), conditioning(SMALL["context"], SMALL["pooled"])
    expected = sampled(comfyui, model)

    def stop(step: int, *_: object) -> None:
        management.interrupt_current_processing()

    latent, noise = torch.zeros(1, 16, 8, 8), torch.randn(1, 16, 8, 8)
    with pytest.raises(management.InterruptProcessingException):
        sample(model, noise, 4, 1.0, "euler", "simple", prompt, prompt, latent, callback=stop)
    assert torch.equal(sampled(comfyui, model), expected)


def test_unloading_and_loading(comfyui):
    model = ours(comfyui)
    expected = sampled(comfyui, model)
    assert model.loaded_size() == model.model_size() > 0
    loaded = comfyui.management.loaded_models()
    assert any(one.is_clone(model) for one in loaded)
    comfyui.management.unload_all_models()
    assert model.loaded_size() == 0 and not comfyui.management.loaded_models()
    assert torch.equal(sampled(comfyui, model), expected)


def test_two_models_and_their_clones(comfyui):
    save_file(weights(SMALL, seed=1), comfyui.models / "diffusion_models/other.safetensors")
    one, two = ours(comfyui), ours(comfyui, "other.safetensors")
    first, second = sampled(comfyui, one), sampled(comfyui, two)
    assert apart(first, second) > 0.01
    assert torch.equal(sampled(comfyui, one.clone()), first) and torch.equal(sampled(comfyui, two.clone()), second)
    assert len({id(found.model) for found in comfyui.management.loaded_models()} & {id(one.model), id(two.model)}) == 2


def test_a_dropped_model_is_forgotten(comfyui):
    release(comfyui)
    model = ours(comfyui)
    sampled(comfyui, model)
    assert len(comfyui.management.loaded_models()) == 1
    del model
    gc.collect()
    comfyui.management.cleanup_models_gc()
    assert comfyui.management.loaded_models() == []


@pytest.fixture
def streamed(comfyui):
    """A MODEL whose device is a stand-in with a memory of its own."""
    from test_runtime import Budget, Host, Quiet, device, find_gpu

    from flux_quant.frontends.comfyui.patcher import model_of
    from flux_quant.frontends.comfyui.seat import Seat
    from flux_quant.loading import load_flux
    from flux_quant.runtime import Memory

    with torch.inference_mode(False):
        engine = load_flux(comfyui.models / "diffusion_models" / DEEP)
    machine = find_gpu("rtx-3060-12gb").machine()
    memory = Memory(device(), machine, Budget(machine.total, "test"), Host(), Quiet())
    return model_of(Seat(engine, memory), torch.device("cpu"), torch.float32)


def test_streamed(comfyui, streamed, loras):
    """As --lowvram does: as many bytes as are allowed, in any order; the picture stays the same bit for bit."""
    place, expected = streamed.load_device, sampled(comfyui, ours(comfyui, DEEP))
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
    assert torch.equal(sampled(comfyui, streamed), expected)
    adapted = with_loras(comfyui, streamed, loras)
    close(sampled(comfyui, adapted), sampled(comfyui, with_loras(comfyui, ours(comfyui, DEEP), loras)), 1e-6)
    comfyui.management.unload_all_models()
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
def test_states_of_memory(comfyui, streamed, state, monkeypatch):
    """ComfyUI's own bookkeeping over the stand-in, as if it were a card with little memory."""
    management = comfyui.management
    release(comfyui)
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
    assert torch.equal(sampled(comfyui, streamed), sampled(comfyui, ours(comfyui, DEEP)))


def node(kind: str, **inputs: object) -> dict[str, object]:
    return {"class_type": kind, "inputs": inputs}


def test_whole_prompts(comfyui, encoders, loras):
    """Executed as ComfyUI executes them: twice, with a change, interrupted, and again."""
    import execution

    widths = SMALL | {"context": T5["d_model"], "pooled": CLIP["hidden_size"]}
    save_file(weights(widths), comfyui.models / "diffusion_models/reads.safetensors")
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
    model = next(one.model for one in comfyui.management.loaded_models() if hasattr(one.model, "seat"))
    stop = comfyui.management.interrupt_current_processing
    handle = model.seat.engine.double_blocks[0].register_forward_hook(lambda *_: stop())
    assert "execution_interrupted" in execute(4)
    handle.remove()
    assert "execution_success" in execute(5)
