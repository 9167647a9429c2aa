"""Which blocks stay on the device, and through which slots the others pass: a value, and its arithmetic."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flux_quant.errors import UserError


@dataclass(frozen=True)
class Ring:
    """Slots of one size on the device; a slot holds any block of at most `slot_bytes`."""

    slot_bytes: int
    slots: int

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_bytes


@dataclass(frozen=True)
class StreamPlan:
    """What `BlockStreamer` does, as a value: blocks in running order, who stays, through which slots the others pass.

    A streamed block uses the ring with the smallest slots that hold it. Where a ring has at least as many slots as
    blocks, its blocks are copied in the first pass and stay. Sizes are those of `block_bytes`, in bytes. `why` is
    for people: the reasons of whoever made the plan, printed below the table.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    resident: frozenset[int] = frozenset()
    rings: tuple[Ring, ...] = ()
    why: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """UserError for a plan that cannot be carried out."""
        set_ = object.__setattr__
        set_(self, "names", tuple(self.names))
        set_(self, "sizes", tuple(self.sizes))
        set_(self, "resident", frozenset(self.resident))
        set_(self, "rings", tuple(sorted(self.rings, key=lambda ring: ring.slot_bytes)))
        set_(self, "why", tuple(self.why))
        total = len(self.names)
        if len(self.sizes) != total:
            raise UserError(f"a plan of {total} blocks has {len(self.sizes)} sizes")
        if len(set(self.names)) != total:
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise UserError(f"block {twice} stands {self.names.count(twice)} times in the plan")
        if bad := [(name, size) for name, size in zip(self.names, self.sizes, strict=True) if size < 0]:
            raise UserError(f"block {bad[0][0]} has a size of {bad[0][1]} bytes")
        if strange := sorted(i for i in self.resident if not 0 <= i < total):
            raise UserError(f"block {strange[0]} is to stay, but blocks are numbered 0 to {total - 1}")
        if empty := [ring for ring in self.rings if ring.slots < 1 or ring.slot_bytes < 1]:
            raise UserError(f"a ring of {empty[0].slots} slots of {empty[0].slot_bytes} bytes holds nothing")
        if len({ring.slot_bytes for ring in self.rings}) != len(self.rings):
            raise UserError(f"two rings have slots of one size: {[ring.slot_bytes for ring in self.rings]} bytes")
        largest = self.rings[-1].slot_bytes if self.rings else 0
        if homeless := [i for i in self.streamed if self.sizes[i] > largest]:
            i = homeless[0]
            raise UserError(f"block {self.names[i]} of {self.sizes[i]} bytes fits no slot; the largest has {largest}")
        if idle := [ring for r, ring in enumerate(self.rings) if not self.blocks_of(r)]:
            raise UserError(f"no block passes through the {idle[0].slots} slots of {idle[0].slot_bytes} bytes")

    @property
    def streamed(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.names)) if i not in self.resident)

    def ring_of(self, block: int) -> int | None:
        """Number of the ring that a block passes through; None for one that stays."""
        if block in self.resident:
            return None
        return next(r for r, ring in enumerate(self.rings) if ring.slot_bytes >= self.sizes[block])

    def blocks_of(self, ring: int) -> tuple[int, ...]:
        """The blocks of a ring, in running order."""
        return tuple(i for i in self.streamed if self.ring_of(i) == ring)

    @property
    def resident_bytes(self) -> int:
        return sum(self.sizes[i] for i in self.resident)

    @property
    def slot_bytes(self) -> int:
        return sum(ring.nbytes for ring in self.rings)

    @property
    def device_bytes(self) -> int:
        """Everything the blocks take on the device."""
        return self.resident_bytes + self.slot_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes over the bus in one pass, the first one aside."""
        moving = (self.blocks_of(r) for r in range(len(self.rings)))
        rows = zip(self.rings, moving, strict=True)
        return sum(self.sizes[i] for ring, blocks in rows if len(blocks) > ring.slots for i in blocks)

    def __str__(self) -> str:
        lines = [
            f"{len(self.names)} blocks, {megabytes(sum(self.sizes))}: {len(self.resident)} stay "
            f"({megabytes(self.resident_bytes)}), {len(self.streamed)} stream "
            f"({megabytes(self.streamed_bytes)} a pass) through {megabytes(self.slot_bytes)} of slots; "
            f"{megabytes(self.device_bytes)} on the device"
        ]
        table = [("blocks", "bytes", "stay", "stream", "slots")]
        for label, blocks in families(self.names).items():
            sizes = {self.sizes[i] for i in blocks}
            stream = [i for i in blocks if i not in self.resident]
            rings = [self.rings[r] for r in sorted({self.ring_of(i) for i in stream})]
            size = megabytes(max(sizes)) if len(sizes) == 1 else f"{megabytes(min(sizes))} to {megabytes(max(sizes))}"
            slots = ", ".join(f"{ring.slots} x {megabytes(ring.slot_bytes)}" for ring in rings) or "-"
            table.append((label, size, str(len(blocks) - len(stream)), str(len(stream)), slots))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return "\n".join([*lines, *self.why])


def families(names: Sequence[str]) -> dict[str, list[int]]:
    """Blocks of one list together: "double_blocks.0-18" -> their numbers in `names`."""
    lists: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        lists.setdefault(name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else name, []).append(i)
    labels = {}
    for blocks in lists.values():
        ends = [names[blocks[0]], names[blocks[-1]].rpartition(".")[2]]
        labels["-".join(ends) if len(blocks) > 1 else ends[0]] = blocks
    return labels


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def spread_evenly(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` places as even as can be: the middles of `count` equal parts. UserError if there are too few.

    spread_evenly(2, 8) = (2, 6).
    """
    if not 0 <= count <= total:
        raise UserError(f"{count} blocks cannot be spread over {total}")
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def rings_for(sizes: Iterable[int], slots: int = 2, tolerance: float = 0.1) -> tuple[Ring, ...]:
    """Rings for streamed blocks of these sizes: blocks share slots if none is more than `tolerance` below the largest.

    tolerance 0: one ring for each size; 1: one ring for all. No ring gets more slots than it has blocks.
    """
    left = sorted(sizes, reverse=True)
    rings = []
    while left:
        alike = [size for size in left if size >= (1 - tolerance) * left[0]]
        rings.append(Ring(alike[0], min(slots, len(alike))))
        left = left[len(alike) :]
    return tuple(reversed(rings))
