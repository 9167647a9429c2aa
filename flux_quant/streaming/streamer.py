"""Carries out a plan: hooks on the blocks move them through slots on the device, ahead of the compute.

Before a block runs, the compute queue waits for the block's copy, and its tensors are pointed at the slot; after it,
the tensors are pointed home, the slot is marked free behind the block's work, and the copy of the next block that has
no slot yet is queued behind that mark. Slots go round in the order in which they become free, and blocks in running
order, from the last of a pass on to the first of the next. So the host only queues work. It waits in three cases: it is
two passes ahead; a block comes from pageable memory or a file and has not been gathered yet; a pass broke off.

Tensors are repointed by `tensor.data = view`: the objects stay the same, so whoever else holds one of them (adapters,
tied weights, compiled regions of older torch) sees the block arrive; no memory is allocated; it takes 0.6 us a tensor.
That is out of autograd's sight, hence refused where a gradient would be recorded. Compiled blocks (`block.compile()`
before the streamer is made) are driven from outside of the compiled region, whose guards see the same dtypes, shapes,
strides and alignment in every slot. A block lies at one of as many addresses as its ring has slots, and at one only if
the ring's blocks are a multiple of its slots: code that takes addresses for fixed, as CUDA graphs do, needs a version
for each, and must not be captured across the border of a block.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flux_quant.errors import UserError
from flux_quant.streaming.device import COMPUTE, COPY, CudaDevice, Event, StreamDevice
from flux_quant.streaming.host import HostArena, Stager, Ticket, point
from flux_quant.streaming.layout import as_bytes, module_layout
from flux_quant.streaming.memory import pin_budget
from flux_quant.streaming.meter import Meter, StreamMetrics
from flux_quant.streaming.plan import StreamPlan


@dataclass(eq=False)
class Slot:
    buffer: Tensor
    free: Event
    loaded: Event
    ticket: Ticket | None = None
    views: dict[int, list[Tensor]] = field(default_factory=dict)  # by block


class RingState:
    """Slots of one ring: free ones in the order in which they became so, the others by the block they are for."""

    def __init__(self, blocks: Sequence[int], slots: Sequence[Slot]) -> None:
        self.order, self.slots = tuple(blocks), tuple(slots)
        self.place = {block: i for i, block in enumerate(self.order)}
        self.empty()

    def empty(self) -> None:
        self.free, self.loaded = deque(self.slots), {}
        self.head = -1  # place of the block that ran last

    def following(self, place: int, count: int) -> list[int]:
        """`count` blocks in running order, round and round, from a place on."""
        return [self.order[(place + i) % len(self.order)] for i in range(count)]

    @property
    def keeps_all(self) -> bool:
        return len(self.order) <= len(self.slots)


class BlockStreamer:
    """Makes a module run on a device that its blocks do not fit, with the module's own tensors as the only copy.

    The plan's blocks are paths of modules. What lies outside of them, or is shared between them, is put on the device.
    `detach`, or the end of a `with` statement, leaves the module as it was: same tensors on the same devices, no hooks.
    For other adapters, detach and make a new one. One thread at a time; inference only.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: StreamPlan,
        device: str | torch.device | StreamDevice = "cuda",
        ram_budget: int | None = None,
        extra: Mapping[str, Sequence[Tensor]] | None = None,
        exclude: Iterable[str] = (),
    ) -> None:
        """ram_budget: bytes to pin, `pin_budget()` if None. extra and exclude: see `module_layout`.

        UserError for blocks or sizes that are not the module's; torch's out-of-memory errors leave it as it was.
        """
        self.device = CudaDevice(device) if isinstance(device, str | torch.device) else device
        self.module = module
        layout = module_layout(module, plan.names, extra, exclude)
        self.layouts = [*layout.blocks, layout.rest]
        for block in self.layouts:
            if any(tensor.is_meta for tensor in block.tensors):
                raise UserError(f"{block.name} has no weights yet (meta device): load them, then stream")
        budget = pin_budget() if ram_budget is None else ram_budget
        self.arena = HostArena(self.device, self.layouts, budget)
        self.meter = Meter(self.device)
        self.residents: dict[int, Tensor | None] = {}  # None: was on the device and stayed there
        self.rings: list[RingState] = []
        self.stager: Stager | None = None
        self.plan: StreamPlan | None = None  # None: no plan could be carried out
        self.undo: list[Callable[[], None]] = []
        self._busy, self._last, self.attached = False, len(plan.names), True
        try:
            self.replan(plan)
        except BaseException:
            self.detach()
            raise

    def __enter__(self) -> "BlockStreamer":
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @torch.inference_mode(False)  # slots are written by other threads, which are not in that mode
    def replan(self, plan: StreamPlan) -> None:
        """Carry out another plan for the same blocks from the next pass on. What is pinned stays pinned.

        Waits for the device. If the device has no room for it, its error is raised and no block is streamed; a smaller
        plan may follow, or `detach`.
        """
        if not self.attached:
            raise UserError("this streamer is detached; make a new one")
        sizes = tuple(layout.nbytes for layout in self.layouts[:-1])
        names = tuple(layout.name for layout in self.layouts[:-1])
        if plan.names != names:
            raise UserError(f"the plan's {len(plan.names)} blocks are not the {len(names)} that are streamed here")
        if wrong := [i for i, size in enumerate(sizes) if size != plan.sizes[i]]:
            i = wrong[0]
            raise UserError(f"block {names[i]} has {sizes[i]} bytes, in the plan {plan.sizes[i]}")
        if self.plan is not None and (plan.resident, plan.rings) == (self.plan.resident, self.plan.rings):
            return
        self.plan = None
        self._halt()
        stay = plan.resident | {len(names)}
        for block in set(self.residents) - stay:
            self.arena.bring_home(block)
            del self.residents[block]
        self.arena.settle(plan.streamed)
        for block in sorted(stay - set(self.residents)):
            self._bring_to_stay(block)
        for number, ring in enumerate(plan.rings):
            slots = [self._new_slot(ring.slot_bytes) for _ in range(ring.slots)]
            self.rings.append(RingState(plan.blocks_of(number), slots))
        staged = [sizes[i] for i in plan.streamed if i not in self.arena.pinned]
        self.stager = Stager(self.arena, max(staged)) if staged else None
        self.plan = plan
        for ring in sorted(self.rings, key=lambda ring: ring.order[0]):  # what runs first is loaded first
            for block in ring.order:
                self._hook(ring, block)
            self._fill(ring)
        totals = self.meter.totals
        totals.resident_bytes, totals.slot_bytes = plan.resident_bytes + self.layouts[-1].nbytes, plan.slot_bytes
        totals.pinned_bytes = self.arena.pinned_bytes + (2 * max(staged) if staged else 0)
        totals.pageable_bytes, totals.mapped_bytes = self.arena.tiers(plan.streamed)

    @torch.inference_mode(False)
    def pause(self) -> None:
        """Give back the device's memory; what is pinned stays so. `replan` goes on. Waits for the device."""
        if self.attached:
            self.plan = None
            self._halt()
            for block in self.residents:
                self.arena.bring_home(block)
            self.residents.clear()

    @torch.inference_mode(False)
    def detach(self) -> None:
        """Leave the module as it was, and give back all memory. Waits for the device."""
        if self.attached:
            self._halt()
            self.residents.clear()
            self.arena.close()
            self.attached = False

    def metrics(self) -> StreamMetrics:
        """Waits for nothing: the latest pass counts once the device has finished it."""
        return self.meter.result()

    def _halt(self) -> None:
        """All blocks but the residents at home, no hook, no slot, nothing under way."""
        while self.undo:
            self.undo.pop()()
        if self.stager is not None:
            self.stager.drain()
        self.device.finish()
        if self.stager is not None:
            self.stager.close()
            self.stager = None
        for block in range(len(self.layouts)):
            if block not in self.residents:
                self.arena.bring_home(block)
        self.rings, self._busy, self._last = [], False, len(self.layouts)

    def _new_slot(self, nbytes: int) -> Slot:
        return Slot(self.device.allocate(nbytes), self.device.event(), self.device.event())

    def _bring_to_stay(self, block: int) -> None:
        layout, homes = self.layouts[block], self.arena.homes[block]
        if all(home.device == self.device.device != torch.device("cpu") for home in homes):
            self.residents[block] = None
            return
        buffer = self.device.allocate(layout.nbytes)
        for member, home in zip(layout.members, homes, strict=True):
            self.device.copy(buffer[member.offset :][: member.nbytes], as_bytes(home))
        self.device.finish()
        self.residents[block] = buffer
        point(layout.tensors, layout.views(buffer))

    def _hook(self, ring: RingState, block: int) -> None:
        module = self.module.get_submodule(self.layouts[block].name)
        compiled = module._compiled_call_impl

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            self._before(ring, block, (*args, *kwargs.values()))

        def after(*_: object) -> None:
            self._after(ring, block)

        def around(*args: object, **kwargs: object) -> object:
            before(module, args, kwargs)
            result = compiled(*args, **kwargs)
            after()
            return result

        if compiled is None:
            self.undo.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True).remove)
            self.undo.append(module.register_forward_hook(after).remove)
        else:
            module._compiled_call_impl = around
            self.undo.append(lambda: setattr(module, "_compiled_call_impl", compiled))

    def _before(self, ring: RingState, block: int, inputs: Iterable[object]) -> None:
        layout = self.layouts[block]
        if torch.is_grad_enabled():
            tensors = [*layout.tensors, *(x for x in inputs if isinstance(x, Tensor))]
            if any(tensor.requires_grad for tensor in tensors):
                raise UserError(f"{layout.name} is streamed, which is for inference: run it under torch.no_grad()")
        if self._busy:  # the block before was left by an exception
            self._resync()
        self._busy = True
        if block <= self._last:
            self.meter.begin_pass()
        self._last = block
        slot = self._slot_of(ring, block)
        if slot.ticket is not None:
            slot.ticket.wait()
        with self.meter.waiting(layout.name):
            self.device.wait(COMPUTE, slot.loaded)
        if block not in slot.views:
            slot.views[block] = layout.views(slot.buffer)
        point(layout.tensors, slot.views[block])

    def _after(self, ring: RingState, block: int) -> None:
        self.arena.bring_home(block)
        ring.head = ring.place[block]
        if not ring.keeps_all:
            slot = ring.loaded.pop(block)
            self.device.record(slot.free, COMPUTE)
            ring.free.append(slot)
        self._fill(ring)
        if block == self.plan.streamed[-1]:
            self.meter.end_pass()
        self._busy = False

    def _slot_of(self, ring: RingState, block: int) -> Slot:
        """Where a block is or will be. Whatever was loaded for places out of reach from here is given up."""
        reach = ring.following(ring.place[block], len(ring.slots))
        stale = [other for other in ring.loaded if other not in reach]
        for other in stale:
            slot = ring.loaded.pop(other)
            if slot.ticket is not None:
                slot.ticket.queued.wait()  # or it would be sent later, over what comes next
            ring.free.append(slot)
        missing = block not in ring.loaded
        if missing:
            self._load(ring, block)
        self.meter.totals.unused += len(stale)
        self.meter.totals.misses += missing
        self.meter.totals.resyncs += missing or bool(stale)
        return ring.loaded[block]

    def _fill(self, ring: RingState) -> None:
        for block in ring.following(ring.head + 1, len(ring.slots)):
            if ring.free and block not in ring.loaded:
                self._load(ring, block)

    def _load(self, ring: RingState, block: int) -> None:
        slot = self._take_slot(ring, block)
        ring.loaded[block] = slot
        nbytes = self.layouts[block].nbytes

        def send(source: Tensor) -> None:
            self.device.wait(COPY, slot.free)
            with self.meter.copying(nbytes):
                self.device.copy(slot.buffer[:nbytes], source[:nbytes])
            self.device.record(slot.loaded, COPY)

        self.meter.count_load(nbytes)
        if block in self.arena.pinned:
            slot.ticket = None
            send(self.arena.pinned[block])
        else:
            slot.ticket = self.stager.load(block, send)

    def _take_slot(self, ring: RingState, block: int) -> Slot:
        """The slot that has been free for longest, whatever the block."""
        return ring.free.popleft()

    def _resync(self) -> None:
        """After a pass that broke off in the middle: wait for the device, forget what was loaded."""
        if self.stager is not None:
            self.stager.drain()
        self.device.finish()
        for ring in self.rings:
            self.meter.totals.unused += len(ring.loaded)
            for block in ring.order:
                self.arena.bring_home(block)
            ring.empty()
        self.meter.totals.resyncs += 1
        self._busy = False
