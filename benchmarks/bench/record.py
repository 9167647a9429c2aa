"""What a benchmark leaves behind: one JSON per run, with every raw sample, the machine, and what was expected.

    results/<machine>/<date>-<suite>.json
    {"schema": 1, "suite", "command", "date", "weights", "machine", "limits", "rows": [Row, ...]}

A row is one case of one program. Names of numbers end in their unit (`seconds`, `bytes`, `_db`, `_gb_per_s`, `joules`);
a name without one is a count or a ratio. What could not run is a row too, and says why.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

from flux_quant.benchmarks.bench.places import cleaned
from flux_quant.errors import UserError

SCHEMA = 1
OURS = "flux_quant"
MEASURED, EMULATED, PREDICTED, SKIPPED = "measured", "emulated", "predicted", "skipped"
REPORTED = "reported"  # published by others, with values["source"]; not measured here
SPREAD = 0.15  # of the middle half of the samples over their median: above it a row is marked unstable
OUTLIER = 2.0  # the slowest sample over the median, likewise

Scalar = str | int | float | bool | None


@dataclass
class Row:
    """One case of one program.

    what:     the case, of scalars: format, size, vram, steps, ...; with `subject` it identifies the row in its suite
    subject:  the program, `OURS` or a peer with its version
    samples:  every raw sample after warm-up, in the order taken
    values:   what else was found: ratios, decibels, bytes moved, ...
    memory:   bytes: allocated, reserved (torch), process, device (NVML), host_rss, host_pinned; those that were had
    expected: predicted_seconds (planner), bound_seconds (physical) and bound_by, where there are such
    status:   measured; emulated (a larger card under a cap: says what fits, never how fast); predicted; reported (by
              others, values["source"] says where); skipped
    note:     why it was skipped, or what has to be known to read the row
    rerun:    the command that measures it again
    """

    what: dict[str, Scalar] = field(default_factory=dict)
    subject: str = OURS
    samples: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, Scalar] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    expected: dict[str, Scalar] = field(default_factory=dict)
    status: str = MEASURED
    note: str = ""
    rerun: str = ""

    @property
    def key(self) -> str:
        return json.dumps([self.subject, self.what], sort_keys=True)

    def seconds(self, name: str = "seconds") -> float | None:
        """The median of a kind of samples; None where there are none."""
        return median(self.samples[name]) if self.samples.get(name) else None

    def unstable(self) -> list[str]:
        """Times that scatter too much to be believed, each with its reason. Other samples differ by their nature."""
        found = []
        for name, samples in self.samples.items():
            middle = median(samples) if samples else 0
            if not name.endswith("seconds") or len(samples) < 3 or not middle:
                continue
            low, _, high = quantiles(samples, n=4, method="inclusive")
            if (high - low) / middle > SPREAD:
                found.append(f"{name}: the middle half spreads over {(high - low) / middle:.0%} of the median")
            elif max(samples) / middle > OUTLIER:
                found.append(f"{name}: one sample took {max(samples) / middle:.1f} times the median")
        return found


@dataclass
class Run:
    """One run of one suite on one machine.

    weights: what was measured with: kind (random, shipped, file), name, bytes and sha256 of a file
    machine: its fingerprint; limits: what it can do, measured in the same run (GB/s, TFLOP/s)
    """

    suite: str
    command: str
    date: str  # ISO, UTC
    weights: dict[str, Scalar]
    machine: dict[str, object]
    limits: dict[str, object] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA

    def find(self, key: str) -> Row | None:
        return next((row for row in self.rows if row.key == key), None)


def write_run(run: Run, path: Path) -> None:
    """Complete or not at all, and no folder of the machine in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(cleaned(asdict(run)), indent=1) + "\n")
    temporary.replace(path)


def read_run(path: Path) -> Run:
    """UserError for a file that is no result, or of another schema."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no result of a benchmark: {error}") from None
    if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, Mapping) else None
        if found is None:
            raise UserError(f"{path} was not written by flux-quant bench: it has no schema")
        raise UserError(f"{path} has schema {found}, this version reads {SCHEMA}; measure again with flux-quant bench")
    try:
        rows = [Row(**row) for row in content.pop("rows")]
        return Run(**content, rows=rows)
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is no result of a benchmark: {error}") from None


def slug(text: str) -> str:
    """A name for files: "NVIDIA H200 NVL" -> "nvidia-h200-nvl"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
