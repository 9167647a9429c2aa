"""A stand-in for a device with two queues, whose memory is ordinary memory and which is late on purpose.

`ThreadDevice` does what is queued in another thread: with `lazy`, nothing before somebody waits, and then no more than
is needed, in the order that its policy prefers; otherwise at once, beside the host. Either way only a wait in a queue
holds work back, as on CUDA. `Late` makes the compute late too: every operator of torch gives its result's memory at
once, filled with NaN, and is done when its turn comes. `Toy` is a model of blocks in two sizes.
"""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flux_quant.streaming import StreamPlan, block_bytes, rings_for
from flux_quant.streaming.device import COMPUTE, COPY

WIDTH = 8  # of the toy model

POLICIES = {  # which queue goes first where both could
    "copies first": lambda _: COPY,
    "compute first": lambda _: COMPUTE,
    "in turns": lambda rng: rng.choice((COMPUTE, COPY)),
}


@dataclass
class Mark:
    """One record of an event; what it stands for has happened once it has a time."""

    time: float | None = None


@dataclass
class LateEvent:
    mark: Mark | None = None


@dataclass
class ThreadDevice:
    policy: str = "in turns"
    seed: int = 0
    lazy: bool = True
    registers: bool = True  # whether ordinary memory can be pinned
    most: int | None = None  # bytes that `allocate` gives out in all
    compute_is_host: bool = False  # for work that `Late` cannot put off: compiled, or not made of torch's operators
    device: torch.device = torch.device("cpu")
    allocations: list[int] = field(default_factory=list)
    registered: set[int] = field(default_factory=set)
    slabs: list[int] = field(default_factory=list)
    host_waits: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.queues = {COMPUTE: deque(), COPY: deque()}
        self.running: set[str] = set()
        self.wanted = 0  # threads that wait
        self.stuck = False
        self.error: Exception | None = None
        self.changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def allocate(self, nbytes: int) -> Tensor:
        if self.most is not None and sum(self.allocations) + nbytes > self.most:
            raise torch.OutOfMemoryError(f"{nbytes} bytes wanted")
        self.allocations.append(nbytes)
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)  # NaN in every float format

    def register(self, memory: Tensor) -> bool:
        assert memory.data_ptr() % 4096 == 0 and memory.numel() % 4096 == 0, "whole pages are registered"
        assert memory.data_ptr() not in self.registered
        if self.registers:
            self.registered.add(memory.data_ptr())
        return self.registers

    def unregister(self, memory: Tensor) -> None:
        self.registered.remove(memory.data_ptr())

    def pinned(self, nbytes: int) -> Tensor:
        assert nbytes & (nbytes - 1) == 0, "rounded up to a power of two"
        self.slabs.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    def event(self, timed: bool = False) -> LateEvent:
        return LateEvent()

    def record(self, event: LateEvent, queue: str) -> None:
        mark = Mark()
        self.launch(queue, lambda: setattr(mark, "time", time.perf_counter()))
        event.mark = mark

    def wait(self, queue: str, event: LateEvent) -> None:
        if queue == COMPUTE and self.compute_is_host:
            self._until(lambda: self.done(event))
        if event.mark is not None:
            self.launch(queue, event.mark)

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.launch(COPY, lambda: to.copy_(source))

    def host_wait(self, event: LateEvent) -> None:
        self.host_waits += 1
        self._until(lambda: self.done(event))

    def done(self, event: LateEvent) -> bool:
        return event.mark is None or event.mark.time is not None

    def seconds(self, begin: LateEvent, end: LateEvent) -> float:
        return end.mark.time - begin.mark.time

    def finish(self) -> None:
        self._until(lambda: not self.running and not any(self.queues.values()))

    def launch(self, queue: str, work: Callable[[], object] | Mark) -> None:
        """Queue a function, or a wait for a mark."""
        with self.changed:
            self.queues[queue].append(work)
            self.stuck = False
            self.changed.notify_all()

    def _until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            self.wanted += 1
            self.stuck = False
            self.changed.notify_all()
            self.changed.wait_for(lambda: condition() or self.stuck or self.error)
            self.wanted -= 1
            if self.error:
                raise self.error
            assert condition(), "every queue waits for another one"

    def _ready(self, queue: str) -> bool:
        work = self.queues[queue]
        while work and isinstance(work[0], Mark) and work[0].time is not None:
            work.popleft()
        return bool(work) and not isinstance(work[0], Mark)

    def _next(self) -> Callable[[], object] | None:
        ready = [queue for queue in (COMPUTE, COPY) if self._ready(queue)]
        if not ready or (self.lazy and not self.wanted):
            return None
        first = POLICIES[self.policy](self.rng)
        queue = first if first in ready else ready[0]
        self.running.add(queue)
        return self.queues[queue].popleft()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.running.clear()
                while (work := self._next()) is None:
                    self.stuck = self.wanted > 0 and (self.lazy or any(self.queues.values()))
                    self.changed.notify_all()
                    self.changed.wait()
            if not self.lazy and self.rng.random() < 0.2:
                time.sleep(self.rng.random() / 5000)
            try:
                with torch.inference_mode(COMPUTE in self.running), torch.no_grad():
                    work()
            except Exception as error:
                self.error = error
            with self.changed:
                self.changed.notify_all()


class Late(TorchDispatchMode):
    """Operators queue their work on a `ThreadDevice`. Their results' shapes come from running them once beforehand,
    on whatever is in memory by then, and those values are thrown away."""

    def __init__(self, device: ThreadDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        returns = func._schema.returns
        alias = bool(returns) and returns[0].alias_info is not None
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not tensors or func.overloadpacket is torch.ops.aten.set_:
            return func(*args, **kwargs)
        if alias and not returns[0].alias_info.is_write:  # a view, or a copy where that is impossible
            result, memory = func(*args, **kwargs), {x.untyped_storage()._cdata for x in tensors}
            if all(x.untyped_storage()._cdata in memory for x in tree_leaves(result)):
                return result
            alias = False
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.device.finish()
            return func(*args, **kwargs)
        held_args, held_kwargs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (args, kwargs))
        if alias:  # in place
            self.device.launch(COMPUTE, lambda: func(*held_args, **held_kwargs))
            return args[0]
        results = tree_map(lambda x: blank(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))

        def work() -> None:
            values = tree_leaves(func(*held_args, **held_kwargs))
            for late, value in zip(tree_leaves(results), values, strict=True):
                if isinstance(late, Tensor):
                    late.copy_(value)

        self.device.launch(COMPUTE, work)
        return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, results)


def blank(like: Tensor) -> Tensor:
    empty = torch.empty_like(like)
    return empty.fill_(float("nan")) if like.is_floating_point() else empty.zero_()


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.register_buffer("scale", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.down(torch.tanh(self.up(x)))


class Toy(nn.Module):
    """Blocks of two sizes, in two lists."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        torch.manual_seed(wide + 100 * narrow)
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.wide = nn.ModuleList(Block(40) for _ in range(wide))
        self.narrow = nn.ModuleList(Block(16) for _ in range(narrow))
        self.fails_at = -1

    @property
    def names(self) -> list[str]:
        return [f"{kind}.{i}" for kind in ("wide", "narrow") for i in range(len(getattr(self, kind)))]

    def forward(self, x: Tensor, order: Iterable[int] | None = None) -> Tensor:
        x = self.enter(x)
        blocks = [*self.wide, *self.narrow]
        for i in range(len(blocks)) if order is None else order:
            if i == self.fails_at:
                raise KeyboardInterrupt
            x = blocks[i](x)
        return x


def plan_for(module: nn.Module, names: list[str], resident: Iterable[int] = (), slots: int = 2, **how) -> StreamPlan:
    sizes, resident = block_bytes(module, names)[0], frozenset(resident)
    rings = rings_for([size for i, size in enumerate(sizes) if i not in resident], slots, **how)
    return StreamPlan(names, sizes, resident, rings)


def inputs(count: int) -> list[Tensor]:
    """Batches that change their size from pass to pass."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(1 + i % 3, WIDTH, generator=generator) for i in range(count)]


def run(module: nn.Module, x: Tensor, device: ThreadDevice) -> Tensor:
    with Late(device):
        out = module(x)
    device.finish()
    return out
