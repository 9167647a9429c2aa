"""A plan carried out on a stand-in for a small device: same picture, and what happens when memory or time is short."""

from dataclasses import replace

import pytest
import torch
from stream_backends import ThreadDevice
from torch import Tensor

from flux_quant import runtime
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing import vae
from flux_quant.drawing.request import Request
from flux_quant.drawing.sampling import Conditioning, Drawing, denoise
from flux_quant.drawing.schedules import noise_levels
from flux_quant.errors import UserError
from flux_quant.generation import generate
from flux_quant.linear import QuantLinear, repack_, set_compute_
from flux_quant.loading import load_flux
from flux_quant.modulation import HoistedModulation
from flux_quant.planner import plan as planner
from flux_quant.planner.footprint import Model, Work, t5_xxl
from flux_quant.planner.gpus import find_gpu
from flux_quant.planner.memory import Budget
from flux_quant.planner.steptime import Host
from flux_quant.streaming import StreamPlan, block_bytes, rings_for, spread_evenly
from flux_quant.text.encode import TextOptions
from flux_quant.text.prompt_cache import PromptCache

GB = 10**9


@pytest.fixture
def model():
    return load_flux(find_components(BUNDLED).transformer)


def planned(model, resident: int, slots: int = 2) -> planner.Plan:
    """A plan of a big machine, but with so many residents and slots."""
    machine = find_gpu("rtx-3060-12gb").machine()
    made = planner.plan(runtime.sizes_of(model), Work((96, 96)), machine, Budget(8 * GB, "test"), t5_xxl("q8_0"))
    names = made.stream.names
    sizes, _ = block_bytes(model, names, exclude=runtime.hoisted_globs(model))
    stay = frozenset(spread_evenly(resident, len(names)))
    rings = rings_for([size for i, size in enumerate(sizes) if i not in stay], slots)
    return replace(made, stream=StreamPlan(names, sizes, stay, rings))


def memory(model, stand_in: ThreadDevice | None = None, readings=None, log=lambda line: None) -> runtime.Memory:
    budget, machine = Budget(8 * GB, "test"), find_gpu("rtx-3060-12gb").machine()
    return runtime.Memory(stand_in or device(), machine, budget, Host(), readings or Quiet(), log=log)


class Quiet:
    """What a device says that has no room for more residents, and enough for those there are."""

    def __init__(self, free: int = 0, held: int = GB) -> None:
        self._free, self._held, self.forgotten = free, held, 0

    def free(self) -> int:
        return self._free

    def held(self) -> int:
        return self._held

    now = held

    def forget(self) -> None:
        self.forgotten += 1


def drawing(model, steps: int = 3) -> Drawing:
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(1, 24, model.config.context, generator=generator)
    pooled = torch.randn(1, model.config.pooled, generator=generator)
    noise = torch.randn(1, 36, model.config.in_channels, generator=generator)
    return Drawing(noise, Conditioning(words, pooled), (6, 6), noise_levels("euler", steps, 36, True), 3.5)


def drawn(model, callback=None) -> Tensor:
    return denoise(model, drawing(model), modulation=HoistedModulation(model), callback=callback)


def device(**options: object) -> ThreadDevice:
    return ThreadDevice(lazy=False, compute_is_host=True, **options)


@pytest.mark.parametrize("change", ["as stored", "planar", "int8"])
@pytest.mark.parametrize(("resident", "slots"), [(0, 1), (3, 2), (100, 2)], ids=["one slot", "some stay", "all stay"])
def test_the_same_picture(model, change, resident, slots):
    if change == "planar":
        repack_(model)
    elif change == "int8":
        assert set_compute_(model, "int8")
    expected = drawn(model)
    blocks = len(model.double_blocks) + len(model.single_blocks)
    plan = planned(model, min(resident, blocks), slots)
    with runtime.Residence(model, plan, memory(model)) as residence:
        assert torch.equal(residence.run(lambda: drawn(model, residence.after_step)), expected)
        found = residence.metrics()
    assert len(found["step_seconds"]) == 3 and found["misses"] == 0 and found["changes"] == []
    assert (found["total_bytes"] == 0) == (resident >= blocks)
    assert torch.equal(drawn(model), expected)


def test_what_is_hoisted_is_not_streamed(model):
    plan = planned(model, 0)
    with runtime.Residence(model, plan, memory(model)) as residence:
        names = {name for layout in residence.streamer.layouts for name in [layout.name]}
        assert len(names) == len(plan.stream.names) + 1
    modulation = sum(p.nbytes for block in model.single_blocks for p in block.modulation.lin.parts)
    whole, _ = block_bytes(model, plan.stream.names)
    assert sum(whole) - sum(plan.stream.sizes) > modulation > 0


def test_sizes_are_the_checkpoints(model):
    from flux_quant.converters.component import open_component

    reader = open_component(find_components(BUNDLED).transformer, "FLUX.1")
    assert runtime.sizes_of(model) == Model.of({name: (i.shape, i.format) for name, i in reader.tensors.items()})
    repack_(model)
    assert (
        runtime.sizes_of(model).nbytes == Model.of({n: (i.shape, i.format) for n, i in reader.tensors.items()}).nbytes
    )


def test_a_plan_for_other_sizes_is_fitted(model):
    plan = planned(model, 2)
    assert runtime.fitted(plan, model) is plan
    set_compute_(model, "int8")
    changed = runtime.fitted(plan, model)
    assert changed.stream.sizes != plan.stream.sizes and changed.stream.resident == plan.stream.resident
    assert all(ring.slots == old.slots for ring, old in zip(changed.stream.rings, plan.stream.rings, strict=True))


def test_memory_runs_out_step_by_step(model):
    """The device holds less than the plan wants: residents are given up until it fits; the picture is the same."""
    expected, lines = drawn(model), []
    plan = planned(model, len(model.double_blocks) + len(model.single_blocks))
    rest = block_bytes(model, plan.stream.names, exclude=runtime.hoisted_globs(model))[1]
    small = Shrunk(most=rest + plan.stream.device_bytes // 2)
    readings = Quiet()
    with runtime.Residence(model, plan, memory(model, small, readings, lines.append)) as residence:
        assert torch.equal(residence.run(lambda: drawn(model, residence.after_step)), expected)
        assert residence.plan.stream.device_bytes <= plan.stream.device_bytes // 2
    assert lines and len(set(lines)) == len(lines) and all("out of memory" in line for line in lines)
    assert readings.forgotten >= len(lines)


class Shrunk(ThreadDevice):
    """Counts what is given back: `most` is what can be held at once."""

    def __init__(self, most: int) -> None:
        super().__init__(lazy=False, compute_is_host=True)
        self.room, self.buffers = most, []

    def allocate(self, nbytes: int) -> Tensor:
        import sys

        self.buffers = [buffer for buffer in self.buffers if sys.getrefcount(buffer) > 3]
        if sum(buffer.nbytes for buffer in self.buffers) + nbytes > self.room:
            raise torch.OutOfMemoryError(f"{nbytes} bytes wanted")
        self.buffers.append(super().allocate(nbytes))
        return self.buffers[-1]


def test_memory_that_runs_out_in_the_middle_starts_the_drawing_again(model):
    expected, attempts = drawn(model), []

    def work():
        attempts.append(1)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("activations")
        return drawn(model)

    with runtime.Residence(model, planned(model, 5), memory(model)) as residence:
        before = residence.plan.stream.device_bytes
        assert torch.equal(residence.run(work), expected)
        assert len(attempts) == 2 and residence.plan.stream.device_bytes < before
        assert len(residence.changes) == 1


def test_nothing_left_to_give_up_is_an_error(model):
    def work():
        raise torch.OutOfMemoryError("activations")

    with runtime.Residence(model, planned(model, 3), memory(model)) as residence:
        with pytest.raises(UserError, match="out of GPU memory with .* of blocks on the device .one block is"):
            residence.run(work)
        assert len(residence.plan.stream.resident) == 0


def test_other_errors_pass_and_leave_the_model_as_it_was(model):
    expected = drawn(model)

    def work():
        raise KeyError("something else")

    with (
        pytest.raises(KeyError),
        runtime.Residence(model, planned(model, 3), memory(model)) as residence,
    ):
        residence.run(work)
    assert torch.equal(drawn(model), expected)


def test_short_memory_between_steps_sheds_residents_and_says_so_once(model):
    expected, lines = drawn(model), []
    plan = planned(model, 7)
    plan = replace(plan, budget=Budget(8 * GB, "test", reserve=4_000_000))
    readings = Quiet(free=1_000_000)
    with runtime.Residence(model, plan, memory(model, None, readings, lines.append)) as residence:
        assert torch.equal(residence.run(lambda: drawn(model, residence.after_step)), expected)
        assert len(residence.plan.stream.resident) < 7
        assert residence.metrics()["changes"] == lines
    assert any("of the device are free" in line for line in lines)


def test_layers_of_the_engine_that_plans_do_not_know(model):
    layer = next(layer for layer in model.modules() if isinstance(layer, QuantLinear))
    assert layer.fmt.name in str(runtime.sizes_of(model).blocks) or layer.fmt.is_plain


@pytest.mark.gpu
def test_readings_of_cuda():
    readings = runtime.CudaReadings(torch.device("cuda"))
    readings.forget()
    before = readings.held()
    kept = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    assert readings.held() >= before + kept.nbytes and 0 < readings.free() < torch.cuda.mem_get_info()[1]


@pytest.mark.parametrize("compute", ["16-bit", "int8"])
@pytest.mark.parametrize("negative", [None, "penguin"])
@pytest.mark.parametrize("tiled", [False, True], ids=["one piece", "tiles"])
def test_generate_on_a_device_that_is_too_small(model, compute, negative, tiled, monkeypatch, tmp_path):
    """Plan, T5 and blocks through slots, hoisted modulation, tiles of the VAE, a cached prompt: always the picture of
    a machine that is big enough."""
    components, cache = find_components(BUNDLED), PromptCache(tmp_path)
    request = Request("red apple", steps=3, size=(192, 96), negative=negative, cfg=1.0 if negative is None else 3.0)
    free = 35_000_000 if tiled else 8 * GB  # two tiles, or all in one piece
    monkeypatch.setattr(vae, "free_memory", lambda device: free)
    whole = generate(components, request, compute=compute, text=TextOptions(cache=cache))
    lines = []
    small = memory(model, None, Quiet(free=free, held=0), lines.append)
    monkeypatch.setattr(planner, "plan", lambda model, *rest: shrunk(planned_by_machine(model, *rest)))
    for text in (TextOptions(), TextOptions(cache=cache)):
        streamed = generate(components, request, memory=small, compute=compute, text=text)
        assert streamed.image.tobytes() == whole.image.tobytes()
        assert streamed.metrics["total_bytes"] > 0 and streamed.metrics["misses"] == 0
        assert len(streamed.metrics["step_seconds"]) == 3
    assert any("blocks" in line for line in lines)
    assert {"load", "text", "modulation", "denoise", "decode"} <= set(streamed.measured()["seconds"])


planned_by_machine = planner.plan


def shrunk(plan: planner.Plan) -> planner.Plan:
    """The same with a single resident and the text encoder on the device."""
    stream = plan.stream
    sizes = [size for i, size in enumerate(stream.sizes) if i != 2]
    phases = tuple(replace(p, parts=(("slots", 1),)) if p.name == "text" else p for p in plan.phases)
    return replace(plan, stream=StreamPlan(stream.names, stream.sizes, {2}, rings_for(sizes, 2)), phases=phases)
