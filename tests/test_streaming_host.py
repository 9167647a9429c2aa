"""Plans as values, layouts of blocks, tiers of host memory, and how much of it may be pinned."""

import random
from pathlib import Path

import pytest
import torch
from stream_backends import ThreadDevice
from torch import nn

from flux_quant.errors import UserError
from flux_quant.streaming import BlockStreamer, Ring, StreamPlan, block_bytes, pin_budget, rings_for, spread_evenly
from flux_quant.streaming.host import HostArena, Slabs, page_aligned, pin_choice, power_of_two, whole_pages
from flux_quant.streaming.layout import ALIGN, as_bytes, lay_out, module_layout, span
from flux_quant.streaming.memory import GIB, linux_memory, total_ram

NAMES = ("double.0", "double.1", "double.2", "single.0", "single.1")
SIZES = (200, 200, 180, 100, 100)


def test_arithmetic_of_a_plan():
    plan = StreamPlan(NAMES, SIZES, {1}, (Ring(200, 1), Ring(100, 2)), ("because",))
    assert plan.rings == (Ring(100, 2), Ring(200, 1)) and plan.streamed == (0, 2, 3, 4)
    assert [plan.ring_of(i) for i in range(5)] == [1, None, 1, 0, 0]
    assert (plan.blocks_of(0), plan.blocks_of(1)) == ((3, 4), (0, 2))
    assert (plan.resident_bytes, plan.slot_bytes, plan.device_bytes) == (200, 400, 600)
    assert plan.streamed_bytes == 380  # singles have as many slots as they are: they stay
    assert hash(plan) == hash(StreamPlan(list(NAMES), list(SIZES), [1], plan.rings, ["because"]))
    rows = str(plan).splitlines()
    assert rows[0].startswith("5 blocks, 0.0 MB: 1 stay") and rows[-1] == "because"
    assert rows[2].split() == ["double.0-2", "0.0", "MB", "to", "0.0", "MB", "1", "2", "1", "x", "0.0", "MB"]
    assert rows[3].startswith("single.0-1 ")


def test_everything_may_stay():
    plan = StreamPlan(NAMES, SIZES, range(5))
    assert plan.streamed == plan.rings == () and plan.streamed_bytes == 0 and plan.device_bytes == sum(SIZES)
    assert str(plan)


REFUSED = {  # what the message says: (sizes, resident, rings)
    "has 4 sizes": (SIZES[1:], (), (Ring(200, 2),)),
    "numbered 0 to 4": (SIZES, (5,), (Ring(200, 2),)),
    "double.0 of 200 bytes fits no slot; the largest has 180": (SIZES, (1,), (Ring(180, 2),)),
    "double.0 of 200 bytes fits no slot; the largest has 0": (SIZES, (), ()),
    "size of -1 bytes": ((*SIZES[:4], -1), (), (Ring(200, 2),)),
    "0 slots of 200 bytes": (SIZES, (), (Ring(200, 0),)),
    "one size": (SIZES, (), (Ring(200, 1), Ring(200, 2))),
    "no block passes through the 2 slots of 300 bytes": (SIZES, (), (Ring(200, 2), Ring(300, 2))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_plans_that_cannot_be_carried_out(message: str):
    with pytest.raises(UserError, match=message):
        StreamPlan(NAMES, *REFUSED[message])


def test_block_named_twice():
    with pytest.raises(UserError, match="double.0 stands 2 times"):
        StreamPlan((*NAMES[:4], NAMES[0]), SIZES, (), (Ring(200, 2),))


def test_spread_is_even():
    assert spread_evenly(2, 8) == (2, 6) and spread_evenly(0, 0) == ()
    for total in range(1, 60):
        for count in range(1, total + 1):
            chosen = spread_evenly(count, total)
            gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
            assert len(set(chosen)) == count and chosen[0] >= 0 and chosen[-1] < total
            assert not gaps or max(gaps) - min(gaps) <= 1
            assert abs(chosen[0] - (total - 1 - chosen[-1])) <= 1
    with pytest.raises(UserError, match="9 blocks cannot be spread over 8"):
        spread_evenly(9, 8)


@pytest.mark.parametrize("seed", range(20))
def test_rings_hold_their_blocks(seed: int):
    rng = random.Random(seed)
    sizes = [rng.choice([100, 105, 200, 210, 1000]) for _ in range(rng.randrange(1, 12))]
    slots, tolerance = rng.randrange(1, 4), rng.choice([0, 0.1, 1])
    plan = StreamPlan([str(i) for i in range(len(sizes))], sizes, (), rings_for(sizes, slots, tolerance))
    for r, ring in enumerate(plan.rings):
        blocks = plan.blocks_of(r)
        assert ring.slots == min(slots, len(blocks))
        assert all((1 - tolerance) * ring.slot_bytes <= sizes[i] <= ring.slot_bytes for i in blocks)
    if tolerance in (0, 1):
        assert len(plan.rings) == (1 if tolerance else len(set(sizes)))


class Odd(nn.Module):
    """A block with tied and overlapping tensors, odd sizes, strides and dtypes."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.randn(7, 9)
        self.a = nn.Parameter(base[:3])
        self.b = nn.Parameter(base[2:5])  # one row of each is the other's
        self.tied = self.a
        self.register_buffer("turned", torch.randn(5, 3).half().T)
        self.register_buffer("wide", torch.randn(1, 4).double().expand(3, 4))
        self.register_buffer("packed", torch.arange(77, dtype=torch.uint8)[3:])
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("absent", None)
        self.register_buffer("flag", torch.tensor([True, False]), persistent=False)


def test_layout_of_odd_tensors():
    module = nn.ModuleDict(dict(block=Odd()))
    layout = module_layout(module, ["block"]).blocks[0]
    tensors = {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}
    assert {id(tensor) for tensor in layout.tensors} == tensors and len(layout.members) == len(tensors)
    flat = torch.full((layout.nbytes,), 0xFF, dtype=torch.uint8)
    arena = HostArena(ThreadDevice(), [layout], 0)
    arena.gather(0, flat)
    for tensor, view in zip(layout.tensors, layout.views(flat), strict=True):
        assert torch.equal(tensor, view) and tensor.dtype == view.dtype and tensor.stride() == view.stride()
    places = {id(member.tensor): member for member in layout.members}
    a, b = (places[id(x)] for x in (module["block"].a, module["block"].b))
    assert b.offset - a.offset == 2 * 9 * 4
    assert all(member.offset % ALIGN == 0 for member in layout.members if member is not b)
    assert layout.nbytes == 6 * ALIGN  # a and b, turned, wide, packed, scalar, flag; and nothing
    arena.close()


def test_layout_is_the_same_on_the_meta_device():
    real = nn.ModuleDict(dict(block=Odd(), other=nn.Linear(3, 3)))
    with torch.device("meta"):
        empty = nn.ModuleDict(dict(block=Odd(), other=nn.Linear(3, 3)))
    assert block_bytes(real, ["block"]) == block_bytes(empty, ["block"]) == ((6 * ALIGN,), 2 * ALIGN)


def test_who_owns_a_tensor():
    first, second, other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight  # of two blocks
    second.bias = nn.Parameter(other.bias.detach()[:4].repeat(2))
    first.bias = nn.Parameter(other.bias.detach())  # shares memory with what is outside
    module = nn.ModuleDict(dict(first=first, second=second, other=other))
    layout = module_layout(module, ["first", "second"])
    assert [len(block.tensors) for block in layout.blocks] == [0, 1]
    assert {id(t) for t in layout.rest.tensors} == {id(t) for t in (first.weight, first.bias, other.weight, other.bias)}
    layout = module_layout(module, ["first", "second"], exclude=["*.weight"])
    assert [len(block.tensors) for block in layout.blocks] == [0, 1] and len(layout.rest.tensors) == 2
    extra = torch.zeros(3, 3)
    layout = module_layout(module, ["second"], {"second": [extra, second.bias]})
    assert {id(t) for t in layout.blocks[0].tensors} == {id(extra), id(second.bias)}


@torch.no_grad()
def test_odd_and_shared_tensors_come_back():
    module = nn.ModuleDict(dict(block=Odd(), second=Odd(), other=nn.Linear(3, 3)))
    module["second"].a = module["block"].a
    module["other"].weight = nn.Parameter(module["second"].turned)
    copies = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    names = ["block", "second"]
    sizes, _ = block_bytes(module, names)
    for budget, registers in ((0, True), (1 << 30, True), (1 << 30, False)):
        with BlockStreamer(
            module, StreamPlan(names, sizes, (), rings_for(sizes, 1, 1)), ThreadDevice(registers=registers), budget
        ):
            pass
        assert all(torch.equal(tensor, copies[name]) for name, tensor in module.state_dict().items())
        assert module["second"].a is module["block"].a
        if budget == 0:
            module["block"].a[2, 4] = 7
            assert module["block"].b[0, 4] == 7
            copies = {name: tensor.clone() for name, tensor in module.state_dict().items()}


BAD_PATHS = {
    "no block 'thrid'": (["first", "thrid"], {}),
    "no block ''": ([""], {}),
    "block first.0 lies in block first": (["first", "first.0"], {}),
    "2 blocks are listed, but only 1": (["first", "first"], {}),
    "one module is listed as two blocks": (["first", "again"], {}),
    "belong to second, which is not a block": (["first"], {"second": []}),
}


@pytest.mark.parametrize("message", BAD_PATHS)
def test_wrong_blocks(message: str):
    first = nn.Sequential(nn.Linear(2, 2))
    module = nn.ModuleDict(dict(first=first, again=first, second=nn.Linear(2, 2)))
    with pytest.raises(UserError, match=message):
        module_layout(module, *BAD_PATHS[message])


def test_memory_that_cannot_be_repointed():
    module = nn.ModuleDict(dict(block=nn.Module()))
    module["block"].register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(UserError, match="block.sparse is a Tensor whose memory cannot"):
        module_layout(module, ["block"])


def test_span_and_bytes():
    x = torch.arange(24, dtype=torch.int16).view(4, 6)
    part = x[1:3, 2:4].T
    _, start, end = span(part)
    assert (start - x.data_ptr(), end - start) == (16, 16)
    assert torch.equal(as_bytes(part), x.flatten()[8:16].view(torch.uint8))


def test_pages_and_powers():
    for nbytes in (1, 4095, 4096, 4097, 100_000):
        memory = page_aligned(nbytes)
        assert memory.numel() == nbytes and memory.data_ptr() % 4096 == 0
        pages = whole_pages(memory)
        assert pages.data_ptr() == memory.data_ptr() and pages.numel() == -(-nbytes // 4096) * 4096
        assert power_of_two(nbytes) >= nbytes > power_of_two(nbytes) // 2


def test_pinned_subset_is_spread_and_within_budget():
    assert pin_choice([10] * 8, 25) == (2, 6) and pin_choice([10] * 8, 9) == () and pin_choice([], 5) == ()
    sizes = [200] * 19 + [100] * 38
    for budget in range(0, 8000, 170):
        chosen = pin_choice(sizes, budget)
        assert sum(sizes[i] for i in chosen) <= budget
        assert chosen == spread_evenly(len(chosen), 57)


def test_slabs_waste_little():
    """FLUX.1 [dev] in FP8: 57 blocks in slabs of a GiB, and what a power of two for each would take."""
    device = ThreadDevice()
    device.pinned = lambda nbytes: device.slabs.append(nbytes) or torch.empty(nbytes, dtype=torch.uint8, device="meta")
    sizes = [339_800_000] * 19 + [141_600_000] * 38
    slabs, coming = Slabs(device), sum(sizes)
    for size in sizes:
        assert slabs.allocate(size, coming).numel() == size
        coming -= size
    assert all(size & (size - 1) == 0 for size in device.slabs)
    assert sum(device.slabs) < 1.1 * sum(sizes) < 1.6 * sum(sizes) < sum(power_of_two(size) for size in sizes)


def test_refused_registration_falls_back_to_slabs():
    layouts = [lay_out(str(i), [torch.randn(300 + i)]) for i in range(6)]
    values = [layout.tensors[0].clone() for layout in layouts]
    device = ThreadDevice(registers=False)
    arena = HostArena(device, layouts, 1 << 30, slab_bytes=4096)
    arena.settle(range(6))
    assert len(arena.pinned) == 6 and 1 < len(device.slabs) <= 3
    spans = sorted(span(arena.pinned[i])[1:] for i in range(6))
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
    arena.close()
    assert all(torch.equal(layout.tensors[0], value) for layout, value in zip(layouts, values, strict=True))
    now = [span(layout.tensors[0])[1] for layout in layouts]
    assert not any(start <= address < end for start, end in spans for address in now), "slabs are given back"


def test_no_pinned_memory_at_all():
    device = ThreadDevice(registers=False)
    device.pinned = lambda nbytes: None
    module = nn.ModuleDict({str(i): nn.Linear(5, 5) for i in range(4)})
    sizes, _ = block_bytes(module, list(module))
    with BlockStreamer(module, StreamPlan(list(module), sizes, (), rings_for(sizes)), device, 1 << 30) as streamer:
        assert streamer.metrics().pageable_bytes == 4 * (5 * 5 + 5) * 4


def test_planning_anew_pins_nothing_again():
    module = nn.ModuleDict({str(i): nn.Linear(8, 8) for i in range(6)})
    names, (sizes, _) = list(module), block_bytes(module, list(module))
    first, second = (StreamPlan(names, sizes, stay, rings_for(sizes[2:])) for stay in ({0, 1}, {4, 5}))
    device = ThreadDevice()
    with BlockStreamer(module, first, device, 1 << 30) as streamer:
        homes = dict(streamer.arena.pinned)
        assert sorted(homes) == [2, 3, 4, 5]
        streamer.replan(second)
        assert sorted(streamer.arena.pinned) == [0, 1, 2, 3, 4, 5]
        assert all(streamer.arena.pinned[i] is home for i, home in homes.items())
        assert streamer.residents.keys() == {4, 5, 6}
    assert not device.registered


def memory_tree(root: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 12582912 kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"
TREES = {  # files, (limit, available, budget) in GiB of a machine with 16, 12 of them available
    "no groups": ({}, (16, 12, 12)),
    "no limit": ({"proc/self/cgroup": "0::/a\n", f"{V2}/a/memory.max": "max\n"}, (16, 12, 12)),
    "container": (
        {
            "proc/self/cgroup": "0::/\n",
            f"{V2}/memory.max": str(8 * GIB),
            f"{V2}/memory.current": str(6 * GIB),
            f"{V2}/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {GIB}\n",
        },
        (8, 4, 4),
    ),
    "limit of a parent": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            f"{V2}/a/b/memory.max": "max",
            f"{V2}/a/memory.max": str(10 * GIB),
            f"{V2}/a/memory.current": str(GIB),
        },
        (10, 9, 6),
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/x\n",
            f"{V1}/x/memory.limit_in_bytes": str(6 * GIB),
            f"{V1}/x/memory.usage_in_bytes": str(GIB),
            f"{V1}/x/memory.stat": "total_inactive_file 0\n",
            f"{V1}/memory.limit_in_bytes": str(1 << 62),
        },
        (6, 5, 2.4),
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_memory_of_machine_and_container(name: str, tmp_path: Path):
    files, (limit, available, budget) = TREES[name]
    root = memory_tree(tmp_path, files)
    assert linux_memory(root) == (limit * GIB, available * GIB)
    assert pin_budget("linux", root) == pytest.approx(budget * GIB, abs=1)


def test_budget_elsewhere():
    assert pin_budget("win32") == int(0.4 * total_ram())


def test_tensors_on_other_devices_are_no_meta_tensors():
    meta = torch.empty(3, device="meta")
    assert span(meta)[0] != span(meta.clone())[0]
