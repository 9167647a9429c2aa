"""What several cases need and is made when the first of them runs; measurements that take a sample at every call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Generic, TypeVar

import torch

from flux_quant.benchmarks.bench.record import Row
from flux_quant.benchmarks.timing import CALLS, Call, runner, timed

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

    def begin(self) -> tuple[Callable[[], float], int, Row]:
        call, copies, row = self.make()
        if self.device.type == "cuda":
            calls = max(CALLS, copies)
        else:
            timed(call, copies, copies)  # loops are compiled
            calls = copies * ceil(LEAST / max(timed(call, copies, copies), 1e-9))
        run = runner(call, calls, copies, self.device)
        for _ in range(self.warm):
            run()
        return run, calls, row

    @torch.inference_mode()
    def __call__(self) -> Row:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            run, calls, row = self.state.get()
            return Row(
                samples={"seconds": [run() / calls]},
                values=dict(row.values),
                expected=dict(row.expected),
                note=row.note,
            )
        finally:
            torch.set_num_threads(before)
