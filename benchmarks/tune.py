"""Measure once which way linear layers are fastest on this GPU, for each format and number of rows.

    python -I -m flux_quant.benchmarks.tune [--formats q8_0,q4_k] [--seconds 70] [--small] [--save]

From then on `kernels.dispatch` uses what was found; `--save` also writes it to benchmarks/results/,
from where `ship_table` puts it into the package.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from flux_quant.benchmarks.kernels import copies_of, formats, in_order
from flux_quant.benchmarks.machine import device_name, write_result
from flux_quant.benchmarks.timing import compare
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, INT8_ROWS
from flux_quant.kernels import fallback, tables

LAYER = (9216, 3072)  # qkv of a double block
ROUNDS = 3


@torch.inference_mode()
def run(device: torch.device, names: list[str], limit: float) -> dict[str, object]:
    """The most important formats first, none that would begin after `limit` seconds."""
    from flux_quant.kernels import tuning

    def seconds(call: Callable[[int], object], copies: int) -> float:
        return compare({"it": call}, copies, device, ROUNDS)["it"].median

    chosen, end = formats(device, names), time.monotonic() + limit
    order = in_order([*chosen, *([] if names else ["int8"])])
    fmts = [INT8_ROWS if name == "int8" else chosen[name] for name in order]
    weights = ((fmt, LAYER, copies_of(fmt, LAYER, device)) for fmt in fmts)
    table, evidence = tuning.tune(device, weights, torch.bfloat16, seconds, lambda: time.monotonic() > end)
    capability = torch.cuda.get_device_capability(device)
    return {
        "layer": list(LAYER),
        "table": {name: tables.rows_of(steps, capability) for name, steps in table.items()},
        "left_out": order[len(table) :],
        "microseconds": evidence,
    }


def tune_device(names: list[str], limit: float = float("inf")) -> dict[str, object]:
    """Measure, keep and show the table of this GPU; stops after `limit` seconds. UserError without one."""
    device = torch.device("cuda")
    if reason := fallback.triton_for(device):
        raise UserError(f"nothing to tune: {reason}")
    if unknown := [name for name in names if name not in FORMATS]:
        raise UserError(f"unknown format {unknown[0]}; choose from {', '.join(FORMATS)}")
    result = run(device, names, limit)
    table = Table(title=f"Ways on {device_name()}")
    table.add_column("format")
    table.add_column("rows of input: way")
    for name, steps in result["table"].items():
        words = (f"{'more' if step['rows'] is None else step['rows']}: {step['path']}" for step in steps)
        table.add_row(name, ", ".join(words))
    Console(width=120).print(table)
    if result["left_out"]:
        print(f"no time was left for {', '.join(result['left_out'])}; --formats measures them", file=sys.stderr)
    print(f"kept in {tables.table_file(device)}", file=sys.stderr)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="", help="names with commas between them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no format after them")
    parser.add_argument("--small", action="store_true", help="say what would be done")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    names = [name for name in args.formats.split(",") if name]
    try:
        result = tune_device(names, args.seconds)
    except UserError as error:
        print(error, file=sys.stderr)
        return 0 if args.small else 1
    if args.save:
        print(f"wrote {write_result('tune', result)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
