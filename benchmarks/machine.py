"""Where a number was measured, and how it is kept: `results/<machine>/<date>-<suite>.json`."""

import json
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from flux_quant.benchmarks.bench.nvidia import query
from flux_quant.benchmarks.bench.places import cleaned
from flux_quant.benchmarks.bench.record import slug

RESULTS = Path(__file__).parent / "results"


PACKAGES = ("triton", "numpy", "numba", "gguf", "safetensors", "diffusers", "transformers", "accelerate")
VARIABLES = ("FLUX_QUANT_", "OMP_", "MKL_", "NUMBA_", "TORCH", "PYTORCH_", "TRITON_", "CUDA_")  # beginnings of names
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def fingerprint() -> dict[str, object]:
    """The device, the processor, the versions and settings that decide about speed and results.

    It takes nothing of a card's memory, so that what others hold there can be asked for afterwards.
    """
    commit = output_of("git", "describe", "--always", "--dirty")
    out: dict[str, object] = {
        "device": device_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "instructions": instructions(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "ram_gb": ram_gb(),
        "disk_free_gb": round(shutil.disk_usage(Path(__file__).parent).free / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: package_version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not Path(value).is_absolute()  # folders say nothing of results
        },
        "commit": commit,
        "dirty": commit.endswith("-dirty") if commit else None,
        "date": now(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        out |= query() | {
            "cuda": torch.version.cuda,
            "capability": f"{properties.major}.{properties.minor}",
            "vram_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "attention": attention_backends(),
        }
    return out


def instructions(text: str | None = None) -> list[str]:
    """Of the processor, as /proc/cpuinfo has them: those that our loops and torch's products care about."""
    try:
        text = Path("/proc/cpuinfo").read_text() if text is None else text
    except OSError:
        return []
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for name in INSTRUCTIONS if name in flags]


def attention_backends() -> list[str]:
    """Of torch's scaled_dot_product_attention, those that are switched on."""
    names = {"flash": "flash_sdp", "efficient": "mem_efficient_sdp", "math": "math_sdp", "cudnn": "cudnn_sdp"}
    switches = {name: getattr(torch.backends.cuda, f"{switch}_enabled", None) for name, switch in names.items()}
    return [name for name, enabled in switches.items() if enabled and enabled()]


def write_result(
    suite: str, result: dict[str, object], folder: Path = RESULTS, machine: dict[str, object] | None = None
) -> Path:
    """`folder/<machine>/<date>-suite.json`, which replaces that of the same day: complete or not at all,
    and no folder of the machine in it. A file of `flux-quant bench`, which has suites of the same names, stays.

    machine: its fingerprint, where that is known already.
    """
    machine = machine or fingerprint()
    path = result_path(suite, folder, str(machine["date"])[:10])
    path = aside(path, str(machine["date"])) if of_bench(path) else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    content = {"suite": suite, "machine": machine, **result}
    temporary.write_text(json.dumps(cleaned(content), indent=1) + "\n")
    temporary.replace(path)
    return path


def result_path(suite: str, folder: Path = RESULTS, date: str | None = None) -> Path:
    """Of this device; date: YYYY-MM-DD, else today in UTC."""
    date = date or now()[:10]
    return folder / slug(device_name()) / f"{date}-{suite}.json"


def aside(day: Path, date: str) -> Path:
    """2026-11-21-step.json -> 2026-11-21T140501-step.json, at that time of `date`."""
    return day.with_name(f"{day.name[:10]}T{date[11:19].replace(':', '')}{day.name[10:]}")


def of_bench(path: Path) -> bool:
    """Whether a result is there that `flux-quant bench` wrote, and no script."""
    try:
        return "schema" in json.loads(path.read_text())
    except (OSError, ValueError):
        return False


def newest_result(suite: str, folder: Path = RESULTS, machine: str = "") -> Path | None:
    """A script's last one, by its name; of this device, or of the machines whose folder begins with `machine`."""
    found = [path for path in folder.glob(f"{machine or slug(device_name())}*/*.json") if suite_in(path) == suite]
    return max((path for path in found if not of_bench(path)), key=lambda path: path.name, default=None)


def suite_in(path: Path) -> str:
    """2026-11-21-kernels.json -> kernels, 2026-11-21T140501-kernels.json too; nothing for other names."""
    found = re.fullmatch(r"\d{4}-\d\d-\d\d(?:T\d{6})?-(.+)\.json", path.name)
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
