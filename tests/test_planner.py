"""Plans as values: within the budget, no slower than their neighbours or with more memory; and how they change."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest

from flux_quant.errors import UserError
from flux_quant.planner import phases
from flux_quant.planner.footprint import FORMAT_OF, Model, Net, Work, t5_xxl
from flux_quant.planner.gpus import GPUS, find_gpu
from flux_quant.planner.memory import Budget, amount, parse_amount
from flux_quant.planner.plan import Plan, Seen, block_times, pass_seconds, plan, replan, resident_order, spread_order
from flux_quant.planner.steptime import Host, net_seconds, simulate, step_seconds
from flux_quant.streaming import Ring, StreamPlan
from live_bytes import FORMATS, config, tensors_of

VARIANTS = {"dev": True, "schnell": False}
SIZES = ((512, 512), (1024, 1024), (1920, 1072))
GB = 10**9
BUDGETS = tuple(int(gb * GB) for gb in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24))
T5 = t5_xxl("q8_0")
EXACT = 1 + 1e-9


@cache
def model(variant: str, name: str) -> Model:
    return Model.of(tensors_of(config(VARIANTS[variant]), name))


def work(variant: str, size: tuple[int, int], **more: object) -> Work:
    return Work(size, words=512 if VARIANTS[variant] else 256, **more)


def planned(
    variant: str, name: str, card: str, size: tuple[int, int], nbytes: int | None = None, **more: object
) -> Plan:
    machine = GPUS[card].machine()
    budget = Budget(machine.usable if nbytes is None else nbytes, "of a test", GB // 2)
    return plan(model(variant, name), work(variant, size, **more), machine, budget, T5)


def neighbours(made: Plan):
    """Plans with a resident or a slot more or less, in whatever way can be carried out, that fit the same memory."""
    stream, order = made.stream, [i for i in resident_order(made.model) if i in made.stream.resident]
    fixed = sum(n for _, n in phases.denoising_parts(made.model, made.work, made.machine))
    room = phases.usable(made.budget) - fixed
    sets = {stream.resident - {i} for i in order} | {stream.resident | {i} for i in stream.streamed}
    choices = [(resident, stream.rings) for resident in sets]
    for number, more in product(range(len(stream.rings)), (-1, 1)):
        rings = list(stream.rings)
        slots = rings[number].slots + more
        rings[number : number + 1] = [Ring(rings[number].slot_bytes, slots)] if slots else []
        choices += [(frozenset(order[: len(order) - k]), tuple(rings)) for k in range(3)]
    for resident, rings in choices:
        try:
            other = StreamPlan(stream.names, stream.sizes, resident, rings)
        except UserError:  # a block would have no slot
            continue
        if other.device_bytes <= room:
            yield other


def assert_sound(made: Plan) -> int:
    """Returns how many neighbours it was compared with."""
    assert made.peak <= made.budget.nbytes
    assert made.step >= made.compute * (1 - 1e-9)
    denoise = next(phase for phase in made.phases if phase.name == "denoise")
    fixed = sum(n for _, n in phases.denoising_parts(made.model, made.work, made.machine))
    assert denoise.peak == fixed + made.stream.device_bytes
    times, count = block_times(made), 0
    for other in neighbours(made):
        time = pass_seconds(other, times, made.host, made.machine) * made.work.passes
        assert made.step <= time * EXACT, f"{other}"
        count += 1
    return count


@pytest.mark.parametrize("card", GPUS)
def test_every_card(card):
    """Both variants, five formats, three sizes: within the budget, no slower than the neighbours; 4 GB hold most."""
    compared = streamed = 0
    for variant, name, size in product(VARIANTS, FORMATS, SIZES):
        if (name, GPUS[card].vram, variant, size) == ("bf16", 4, "dev", max(SIZES)):
            with pytest.raises(UserError, match="is below the"):
                planned(variant, name, card, size)
            continue
        made = planned(variant, name, card, size)
        compared += assert_sound(made)
        streamed += bool(made.stream.streamed)
        assert made.budget.nbytes == GPUS[card].usable < GPUS[card].vram << 30
    assert compared >= 9 * streamed and (streamed or GPUS[card].vram >= 24)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("card", ["gtx-1070-8gb", "rtx-4060-8gb", "rtx-4090-24gb", "h200-141gb"])
def test_more_memory_is_never_slower(card, name):
    """From the minimum on; below it there is an error, above it a plan. Residents only come, none goes."""
    least = phases.minimum(model("dev", name), work("dev", (1024, 1024)), GPUS[card].machine())[0]
    made = [planned("dev", name, card, (1024, 1024), nbytes) for nbytes in (least, *(b for b in BUDGETS if b > least))]
    for plans in made:
        assert_sound(plans)
    for less, more in pairwise(made):
        assert more.step <= less.step * EXACT
    with pytest.raises(UserError, match="at least"):
        planned("dev", name, card, (1024, 1024), least - GB // 100)


def test_transfer_bound_plans_keep_double_blocks_first():
    """BF16 at 512 px on a narrow link: every gigabyte makes it faster, until nothing waits."""
    made = [planned("dev", "bf16", "rtx-4060-8gb", (512, 512), gb * GB) for gb in (3, 4, 5, 6, 7)]
    assert all(more.step < less.step for less, more in pairwise(made))
    kept = [sum(made[1].model.blocks[i].is_double for i in plans.stream.resident) for plans in made]
    singles = [len(plans.stream.resident) - doubles for plans, doubles in zip(made, kept, strict=True)]
    assert kept == sorted(kept) and kept[-1] > 10 and max(singles) <= 1
    places = sorted(i for i in made[2].stream.resident if i < 19)
    assert max(b - a for a, b in pairwise(places)) <= 4, "spread over the depth"


def test_what_fits_stays():
    made = planned("dev", "q4_k_s", "rtx-3060-12gb", (1024, 1024))
    assert not made.stream.streamed and not made.stream.rings and made.stream.device_bytes == sum(made.stream.sizes)
    assert made.step == pytest.approx(sum(block_times(made))) and "they fit" in "\n".join(made.stream.why)


def test_phases_of_the_worked_example():
    """8 GB, dev in Q4, 1024 px: resident without modulation, text through the GPU, a plan that says all of it."""
    made = planned("dev", "q4_k_s", "rtx-3070-8gb", (1024, 1024), controlnets=690_000_000)
    assert [phase.name for phase in made.phases] == ["text", "modulation", "denoise", "decode"]
    assert not made.stream.streamed
    parts = dict(made.phases[2].parts)
    assert parts["ControlNets"] == 690_000_000 and parts["scratch of unpacked weights"] == 64_424_448
    text = str(made)
    for part in ("57 blocks", "predicted", "T5 streamed", "one piece", "modulation"):
        assert part in text
    assert made.seconds == pytest.approx(sum(phase.seconds for phase in made.phases))
    small = planned("dev", "q4_k_s", "rtx-3070-8gb", (1920, 1072), 3 * GB)
    assert "tiles" in small.phases[3].how and small.phases[3].peak <= 3 * GB
    tight = planned("dev", "q4_k_s", "rtx-3070-8gb", (512, 512), 900_000_000)
    assert "on the processor" in tight.phases[0].how and tight.phases[0].peak == 0


def test_compute_modes():
    """8-bit products are faster, need less scratch or more room, and are refused where a card lacks them."""
    steps = {
        how: planned("dev", "fp8", "rtx-4060-8gb", (1024, 1024), compute=how).step for how in ("float", "int8", "fp8")
    }
    assert steps["int8"] < steps["fp8"] < steps["float"]
    with pytest.raises(UserError, match="no fp8 products; compute: float, int8"):
        planned("dev", "fp8", "rtx-3060-12gb", (1024, 1024), compute="fp8")
    twice = planned("dev", "q8_0", "rtx-4060-8gb", (1024, 1024), passes=2)
    assert twice.step == pytest.approx(2 * planned("dev", "q8_0", "rtx-4060-8gb", (1024, 1024)).step, rel=0.01)


def test_dtypes_of_old_cards():
    """float32 on Pascal, where torch does the work of the kernels; float16 on Turing; their VAE in float32."""
    for card, dtype, other in (("gtx-1070-8gb", "fp32", "bf16"), ("rtx-2060-6gb", "fp16", "bf16")):
        made = planned("dev", "q4_k_s", card, (512, 512))
        assert made.machine.dtype == dtype and "fp32" in made.phases[3].how
        assert model("dev", other).blocks[0].unpacked(dtype)[0] > 0
    assert model("dev", "bf16").blocks[0].unpacked("bf16") == (0, 0) and FORMAT_OF["bf16"] == "bf16"


def test_too_small():
    """The minimum, and what would lower it, with numbers that are true."""
    with pytest.raises(UserError) as caught:
        planned("dev", "bf16", "rtx-4060-8gb", (1920, 1072), 800_000_000, batch=2, controlnets=300_000_000)
    text = str(caught.value)
    parts = ("800 MB", "at least", "predicted", "denoising", "--size 960x528: ", "--batch 1: ", "without ControlNets: ")
    for part in (*parts, "453 MB"):
        assert part in text
    least = parse_amount(text.split("below the ")[1].split(" (")[0].replace(" ", ""))
    planned("dev", "bf16", "rtx-4060-8gb", (1920, 1072), least + GB // 100, batch=2, controlnets=300_000_000)


def test_controlnets_take_time():
    """A net of the model's blocks, in half of the steps: half as long again. Through slots, as long as its copies."""
    alone = planned("dev", "q8_0", "rtx-3090-24gb", (1024, 1024))
    blocks = alone.model.blocks
    beside = planned("dev", "q8_0", "rtx-3090-24gb", (1024, 1024), nets=(Net(blocks, 0.5),))
    assert beside.step == pytest.approx(1.5 * alone.step) and beside.compute == pytest.approx(1.5 * alone.compute)
    slow = replace(alone.machine, pinned=1e9)
    streamed = Net(blocks, streamed=True)
    copies = sum(block.nbytes for block in blocks) / 1e9
    assert net_seconds(alone.model, replace(alone.work, nets=(streamed,)), slow, Host()) == pytest.approx(
        copies, rel=0.02
    )


# --- The model of time ------------------------------------------------------------------------------------------------


def test_simulation_by_hand():
    """Two blocks through one slot: copy and compute alternate. Two slots: whichever is slower."""
    assert simulate([1, 1, 1, 1], [2, 2, 2, 2], [0] * 4, [1], 1) == pytest.approx(4 * (1 + 2))
    assert simulate([1, 1, 1, 1], [2, 2, 2, 2], [0] * 4, [2], 1) == pytest.approx(4 * 2)
    assert simulate([3, 3, 3, 3], [2, 2, 2, 2], [0] * 4, [2], 1) == pytest.approx(4 * 3)
    assert simulate([1, 1], [5, 5], [0, 0], [2], 1) == 2, "slots for all: copied once"
    assert simulate([1, 1, 1], [9, 3, 3], [None, 0, 0], [1], 1) == pytest.approx(1 + 1 + 3 + 3)
    stream = StreamPlan(("a.0", "a.1", "a.2"), (4, 4, 4), frozenset({1}), (Ring(4, 1),))
    assert step_seconds(stream, [1, 1, 1], 1) == pytest.approx(1 + 4 + 1 + 4), "the resident hides a second of one copy"


def test_published_bounds():
    """Sum over blocks of max(compute, copy) without modulation, FP16 at full datasheet rate: offload.md 5.5."""
    made = planned("dev", "fp8", "rtx-4060-ti-8gb", (1024, 1024), 2 * GB)
    seconds = [(59.5 + 14.9) / 44.1 / 57] * 57
    names, sizes = made.stream.names, made.stream.sizes
    streamed = StreamPlan(names, sizes, rings=(Ring(max(sizes), 2),))
    for rate, expected in ((6e9, 1.84), (12e9, 1.69)):
        assert step_seconds(streamed, seconds, rate) == pytest.approx(expected, rel=0.03)


def test_ram():
    """16 GB on Windows pin 40 %; on Linux all but 4 GiB; the rest is slower and the step with it."""
    linux, windows = Host.of(16 * GB), Host.of(16 * GB, windows=True)
    assert windows.split(12 * GB)[0] == int(6.4 * GB) < linux.split(12 * GB)[0]
    assert sum(windows.split(12 * GB)) == 12 * GB and sum(Host.of(2 * GB).split(GB)) == GB
    machine = GPUS["rtx-4060-8gb"].machine()
    rates = [host.rate(17 * GB, machine) for host in (Host(), linux, windows, Host(0, 0))]
    assert rates == sorted(rates, reverse=True) and rates[0] == machine.pinned and rates[-1] == machine.disk
    lots, little = (
        plan(model("dev", "bf16"), Work((512, 512)), machine, Budget(8 * GB, "test"), T5, host)
        for host in (Host(), Host.of(8 * GB))
    )
    assert little.step > lots.step and "read from the file" in "\n".join(little.stream.why)
    assert_sound(little)


@pytest.mark.parametrize("count", [1, 2, 19, 38])
def test_spread_order(count):
    """Every block once; of every beginning, no gap is more than about twice what an even one would be."""
    order = spread_order(count)
    assert sorted(order) == list(range(count))
    for kept in range(1, count + 1):
        places = [-1, *sorted(order[:kept]), count]
        assert max(b - a for a, b in pairwise(places)) <= 2 * count / kept + 2


# --- Between steps ----------------------------------------------------------------------------------------------------


def streaming_plan() -> Plan:
    return planned("dev", "q8_0", "rtx-4060-8gb", (1024, 1024), 7 * GB)


def calm(made: Plan, **seen: float) -> Seen:
    quiet = dict(step=made.step, stall=0.0, free=GB, peak=made.budget.nbytes - GB // 10, usual=made.step)
    return Seen(**quiet | seen)


def test_nothing_to_change():
    made = streaming_plan()
    waits = calm(made, stall=made.step / 2, free=GB // 2)
    for seen in (calm(made), calm(made, stall=0.01 * made.step), calm(made, free=GB * 3 // 10), waits):
        assert replan(made, seen) == (made, ())


def test_memory_grows_short():
    made = streaming_plan()
    other, reasons = replan(made, calm(made, free=0))
    freed = made.stream.device_bytes - other.stream.device_bytes
    assert other.stream.resident < made.stream.resident and other.stream.rings == made.stream.rings
    assert freed >= GB // 2 > freed - max(made.stream.sizes) and other.peak < made.peak
    assert (
        len(reasons) == 1 and "0 B" in reasons[0] and "single_blocks" in reasons[0] and reasons[0] in other.stream.why
    )
    asked = replace(made, budget=replace(made.budget, reserve=0))
    assert replan(asked, calm(made, free=0)) == (asked, ()), "a budget that takes all there is"
    again, none = replan(other, calm(other, free=GB // 2))
    assert again == other and not none, "what was given up is not taken back at once"
    back, _ = replan(other, calm(other, stall=0.1 * made.step, free=2 * GB, peak=other.peak))
    assert back.stream.resident > other.stream.resident and back.stream.device_bytes <= made.budget.nbytes


def test_more_than_the_budget():
    made = streaming_plan()
    other, reasons = replan(made, calm(made, peak=made.budget.nbytes + 5))
    assert len(made.stream.resident) - len(other.stream.resident) == 1 and "more than the budget" in reasons[0]


def test_spill():
    """A step that suddenly takes far longer without waiting for copies; waiting for them is no spill."""
    made = streaming_plan()
    other, reasons = replan(made, calm(made, step=5 * made.step))
    assert other.stream.resident < made.stream.resident and "moved memory out" in reasons[0]
    _, reasons = replan(made, calm(made, step=5 * made.step, stall=4 * made.step, free=GB // 2))
    assert not reasons


def test_waiting_for_copies_brings_residents():
    made = planned("dev", "bf16", "rtx-4060-8gb", (512, 512), 4 * GB)
    tight = replace(made, budget=Budget(6 * GB, "test", GB // 2))
    seen = Seen(step=made.step, stall=0.3 * made.step, free=2 * GB, peak=4 * GB, usual=made.step)
    other, reasons = replan(tight, seen)
    added = other.stream.resident - made.stream.resident
    assert added and other.step < made.step and "stay as well" in reasons[0]
    assert sum(made.stream.sizes[i] for i in added) <= 1.5 * GB
    assert not replan(made, seen)[1], "the budget is an upper bound"


def test_from_all_resident_to_slots():
    made = planned("dev", "q4_k_s", "rtx-3060-12gb", (1024, 1024))
    other, reasons = replan(made, calm(made, free=GB // 10))
    assert other.stream.rings and other.stream.device_bytes <= made.stream.device_bytes - GB * 4 // 10
    assert "instead of 57" in reasons[0]
    least = replace(
        other, stream=StreamPlan(other.stream.names, other.stream.sizes, rings=(Ring(max(other.stream.sizes), 1),))
    )
    assert (
        replan(least, calm(least, free=0))[0] == least and "nothing is left" in replan(least, calm(least, free=0))[1][0]
    )


# --- Amounts and cards ------------------------------------------------------------------------------------------------

AMOUNTS = {
    "8GB": 8 * GB,
    "7.5GiB": int(7.5 * (1 << 30)),
    " 900 mb ": 900_000_000,
    "64KiB": 65536,
    "1TB": 10**12,
    ".5gib": 1 << 29,
    "12b": 12,
}


@pytest.mark.parametrize(("text", "nbytes"), AMOUNTS.items())
def test_amounts(text, nbytes):
    assert parse_amount(text) == nbytes


@pytest.mark.parametrize("text", ["8", "", "GB", "-8GB", "8 G", "8ib", "8GBit", "1e3GB", "0GB", "nan GB", "8,5GB"])
def test_no_amounts(text):
    with pytest.raises(UserError, match="budget"):
        parse_amount(text, "budget")


def test_budgets():
    """Free memory less a reserve, or what was asked for, at most what there is."""
    assert Budget.of(None, 8 * GB, "free memory").nbytes == 8 * GB - 500_000_000
    assert Budget.of("6GB", 8 * GB, "free memory") == Budget(6 * GB, "--vram 6GB", 500_000_000)
    assert Budget.of("7.9GB", 8 * GB, "free memory").reserve == GB // 10, "of what was asked for, no more is left alone"
    lowered = Budget.of("10GB", 8 * GB, "free memory")
    assert lowered.nbytes == 8 * GB and "10GB is more than there is" in lowered.why
    with pytest.raises(UserError, match="400 MB"):
        Budget.of(None, 400_000_000, "free memory")
    assert [amount(n) for n in (5, 1500, 2_000_000, 1_234_567_890)] == ["5 B", "2 KB", "2 MB", "1.23 GB"]


CARDS = {
    "3060": "rtx-3060-12gb",
    "RTX 3060": "rtx-3060-12gb",
    "rtx3060ti": "rtx-3060-ti-8gb",
    "4060_ti 16gb": "rtx-4060-ti-16gb",
    "h200": "h200-141gb",
    "1070": "gtx-1070-8gb",
}


@pytest.mark.parametrize(("text", "slug"), CARDS.items())
def test_cards_by_name(text, slug):
    assert find_gpu(text).slug == slug and all(find_gpu(slug).slug == slug for slug in GPUS)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("4060 ti", "rtx-4060-ti-8gb, rtx-4060-ti-16gb fit"),
        ("3061", "near it: rtx-3060"),
        ("rtx 3080 ti", "near it: rtx-30"),
        ("", "not in the table"),
        ("Radeon", "not in the table"),
    ],
)
def test_unknown_cards(text, part):
    with pytest.raises(UserError, match=part):
        find_gpu(text)


def test_table_is_consistent():
    """Rates against each other as the generations have them; links as fast as their lanes."""
    for gpu in GPUS.values():
        machine = gpu.machine()
        assert gpu.usable <= gpu.total < gpu.vram << 30 and machine.flops[machine.dtype] < gpu.half * 1e12
        assert ("bf16" in machine.flops) == (gpu.capability >= (8, 0)) and machine.pageable <= machine.pinned
        if gpu.display and gpu.has_tensor_cores:
            assert gpu.int8 == pytest.approx(4 * gpu.half, rel=0.02)
            assert gpu.fp8 is None or gpu.fp8 == pytest.approx(2 * gpu.half, rel=0.02)
    links = {gpu.pcie: gpu.link for gpu in GPUS.values()}
    assert links == {(3, 16): 12e9, (4, 16): 24e9, (4, 8): 12e9, (5, 8): 24e9, (5, 16): 48e9}
