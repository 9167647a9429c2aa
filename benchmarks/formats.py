"""Seconds to unpack a weight and to multiply with it, per format, on this machine, through `kernels.dispatch`.

    python -I -m flux_quant.benchmarks.formats [--columns 3072] [--rows 3072] [--tokens 256] [--save]

The default is FLUX.1's commonest layer (3072 x 3072) under 256 tokens. GB/s counts the stored bytes once and the
unpacked float32 once.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from flux_quant.benchmarks.machine import device_name, write_result
from flux_quant.formats import FORMATS
from flux_quant.kernels import dispatch


def best_of(work: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """Seconds of the fastest run after one to warm up."""
    seconds = []
    for _ in range(runs + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def measure(rows: int, columns: int, tokens: int, device: torch.device) -> list[dict[str, object]]:
    """One row per format for a weight (rows, columns) under `tokens` rows of bfloat16 (on a CPU: float32) input."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weight = torch.randn(rows, columns, device=device, generator=torch.Generator(device).manual_seed(0)) * 0.03
    x = torch.randn(tokens, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device)
    results = []
    for fmt in FORMATS.values():
        if not fmt.fits((rows, columns)):
            continue
        parts = fmt.pack(weight)
        unpack = best_of(lambda p=parts, f=fmt: dispatch.dequantize(f, p, torch.float32, out=out), device)
        multiply = best_of(lambda p=parts, f=fmt: dispatch.linear(x, f, p), device)
        results.append(
            {
                "format": fmt.name,
                "bits_per_weight": fmt.bits_per_weight,
                "dequantize_ms": round(unpack * 1e3, 3),
                "dequantize_gb_per_s": round((fmt.nbytes((rows, columns)) + out.nbytes) / unpack / 1e9, 2),
                "linear_ms": round(multiply * 1e3, 3),
                "path": dispatch.explain(fmt, (tokens, rows, columns), device),
            }
        )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = measure(args.rows, args.columns, args.tokens, device)
    table = Table(title=f"weight {args.rows} x {args.columns}, {args.tokens} tokens, {device_name()}")
    for title in ("format", "bits/weight", "dequantize ms", "GB/s", "linear ms"):
        table.add_column(title, justify="left" if title == "format" else "right")
    for row in results:
        table.add_row(*(str(value) for value in list(row.values())[:5]))
    Console().print(table)
    if args.save:
        shape = {"rows": args.rows, "columns": args.columns, "tokens": args.tokens}
        print(f"wrote {write_result('formats', {**shape, 'results': results})}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
