"""What several cases need and is made when the first of them runs; measurements that take a sample at every call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from math import ceil
from time import perf_counter
from typing import Generic, TypeVar

import torch

from flux_quant.benchmarks.bench.record import Row
from flux_quant.benchmarks.timing import CALLS, Call, runner

T = TypeVar("T")
LEAST = 0.02  # seconds of a sample on a processor: shorter calls are repeated


@dataclass
class Prepared(Generic[T]):
    """`make` is called once, until `drop`."""

    make: Callable[[], T]
    made: list[T] = field(default_factory=list)

    def get(self) -> T:
        if not self.made:
            self.made.append(self.make())
        return self.made[0]

    def drop(self) -> None:
        self.made.clear()


@dataclass
class Sampled:
    """The `work` of a case whose call is short: seconds of one call, `warm` samples at the beginning discarded.

    make: gives the call, how many copies it rotates over, and the row without samples
    """

    make: Callable[[], tuple[Call, int, Row]]
    device: torch.device
    threads: int = 0  # of torch on a processor, if not those it has
    warm: int = 1
    state: Prepared = field(init=False)

    def __post_init__(self) -> None:
        self.state = Prepared(self.begin)

    def begin(self) -> tuple[Callable[[], float], Row]:
        """What gives seconds of a call each time, and the row without samples."""
        call, copies, row = self.make()
        if self.device.type != "cuda":
            return on_processor(call, copies, self.warm), row
        calls = max(CALLS, copies)
        run = runner(call, calls, copies, self.device)
        for _ in range(self.warm):
            run()
        return lambda: run() / calls, row

    @torch.inference_mode()
    def __call__(self) -> Row:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            run, row = self.state.get()
            return Row(
                samples={"seconds": [run()]},
                values=dict(row.values),
                expected=dict(row.expected),
                note=row.note,
            )
        finally:
            torch.set_num_threads(before)


def on_processor(call: Call, copies: int, warm: int) -> Callable[[], float]:
    """Calls over the copies in turn, as many at a time as last LEAST together; loops are compiled by then."""
    turns = cycle(range(copies))

    def several(count: int) -> float:
        start = perf_counter()
        for _ in range(count):
            call(next(turns))
        return (perf_counter() - start) / count

    several(1)
    seconds = min(several(1) for _ in range(max(1, warm)))
    count = ceil(LEAST / max(seconds, 1e-9))
    return lambda: several(count)
