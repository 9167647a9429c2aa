"""Results of scripts that are no suites of `flux-quant bench`, read as if they were: the GPU suite, and earlier ones.

Such a file is {"suite", "machine", ...} with lists of rows, and every script has its own names. Of a row, words and the
numbers that name a case are `what`; "seconds", "samples" and the times of timing.py are samples; peaks are memory;
other numbers are values. What is nested deeper is left out.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flux_quant.benchmarks.bench.record import EMULATED, MEASURED, SKIPPED, Row, Run, read_run
from flux_quant.errors import UserError
from flux_quant.planner.memory import parse_amount

# script -> suite of today
NAMES = {"conversion": "convert", "text_memory": "text", "cpu_linear": "kernels", "streaming": "step"}
WHAT = {"size", "batch", "width", "height", "words", "rows", "n", "k", "m", "threads", "steps", "layers"}
WHAT |= {"tiles", "budget_gb"}
MEMORY = {  # names of bytes -> of `Row.memory`
    "peak_vram": "allocated",
    "peak_allocated": "allocated",
    "peak_torch": "reserved",
    "peak": "process",
    "pinned": "host_pinned",
    "ram": "host_rss",
}
RENAMED = {"type": "format", "way": "program"}


def load(path: Path) -> Run:
    """A result of either kind. UserError for what is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no result of a benchmark: {error}") from None
    if not isinstance(content, Mapping) or "schema" in content or not {"suite", "machine"} <= content.keys():
        return read_run(path)
    machine = content["machine"]
    rows = conversions(content) if content["suite"] == "conversion" else list(generic(content))
    suite = NAMES.get(content["suite"], content["suite"])
    return Run(
        suite, "", str(machine.get("date", "")), {"kind": "earlier", "name": content["suite"]}, machine, {}, rows
    )


def conversions(content: Mapping[str, Any]) -> list[Row]:
    return [
        Row(
            {"format": row["format"], "source": f"random weights, {source['bytes'] / 1e9:.1f} GB"},
            samples={
                "seconds": [row["seconds"]],
                "cp_seconds": [source["cp_seconds"]],
                "times_cp": [row["times_cp"]],
                "gb_per_s": [source["bytes"] / row["seconds"] / 1e9],
            },
            values={"source_bytes": source["bytes"], "file_bytes": row["bytes"], "weight_snr_db": row["snr_db"]},
            memory={"host_rss": int(row["memory_gb"] * 1e9)},
        )
        for source in content["sources"]
        for row in source["results"]
    ]


def generic(content: Mapping[str, Any]) -> Iterator[Row]:
    """A list of dictionaries is a part of the suite, and every dictionary a row."""
    for part, found in content.items():
        if isinstance(found, list):
            for number, row in enumerate(found):
                if isinstance(row, Mapping):
                    yield read_row(part, number, row)


def read_row(part: str, number: int, found: Mapping[str, Any]) -> Row:
    row = Row({"part": part})
    for name, value in found.items():
        name = RENAMED.get(name, name)
        if name == "why":
            row.status, row.note = SKIPPED, str(value)
        elif name == "vram":
            row.what |= {"vram": parse_amount(value)} if isinstance(value, str) else {}
        elif name == "samples" or name == "seconds" and isinstance(value, list):
            row.samples["seconds"] = [x for x in value[found.get("warm", 0) :] if isinstance(x, int | float)]
        elif name == "seconds" and isinstance(value, int | float):
            row.samples.setdefault("seconds", [value])
        elif name == "us":
            row.samples["seconds"] = [value / 1e6]
        elif isinstance(value, Mapping) and "us" in value:
            row.samples["seconds" if name == "ours" else f"{name}_seconds"] = [value["us"] / 1e6]
        elif name in MEMORY and isinstance(value, int):
            row.memory[MEMORY[name]] = value
        elif isinstance(value, str | bool) or name in WHAT and isinstance(value, int | float):
            row.what[name] = value
        elif value is None or isinstance(value, int | float):
            row.values[name] = value
    row.expected = expected(found)
    if row.status == MEASURED and row.what.get("vram") and part == "rows":
        row.status = EMULATED
    if len(row.what) == 1:
        row.what["number"] = number
    return row


def expected(found: Mapping[str, Any]) -> dict[str, Any]:
    predicted = found.get("predicted")
    out = {"predicted_seconds": predicted["seconds"]} if isinstance(predicted, Mapping) else {}
    if found.get("compute") and not isinstance(found["compute"], str) and "copies" in found:
        seconds, by = max((found["compute"], "compute"), (found["copies"], "copies"))
        out |= {"bound_seconds": seconds, "bound_by": by}
    return out
