"""The link to the device, and slower ones in its place: what a streamer copies through.

A slower link is emulated by the copy engine itself: after the bytes of a block it moves the same bytes again, until it
has been busy for as long as a link of the wanted rate would be. The slot holds the same values throughout, the block
counts as loaded when the last of these copies is over, and nothing of the compute is touched: no kernel waits or spins,
nothing takes a multiprocessor. What differs from a slow link: host and device memory are read and written at the full
rate meanwhile, and a copy may be delayed by no more than the last piece of the one before, as on any link.

`rate_of` times copies by themselves: it says what the link gives, and whether an emulated one gives what it should.
"""

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from flux_quant.errors import UserError
from flux_quant.streaming.device import COPY, CudaDevice, StreamDevice
from flux_quant.streaming.host import page_aligned, whole_pages

NBYTES, TIMES = 256 << 20, 7


class Slower:
    """Mixed into a device: copies take as long as at `rate` bytes/s, where the device itself gives `native`."""

    native: float = 0.0
    rate: float | None = None

    def emulate(self, rate: float | None) -> None:
        """UserError for a rate that is not below the link's own; None for the link as it is."""
        if rate is not None and rate >= self.native:
            raise UserError(f"{rate / 1e9:.1f} GB/s cannot be emulated over a link of {self.native / 1e9:.1f} GB/s")
        self.rate = rate

    def copy(self, to: Tensor, source: Tensor) -> None:
        super().copy(to, source)
        again = 0 if self.rate is None else int(len(source) * (self.native / self.rate - 1))
        while again > 0:
            piece = min(again, len(source))
            super().copy(to[:piece], source[:piece])
            again -= piece


class CudaLink(Slower, CudaDevice):
    """CUDA's own link."""


@dataclass
class Moment:
    seconds: float = 0.0


class Synchronous:
    """A device whose memory is RAM and which does everything at once: for walking through without a GPU."""

    device = torch.device("cpu")

    def allocate(self, nbytes: int) -> Tensor:
        return page_aligned(nbytes)

    def register(self, memory: Tensor) -> bool:
        return True

    def unregister(self, memory: Tensor) -> None:
        pass

    def pinned(self, nbytes: int) -> Tensor:
        return page_aligned(nbytes)

    def event(self, timed: bool = False) -> Moment:
        return Moment()

    def record(self, event: Moment, queue: str) -> None:
        event.seconds = time.perf_counter()

    def wait(self, queue: str, event: Moment) -> None:
        pass

    def copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def host_wait(self, event: Moment) -> None:
        pass

    def done(self, event: Moment) -> bool:
        return True

    def seconds(self, begin: Moment, end: Moment) -> float:
        return end.seconds - begin.seconds

    def finish(self) -> None:
        pass


class HostLink(Slower, Synchronous):
    """The stand-in."""


Link = CudaLink | HostLink


def open_link(nbytes: int = NBYTES) -> Link:
    """To the CUDA device, or the stand-in where there is none; `native` is measured."""
    link = CudaLink() if torch.cuda.is_available() else HostLink()
    link.native = median(rate_of(link, nbytes))
    return link


def rate_of(device: StreamDevice, nbytes: int = NBYTES, times: int = TIMES) -> list[float]:
    """bytes/s of copies from pinned memory, one after the other, nothing else going on; a first one does not count."""
    source, to = page_aligned(nbytes), device.allocate(nbytes)
    source.random_(generator=torch.Generator().manual_seed(0))
    to.zero_()
    device.finish()
    if not device.register(whole_pages(source)):
        raise UserError("the system does not let RAM be pinned: a link from pinned memory cannot be measured")
    try:
        pairs = [(device.event(timed=True), device.event(timed=True)) for _ in range(times + 1)]
        for begin, end in pairs:
            device.record(begin, COPY)
            device.copy(to, source)
            device.record(end, COPY)
        device.finish()
        assert torch.equal(to.cpu(), source), "what arrived is not what was sent"
    finally:
        device.unregister(whole_pages(source))
    return [nbytes / max(device.seconds(begin, end), 1e-9) for begin, end in pairs[1:]]
