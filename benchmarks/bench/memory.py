"""Memory at its peak while something runs, five figures of it, and the energy that took.

torch's own peaks, allocated and reserved; the process and the whole card by NVML, in looks every EVERY seconds from a
thread; RAM by the kernel's account of the largest resident size, which begins anew where the system permits that, else
in the same looks. RAM that is pinned is part of the resident size; who pins it knows how much (`host_pinned`).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flux_quant.benchmarks.bench.nvml import Card
from flux_quant.drawing.resources import peak_ram

EVERY = 0.02


@dataclass
class Peaks:
    memory: dict[str, int] = field(default_factory=dict)  # bytes, as `Row.memory`
    joules: float | None = None

    def most(self, name: str, nbytes: int | None) -> None:
        if nbytes is not None:
            self.memory[name] = max(nbytes, self.memory.get(name, 0))


@contextmanager
def watched(device: torch.device | str = "cpu") -> Iterator[Peaks]:
    """Peaks of what runs inside; complete when it has ended."""
    peaks, place = Peaks(), torch.device(device)
    on_cuda = place.type == "cuda"
    card = Card.open(place.index or 0) if on_cuda else None
    if on_cuda:
        torch.cuda.synchronize(place)
        torch.cuda.reset_peak_memory_stats(place)
    anew, before = forget_peak(), card and card.joules()
    with looks(peaks, card, resident=not anew):
        yield peaks
        if on_cuda:
            torch.cuda.synchronize(place)
    after = card and card.joules()
    if before is not None and after is not None:
        peaks.joules = after - before
    if on_cuda:
        peaks.most("allocated", torch.cuda.max_memory_allocated(place))
        peaks.most("reserved", torch.cuda.max_memory_reserved(place))
    if anew:
        peaks.most("host_rss", status("VmHWM"))
    elif "host_rss" not in peaks.memory:
        peaks.most("host_rss", peak_ram())  # of the process since it began


@contextmanager
def looks(peaks: Peaks, card: Card | None, resident: bool) -> Iterator[None]:
    if card is None and not (resident and status("VmRSS")):
        yield
        return
    done = threading.Event()

    def look() -> None:
        while True:
            if card:
                peaks.most("device", card.device_bytes())
                peaks.most("process", card.process_bytes())
            if resident:
                peaks.most("host_rss", status("VmRSS"))
            if done.wait(EVERY):
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def status(name: str, text: str | None = None) -> int | None:
    """Bytes of a field of /proc/self/status, or of its text; None where there is none."""
    try:
        lines = (Path("/proc/self/status").read_text() if text is None else text).splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def forget_peak() -> bool:
    """VmHWM begins anew; False where the system does not let it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return status("VmHWM") is not None
