"""What this machine can do, measured once: copies to the GPU, matrix products, reading from the drive. What is missing.

    report = diagnose()         measures, some seconds, or reads what was measured before
    machine = machine_of(report)     for `planner.plan`; None without a GPU

Rates are kept in the cache folder, one file for each device and version of torch. How much memory is free is asked for
anew every time.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flux_quant.kernels import fallback, fused, tables
from flux_quant.planner.gpus import CPU_FLOPS, DISK, Machine
from flux_quant.planner.memory import amount
from flux_quant.planner.rates import DTYPES, Effort, attention_rate, copy_rates, cpu_rate, disk_rate, gpu_rates
from flux_quant.streaming import pin_budget
from flux_quant.streaming.memory import linux_memory, total_ram


@dataclass(frozen=True)
class GpuReport:
    """bytes/s, FLOP/s and bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    driver: str | None
    triton: str  # "works", or why not
    pinned: float
    pageable: float
    device_copy: float  # read and written
    flops: dict[str, float]
    attention: float


@dataclass(frozen=True)
class Report:
    system: str
    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    date: str
    ram: int  # that this process may have: of the machine, or of its container
    ram_free: int
    ram_pinned: int  # that streaming would pin
    cpu_flops: dict[str, float]
    disk: float | None  # bytes/s
    gpu: GpuReport | None
    missing: tuple[str, ...]


def diagnose(folder: Path | None = None, refresh: bool = False, effort: Effort | None = None) -> Report:
    """From the cache if this device was measured before with this torch; memory is always looked at."""
    place = report_file(folder or tables.cache_folder())
    known = None if refresh else read_report(place)
    report = known or measure(place.parent, effort or Effort())
    if known is None:
        write_report(report, place)
    return with_memory(report)


def report_file(folder: Path) -> Path:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {processor_name()}"
    name = f"{device} torch {torch.__version__} threads {torch.get_num_threads()}"
    return folder / f"machine-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def read_report(path: Path) -> Report | None:
    """None if there is none, or an older version wrote another form."""
    try:
        stored = json.loads(path.read_text())
        gpu = stored.pop("gpu")
        if gpu:
            gpu = GpuReport(**gpu | {"capability": tuple(gpu["capability"])})
        return Report(**stored | {"gpu": gpu, "missing": tuple(stored["missing"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_report(report: Report, path: Path) -> None:
    """Complete or not at all; a folder that cannot be written to is said, and costs a new measurement next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(report), indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        warnings.warn(f"{path}: not kept ({error.strerror})", stacklevel=2)


def with_memory(report: Report) -> Report:
    ram, free = ram_now()
    fields = {"ram": ram, "ram_free": free, "ram_pinned": pin_budget()}
    if report.gpu:
        fields["gpu"] = GpuReport(**vars(report.gpu) | {"free": torch.cuda.mem_get_info()[0]})
    return Report(**vars(report) | fields)


def ram_now() -> tuple[int, int]:
    """(what this process may have, what it can get now); elsewhere than on Linux both are the whole."""
    return tuple(linux_memory()) if sys.platform.startswith("linux") else (total_ram(), total_ram())


def machine_of(report: Report) -> Machine | None:
    """What plans are made for. Measured rates are used as they are."""
    gpu = report.gpu
    if gpu is None:
        return None
    return Machine(
        name=gpu.name,
        source=f"measured {report.date}",
        capability=gpu.capability,
        total=gpu.total,
        usable=gpu.free,
        flops=gpu.flops,
        attention=gpu.attention,
        bandwidth=gpu.device_copy,
        pinned=gpu.pinned,
        pageable=gpu.pageable,
        disk=report.disk or DISK,
        cpu=report.cpu_flops.get("fp32", CPU_FLOPS),
        triton=gpu.triton == "works",
    )


# --- Measuring --------------------------------------------------------------------------------------------------------


def measure(folder: Path, effort: Effort) -> Report:
    ram, free = ram_now()
    disk, no_disk = disk_rate(folder, effort)
    gpu = measure_gpu(effort) if torch.cuda.is_available() else None
    return Report(
        system=platform.platform(),
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        date=time.strftime("%Y-%m-%d"),
        ram=ram,
        ram_free=free,
        ram_pinned=pin_budget(),
        cpu_flops={name: cpu_rate(DTYPES[name], effort) for name in ("fp32", "bf16")},
        disk=disk,
        gpu=gpu,
        missing=(*lacking(gpu), *no_disk),
    )


def lacking(gpu: GpuReport | None) -> list[str]:
    """What would make things faster here, a line each."""
    if gpu is None:
        without = f"torch {torch.__version__} is built without CUDA"
        why = without if torch.version.cuda is None else "no driver or no card"
        return [f"no CUDA GPU: {why}; everything runs on the processor, and there is nothing to stream to"]
    lines = [] if gpu.triton == "works" else [f"no Triton kernels, torch does their work: {gpu.triton}"]
    if "bf16" not in gpu.flops:
        lines.append("no bfloat16 products on this card")
    return lines


def processor_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def measure_gpu(effort: Effort) -> GpuReport:
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    copies = copy_rates(device, effort)
    return GpuReport(
        name=properties.name,
        capability=capability,
        total=properties.total_memory,
        free=torch.cuda.mem_get_info(device)[0],
        driver=driver_version(),
        triton=triton_state(device),
        pinned=copies["pinned"],
        pageable=copies["pageable"],
        device_copy=copies["device"],
        flops=gpu_rates(device, capability, effort),
        attention=attention_rate(device, capability, effort),
    )


def triton_state(device: torch.device) -> str:
    """ "works", if one small kernel of ours runs on the device, or why not."""
    if reason := fallback.triton_for(device):
        return reason
    x = torch.randn(1, 64, 256, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused.gelu_(x)
    torch.cuda.synchronize(device)
    return fallback.failures().get(("gelu", x.device), "works")


def driver_version() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def lines_of(report: Report) -> list[tuple[str, str]]:
    """(what, value) rows for people."""
    rows = [
        ("system", f"{report.system}, Python {report.python}, torch {report.torch}"),
        ("processor", f"{report.processor}, {report.cores} cores, {report.threads} threads of torch"),
        ("RAM", f"{amount(report.ram)}, {amount(report.ram_free)} free, {amount(report.ram_pinned)} to pin at most"),
        *((f"processor, {name}", f"{rate / 1e9:.0f} GFLOP/s") for name, rate in report.cpu_flops.items()),
        ("reading from the drive", f"{report.disk / 1e9:.2f} GB/s" if report.disk else "not measured"),
    ]
    gpu = report.gpu
    if gpu:
        major, minor = gpu.capability
        rows += [
            ("GPU", f"{gpu.name}, compute capability {major}.{minor}, driver {gpu.driver or 'unknown'}"),
            ("GPU memory", f"{amount(gpu.total)}, {amount(gpu.free)} free"),
            ("Triton", gpu.triton),
            ("from pinned RAM", f"{gpu.pinned / 1e9:.1f} GB/s"),
            ("from pageable RAM", f"{gpu.pageable / 1e9:.1f} GB/s"),
            ("within the GPU", f"{gpu.device_copy / 1e9:.0f} GB/s"),
            *((f"GPU, {name}", f"{rate / 1e12:.1f} TFLOP/s") for name, rate in gpu.flops.items()),
            ("GPU, attention", f"{gpu.attention / 1e12:.1f} TFLOP/s"),
        ]
        if gpu.triton == "works" and torch.cuda.is_available():
            rows.append(("ways of linear layers", tables.summary(torch.device("cuda"))))
    return rows
