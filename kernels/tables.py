"""Which way a linear layer goes, by device class, format and rows of input: facts, and where a machine keeps its own.

A table has rows (largest M, path) for a format, the last one without a limit. The shipped ones are derived from the
rooflines of the device class, not measured: a fused kernel that reaches 0.7 of cuBLAS is faster than two passes up to
216 rows on an RTX 3060, 340 on a 4060, 500 on a 4090, 549 on an H200. What was measured goes before them, by format:

1. on this machine, with its versions of torch and Triton: `tuning.tune` stores it in the cache folder;
2. on a card of the same name: `measured/*.json`, which come with the package (`benchmarks.ship_table` writes them);
3. on a card of the same compute capability, the one with the most similar number of multiprocessors.

The derived limits stay as they are when a class has been measured: they are for its formats that were not.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

VECTOR, FUSED, TWO_PASS = "vector", "fused", "two_pass"
ONE_KERNEL = VECTOR, FUSED
MEASURED = Path(__file__).parent / "measured"  # one file for each card that somebody measured


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
        return table_in(json.loads(table_file(device).read_text()), torch.cuda.get_device_capability(device))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def table_in(stored: Mapping, capability: tuple[int, int]) -> Table:
    """Of a file; without formats whose configurations the kernels no longer have."""
    from flux_quant.kernels import configurations

    table = {}
    for name, rows in stored["table"].items():
        with suppress(LookupError):
            table[name] = tuple(
                Step(row["rows"], row["path"], configurations.number_of(row["path"], row["config"], capability))
                for row in rows
            )
    return table


def rows_of(steps: Iterable[Step], capability: tuple[int, int]) -> list[dict[str, object]]:
    """Steps as files have them."""
    from flux_quant.kernels import configurations

    return [
        {"rows": step.rows, "path": step.path, "config": configurations.content(step.path, step.config, capability)}
        for step in steps
    ]


def store(device: torch.device, table: Table, evidence: Mapping[str, object]) -> Path:
    """Keep what was measured of some formats beside what the file holds of others; `evidence`: what each was made from.

    Returns the file.
    """
    path, capability = table_file(device), torch.cuda.get_device_capability(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        before = json.loads(path.read_text())
        kept, seen = dict(before["table"]), dict(before["evidence"])
    except (OSError, ValueError, KeyError, TypeError):
        kept, seen = {}, {}
    kept |= {name: rows_of(steps, capability) for name, steps in table.items()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"table": kept, "evidence": seen | dict(evidence)}, indent=1) + "\n")
    temporary.replace(path)
    forget()
    return path


def forget() -> None:
    """Look at the files again."""
    for one in (measured, shipped, found_for):
        one.cache_clear()


def table_file(device: torch.device) -> Path:
    import triton

    name = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} triton {triton.__version__}"
    return cache_folder() / "kernels" / ("".join(c if c.isalnum() else "-" for c in name.lower()) + ".json")


@dataclass(frozen=True)
class Shipped:
    """A table that comes with the package."""

    card: str
    capability: tuple[int, int]
    multiprocessors: int
    table: Table


@cache
def shipped(folder: Path | None = None) -> tuple[Shipped, ...]:
    """All there are, of MEASURED if no folder is given; a file that cannot be read is none."""
    found = []
    for path in sorted((folder or MEASURED).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = json.loads(path.read_text())
            capability = tuple(stored["capability"])
            table = table_in(stored, capability)
            found.append(Shipped(stored["card"], capability, stored["multiprocessors"], table))
    return tuple(found)


def cache_folder() -> Path:
    """Where this machine keeps what was measured once: FLUX_QUANT_CACHE, or the place for caches of the system."""
    if place := os.environ.get("FLUX_QUANT_CACHE"):
        return Path(place)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "flux_quant" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "flux_quant"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux_quant"


@cache
def found_for(device: torch.device, name: str) -> tuple[tuple[Step, ...], str] | None:
    """The steps of a format, or of "int8", that were measured for a device, and where; None if none were."""
    if steps := measured(device).get(name):
        return steps, f"measured on {torch.cuda.get_device_name(device)}, on this machine"
    if others := shipped():
        card, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        count = torch.cuda.get_device_properties(device).multi_processor_count
        for one in nearest(others, card, capability, count):
            if steps := one.table.get(name):
                return steps, f"measured on {one.card}" + ("" if one.card == card else f", sm_{digits(capability)} too")
    return None


def nearest(tables: Iterable[Shipped], card: str, capability: tuple[int, int], multiprocessors: int) -> list[Shipped]:
    """Those of this card, then those of its class, the most similar first."""
    same = [one for one in tables if one.capability == capability]
    return sorted(same, key=lambda one: (one.card != card, abs(one.multiprocessors - multiprocessors)))


def summary(device: torch.device) -> str:
    """In words, which formats have a measured table on a device, and the rest a derived one."""
    names = {name for one in shipped() for name in one.table} | set(measured(device))
    sources: dict[str, list[str]] = {}
    for name in sorted(names):
        if found := found_for(device, name):
            sources.setdefault(found[1], []).append(name)
    words = [f"{source}: {', '.join(some)}" for source, some in sources.items()]
    rest = f"derived for sm_{digits(torch.cuda.get_device_capability(device))}, not measured"
    return "; ".join([*words, f"others {rest}"] if words else [f"{rest}; `flux-quant tune` measures"])


def steps_for(device: torch.device, name: str) -> tuple[tuple[Step, ...], str]:
    """The steps of a format on a device, and where they come from."""
    if found := found_for(device, name):
        return found
    capability = torch.cuda.get_device_capability(device)
    return derived_steps(capability), f"derived for sm_{digits(capability)}, not measured"


def digits(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"


def step_for(steps: tuple[Step, ...], rows: int) -> Step:
    return next(step for step in steps if step.rows is None or rows <= step.rows)
