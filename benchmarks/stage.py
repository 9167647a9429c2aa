"""Where streaming is measured: the device behind its link, what it can do, less memory than it has, and what was held.

A budget is the most that the whole process may hold on the device. torch is held to it less CUDA's own part
(`runtime.Memory.capped`); what CUDA itself took is read from the device and counted on top of torch's peak.
Without a GPU everything runs on a stand-in, for walking through: nothing is capped there and no peak is known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flux_quant.benchmarks.links import Link, open_link, rate_of
from flux_quant.benchmarks.machine import output_of
from flux_quant.planner.doctor import diagnose, machine_of
from flux_quant.planner.gpus import GPUS, Machine
from flux_quant.planner.memory import Budget
from flux_quant.planner.steptime import Host
from flux_quant.runtime import CudaReadings, Memory, Readings

SMALL_LINK = 1 << 20  # bytes copied to measure the link of the stand-in
STAND_IN = "rtx-3060-12gb"  # whose rates plans of the stand-in assume


class NoReadings:
    """Of a device whose memory nobody counts."""

    def free(self) -> int:
        return 10**12

    def now(self) -> int:
        return 0

    def held(self) -> int:
        return 0

    def forget(self) -> None:
        pass


@dataclass
class Stage:
    link: Link
    machine: Machine
    readings: Readings
    others: int  # bytes of the device that were taken before this process came
    rates: dict[float, list[float]] = field(default_factory=dict)  # emulated bytes/s -> measured

    @property
    def place(self) -> torch.device:
        return self.link.device

    @property
    def is_cuda(self) -> bool:
        return self.place.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    def memory(self, vram: str | None, rate: float | None = None) -> Memory:
        """Under a budget ("8GB", None for all that is free), for plans that go by a link of that rate."""
        budget = Budget.of(vram, self.machine.usable, "free memory of this GPU")
        machine = replace(self.machine, pinned=rate or self.link.native)
        return Memory(self.link, machine, budget, Host(), self.readings, ram_budget=int(1e15), log=print)

    @contextmanager
    def capped(self, memory: Memory) -> Iterator[None]:
        """torch holds no more than the budget inside. Peaks are counted from here on."""
        self.readings.forget()
        real = replace(memory, device=self.place if self.is_cuda else self.link)
        with real.capped():
            yield

    def held(self) -> dict[str, int]:
        """Bytes on the device since the last `capped`: torch's peak, what is held beside it, and both together."""
        if not self.is_cuda:
            return {}
        free, total = torch.cuda.mem_get_info(self.place)
        beside = total - free - torch.cuda.memory_reserved(self.place) - self.others
        peak = torch.cuda.max_memory_reserved(self.place)
        allocated = torch.cuda.max_memory_allocated(self.place)
        return {"peak_torch": peak, "peak_allocated": allocated, "beside_torch": beside, "peak": peak + beside}

    def rate(self, emulated: float | None) -> float:
        """Measured bytes/s of copies alone, over the link as it is or as one that is emulated."""
        if emulated is None:
            return self.link.native
        if emulated not in self.rates:
            with self.emulating(emulated):
                self.rates[emulated] = rate_of(self.link, SMALL_LINK if not self.is_cuda else 256 << 20)
        return sorted(self.rates[emulated])[len(self.rates[emulated]) // 2]

    @contextmanager
    def emulating(self, rate: float | None) -> Iterator[None]:
        self.link.emulate(rate)
        try:
            yield
        finally:
            self.link.emulate(None)


def open_stage() -> Stage:
    """On CUDA `doctor` measures what it has not measured yet, ten seconds."""
    if not torch.cuda.is_available():
        return Stage(open_link(SMALL_LINK), GPUS[STAND_IN].machine(), NoReadings(), 0)
    others = memory_in_use()
    machine = machine_of(diagnose())
    link = open_link()
    return Stage(link, machine, CudaReadings(link.device), others)


def memory_in_use() -> int:
    """Bytes of the first device that somebody holds, by nvidia-smi; to be asked before CUDA is used."""
    said = output_of("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    return int(said) * (1 << 20) if said and said.isdecimal() else 0


def ram() -> int | None:
    """Bytes of RAM that belong to this process alone, pinned ones included; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return None
