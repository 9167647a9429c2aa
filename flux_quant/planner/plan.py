"""What fits a budget of GPU memory, and which blocks of the transformer stay there: a plan, which is a value.

`plan` predicts the peak of every phase and the time of a step; nothing is measured or allocated. How residents and
slots are chosen: for rings in the order of RINGS, and every number of double blocks, single blocks take the room that
is left. The first choice in which no block waits for its copy is taken, else the fastest. Double blocks come first
because one has twice the bytes of a single block for the same compute; of each list, residents are taken in an order
of which every beginning is spread evenly, so that more memory adds residents and moves none.

`replan` makes another plan between steps, from what was seen. It returns a value and reasons, and touches nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from flux_quant.planner import phases
from flux_quant.planner.footprint import Model, TextEncoder, Work
from flux_quant.planner.gpus import Machine
from flux_quant.planner.memory import RESERVE, Budget, amount
from flux_quant.planner.phases import Phase
from flux_quant.planner.steptime import Host, block_seconds, net_seconds, simulate
from flux_quant.streaming import Ring, StreamPlan

# Slots for double and for single blocks; None: single blocks pass through the slots of the double ones. With one slot
# nothing is copied ahead, so such rings come last.
RINGS: tuple[tuple[int, int | None], ...] = (
    *((2, None), (2, 2), (3, None), (3, 2), (2, 3), (3, 3), (4, None)),
    *((1, 2), (2, 1), (1, None), (1, 1)),
)


@dataclass(frozen=True)
class Plan:
    """Predictions for `work` on `machine`. Why it is as it is: `stream.why`."""

    model: Model
    work: Work
    machine: Machine
    budget: Budget
    host: Host
    stream: StreamPlan
    phases: tuple[Phase, ...]
    step: float  # seconds
    compute: float  # of them, with all copies hidden

    @property
    def peak(self) -> int:
        """Predicted, of all phases."""
        return max(phase.peak for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Predicted, for one batch of pictures whose weights are in RAM."""
        return sum(phase.seconds for phase in self.phases)

    def __str__(self) -> str:
        phases = [
            f"{phase.name}: {phase.how}; predicted peak {amount(phase.peak)}, {phase.seconds:.2f} s"
            for phase in self.phases
        ]
        return "\n".join(
            [str(self.stream), *phases, f"predicted: {self.step:.2f} s a step, {self.seconds:.1f} s in all"]
        )


def plan(
    model: Model, work: Work, machine: Machine, budget: Budget, encoder: TextEncoder | None, host: Host | None = None
) -> Plan:
    """The plan for this work, without a phase for text if there is no encoder.

    UserError with the minimum, and what would lower it, if it does not fit the budget.
    """
    host = host or Host()
    phases.check_rates(work, machine)
    phases.check_minimum(model, work, machine, budget)
    fixed = phases.denoising_parts(model, work, machine)
    room = phases.usable(budget) - sum(nbytes for _, nbytes in fixed)
    seconds = [block_seconds(block, model, work, machine) for block in model.blocks]
    stream, time = choose(model, seconds, room, host, machine)
    nets = net_seconds(model, work, machine, host)
    step, compute = (time + nets) * work.passes, (sum(seconds) + nets) * work.passes
    in_order = (
        *([phases.text(encoder, work, machine, budget, host)] if encoder else []),
        phases.modulation(model, work, machine, host),
        phases.denoise(fixed, stream, work, step),
        phases.decode(work, machine, budget),
    )
    reasons = explain(model, stream, machine, budget, host, step, compute)
    return Plan(model, work, machine, budget, host, replace(stream, why=reasons), in_order, step, compute)


def explain(
    model: Model, stream: StreamPlan, machine: Machine, budget: Budget, host: Host, step: float, compute: float
) -> tuple[str, ...]:
    """Why the plan is as it is, a line for each decision."""
    pinned, pageable, in_file = host.split(stream.streamed_bytes)
    rate = host.rate(stream.streamed_bytes, machine)
    lines = [f"budget {amount(budget.nbytes)}: {budget.why}; rates of {machine.name} ({machine.source})"]
    if not stream.streamed:
        lines.append("all blocks stay: they fit")
    else:
        copy = stream.streamed_bytes / rate
        lines.append(
            f"a pass copies {amount(stream.streamed_bytes)} at {rate / 1e9:.1f} GB/s in {copy:.2f} s beside "
            f"{compute:.2f} s of compute; the compute waits {max(0.0, step - compute):.2f} s a step (predicted)"
        )
        lines.append(why_these(model, stream))
        where = ((pinned, "pinned"), (pageable, "pageable"), (in_file, "read from the file at every step"))
        lines.append("RAM for streamed blocks: " + ", ".join(f"{amount(n)} {how}" for n, how in where if n))
    hoisted = f"modulation, {amount(model.modulation)}, passes through once before the steps and does not stay"
    return (*lines, hoisted)


def why_these(model: Model, stream: StreamPlan) -> str:
    double = [i for i, block in enumerate(model.blocks) if block.is_double]
    single = [i for i, block in enumerate(model.blocks) if not block.is_double]
    kept = [sum(i in stream.resident for i in blocks) for blocks in (double, single)]
    text = f"{kept[0]} of {len(double)} double and {kept[1]} of {len(single)} single blocks stay"
    if double and single:
        ratio = model.blocks[double[0]].nbytes / model.blocks[single[0]].nbytes
        text += f": double ones first, they have {ratio:.1f} times the bytes for the same compute"
    slots = " and ".join(f"{ring.slots} of {amount(ring.slot_bytes)}" for ring in stream.rings)
    return f"{text}; slots: {slots}"


def spread_order(count: int) -> list[int]:
    """Numbers 0 to count - 1 such that those at the beginning of the list always lie evenly: bits reversed."""
    bits = max(1, (count - 1).bit_length())
    reversed_ = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [i for i in reversed_ if i < count]


def resident_order(model: Model) -> list[int]:
    """Blocks in the order in which they become residents: double ones first."""
    double = [i for i, block in enumerate(model.blocks) if block.is_double]
    single = [i for i, block in enumerate(model.blocks) if not block.is_double]
    return [blocks[i] for blocks in (double, single) for i in spread_order(len(blocks))]


def choose(model: Model, seconds: Sequence[float], room: int, host: Host, machine: Machine) -> tuple[StreamPlan, float]:
    """The plan for `room` bytes of blocks, and the seconds of a pass."""
    floor, best = sum(seconds), None
    for resident, rings in candidates(model, room):
        stream = stream_plan(model, resident, rings)
        time = pass_seconds(stream, seconds, host, machine)
        if best is None or time < best[1]:
            best = stream, time
        if time <= floor * (1 + 1e-9):
            break
    assert best is not None, "check_minimum lets nothing through that one slot does not hold"
    return best


def candidates(model: Model, room: int) -> Iterator[tuple[frozenset[int], tuple[Ring, ...]]]:
    """(residents, rings) that fit, the preferred ones first."""
    order = resident_order(model)
    sizes = [block.nbytes for block in model.blocks]
    if sum(sizes) <= room:
        yield frozenset(order), ()
        return
    doubles = [i for i in order if model.blocks[i].is_double]
    singles = [i for i in order if not model.blocks[i].is_double]
    for slots in RINGS:
        for kept in range(len(doubles), -1, -1):
            left = room - sum(sizes[i] for i in doubles[:kept])
            if left < 0:
                continue
            for more in range(len(singles), -1, -1):
                resident = frozenset(doubles[:kept] + singles[:more])
                rings = rings_of([sizes[i] for i in doubles[kept:]], [sizes[i] for i in singles[more:]], slots)
                if sum(sizes[i] for i in singles[:more]) + sum(ring.nbytes for ring in rings) <= left:
                    yield resident, rings
                    break


def rings_of(doubles: Sequence[int], singles: Sequence[int], slots: tuple[int, int | None]) -> tuple[Ring, ...]:
    """Rings for streamed blocks of these sizes; none gets more slots than it has blocks."""
    of_double, of_single = slots
    if of_single is None or not doubles or not singles or max(doubles) <= max(singles):
        largest, count = max([*doubles, *singles], default=0), of_double if doubles else of_single or of_double
        return (Ring(largest, min(count, len(doubles) + len(singles))),) if largest else ()
    return (
        Ring(max(singles), min(of_single, len(singles))),
        Ring(max(doubles), min(of_double, len(doubles))),
    )


def stream_plan(model: Model, resident: frozenset[int], rings: tuple[Ring, ...]) -> StreamPlan:
    names = tuple(block.name for block in model.blocks)
    return StreamPlan(names, tuple(block.nbytes for block in model.blocks), resident, rings)


def pass_seconds(stream: StreamPlan, seconds: Sequence[float], host: Host, machine: Machine) -> float:
    rings = [None if i in stream.resident else stream.ring_of(i) for i in range(len(stream.names))]
    rate = host.rate(stream.streamed_bytes, machine)
    return simulate(seconds, stream.sizes, rings, [ring.slots for ring in stream.rings], rate)


# --- Between steps ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a step showed."""

    step: float  # seconds
    stall: float  # of them, waiting for copies
    free: int  # bytes of the device that nobody holds
    peak: int  # bytes that this process held at most, CUDA's own part included
    usual: float  # seconds of a step so far: their median


STALL = 0.02  # of a step: less is not worth a change
SPILL = 3.0  # times the usual step: copies and compute do not vary as much, memory that the driver moved out does


def replan(plan: Plan, seen: Seen) -> tuple[Plan, tuple[str, ...]]:
    """The plan for the next steps and why it differs; the same plan and no reasons where nothing has to change.

    Blocks are given up where memory is short, and stay in addition where the compute waits and memory is free. What is
    given up leaves the budget's reserve free; more is given up only below half of that, so that plans do not alternate.
    """
    reserve = plan.budget.reserve
    over = seen.peak - plan.budget.nbytes
    if over > 0:
        return shed(plan, over, f"{amount(seen.peak)} were held, {amount(over)} more than the budget")
    if seen.free < reserve // 2:
        return shed(plan, reserve - seen.free, f"only {amount(seen.free)} of the device are free")
    if seen.step > SPILL * seen.usual and seen.stall < (seen.step - seen.usual) / 2:
        why = f"a step took {seen.step:.1f} s, usually {seen.usual:.1f} s: the driver may have moved memory out"
        return shed(plan, max(reserve, RESERVE), why)
    room = min(-over, seen.free - reserve)
    if seen.stall > STALL * seen.step and room > 0:
        return grow(plan, room, f"compute waited {seen.stall:.2f} s of {seen.step:.2f} s for copies")
    return plan, ()


def grow(plan: Plan, room: int, why: str) -> tuple[Plan, tuple[str, ...]]:
    """More residents, as many as fit `room` bytes."""
    stream, more = plan.stream, []
    for i in resident_order(plan.model):
        if i not in stream.resident and stream.sizes[i] <= room:
            more.append(i)
            room -= stream.sizes[i]
    if not more:
        return plan, ()
    reason = f"{why}: {names_of(stream, more)} stay as well"
    return changed(plan, with_residents(stream, stream.resident | set(more)), reason), (reason,)


def shed(plan: Plan, nbytes: int, why: str) -> tuple[Plan, tuple[str, ...]]:
    """Fewer residents; where that is not enough, or no slot would hold what then streams, other rings."""
    stream, fewer, freed = plan.stream, [], 0
    slot = max((ring.slot_bytes for ring in stream.rings), default=0)
    for i in reversed(resident_order(plan.model)):
        if i in stream.resident and stream.sizes[i] <= slot and freed < nbytes:
            fewer.append(i)
            freed += stream.sizes[i]
    if freed >= nbytes:
        reason = f"{why}: {names_of(stream, fewer)} stream from now on"
        return changed(plan, with_residents(stream, stream.resident - set(fewer)), reason), (reason,)
    room = stream.device_bytes - nbytes
    if room < plan.model.largest:
        return plan, (f"{why}: nothing is left to give up, one slot for {amount(plan.model.largest)} has to remain",)
    other, _ = choose(plan.model, block_times(plan), room, plan.host, plan.machine)
    slots = ", ".join(f"{ring.slots} slots of {amount(ring.slot_bytes)}" for ring in other.rings)
    reason = f"{why}: {len(other.resident)} instead of {len(stream.resident)} blocks stay, {slots}"
    return changed(plan, other, reason), (reason,)


def with_residents(stream: StreamPlan, resident: frozenset[int]) -> StreamPlan:
    """The same with other residents; slots that no block passes through any more are given up."""
    left = [size for i, size in enumerate(stream.sizes) if i not in resident]
    used = {min((ring.slot_bytes for ring in stream.rings if ring.slot_bytes >= size), default=0) for size in left}
    return replace(stream, resident=resident, rings=tuple(ring for ring in stream.rings if ring.slot_bytes in used))


def names_of(stream: StreamPlan, blocks: Sequence[int]) -> str:
    return ", ".join(stream.names[i] for i in blocks)


def block_times(plan: Plan) -> list[float]:
    return [block_seconds(block, plan.model, plan.work, plan.machine) for block in plan.model.blocks]


def changed(plan: Plan, stream: StreamPlan, reason: str) -> Plan:
    """The plan with other residents or rings, its predictions made anew."""
    step = pass_seconds(stream, block_times(plan), plan.host, plan.machine) * plan.work.passes
    fixed = phases.denoising_parts(plan.model, plan.work, plan.machine)
    in_order = tuple(
        phases.denoise(fixed, stream, plan.work, step) if phase.name == "denoise" else phase for phase in plan.phases
    )
    return replace(plan, stream=replace(stream, why=(*plan.stream.why, reason)), phases=in_order, step=step)
