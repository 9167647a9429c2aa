"""What NVML says while something runs: energy, memory of this process and of the whole card; nothing without pynvml."""

import os
from typing import Any

import torch


class Card:
    """The CUDA device `index`, as NVML knows it. What it does not tell is None."""

    def __init__(self, library: Any, handle: object) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def open(cls, index: int = 0) -> "Card | None":
        if not torch.cuda.is_available():
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
        except (ImportError, AttributeError, OSError):
            return None
        except pynvml.NVMLError:
            return None

    def asked(self, name: str) -> Any:
        try:
            return getattr(self.library, name)(self.handle)
        except (self.library.NVMLError, AttributeError):
            return None

    def joules(self) -> float | None:
        """Since the driver was loaded; from Volta on."""
        found = self.asked("nvmlDeviceGetTotalEnergyConsumption")
        return None if found is None else found / 1e3

    def device_bytes(self) -> int | None:
        found = self.asked("nvmlDeviceGetMemoryInfo")
        return None if found is None else int(found.used)

    def process_bytes(self) -> int | None:
        """Containers may hide the process, Windows its memory."""
        for process in self.asked("nvmlDeviceGetComputeRunningProcesses") or ():
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return None
