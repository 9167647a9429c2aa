"""Streamed blocks give the unstreamed module's output, bit for bit, however late the device; tests of these tests."""

import random
import time
from itertools import cycle, product
from threading import Event, current_thread, main_thread

import pytest
import torch
from stream_backends import POLICIES, WIDTH, Late, ThreadDevice, Toy, inputs, plan_for, run
from torch import nn

from flux_quant.errors import UserError
from flux_quant.streaming import BlockStreamer, Ring, StreamPlan, block_bytes, host, rings_for, spread_evenly
from flux_quant.streaming.device import COMPUTE, COPY

TIERS = {"pinned": 1 << 40, "part pinned": 6000, "in place": 0}  # bytes to pin


def state(module: nn.Module) -> dict[str, tuple]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (id(t), t.device, t.shape, t.stride(), t.requires_grad, t.tolist()) for name, t in tensors.items()}


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


@torch.no_grad()
def check_protocol(streamer: type = BlockStreamer, device: type = ThreadDevice) -> None:
    """Several passes with 1 to 4 slots, odd and even numbers of blocks, one and two rings, each order of queues."""
    tiers = cycle(TIERS.values())
    for (wide, narrow), slots, tolerance in product(((3, 4), (2, 5), (0, 7)), (1, 2, 3, 4), (0, 1)):
        module, given = Toy(wide, narrow), inputs(3)
        expected = [module(x) for x in given]
        for policy, lazy in product(POLICIES, (True, False)):
            late = device(policy, seed=slots, lazy=lazy)
            plan = plan_for(module, module.names, slots=slots, tolerance=tolerance)
            with streamer(module, plan, late, next(tiers)):
                with Late(late):
                    found = [module(x) for x in given]
                late.finish()
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_same_output_however_late_the_device_is():
    check_protocol()


class SlotByNumber(BlockStreamer):
    """Mutant: the slot of a block is its number modulo the slots, whoever is in it."""

    def _take_slot(self, ring, block):
        slot = ring.slots[ring.place[block] % len(ring.slots)]
        ring.free.remove(slot) if slot in ring.free else ring.free.popleft()
        return slot


class FreeTooEarly(BlockStreamer):
    """Mutant: a slot is marked free before the block in it has run."""

    def _before(self, ring, block, given):
        super()._before(ring, block, given)
        self.device.record(ring.loaded[block].free, COMPUTE)
        self.early = ring.loaded[block].free.mark

    def _fill(self, ring):
        if ring.head >= 0:
            ring.free[-1].free.mark = self.early
        super()._fill(ring)


class ComputeDoesNotWait(ThreadDevice):
    def wait(self, queue, event):
        if queue != COMPUTE:
            super().wait(queue, event)


class CopyDoesNotWait(ThreadDevice):
    def wait(self, queue, event):
        if queue != COPY:
            super().wait(queue, event)


MUTANTS = [(SlotByNumber, ThreadDevice), (FreeTooEarly, ThreadDevice)]
MUTANTS += [(BlockStreamer, ComputeDoesNotWait), (BlockStreamer, CopyDoesNotWait)]


@pytest.mark.parametrize(("streamer", "device"), MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutants_fail(streamer: type, device: type):
    """The tests above find what they are there to find."""
    with pytest.raises(AssertionError, match="all"):
        check_protocol(streamer, device)


@pytest.mark.parametrize("seed", range(40))
@torch.no_grad()
def test_any_plan_and_any_use(seed: int):
    """Random plans over random models; blocks skipped, called twice and out of order; plans changed between passes."""
    rng = random.Random(seed)
    module = Toy(rng.randrange(4), rng.randrange(1, 7))
    total = len(module.names)
    device = ThreadDevice(rng.choice(list(POLICIES)), seed, lazy=rng.random() < 0.7, registers=rng.random() < 0.7)
    before = state(module)

    def plan() -> StreamPlan:
        resident = rng.sample(range(total), rng.randrange(total + 1))
        return plan_for(module, module.names, resident, rng.randrange(1, 5), tolerance=rng.choice((0, 1)))

    def order() -> list[int]:
        normal = [i for i in range(total) if rng.random() < 0.9]
        return rng.choice([normal, normal, list(range(total)), rng.choices(range(total), k=total)])

    plans, orders = [plan() for _ in range(2)], [[order() for _ in range(4)] for _ in range(2)]
    expected = [[module(x, o) for x, o in zip(inputs(4), some, strict=True)] for some in orders]
    with BlockStreamer(module, plans[0], device, rng.choice([0, 5000, 10000, 1 << 40])) as streamer:
        for i in range(2):
            if i:
                streamer.replan(plans[1])
            with Late(device):
                found = [module(x, o) for x, o in zip(inputs(4), orders[i], strict=True)]
            device.finish()
            assert all(torch.equal(a, b) for a, b in zip(found, expected[i], strict=True))
    assert state(module) == before and not hooks(module) and not device.registered


ORDERS = {  # name: (what a pass runs of five blocks, misses in three passes with two slots)
    "plan": ([0, 1, 2, 3, 4], 0),
    "one skipped": ([0, 1, 3, 4], 0),
    "most skipped": ([0], 2),
    "each twice": ([0, 0, 1, 1, 2, 2, 3, 3, 4, 4], 15),
    "backwards": ([4, 3, 2, 1, 0], 15),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("tier", TIERS)
@torch.no_grad()
def test_other_orders_are_found_out(name: str, tier: str):
    module, given, (order, misses) = Toy(0, 5), inputs(3), ORDERS[name]
    expected = [module(x, order) for x in given]
    device = ThreadDevice("copies first")
    with BlockStreamer(module, plan_for(module, module.names), device, TIERS[tier]) as streamer:
        with Late(device):
            found = [module(x, order) for x in given]
        device.finish()
        metrics = streamer.metrics()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert metrics.misses == misses and (metrics.resyncs > 0) == (name != "plan")


class Interrupted(ThreadDevice):
    """Ctrl-C at one operation of the streamer's."""

    countdown: int = -1

    def launch(self, queue, work):
        if self.countdown >= 0 and current_thread() is main_thread():
            self.countdown -= 1
            if self.countdown < 0:
                raise KeyboardInterrupt
        super().launch(queue, work)


def slow_gather(streamer: BlockStreamer) -> None:
    """Loads from pageable memory are queued after a while, when other things have happened."""
    gather = streamer.arena.gather
    streamer.arena.gather = lambda *given: time.sleep(0.002) or gather(*given)


@pytest.mark.parametrize("breaks_off", [False, True])
@torch.no_grad()
def test_slot_of_a_load_in_vain_is_not_written_later(monkeypatch, breaks_off: bool):
    """Block 1 is skipped, or a pass breaks off, while it is still being gathered; block 4 gets its slot."""
    monkeypatch.setattr(host, "pin_choice", lambda sizes, left: (0, 2, 3, 4))
    gather, passed = host.HostArena.gather, Event()

    def late(*given: object) -> None:
        if current_thread() is not main_thread():
            passed.wait(timeout=0.5)  # as late as the streamer lets it be
        gather(*given)

    monkeypatch.setattr(host.HostArena, "gather", late)
    module, (x, *_) = Toy(0, 5), inputs(1)
    expected, device = module(x, [3, 4]), ThreadDevice("copies first")
    run(module, x, device)  # the first time takes torch longer than the wait above
    with BlockStreamer(module, plan_for(module, module.names), device) as streamer:
        if breaks_off:
            with pytest.raises(RuntimeError):
                module.narrow[0](torch.zeros(1, WIDTH + 1))
        module.narrow[4].register_forward_pre_hook(lambda *_: passed.set() or streamer.stager.drain())
        with Late(device):
            found = module(x, [3, 4])
        device.finish()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tier", ["pinned", "part pinned"])
@torch.no_grad()
def test_interrupted_anywhere(tier: str):
    """The next pass is right, and nothing is left behind: after Ctrl-C at each queued operation of a pass in turn."""
    module, (x, *_) = Toy(2, 3), inputs(1)
    before, expected, interruptions = state(module), module(x), 0
    for countdown in range(1000):
        device = Interrupted("copies first")
        with BlockStreamer(module, plan_for(module, module.names), device, TIERS[tier]) as streamer:
            slow_gather(streamer)
            run(module, x, device)
            with Late(device):
                earlier = module(x)
                device.countdown = countdown
                try:
                    module(x)
                except KeyboardInterrupt:
                    interruptions += 1
            done, device.countdown = device.countdown >= 0, -1
            for _ in range(2):
                assert torch.equal(run(module, x, device), expected)
            assert torch.equal(earlier, expected)
            assert streamer.metrics().resyncs <= 3
        assert state(module) == before and not hooks(module) and not device.registered
        if done:
            break
    assert interruptions == countdown > 15


@torch.no_grad()
def test_exception_in_the_middle_of_a_pass():
    module, (x, *_) = Toy(2, 3), inputs(1)
    before, expected = state(module), module(x)
    device = ThreadDevice()
    with pytest.raises(ZeroDivisionError), BlockStreamer(module, plan_for(module, module.names), device) as streamer:
        with pytest.raises(RuntimeError):
            module.narrow[0](torch.zeros(1, WIDTH + 1))  # fails within the block
        assert torch.equal(run(module, x, device), expected)
        module.fails_at = 3
        with pytest.raises(KeyboardInterrupt):  # between two blocks
            module(x)
        module.fails_at = -1
        assert torch.equal(run(module, x, device), expected)
        assert streamer.metrics().resyncs >= 2
        _ = 1 / 0
    assert state(module) == before and not hooks(module) and not device.registered
    assert torch.equal(module(x), expected)


@torch.no_grad()
def test_nothing_is_allocated_and_nobody_waits_in_the_loop():
    module = Toy(3, 6)
    device = ThreadDevice(lazy=False)
    with BlockStreamer(module, plan_for(module, module.names, [1]), device):
        made = list(device.allocations)
        module(inputs(1)[0])
        host_waits = device.host_waits
        for passes in range(1, 8):
            module(inputs(1)[0])
            assert device.host_waits - host_waits <= passes, "the host waits for nothing but the pass before the last"
        assert device.allocations == made
        sizes, rest = block_bytes(module, module.names)
        assert sorted(made) == sorted([rest, sizes[1], *2 * [max(sizes)], *2 * [min(sizes)]])


@torch.no_grad()
def test_host_is_at_most_a_pass_ahead():
    module = Toy(0, 4)
    device = ThreadDevice("copies first")
    with BlockStreamer(module, plan_for(module, module.names), device), Late(device):
        lengths = []
        for x in inputs(8):
            module(x)
            lengths.append(len(device.queues[COMPUTE]))
        device.finish()
    assert lengths[1] > lengths[0] and max(lengths[2:]) <= lengths[1] * 1.5


@torch.no_grad()
def test_metrics():
    module = Toy(3, 4)
    plan = plan_for(module, module.names, [0])
    device = ThreadDevice("compute first")
    rest = block_bytes(module, module.names)[1]
    with BlockStreamer(module, plan, device) as streamer:
        for x in inputs(5):
            module(x)
        device.finish()
        metrics = streamer.metrics()
    assert (metrics.passes, metrics.pass_loads, metrics.pass_bytes) == (5, 4, plan.streamed_bytes)
    assert metrics.loads == 4 + 5 * 4 and metrics.misses == metrics.resyncs == metrics.unused == 0
    assert metrics.copied_bytes > 0 and metrics.bytes_per_second > 0
    assert set(metrics.stall_seconds) == set(module.names[1:]) and metrics.stall >= 0
    assert metrics.pinned_bytes == sum(plan.sizes[1:]) and not metrics.pageable_bytes and not metrics.mapped_bytes
    assert metrics.slot_bytes == plan.slot_bytes and metrics.resident_bytes == plan.sizes[0] + rest


@torch.no_grad()
def test_no_room():
    """Out of memory while attaching leaves the module alone; while planning anew, a smaller plan may follow."""
    module, (x, *_) = Toy(4, 4), inputs(1)
    expected, before, everything = module(x), state(module), frozenset(range(8))
    small = plan_for(module, module.names)
    whole = StreamPlan(small.names, small.sizes, everything)
    with pytest.raises(torch.OutOfMemoryError):
        BlockStreamer(module, whole, ThreadDevice(most=whole.resident_bytes - 1))
    assert state(module) == before and not hooks(module)
    device = ThreadDevice(most=2 * small.device_bytes + whole.resident_bytes // 2)
    with BlockStreamer(module, small, device) as streamer:
        with pytest.raises(RuntimeError):
            module.narrow[3](torch.zeros(1, WIDTH + 1))
        with pytest.raises(torch.OutOfMemoryError):
            streamer.replan(whole)
        at_home = zip(streamer.layouts[7].tensors, streamer.arena.homes[7], strict=True)
        assert all(tensor.data_ptr() == home.data_ptr() for tensor, home in at_home)
        device.most = None
        streamer.replan(small)
        assert torch.equal(run(module, x, device), expected)
    assert state(module) == before and not hooks(module) and not device.registered


@torch.no_grad()
def test_plans_that_are_not_the_modules():
    module = Toy(1, 3)
    good = plan_for(module, module.names)
    sizes = (good.sizes[0] + 256, *good.sizes[1:])
    with BlockStreamer(module, good, ThreadDevice()) as streamer:
        with pytest.raises(UserError, match=f"wide.0 has {good.sizes[0]} bytes, in the plan {sizes[0]}"):
            streamer.replan(StreamPlan(good.names, sizes, (), (Ring(sizes[0], 2),)))
        with pytest.raises(UserError, match="3 blocks are not the 4"):
            streamer.replan(StreamPlan(good.names[1:], good.sizes[1:], range(3)))
        module(inputs(1)[0])
    with pytest.raises(UserError, match="detached"):
        streamer.replan(good)
    with torch.device("meta"):
        empty = Toy(1, 3)
    with pytest.raises(UserError, match="wide.0 has no weights yet"):
        BlockStreamer(empty, plan_for(empty, empty.names), ThreadDevice())


def test_gradients_are_refused():
    module, (x, *_) = Toy(0, 3), inputs(1)
    with BlockStreamer(module, plan_for(module, module.names), ThreadDevice()):
        with pytest.raises(UserError, match="torch.no_grad"):
            module(x)
        module.requires_grad_(False)
        assert module(x).shape == x.shape
        with pytest.raises(UserError, match="torch.no_grad"):
            module(x.requires_grad_())


@torch.no_grad()
def test_adapters_stream_with_their_block():
    module, (x, *_) = Toy(0, 5), inputs(1)
    factors = [(torch.randn(2, WIDTH), torch.randn(WIDTH, 2, dtype=torch.float64)) for _ in range(5)]
    for (down, up), block in zip(factors, module.narrow, strict=True):
        block.register_forward_hook(lambda _, args, out, down=down, up=up: out + (up.float() @ down @ args[0].T).T)
    extra = {f"narrow.{i}": pair for i, pair in enumerate(factors)}
    expected, before = module(x), [tensor.clone() for pair in factors for tensor in pair]
    sizes, _ = block_bytes(module, module.names, extra)
    assert sizes[0] == block_bytes(module, module.names)[0][0] + 256 + 256
    plan = StreamPlan(module.names, sizes, spread_evenly(1, 5), rings_for(sizes))
    device = ThreadDevice()
    with BlockStreamer(module, plan, device, extra=extra):
        for _ in range(2):
            assert torch.equal(run(module, x, device), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (t for pair in factors for t in pair), strict=True))
