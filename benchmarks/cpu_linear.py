"""Packed weights on the CPU: how fast they are unpacked, and what a linear layer over them costs beside a dense one.

    python -I -m flux_quant.benchmarks.cpu_linear [--threads 2] [--types q8_0 q4_k] [--runs 4] [--save]

Unpacking: billions of weights per second of a weight (4096, 4096) into memory that is there already, by our loops on
one thread and on all, by gguf.quants.dequantize (numpy, float32, one thread) and by the codec in torch on all threads;
and of 256 rows that stay in the cache, as `linear` unpacks them, on one thread. Linear: milliseconds at the shapes of
T5-XXL beside torch's product with the dense weight in float32 or bfloat16, whichever this processor multiplies faster.

What is compared takes turns, until so many rounds in a row have made nothing faster; the fastest run counts. The median
over the fastest ("noise") tells how quiet the machine was.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from flux_quant.benchmarks.machine import device_name, write_result
from flux_quant.formats import FORMATS, QuantFormat
from flux_quant.kernels import cpu_dequant, cpu_quantize

MULTIPLIED = ("fp8", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_xs")
TYPES = tuple(name for name, fmt in FORMATS.items() if cpu_dequant.supports(fmt))
SHAPES = {"q, k, v, o": (4096, 4096), "wi": (10240, 4096), "wo": (4096, 10240)}
ROWS = (1, 16, 77, 512)
UNPACKED, SLICE = (4096, 4096), 256
BETTER, PATIENCE = 0.98, 6  # a gain that counts; rounds at most, in units of --runs
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Work = dict[str, Callable[[], object]]


def fastest(work: Work, runs: int, threads: dict[str, int]) -> tuple[dict[str, float], float]:
    """Seconds of the fastest run of each, one after the other in every round, on so many threads; median over fastest.

    What is over in a moment runs more often than what is not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for name, run in work.items():
        torch.set_num_threads(threads[name])
        run()
    idle = 0
    for _ in range(PATIENCE * runs):
        idle += 1
        for name, run in work.items():
            torch.set_num_threads(threads[name])
            times = timed(run)
            if min(times) < BETTER * min(seconds[name], default=float("inf")):
                idle = 0
            seconds[name] += times
        if idle == runs:
            break
    return {name: min(times) for name, times in seconds.items()}, max(median(t) / min(t) for t in seconds.values())


def timed(run: Callable[[], object], least: float = 0.01) -> list[float]:
    """Seconds of runs that together take `least`."""
    times: list[float] = []
    while sum(times) < least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def packed(fmt: QuantFormat, shape: tuple[int, int]) -> tuple[Tensor, ...]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    return cpu_quantize.quantize(fmt.name, weight, search=False)[0]


def unpacking(fmt: QuantFormat, threads: int, runs: int) -> dict[str, object]:
    """Billions of weights per second by who unpacks, to what, on how many threads."""
    parts = packed(fmt, UNPACKED)
    outs = {name: torch.empty(UNPACKED, dtype=dtype) for name, dtype in DTYPES.items()}
    small, few = torch.empty(SLICE, UNPACKED[1]), slice(0, SLICE)
    work: Work = {"slice": lambda: cpu_dequant.dequantize(fmt, parts, small, few)}
    on = {"slice": 1}
    for name, out in outs.items():
        for count in sorted({1, threads}):
            work[f"{name} {count}"] = lambda out=out: cpu_dequant.dequantize(fmt, parts, out)
            on[f"{name} {count}"] = count
    work["codec"], on["codec"] = lambda: fmt.unpack(*parts), threads
    if fmt.block > 1:
        import gguf

        data, kind = parts[0].numpy(), gguf.GGMLQuantizationType[fmt.name.upper()]
        work["gguf"], on["gguf"] = lambda: gguf.quants.dequantize(data, kind), 1
    seconds, noise = fastest(work, runs, on)
    counts = {name: (SLICE if name == "slice" else UNPACKED[0]) * UNPACKED[1] for name in work}
    rates = {name: counts[name] / taken / 1e9 for name, taken in seconds.items()}
    written = {f"{name} GB/s": rates[f"{name} {threads}"] * dtype.itemsize for name, dtype in DTYPES.items()}
    return {"type": fmt.name, **rates, **written, "noise": noise}


def layers(names: Sequence[str], threads: int, runs: int) -> Iterator[dict[str, object]]:
    """Milliseconds of linear layers, dense and over packed weights."""
    formats = [FORMATS[name] for name in names]
    for layer, shape in SHAPES.items():
        torch.set_num_threads(threads)
        dense = {name: torch.randn(shape).mul(0.02).to(dtype) for name, dtype in DTYPES.items()}
        parts = {fmt.name: packed(fmt, shape) for fmt in formats}
        for rows in ROWS:
            inputs = {name: torch.randn(rows, shape[1]).to(dtype) for name, dtype in DTYPES.items()}
            products = {name: lambda x=x, w=dense[name]: F.linear(x, w) for name, x in inputs.items()}
            seconds, _ = fastest(products, 2, dict.fromkeys(products, threads))
            best = min(seconds, key=seconds.get)
            for fmt in formats:
                work: Work = {"dense": products[best]}
                work["packed"] = lambda fmt=fmt, x=inputs[best], parts=parts: cpu_dequant.linear(
                    x, fmt, parts[fmt.name]
                )
                seconds, noise = fastest(work, runs, dict.fromkeys(work, threads))
                yield {
                    "layer": layer,
                    "shape": list(shape),
                    "rows": rows,
                    "type": fmt.name,
                    "dense_dtype": best,
                    "dense_ms": 1e3 * seconds["dense"],
                    "packed_ms": 1e3 * seconds["packed"],
                    "ratio": seconds["packed"] / seconds["dense"],
                    "noise": noise,
                }


def table_of_unpacking(rows: list[dict[str, object]], threads: int) -> Table:
    table = Table(title=f"unpacking, billions of weights per second, {device_name()}")
    rates = ["slice", *(f"{name} {count}" for name in DTYPES for count in sorted({1, threads})), "codec", "gguf"]
    for column in ("type", *rates, *(f"{name} GB/s" for name in DTYPES), "x gguf", "noise"):
        table.add_column(column, justify="left" if column == "type" else "right")
    for row in rows:
        times = f"{row[f'float32 {threads}'] / row['gguf']:.0f}" if "gguf" in row else ""
        cells = [f"{row[name]:.3g}" if name in row else "" for name in (*rates, *(f"{n} GB/s" for n in DTYPES))]
        table.add_row(row["type"], *cells, times, f"{row['noise']:.2f}")
    return table


def table_of_layers(rows: list[dict[str, object]], threads: int) -> Table:
    table = Table(title=f"linear, {threads} threads, {device_name()}")
    for column in ("layer", "weight", "rows", "type", "dense ms", "in", "packed ms", "x dense", "noise"):
        table.add_column(column, justify="left" if column in ("layer", "type", "in") else "right")
    for row in rows:
        times = [f"{row[name]:.2f}" for name in ("dense_ms", "packed_ms", "ratio", "noise")]
        weight = " x ".join(map(str, row["shape"]))
        table.add_row(row["layer"], weight, str(row["rows"]), row["type"], times[0], row["dense_dtype"], *times[1:])
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="+", choices=TYPES, metavar="TYPE", help="all are unpacked, some multiplied")
    parser.add_argument("--runs", type=int, default=4, help="rounds that make nothing faster")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speeds = [unpacking(FORMATS[name], args.threads, args.runs) for name in args.types or TYPES]
    console = Console(width=150)
    console.print(table_of_unpacking(speeds, args.threads))
    times = list(layers(args.types or MULTIPLIED, args.threads, args.runs))
    console.print(table_of_layers(times, args.threads))
    if args.save:
        torch.set_num_threads(args.threads)
        result = {"threads": args.threads, "runs": args.runs, "unpacking": speeds, "linear": times}
        print(f"wrote {write_result('cpu_linear', result)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
