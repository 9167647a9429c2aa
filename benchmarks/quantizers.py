"""Error and speed of our quantizers beside ggml's own code (libgguf), per type and family of weights.

    python -I -m flux_quant.benchmarks.quantizers [--rows 512] [--columns 3072] [--threads 1] [--clock wall] [--save]

Errors are relative RMSE in percent, unpacked by ggml: its plain path (no weights), its weighted search with weights of
one, ours. Speeds are millions of weights per second on the same threads, and MB/s of BF16 that we read, input in the
cache or not as it comes. Both quantize from what they take: ggml float32, ours BF16. The process keeps to as many cores
as threads are asked for, which holds for ggml's own threads too. `--clock cpu` counts the processor time of one thread
instead, for machines that do other work at the same time.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import flux_quant
from flux_quant.benchmarks.machine import device_name, write_result
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.formats import FORMATS
from flux_quant.kernels import cpu_quantize

TYPES = tuple(name for name, fmt in FORMATS.items() if fmt.block > 1)
MODEL = Path(flux_quant.__file__).parent / "tiny_flux/diffusion_models/flux1-tiny.safetensors"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def families(rows: int, columns: int) -> dict[str, Tensor]:
    """Weights (rows, columns) BF16 by the name of their family."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    uniform = torch.rand(rows, columns, generator=generator) - 0.5
    out = {
        "Gaussian": normal(rows, columns),
        "Student-t": normal(rows, columns) / normal(4, rows, columns).square().mean(dim=0).sqrt(),
        "Laplace": -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999999)),
        "log-normal": normal(rows, columns) * normal(columns).exp(),
        "trained": trained(rows, columns) / 0.03,
    }
    return {name: (weight * 0.03).to(torch.bfloat16) for name, weight in out.items()}


def trained(rows: int, columns: int) -> Tensor:
    """Pieces of (columns) weights from all over the shipped model, repeated where it is too small."""
    with open_checkpoint(MODEL) as reader:
        matrices = [n for n, info in reader.tensors.items() if len(info.shape) == 2 and info.shape[1] % 256 == 0]
        weights = torch.cat([load(reader, name).float().flatten() for name in sorted(matrices)])
    pieces = weights[: len(weights) // columns * columns].view(-1, columns)
    return pieces[torch.linspace(0, len(pieces) - 1, rows).long()]


class Ggml:
    """libgguf: ggml's quantizers. The library shares rows out to threads of its own, on the cores that it may use."""

    def __init__(self) -> None:
        import libgguf

        self.library = libgguf

    def quantize(self, name: str, weight: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        return self.library.quantize_rows(weight, self.library.GGMLQuantizationType[name.upper()], importance)

    def dequantize(self, name: str, data: np.ndarray) -> Tensor:
        kind = self.library.GGMLQuantizationType[name.upper()]
        return torch.from_numpy(self.library.dequantize_rows(data, kind))


def relative_error(weight: Tensor, values: Tensor) -> float:
    """Root of the mean squared error over that of the weight."""
    weight = weight.double()
    return ((weight - values).square().sum() / weight.square().sum()).sqrt().item()


def measure(name: str, weight: Tensor, ggml: Ggml, clock: Callable[[], float], runs: int) -> dict[str, float]:
    """Errors in percent and millions of weights per second of one type on one weight (N, K) BF16."""
    single, ones = weight.float().numpy(), np.ones(weight.shape[1], np.float32)
    work = {
        "ours": lambda: cpu_quantize.quantize(name, weight)[0][0].numpy(),
        "ggml_plain": lambda: ggml.quantize(name, single, None),
        "ggml_weighted": lambda: ggml.quantize(name, single, ones),
    }
    out = {}
    for who, quantize in work.items():
        seconds = []
        for _ in range(runs):
            start = clock()
            data = quantize()
            seconds.append(clock() - start)
        error = relative_error(weight, ggml.dequantize(name, data))
        out |= {f"{who}_error": 100 * error, f"{who}_mweights": weight.numel() / min(seconds) / 1e6}
    return out


def results(rows: int, columns: int, threads: int, clock: str, runs: int) -> Iterator[dict[str, object]]:
    torch.set_num_threads(threads)
    ggml = Ggml()
    weights = families(rows, columns)
    for name in TYPES:
        cpu_quantize.quantize(name, next(iter(weights.values()))[:1])  # compiled before it is timed
        for family, weight in weights.items():
            yield {"type": name, "family": family} | measure(name, weight, ggml, CLOCKS[clock], runs)


def table_of(rows: list[dict[str, object]], title: str) -> Table:
    table = Table(title=title)
    speeds = ("Mw/s", "MB/s", "plain MB/s", "weighted MB/s")
    for column in ("type", "family", "ours %", "ggml plain %", "weighted %", *speeds):
        table.add_column(column, justify="left" if column in ("type", "family") else "right")
    for column in ("x plain", "x weighted"):
        table.add_column(column, justify="right")
    for row in rows:
        errors = [f"{row[f'{who}_error']:.3f}" for who in ("ours", "ggml_plain", "ggml_weighted")]
        ours, plain, weighted = (row[f"{who}_mweights"] for who in ("ours", "ggml_plain", "ggml_weighted"))
        speeds = [f"{ours:.0f}", *(f"{2 * speed:.0f}" for speed in (ours, plain, weighted))]  # of BF16
        table.add_row(row["type"], row["family"], *errors, *speeds, f"{ours / plain:.1f}", f"{ours / weighted:.1f}")
    return table


def keep_to(cores: int) -> None:
    if not hasattr(os, "sched_setaffinity"):
        raise SystemExit("this system does not bind processes to cores: ggml would use all of them")
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < cores:
        raise SystemExit(f"{cores} threads are asked for, there are {len(mine)} cores")
    os.sched_setaffinity(0, mine[:cores])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads > 1:
        parser.error("processor time is compared on one thread")
    keep_to(args.threads)
    options = {"rows": args.rows, "columns": args.columns, "threads": args.threads, "clock": args.clock}
    rows = list(results(**options, runs=args.runs))
    title = f"weights {args.rows} x {args.columns}, {args.threads} threads, {args.clock} clock, {device_name()}"
    Console(width=140).print(table_of(rows, title))
    if args.save:
        print(f"wrote {write_result('quantizers', {**options, 'results': rows})}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
