"""How long a step takes: what each block computes, what each copies, and how the two overlap.

A block's compute is its products at the rate of the machine, the unpacking of its weights, attention, and the bytes of
the pointwise work. Copies run beside it through the slots of a `StreamPlan`: the next block of a ring is copied into a
slot as soon as the block before has been computed, also across the end of a step; a block starts when it has arrived.
The step time is that of the steady state. It is what a sum over blocks of max(compute, copy) stands for, exact for
slots of any number. Rates are assumptions or measurements of the machine; what comes out is a prediction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from flux_quant.planner.footprint import Block, Model, Net, TextEncoder, Work
from flux_quant.planner.gpus import Machine
from flux_quant.streaming import StreamPlan
from flux_quant.streaming.memory import RESERVE, SHARE

LAUNCH = 3e-6  # seconds of a kernel that unpacks a weight
UNITS = {True: (24, 19), False: (110, 103)}  # pointwise bytes of a double and a single block, see `kernels.fused`
AS_STORED = {  # formats that 8-bit products multiply as they lie
    "fp8": {"fp8", "fp8_plain", "fp8 as fp8", "fp8_plain as fp8", "fp8_rows as fp8"},
    "int8": {"int8_rows"},
}
PASSES = 4  # until the steady state; the last one counts


@dataclass(frozen=True)
class Host:
    """RAM for weights that stream: bytes that may be pinned, and bytes beyond. The rest is read from the file again."""

    pinned: float = inf
    pageable: float = inf

    @classmethod
    def of(cls, ram: int, windows: bool = False) -> "Host":
        """Of a machine with `ram` bytes, or a container that may use as much."""
        most = max(int(SHARE * ram), min(int(0.9 * ram), ram - RESERVE))  # as `streaming.pin_budget`
        pinned = int(SHARE * ram) if windows else most
        return cls(pinned, max(0, ram - RESERVE - pinned))

    def split(self, nbytes: int) -> tuple[int, int, int]:
        """Of that many bytes: pinned, pageable, left in the file."""
        pinned = min(nbytes, self.pinned)
        pageable = min(nbytes - pinned, self.pageable)
        return int(pinned), int(pageable), int(nbytes - pinned - pageable)

    def rate(self, nbytes: int, machine: Machine) -> float:
        """Bytes/s to the device, all of them taken together."""
        if not nbytes:
            return machine.pinned
        rates = machine.pinned, machine.pageable, min(machine.disk, machine.pageable)
        return nbytes / sum(part / rate for part, rate in zip(self.split(nbytes), rates, strict=True))


def block_seconds(block: Block, model: Model, work: Work, machine: Machine) -> float:
    """Compute of one block in one pass of the transformer."""
    config, b, tokens = model.config, work.batch, work.tokens
    # Half of a double block's weights see the image, half the text.
    products = block.weights * (tokens if block.is_double else 2 * tokens) * b
    rate = machine.flops[machine.dtype if work.compute == "float" else work.compute]
    unit = b * tokens * config.hidden * (4 if machine.dtype == "fp32" else 2)
    units = UNITS[machine.triton][0 if block.is_double else 1]
    attention = 4 * b * tokens**2 * config.hidden
    moved = units * unit + unpack_bytes(block, work, machine)
    return products / rate + attention / machine.attention + moved / machine.bandwidth


def net_seconds(model: Model, work: Work, machine: Machine, host: Host) -> float:
    """What ControlNets add to the mean pass: their blocks, as wide as the model's, in their share of the steps."""
    return sum(net.share * one_net_seconds(net, model, work, machine, host) for net in work.nets)


def one_net_seconds(net: Net, model: Model, work: Work, machine: Machine, host: Host) -> float:
    compute = [block_seconds(block, model, work, machine) for block in net.blocks]
    if not net.streamed:
        return sum(compute)
    sizes = [block.nbytes for block in net.blocks]
    return simulate(compute, sizes, [int(b.is_double) for b in net.blocks], (2, 2), host.rate(sum(sizes), machine))


def unpack_bytes(block: Block, work: Work, machine: Machine) -> float:
    """Read and written by the pass that unpacks; for 8-bit products one byte per weight is written."""
    values, nbytes = block.unpacked(machine.dtype)
    if work.compute != "float" and set(block.packed) <= AS_STORED[work.compute]:
        return 0
    width = 1 if work.compute != "float" else 4 if machine.dtype == "fp32" else 2
    return nbytes + width * values + LAUNCH * machine.bandwidth * (8 if block.is_double else 2) * bool(values)


def text_seconds(encoder: TextEncoder, work: Work, machine: Machine, host: Host) -> tuple[float, float]:
    """Encoding a prompt, or two with a negative one: streamed through the GPU, on the processor."""
    flops = 2 * encoder.weights * work.words * work.passes
    copy = encoder.nbytes / host.rate(encoder.nbytes, machine)
    return max(copy, flops / machine.flops[machine.dtype]), flops / machine.cpu


def step_seconds(plan: StreamPlan, compute: Sequence[float], rate: float) -> float:
    """One pass through the blocks in the steady state. compute: seconds of each; rate: bytes/s of copies."""
    rings = [None if i in plan.resident else plan.ring_of(i) for i in range(len(plan.names))]
    return simulate(compute, plan.sizes, rings, [ring.slots for ring in plan.rings], rate)


def simulate(
    compute: Sequence[float], sizes: Sequence[int], rings: Sequence[int | None], slots: Sequence[int], rate: float
) -> float:
    """rings: number of each block's ring, None for one that stays; slots: of each ring."""
    following: list[int | None] = [None] * len(sizes)  # whom a block leaves its slot to
    for ring, count in enumerate(slots):
        blocks = [i for i, own in enumerate(rings) if own == ring]
        if len(blocks) > count:
            for place, i in enumerate(blocks):
                following[i] = blocks[(place + count) % len(blocks)]
    if not any(i is not None for i in following):
        return sum(compute)
    arrived = [0.0] * len(sizes)
    now = copied = start = 0.0
    for _ in range(PASSES):
        start = now
        for i, seconds in enumerate(compute):
            now = max(now, arrived[i]) + seconds
            if (after := following[i]) is not None:
                copied = max(copied, now) + sizes[after] / rate
                arrived[after] = copied
    return now - start
