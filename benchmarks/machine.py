"""Where a number was measured, and how it is kept: one JSON file per suite and device in `results/`."""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def fingerprint() -> dict[str, object]:
    """The device, the processor and the versions that decide about speed and results."""
    out: dict[str, object] = {
        "device": device_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "ram_gb": ram_gb(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "threads": torch.get_num_threads(),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        out |= {
            "cuda": torch.version.cuda,
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "capability": f"{properties.major}.{properties.minor}",
            "vram_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return out


def write_result(
    suite: str, result: dict[str, object], folder: Path = RESULTS, machine: dict[str, object] | None = None
) -> Path:
    """`folder/suite-device.json`, which replaces the last one of this device: complete or not at all.

    machine: its fingerprint, where that is known already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(suite, folder)
    temporary = path.with_suffix(".tmp")
    content = {"suite": suite, "machine": machine or fingerprint(), **result}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def result_path(suite: str, folder: Path = RESULTS) -> Path:
    device = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    return folder / f"{suite}-{device}.json"


def device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU {processor_name()}"


def processor_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def ram_gb() -> float | None:
    """Physical memory; None where the system has no sysconf (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def output_of(*command: str) -> str | None:
    """The first line a command prints, or None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
