"""Streaming on a CUDA device: same output, nothing allocated in the loop, all memory given back."""

import random

import pytest
import torch
from test_streaming_models import MODELS, assert_same_module, half_plan, storages
from torch import Tensor, nn

from flux_quant.streaming import BlockStreamer, StreamPlan, block_bytes, rings_for
from flux_quant.streaming.device import COMPUTE, COPY, CudaDevice
from flux_quant.streaming.host import page_aligned, whole_pages

pytestmark = pytest.mark.gpu
CYCLES = 200_000  # about a tenth of a millisecond of waiting


class Slow(CudaDevice):
    """Copies start late, by times that differ."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)

    def copy(self, to: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.copies):
            torch.cuda._sleep(self.rng.choice((1, CYCLES, 10 * CYCLES)))
        super().copy(to, source)


class Unpinnable(CudaDevice):
    def register(self, memory: Tensor) -> bool:
        return False


class ComputeDoesNotWait(Slow):
    def wait(self, queue, event):
        if queue != COMPUTE:
            super().wait(queue, event)


class CopyDoesNotWait(CudaDevice):
    def wait(self, queue, event):
        if queue != COPY:
            super().wait(queue, event)


class Through(nn.Module):
    """A block of `nbytes` that allocates nothing: writes its first numbers into its input, after a while."""

    def __init__(self, nbytes: int, cycles: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nbytes // 4), requires_grad=False)
        self.cycles = cycles

    def forward(self, x: Tensor) -> Tensor:
        torch.cuda._sleep(self.cycles)
        return x.mul_(0.5).add_(self.weight[: len(x)]).add_(self.weight[-len(x) :])


def through(sizes: list[int], cycles: int = CYCLES) -> tuple[nn.Module, StreamPlan]:
    torch.manual_seed(0)
    model = nn.Sequential(*(Through(size, cycles) for size in sizes))
    names = [str(i) for i in range(len(sizes))]
    sizes, _ = block_bytes(model, names)
    return model, StreamPlan(names, sizes, {0}, rings_for(sizes[1:]))


def expected_of(model: nn.Module, passes: int) -> Tensor:
    x = torch.zeros(256, device="cuda")
    weights = [block.weight.cuda() for block in model]
    for weight in weights * passes:
        x.mul_(0.5).add_(weight[:256]).add_(weight[-256:])
    return x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1 << 30, 1_500_000, 0], ids=["pinned", "part pinned", "pageable"])
@torch.no_grad()
def test_same_output(name: str, budget: int):
    make, lists = MODELS[name]
    model, call = make("cuda")
    model.cuda()
    expected = [call(i) for i in range(3)]
    model.cpu()
    before = storages(model)
    for slots in (1, 2, 3):
        with BlockStreamer(model, half_plan(model, lists, slots), Slow(slots), budget) as streamer:
            found = [call(i) for i in range(3)]
            torch.cuda.synchronize()
            assert streamer.metrics().misses == 0
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_same_module(before, storages(model))


SIZES = [4 << 20] * 5 + [2 << 20] * 6


@torch.no_grad()
def streamed(device: CudaDevice, budget: int = 1 << 30, passes: int = 6) -> tuple[Tensor, Tensor]:
    model, plan = through(SIZES)
    expected = expected_of(model, passes)
    x = torch.zeros(256, device="cuda")
    with BlockStreamer(model, plan, device, budget):
        for _ in range(passes):
            model(x)
        torch.cuda.synchronize()
    return x, expected


@pytest.mark.parametrize("make", [CudaDevice, lambda: Slow(1), Unpinnable], ids=["registered", "slow", "slabs"])
@pytest.mark.parametrize("budget", [1 << 30, 24 << 20, 0])
def test_large_blocks(make, budget: int):
    assert torch.equal(*streamed(make(), budget))


@pytest.mark.parametrize("make", [lambda: ComputeDoesNotWait(1), CopyDoesNotWait], ids=["compute", "copy"])
def test_mutants_fail(make):
    assert not torch.equal(*streamed(make()))


@torch.no_grad()
def test_nothing_is_allocated_in_the_loop_and_all_is_given_back():
    model, plan = through(SIZES)
    x = torch.zeros(256, device="cuda")
    before = torch.cuda.memory_allocated()
    with BlockStreamer(model, plan, "cuda", 1 << 30):
        held = torch.cuda.memory_allocated() - before
        assert plan.device_bytes <= held <= plan.device_bytes + 4096
        for _ in range(3):
            model(x)
        counts = torch.cuda.memory_stats()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(5):
            model(x)
        torch.cuda.synchronize()
        now = torch.cuda.memory_stats()
        for count in ("allocation.all.allocated", "segment.all.allocated", "num_device_alloc"):
            assert now.get(count) == counts.get(count), count
        assert torch.cuda.max_memory_allocated() == before + held
        assert model[1].weight.is_pinned()
    assert torch.cuda.memory_allocated() == before
    assert not model[1].weight.is_pinned() and not model[1].weight.is_cuda


@torch.no_grad()
def test_host_runs_ahead():
    """The host has queued a pass long before the device is through with it."""
    model, plan = through(SIZES, cycles=200 * CYCLES)
    x, done = torch.zeros(256, device="cuda"), torch.cuda.Event()
    with BlockStreamer(model, plan, "cuda", 1 << 30):
        model(x)
        done.record()
        assert not done.query()


@torch.no_grad()
def test_other_compute_stream():
    model, plan = through(SIZES)
    expected = expected_of(model, 4)
    x, stream = torch.zeros(256, device="cuda"), torch.cuda.Stream()
    with BlockStreamer(model, plan, Slow(2), 1 << 30):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                model(x)
        stream.synchronize()
    assert torch.equal(x, expected)


@torch.no_grad()
def test_stalls_and_rates_are_measured():
    model, plan = through(SIZES, cycles=1)
    with BlockStreamer(model, plan, "cuda", 1 << 30) as streamer:
        for _ in range(4):
            model(torch.zeros(256, device="cuda"))
        torch.cuda.synchronize()
        metrics = streamer.metrics()
    assert metrics.passes == 4 and metrics.pass_bytes == plan.streamed_bytes
    assert 1e8 < metrics.bytes_per_second < 1e12
    assert set(metrics.stall_seconds) == set(plan.names[1:]) and 0 < metrics.stall < 60


@torch.no_grad()
def test_module_that_was_on_the_device():
    model, plan = through(SIZES)
    model.cuda()
    expected, x = expected_of(model, 2), torch.zeros(256, device="cuda")
    before = torch.cuda.memory_allocated()
    with BlockStreamer(model, plan, "cuda", 16 << 20):
        assert torch.cuda.memory_allocated() < before
        for _ in range(2):
            model(x)
    assert torch.equal(x, expected)
    assert all(block.weight.is_cuda for block in model)


def test_refused_registration_leaves_no_error_behind():
    device, memory = CudaDevice(), page_aligned(1 << 20)
    assert device.register(whole_pages(memory))
    assert not device.register(whole_pages(memory))  # registered already
    assert torch.ones(3, device="cuda").sum().item() == 3
    device.unregister(whole_pages(memory))
    device.unregister(whole_pages(memory))
    assert torch.ones(3, device="cuda").sum().item() == 3
