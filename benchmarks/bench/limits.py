"""What the machine can do, measured in the run whose rows are compared with it; and the card's state under load."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flux_quant.benchmarks.bench.nvidia import query
from flux_quant.planner.rates import DTYPES, Effort, attention_rate, copy_rates, cpu_rate, disk_rate, gpu_rates
from flux_quant.planner.rates import seconds_of as median_seconds

HOW_DISK = "a file that was just written, dropped from the cache by posix_fadvise, read by 4 threads in pieces of 8 MiB"
QUICK = Effort(seconds=0.02, cpu_side=256, copy_bytes=8 << 20, disk_bytes=16 << 20)
USED, OTHERS = "vram_used_mib", "vram_used_by_others_bytes"
SETTLING = 0.5  # seconds until clocks and link have risen
COPIED = 8  # copies between two looks at whether it is over


def measure(device: torch.device, folder: Path, quick: bool = False) -> dict[str, object]:
    """GB/s and TFLOP/s; what was not measured is None, with its reason in `not_measured`."""
    effort = QUICK if quick else Effort()
    disk, why = disk_rate(folder, effort)
    found: dict[str, object] = {
        "ram_copy_gb_per_s": ram_copy(effort) / 1e9,
        "cpu_tflop_per_s": {name: cpu_rate(DTYPES[name], effort) / 1e12 for name in ("fp32", "bf16")},
        "disk_read_gb_per_s": None if disk is None else disk / 1e9,
        "disk_read_bytes": effort.disk_bytes,
        "disk_how": HOW_DISK,
        "threads": torch.get_num_threads(),
        "not_measured": list(why),
    }
    if device.type == "cuda":
        found |= on_cuda(device, effort)
    return found


def on_cuda(device: torch.device, effort: Effort) -> dict[str, object]:
    capability = torch.cuda.get_device_capability(device)
    copies = copy_rates(device, effort)
    return {
        "pinned_gb_per_s": copies["pinned"] / 1e9,
        "pageable_gb_per_s": copies["pageable"] / 1e9,
        "device_copy_gb_per_s": copies["device"] / 1e9,
        "copy_bytes": effort.copy_bytes,
        "gpu_tflop_per_s": {name: rate / 1e12 for name, rate in gpu_rates(device, capability, effort).items()},
        "attention_tflop_per_s": attention_rate(device, capability, effort) / 1e12,
    }


def ram_copy(effort: Effort) -> float:
    """Bytes/s of a copy within RAM by torch's threads, read and written."""
    source, target = (torch.ones(effort.copy_bytes, dtype=torch.uint8) for _ in range(2))
    return 2 * effort.copy_bytes / median_seconds(lambda: target.copy_(source), effort.seconds)


def under_load(device: torch.device) -> dict[str, object]:
    """The card's state while it is copied to: a link that rests is narrower than it is."""
    if device.type != "cuda":
        return {}
    with copying(device):
        time.sleep(SETTLING)
        found = query()
    found.pop(USED, None)  # by the copies, too
    return found


@contextmanager
def copying(device: torch.device, nbytes: int = 64 << 20) -> Iterator[None]:
    source, target = (
        torch.ones(nbytes, dtype=torch.uint8).pin_memory(),
        torch.empty(nbytes, dtype=torch.uint8).to(device),
    )
    done, stream = threading.Event(), torch.cuda.Stream(device)

    def copy() -> None:
        with torch.cuda.stream(stream):
            while not done.is_set():
                for _ in range(COPIED):
                    target.copy_(source, non_blocking=True)
                stream.synchronize()

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
