"""The few operations of a device that streaming is made of, and CUDA's version of them.

Two queues run in parallel on a device: `COMPUTE`, to which the caller's own work goes, and `COPY`. What is queued is
done later and in order; an event marks a place in a queue, which the other queue or the host can wait for. As on CUDA,
a wait means the latest record of the event before the wait was queued, and waiting for an event never recorded is no
wait. Tests have a second version (`stream_backends.py`) that is late on purpose.
"""

import sys
from typing import Protocol

import torch
from torch import Tensor

COMPUTE, COPY = "compute", "copy"
Event = object
PAGE = 4096


class StreamDevice(Protocol):
    device: torch.device

    def allocate(self, nbytes: int) -> Tensor:
        """(nbytes,) uint8 on the device, aligned to at least 256 bytes."""

    def register(self, memory: Tensor) -> bool:
        """Pin ordinary memory, whole pages of it, where it is; False if the system refuses."""

    def unregister(self, memory: Tensor) -> None: ...

    def pinned(self, nbytes: int) -> Tensor | None:
        """(nbytes,) uint8 of pinned memory, nbytes a power of two; None if the system refuses."""

    def event(self, timed: bool = False) -> Event: ...

    def record(self, event: Event, queue: str) -> None: ...

    def wait(self, queue: str, event: Event) -> None:
        """What is queued from here on is done after `event`. The host does not wait."""

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Queue a copy from host memory, which stays as it is until the copy is over; asynchronous if it is pinned."""

    def host_wait(self, event: Event) -> None: ...

    def done(self, event: Event) -> bool: ...

    def seconds(self, begin: Event, end: Event) -> float:
        """Between two timed events that are done."""

    def finish(self) -> None:
        """The host waits for everything queued."""


class CudaDevice:
    """COMPUTE is whatever stream is current when something is queued, COPY a stream of its own."""

    def __init__(self, device: torch.device | str = "cuda") -> None:
        device = torch.device(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self.copies = torch.cuda.Stream(self.device)

    def allocate(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def register(self, memory: Tensor) -> bool:
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
                return True
            self._forget_error()
        return False

    def unregister(self, memory: Tensor) -> None:
        with torch.cuda.device(self.device):
            if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())) != 0:
                self._forget_error()

    def pinned(self, nbytes: int) -> Tensor | None:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            self._forget_error()
            return None

    def _forget_error(self) -> None:
        """A refused call leaves its error behind, and the next kernel launch would report it as its own."""
        try:
            torch.zeros(1, device=self.device).add_(1)
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            torch.zeros(1, device=self.device)

    def event(self, timed: bool = False) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=timed)

    def record(self, event: torch.cuda.Event, queue: str) -> None:
        event.record(self._stream(queue))

    def wait(self, queue: str, event: torch.cuda.Event) -> None:
        self._stream(queue).wait_event(event)

    def copy(self, to: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.copies):
            to.copy_(source, non_blocking=True)
        if sys.platform == "win32":
            self.copies.query()  # the driver holds work back until somebody asks

    def host_wait(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def done(self, event: torch.cuda.Event) -> bool:
        return event.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000

    def finish(self) -> None:
        torch.cuda.synchronize(self.device)

    def _stream(self, queue: str) -> torch.cuda.Stream:
        return self.copies if queue == COPY else torch.cuda.current_stream(self.device)
