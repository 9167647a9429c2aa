"""What streaming costs, measured on the device while it runs, and read without waiting for it."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from flux_quant.streaming.device import COMPUTE, COPY, Event, StreamDevice

PASSES_AHEAD = 2  # passes that may be queued and unfinished, the newest one included


@dataclass
class StreamMetrics:
    """Seconds and bytes of the latest pass that the device has finished; counts since the streamer was made."""

    passes: int = 0  # finished
    pass_loads: int = 0
    pass_bytes: int = 0  # queued for copying during the pass
    copy_seconds: float = 0.0  # that the copies took by themselves, waits for slots aside
    copied_bytes: int = 0  # by the copies that `copy_seconds` is of
    stall_seconds: dict[str, float] = field(default_factory=dict)  # block -> time that the compute waited for it
    loads: int = 0
    misses: int = 0  # blocks that ran without having been sent for
    resyncs: int = 0  # times that blocks came in another order than the plan's, or a pass broke off
    unused: int = 0  # loads in vain
    total_bytes: int = 0
    resident_bytes: int = 0
    slot_bytes: int = 0
    pinned_bytes: int = 0  # host memory, buffers of the staging thread included
    pageable_bytes: int = 0  # of streamed blocks that are not pinned
    mapped_bytes: int = 0

    @property
    def bytes_per_second(self) -> float:
        return self.copied_bytes / self.copy_seconds if self.copy_seconds else 0.0

    @property
    def stall(self) -> float:
        """Seconds in the latest pass during which the device waited for copies."""
        return sum(self.stall_seconds.values())


@dataclass
class Pass:
    """Pairs of timed events, read when the device is past them."""

    end: Event
    begun: bool = False
    loads: int = 0
    nbytes: int = 0
    waits: list[tuple[str, Event, Event]] = field(default_factory=list)
    copies: list[tuple[int, Event, Event]] = field(default_factory=list)


class Meter:
    def __init__(self, device: StreamDevice) -> None:
        self.device = device
        self.totals = StreamMetrics()
        self.passes = deque([Pass(device.event())])  # not read yet; the last one goes on
        self.spare: list[Event] = []

    def begin_pass(self) -> None:
        """The host waits for the pass before the last one."""
        if self.passes[-1].begun:  # it broke off, or ended early
            self.end_pass()
        self.passes[-1].begun = True
        while len(self.passes) > PASSES_AHEAD:
            oldest = self.passes.popleft()
            self.device.host_wait(oldest.end)
            self._read(oldest)

    def end_pass(self) -> None:
        self.device.record(self.passes[-1].end, COMPUTE)
        self.passes.append(Pass(self.device.event()))

    def count_load(self, nbytes: int) -> None:
        self.passes[-1].loads += 1
        self.passes[-1].nbytes += nbytes
        self.totals.loads += 1
        self.totals.total_bytes += nbytes

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Around what makes the compute wait for a block."""
        begin, end = self._timer(), self._timer()
        self.device.record(begin, COMPUTE)
        yield
        self.device.record(end, COMPUTE)
        self.passes[-1].waits.append((name, begin, end))

    @contextmanager
    def copying(self, nbytes: int) -> Iterator[None]:
        """Around what queues a copy."""
        begin, end = self._timer(), self._timer()
        self.device.record(begin, COPY)
        yield
        self.device.record(end, COPY)
        self.passes[-1].copies.append((nbytes, begin, end))

    def result(self) -> StreamMetrics:
        """Waits for nothing."""
        while len(self.passes) > 1 and self.device.done(self.passes[0].end):
            self._read(self.passes.popleft())
        return replace(self.totals)

    def _timer(self) -> Event:
        return self.spare.pop() if self.spare else self.device.event(timed=True)

    def _read(self, finished: Pass) -> None:
        """Copies that the device has not finished by the end of their pass count for the next one."""
        totals, copied = self.totals, []
        totals.passes += 1
        totals.pass_loads, totals.pass_bytes, totals.stall_seconds = finished.loads, finished.nbytes, {}
        for name, begin, end in finished.waits:
            stall = self.device.seconds(begin, end)
            totals.stall_seconds[name] = totals.stall_seconds.get(name, 0.0) + stall
            self.spare += begin, end
        for row in finished.copies:
            (copied if self.device.done(row[2]) else self.passes[0].copies).append(row)
        totals.copied_bytes = sum(nbytes for nbytes, *_ in copied)
        totals.copy_seconds = sum(self.device.seconds(begin, end) for _, begin, end in copied)
        self.spare += (event for _, *pair in copied for event in pair)
