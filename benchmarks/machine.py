"""Where a number was measured, and how it is kept: `results/<machine>/<date>-<suite>.json`."""

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flux_quant.benchmarks.bench.record import slug

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
        "date": now(),
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
    """`folder/<machine>/<date>-suite.json`, which replaces that of the same day: complete or not at all.

    machine: its fingerprint, where that is known already.
    """
    machine = machine or fingerprint()
    path = result_path(suite, folder, str(machine["date"])[:10])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    content = {"suite": suite, "machine": machine, **result}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
    return path


def result_path(suite: str, folder: Path = RESULTS, date: str | None = None) -> Path:
    """Of this device; date: YYYY-MM-DD, else today in UTC."""
    date = date or now()[:10]
    return folder / slug(device_name()) / f"{date}-{suite}.json"


def newest_result(suite: str, folder: Path = RESULTS, machine: str = "") -> Path | None:
    """The last one of a suite, by its name; of this device, or of the machines whose folder begins with `machine`."""
    found = [path for path in folder.glob(f"{machine or slug(device_name())}*/*.json") if suite_in(path) == suite]
    return max(found, key=lambda path: path.name, default=None)


def suite_in(path: Path) -> str:
    """2026-11-21-kernels.json -> kernels; nothing for other names."""
    found = re.fullmatch(r"\d{4}-\d\d-\d\d-(.+)\.json", path.name)
    return found[1] if found else ""


def now() -> str:
    """ISO, UTC, in seconds."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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
