"""What kernels and streaming are to reach on a GPU, and what the results of this one say: met, or missed by how much.

    python -I -m flux_quant.benchmarks.aims [--save]

Reads the results of SUITES that were measured on the same device.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from flux_quant.benchmarks.machine import device_name, newest_result, write_result
from flux_quant.planner.memory import parse_amount

EIGHT_BITS, FOUR_BITS = ("q8_0", "fp8", "fp8_rows"), ("q4_k",)
SUITES = ("kernels", "products8", "step", "streaming", "offloaders", "side_paths")
Results = dict[str, dict]


@dataclass(frozen=True)
class Aim:
    text: str
    bound: float
    values: Callable[[Results], dict[str, float]]  # what it is about -> measured
    at_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


def unpacking(results: Results) -> dict[str, float]:
    """Of each format in the order in which a GPU keeps it: the faster one where there are two."""
    best: dict[str, float] = {}
    for row in results["kernels"]["unpacking"]:
        best[row["format"]] = max(row["of_copy"], best.get(row["format"], 0))
    return best


def linear(rows: int) -> Callable[[Results], dict[str, float]]:
    def values(results: Results) -> dict[str, float]:
        found = [row for row in results["kernels"]["linear"] if row["m"] == rows]
        return {f"{row['format']} {row['n']} x {row['k']}": row["of_dense"] for row in found}

    return values


def bandwidth(formats: tuple[str, ...]) -> Callable[[Results], dict[str, float]]:
    def values(results: Results) -> dict[str, float]:
        kernels = results["kernels"]
        found = [row for row in kernels["linear"] if row["m"] == 1 and row["n"] == 18432 and row["format"] in formats]
        return {row["format"]: row["gb_per_s"] / kernels["copy_gb_per_s"] for row in found}

    return values


def eight_bits(word: str) -> Callable[[Results], dict[str, float]]:
    """The fastest way of each shape at 4608 rows."""

    def values(results: Results) -> dict[str, float]:
        best: dict[str, float] = {}
        for row in results["products8"]["rows"]:
            place = f"{row['n']} x {row['k']}"
            if row["m"] == 4608 and row["way"].startswith(word) and "of_dense" in row:
                best[place] = max(row["of_dense"], best.get(place, 0))
        return best

    return values


def step(results: Results) -> dict[str, float]:
    rows = [row for row in results["step"]["rows"] if row.get("compute", "16-bit") == "16-bit" and "of_bf16" in row]
    return {row["format"]: row["of_bf16"] for row in rows if row["format"] in ("q8_0", "q4_k")}


def step_in_eight_bits(results: Results) -> dict[str, float]:
    rows = [row for row in results["step"]["rows"] if row.get("compute", "16-bit") != "16-bit" and "of_bf16" in row]
    return {f"{row['format']} {row['compute']}": row["of_bf16"] for row in rows}


def streamed(emulated: bool, column: str = "ratio") -> Callable[[Results], dict[str, float]]:
    """Of the steps of one picture under a budget."""

    def values(results: Results) -> dict[str, float]:
        found = [row for row in results["streaming"]["rows"] if row["what"] == "step" and row["vram"]]
        chosen = [row for row in found if ("emulated_gb_per_s" in row) == emulated]
        return {place_of(row): row[column] for row in chosen if row.get(column) is not None}

    return values


def place_of(row: dict) -> str:
    link = f", {row['emulated_gb_per_s']:.0f} GB/s" if "emulated_gb_per_s" in row else ""
    return f"{row['format']} {row['size']} px x {row['batch']}, {row['vram']}{link}"


def of_budget(*kinds: str) -> Callable[[Results], dict[str, float]]:
    """Peak of the whole process on the device."""

    def values(results: Results) -> dict[str, float]:
        found = [row for row in results["streaming"]["rows"] if row["what"] in kinds and row.get("vram")]
        return {f"{i} {row['what']} {row['vram']}": row["peak"] / budget_of(row) for i, row in enumerate(found)}

    return values


def budget_of(row: dict) -> int:
    return row.get("budget") or parse_amount(row["vram"])


def host_ram(results: Results) -> dict[str, float]:
    rows = [row for row in results["streaming"]["rows"] if row["what"] == "ram"]
    return {row["format"]: row["ram_ratio"] for row in rows if "ram_ratio" in row}


def side_paths(results: Results) -> dict[str, float]:
    """What a LoRA adds to the time of a layer, over its share of the arithmetic."""
    layers = results["side_paths"]["layers"]
    return {f"{layer}, rank {row['rank']}": row["times"] for layer, rows in layers.items() for row in rows}


def of_offloaders(results: Results) -> dict[str, float]:
    """BF16 at 4 GB against the fastest of the offloaders that ran under that cap, by size of the picture."""
    others = [row for row in results["offloaders"]["rows"] if row["vram"] == "4GB" and "reduced_to" not in row]
    ours = {
        row["size"]: row["seconds"]
        for row in results["streaming"]["rows"]
        if (row["what"], row.get("format"), row.get("vram"), row.get("batch")) == ("step", "bf16", "4GB", 1)
        and "emulated_gb_per_s" not in row
    }
    best = {size: min((row["seconds"] for row in others if row["size"] == size), default=None) for size in ours}
    return {f"{size} px": seconds / best[size] for size, seconds in ours.items() if best[size]}


AIMS = (
    Aim("unpacking, share of the copy bandwidth", 0.85, unpacking),
    Aim("linear at 4608 rows, of dense", 0.93, linear(4608)),
    Aim("linear at 512 rows, of dense", 0.75, linear(512)),
    Aim("8-bit formats at 1 row, share of the copy bandwidth", 0.80, bandwidth(EIGHT_BITS)),
    Aim("Q4_K at 1 row, share of the copy bandwidth", 0.60, bandwidth(FOUR_BITS)),
    Aim("int8 at 4608 rows, times dense", 1.4, eight_bits("int8 by")),
    Aim("FP8 at 4608 rows, times dense", 1.5, eight_bits("fp8")),
    Aim("a whole step, times BF16's", 1.08, step, at_most=True),
    Aim("a whole step with 8-bit products, times BF16's", 1.0, step_in_eight_bits, at_most=True),
    Aim("a streamed step, times max(compute, copies)", 1.05, streamed(emulated=False), at_most=True),
    Aim("the same over an emulated slower link", 1.05, streamed(emulated=True), at_most=True),
    Aim("peak of the steps, share of the budget", 1.0, of_budget("step", "modulation"), at_most=True),
    Aim("peak of T5 and VAE, share of the budget", 1.0, of_budget("t5", "vae"), at_most=True),
    Aim("RAM, times the bytes of the weights", 1.01, host_ram, at_most=True),
    Aim("a LoRA's time, times its share of the arithmetic", 1.3, side_paths, at_most=True),
    Aim("streamed BF16, times the fastest offloader", 1.0, of_offloaders, at_most=True),
)


def judged(results: Results) -> Iterator[dict[str, object]]:
    for aim in AIMS:
        try:
            values = aim.values(results)
        except KeyError:
            values = {}
        missed = {what: round(value, 3) for what, value in values.items() if not aim.met(value)}
        worst = (max if aim.at_most else min)(values.values(), default=None)
        yield {"aim": aim.text, "bound": aim.bound, "measured": len(values), "worst": worst, "missed": missed}


def read_results() -> Results:
    """The last results of this device, by suite; those that do not exist are left out."""
    paths = {name: newest_result(name) for name in SUITES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="as without: there is nothing to make smaller")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    rows = list(judged(read_results()))
    table = Table(title=f"Aims on {device_name()}")
    for column in ("aim", "bound", "measured", "worst", "missed"):
        table.add_column(column, justify="left" if column == "aim" else "right")
    for row in rows:
        worst = "-" if row["worst"] is None else f"{row['worst']:.3f}"
        table.add_row(row["aim"], str(row["bound"]), str(row["measured"]), worst, str(len(row["missed"])))
    Console(width=120).print(table)
    if args.save:
        print(f"wrote {write_result('aims', {'aims': rows})}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
