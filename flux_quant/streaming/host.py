"""Where the bytes of blocks lie in RAM, and how they get into memory that the device can copy from by itself.

Three tiers, chosen per block by a budget:

- pinned: one flat piece of memory per block, of exactly its size, registered with the driver, from which one
  asynchronous copy takes the whole block. The module's tensors become views of it, so it takes the place of what they
  were in. Memory from torch's own pinned allocator would be rounded up to a power of two, and never be given back; it
  serves, in slabs of that size with many blocks in each, where the driver refuses to register.
- pageable: stays where it is. A thread gathers the block into one of two pinned buffers and sends it off from there.
- mapped: the same for views of a mapped file, which nothing copies: pages are read, by several threads, when the block
  is gathered, and the system may drop them afterwards.
"""

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import torch
from torch import Tensor

from flux_quant.streaming.device import COPY, PAGE, StreamDevice
from flux_quant.streaming.layout import ALIGN, BlockLayout, alias, as_bytes
from flux_quant.streaming.memory import file_mappings
from flux_quant.streaming.plan import spread_evenly

SLAB = 1 << 30
PIECE = 8 << 20  # bytes that one reader moves at a time
READERS = 4
CPU = torch.device("cpu")


def page_aligned(nbytes: int) -> Tensor:
    """(nbytes,) uint8 of ordinary memory that starts at a page; the rest of its last page is ours too."""
    whole = torch.empty(-(-nbytes // PAGE) * PAGE + PAGE, dtype=torch.uint8)
    return whole[-whole.data_ptr() % PAGE :][:nbytes]


def whole_pages(memory: Tensor) -> Tensor:
    """The pages under `page_aligned` memory, as a tensor."""
    return memory.as_strided((-(-memory.numel() // PAGE) * PAGE,), (1,))


def point(tensors: Iterable[Tensor], memory: Iterable[Tensor]) -> None:
    """Let tensors be views of other memory, on any device. They stay the objects they are; nothing is copied."""
    for tensor, there in zip(tensors, memory, strict=True):
        tensor.data = there


def pin_choice(sizes: Sequence[int], budget: int) -> tuple[int, ...]:
    """Numbers of as many blocks as fit the budget, spread evenly over the depth."""
    for count in range(len(sizes), 0, -1):
        chosen = spread_evenly(count, len(sizes))
        if sum(sizes[i] for i in chosen) <= budget:
            return chosen
    return ()


def power_of_two(nbytes: int) -> int:
    """The smallest that is not less than nbytes."""
    return 1 << max(nbytes - 1, 0).bit_length()


class Slabs:
    """Pinned memory from an allocator that rounds up to powers of two: asked for powers of two, shared out by us."""

    def __init__(self, device: StreamDevice, slab_bytes: int = SLAB) -> None:
        self.device, self.slab_bytes = device, slab_bytes
        self.slabs: list[tuple[Tensor, int]] = []  # memory, bytes given out

    def allocate(self, nbytes: int, coming: int) -> Tensor | None:
        """(nbytes,) of pinned memory; `coming` bytes, these included, are still to be asked for."""
        need = -(-nbytes // ALIGN) * ALIGN
        for i, (slab, used) in enumerate(self.slabs):
            if slab.numel() - used >= need:
                self.slabs[i] = slab, used + need
                return slab[used : used + nbytes]
        slab = self.device.pinned(max(power_of_two(need), min(self.slab_bytes, power_of_two(coming))))
        if slab is None:
            return None
        self.slabs.append((slab, need))
        return slab[:nbytes]


class HostArena:
    """The host's copy of every block. `homes[block]`: what the block's tensors are while they are not on the device."""

    def __init__(
        self, device: StreamDevice, layouts: Sequence[BlockLayout], budget: int, slab_bytes: int = SLAB
    ) -> None:
        self.device, self.layouts, self.budget = device, layouts, budget
        self.homes = [[alias(tensor) for tensor in layout.tensors] for layout in layouts]
        self.came_from = [[tensor.device for tensor in layout.tensors] for layout in layouts]
        self.pinned: dict[int, Tensor] = {}
        self.registered: dict[int, Tensor] = {}
        self.slabs = Slabs(device, slab_bytes)
        self.readers = ThreadPoolExecutor(READERS, "flux_quant reader")

    @property
    def pinned_bytes(self) -> int:
        return sum(flat.numel() for flat in self.pinned.values())

    def settle(self, blocks: Sequence[int]) -> None:
        """Blocks that are to be streamed, none of them on the device: pin what the budget allows. Unpins nothing."""
        new = [i for i in blocks if i not in self.pinned]
        sizes, left = [self.layouts[i].nbytes for i in new], self.budget - self.pinned_bytes
        if sum(sizes) > left:
            left -= 2 * max(sizes)  # the two buffers of the staging thread
        chosen = pin_choice(sizes, left)
        coming = sum(self.layouts[new[i]].nbytes for i in chosen)
        for i in (new[i] for i in chosen):
            flat = self._pin(i, coming)
            coming -= self.layouts[i].nbytes
            if flat is None:
                break
            self.pinned[i] = flat
            self._move(i, flat)
        for i in new:
            if i not in self.pinned and any(home.device != CPU for home in self.homes[i]):
                self._move(i, page_aligned(self.layouts[i].nbytes))

    def pinned_memory(self, nbytes: int, coming: int | None = None) -> tuple[Tensor | None, bool]:
        """((nbytes,) of pinned memory or None, whether it was registered and is to be unregistered)."""
        flat = page_aligned(nbytes)
        if nbytes and self.device.register(whole_pages(flat)):
            return flat, True
        return self.slabs.allocate(nbytes, nbytes if coming is None else coming), False

    def _pin(self, block: int, coming: int) -> Tensor | None:
        flat, registered = self.pinned_memory(self.layouts[block].nbytes, coming)
        if registered:
            self.registered[block] = flat
        return flat

    def _move(self, block: int, flat: Tensor) -> None:
        """`flat` becomes the home of a block, whose former memory is given up."""
        self.gather(block, flat)
        self.homes[block] = self.layouts[block].views(flat)
        self.bring_home(block)

    def bring_home(self, block: int) -> None:
        point(self.layouts[block].tensors, self.homes[block])

    def gather(self, block: int, flat: Tensor) -> None:
        """Copy a block into flat host memory (>= its bytes), several readers at once."""
        jobs = []
        for member, home in zip(self.layouts[block].members, self.homes[block], strict=True):
            if home.device != CPU:
                flat[member.offset :][: member.nbytes].copy_(as_bytes(home))
                continue
            to, source = flat.data_ptr() + member.offset, home.data_ptr()
            for at in range(0, member.nbytes, PIECE):
                jobs.append((to + at, source + at, min(PIECE, member.nbytes - at)))
        if len(jobs) > 1:
            list(self.readers.map(lambda job: ctypes.memmove(*job), jobs))  # runs without the interpreter's lock
        elif jobs:
            ctypes.memmove(*jobs[0])

    def tiers(self, blocks: Iterable[int]) -> tuple[int, int]:
        """How many bytes of these blocks, where not pinned, are pageable and how many lie in mapped files."""
        ranges = file_mappings()
        starts = [start for start, _ in ranges]
        found = [0, 0]
        for i in set(blocks) - set(self.pinned):
            for member, home in zip(self.layouts[i].members, self.homes[i], strict=True):
                at = bisect_right(starts, home.data_ptr()) - 1
                found[at >= 0 and home.data_ptr() < ranges[at][1]] += member.nbytes
        return found[0], found[1]

    def close(self) -> None:
        """Give back what is pinned; homes are ordinary memory afterwards, on the devices that blocks came from."""
        self.readers.shutdown()
        for block, flat in self.pinned.items():
            if block in self.registered:
                self.device.unregister(whole_pages(flat))
            else:
                self.homes[block] = self.layouts[block].views(flat.clone())
        for block, layout in enumerate(self.layouts):
            for device in set(self.came_from[block]) - {CPU}:
                if any(home.device != device for home in self.homes[block]):
                    self._send_back(block, layout, device)
        for block in range(len(self.layouts)):
            self.bring_home(block)
        self.pinned, self.registered, self.slabs, self.homes = {}, {}, Slabs(self.device), []

    def _send_back(self, block: int, layout: BlockLayout, device: torch.device) -> None:
        flat = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
        for member, home in zip(layout.members, self.homes[block], strict=True):
            flat[member.offset :][: member.nbytes].copy_(as_bytes(home))
        rows = zip(layout.views(flat), self.homes[block], self.came_from[block], strict=True)
        self.homes[block] = [there if origin == device else home for there, home, origin in rows]


class Ticket:
    """A load that the staging thread is to queue: `wait` returns when it is queued, not when it is over."""

    def __init__(self) -> None:
        self.queued = threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        self.queued.wait()
        if self.error is not None:
            raise self.error


class Stager:
    """A thread that gathers blocks into two pinned buffers in turn and sends them off from there.

    Nothing but the disk, the RAM and the copies before hold it up: it works ahead of the device.
    """

    def __init__(self, arena: HostArena, nbytes: int) -> None:
        """nbytes: of the largest block that will pass."""
        self.arena, self.device = arena, arena.device
        made = [arena.pinned_memory(nbytes) for _ in range(2)]
        self.registered = [flat for flat, registered in made if registered]
        self.buffers = [page_aligned(nbytes) if flat is None else flat for flat, _ in made]
        self.sent = [self.device.event() for _ in self.buffers]
        self.tasks: SimpleQueue[tuple[int, Callable[[Tensor], None], Ticket] | None] = SimpleQueue()
        self.open = 0  # tasks not queued yet
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="flux_quant stager", daemon=True)
        self.thread.start()

    def load(self, block: int, send: Callable[[Tensor], None]) -> Ticket:
        """Gather a block and call send(its bytes, pinned), which queues their copy."""
        ticket = Ticket()
        with self.changed:
            self.open += 1
        self.tasks.put((block, send, ticket))
        return ticket

    def _work(self) -> None:
        turn = 0
        while (task := self.tasks.get()) is not None:
            block, send, ticket = task
            buffer, sent = self.buffers[turn], self.sent[turn]
            turn = 1 - turn
            try:
                self.device.host_wait(sent)
                self.arena.gather(block, buffer)
                send(buffer)
                self.device.record(sent, COPY)
            except BaseException as error:  # it belongs to the thread that waits for the block
                ticket.error = error
            ticket.queued.set()
            with self.changed:
                self.open -= 1
                self.changed.notify_all()

    def drain(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.open == 0)

    def close(self) -> None:
        """After the device has finished with the buffers."""
        self.tasks.put(None)
        self.thread.join()
        for flat in self.registered:
            self.device.unregister(whole_pages(flat))
