"""Which way a linear layer goes, by device class, format and rows of input: facts, and where a machine keeps its own.

A table has rows (largest M, path) for a format, the last one without a limit. The shipped ones are derived from the
rooflines of the device class, not measured: a fused kernel that reaches 0.7 of cuBLAS is faster than two passes up to
216 rows on an RTX 3060, 340 on a 4060, 500 on a 4090, 549 on an H200. `tuning.tune` measures a machine once and stores
what it found; from then on that is the table.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

VECTOR, FUSED, TWO_PASS = "vector", "fused", "two_pass"


@dataclass(frozen=True)
class Step:
    """Up to `rows` rows of input (None: any number) take `path`, with the kernel's configuration or its default."""

    rows: int | None
    path: str
    config: int | None = None  # number in the kernel's table of configurations


Table = Mapping[str, tuple[Step, ...]]  # by name of the format

FUSED_UP_TO = {(8, 0): 256, (8, 6): 192, (8, 9): 320, (9, 0): 512, (10, 0): 512, (12, 0): 320}  # rows; below: none
VECTOR_FIRST = 2  # rows: each two of them unpack the weight again, a tile of the fused kernel unpacks it once for 16
VECTOR_ALONE = 8  # where no fused kernel follows


def derived_steps(capability: tuple[int, int]) -> tuple[Step, ...]:
    """For a card that nobody measured: the limits of the newest class that is not newer than it."""
    known = [start for start in FUSED_UP_TO if start <= capability]
    limit = FUSED_UP_TO[max(known)] if known else 0
    if not limit:
        return Step(VECTOR_ALONE, VECTOR), Step(None, TWO_PASS)
    return Step(VECTOR_FIRST, VECTOR), Step(limit, FUSED), Step(None, TWO_PASS)


@cache
def measured(device: torch.device) -> Table:
    """What `tune` stored for this device with these versions of torch and Triton; empty if nothing fits."""
    try:
        stored = json.loads(table_file(device).read_text())
        return {name: tuple(Step(**step) for step in steps) for name, steps in stored["table"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def store(device: torch.device, table: Table, evidence: object) -> Path:
    """Keep a measured table; `evidence` is what it was made from. Returns the file."""
    path = table_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {name: [asdict(step) for step in steps] for name, steps in table.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"table": rows, "evidence": evidence}, indent=1) + "\n")
    temporary.replace(path)
    measured.cache_clear()
    return path


def table_file(device: torch.device) -> Path:
    import triton

    name = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__}"
    return cache_folder() / "kernels" / ("".join(c if c.isalnum() else "-" for c in name.lower()) + ".json")


def cache_folder() -> Path:
    """Where this machine keeps what was measured once: FLUX_QUANT_CACHE, or the place for caches of the system."""
    if place := os.environ.get("FLUX_QUANT_CACHE"):
        return Path(place)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "flux_quant" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flux_quant"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux_quant"


def steps_for(device: torch.device, name: str) -> tuple[tuple[Step, ...], str]:
    """The steps of a format on a device, and where they come from."""
    if steps := measured(device).get(name):
        return steps, f"measured on {torch.cuda.get_device_name(device)}"
    capability = torch.cuda.get_device_capability(device)
    return derived_steps(capability), f"derived for sm_{capability[0]}{capability[1]}, not measured"


def step_for(steps: tuple[Step, ...], rows: int) -> Step:
    return next(step for step in steps if step.rows is None or rows <= step.rows)
