"""Put what `tune` measured on a card into the package, for everybody with such a card.

    python -I -m flux_quant.benchmarks.ship_table [benchmarks/results/nvidia-h200/2026-11-21-tune.json] [--folder PLACE]

Without a file: the newest tune result of every machine there is. Writes kernels/measured/<card>.json, which
`kernels.tables` reads; formats that the result lacks keep what the file had. Refuses configurations that the kernels do
not have. Prints the measured limits beside the derived ones of the class, `FUSED_UP_TO` and `VECTOR_FIRST`: those are
for cards and formats that nobody measured, and are changed by hand if several cards say that they are off.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flux_quant.benchmarks.bench.record import slug
from flux_quant.benchmarks.machine import RESULTS, suite_in
from flux_quant.errors import UserError
from flux_quant.kernels import tables

SUITE = "tune"


def shipped_from(result: Mapping, before: Mapping | None = None) -> dict[str, object]:
    """A result of `tune`, and the file that there is -> the new one. UserError for what is no measured table."""
    from flux_quant.kernels import configurations

    try:
        machine = result["machine"]
        capability = tuple(int(digit) for digit in machine["capability"].split("."))
        rows = {name: list(map(dict, steps)) for name, steps in result["table"].items()}
        about = {
            "card": machine["device"],
            "capability": list(capability),
            "multiprocessors": int(machine["multiprocessors"]),
            "layer": result["layer"],
        }
        measured = {key: machine[key] for key in ("torch", "triton", "date", "commit")}
        for name, steps in rows.items():
            for step in steps:
                configurations.number_of(step["path"], step["config"], capability)
            if steps[-1]["rows"] is not None:
                raise UserError(f"{name}: the last step has a limit of {steps[-1]['rows']} rows")
    except LookupError as error:
        raise UserError(f"not a table of these kernels: {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"not a result of tune on a CUDA device: {error}") from None
    if not rows:
        raise UserError("the result has measured no format")
    before = before or {"table": {}, "measured": {}}
    return about | {
        "measured": {**before["measured"], **dict.fromkeys(rows, measured)},
        "table": {**before["table"], **rows},
    }


def ship(path: Path, folder: Path) -> Path:
    """Write the file of the result's card. UserError for what is no measured table; nothing is written then."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    target = folder / f"{slug(str(result.get('machine', {}).get('device', '')))}.json"
    before = json.loads(target.read_text()) if target.exists() else None
    content = shipped_from(result, before)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(target)
    tables.forget()
    return target


def compared(content: Mapping) -> Table:
    """Rows up to which each way is taken: measured, and as it was derived."""
    capability = tuple(content["capability"])
    out = Table(title=f"{content['card']}, sm_{tables.digits(capability)}: up to how many rows")
    for column in ("format", "vector", "fused"):
        out.add_column(column)
    derived = tables.rows_of(tables.derived_steps(capability), capability)
    for name, steps in (*content["table"].items(), ("derived", derived)):
        limits = {step["path"]: step["rows"] for step in steps}  # steps come by rows: the last of a way counts
        out.add_row(name, *(str(limits.get(path, 0)) for path in tables.ONE_KERNEL))
    return out


def newest_results(folder: Path = RESULTS) -> list[Path]:
    """Of tune, the last one of each machine."""
    found = {path.parent: path for path in sorted(folder.glob("*/*.json")) if suite_in(path) == SUITE}
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path, help="JSON of tune; without it the newest of every machine")
    parser.add_argument("--folder", type=Path, default=tables.MEASURED, help="where the package has them")
    args = parser.parse_args()
    found = [args.result] if args.result else newest_results()
    if not found:
        print("nobody has measured a card: run `make gpu` or `benchmarks.tune --save` on one", file=sys.stderr)
        return 2
    for path in found:
        try:
            target = ship(path, args.folder)
        except UserError as error:
            print(f"error: {path.name}: {error}", file=sys.stderr)
            return 2
        Console(width=100).print(compared(json.loads(target.read_text())))
        print(f"wrote {target}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
