"""8-bit products at FLUX's shapes beside torch's in 16 bits: every way that this device has.

    python -I -m flux_quant.benchmarks.products8 [--seconds 35] [--small] [--save]

Times include quantizing the activations. `int8 from q4_k`: the weight stays packed and is expanded at every call.
Errors are relative, against float64 with the weight before it was requantized.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from flux_quant.benchmarks.journal import FAILURES, Journal
from flux_quant.benchmarks.machine import device_name
from flux_quant.benchmarks.random_weights import PLAIN, on_device, random_parts
from flux_quant.benchmarks.timing import Call, compare, copies_for
from flux_quant.formats import FORMATS, IN_MEMORY, QuantFormat, format_named
from flux_quant.kernels import eight_bit, fallback, fp8, int8_torch
from flux_quant.kernels.eight_bit import Product

Shape = tuple[int, int]
Parts = tuple[Tensor, ...]
LAYERS = {(21504, 3072): (4608,), (3072, 15360): (4608,), (9216, 3072): (512, 4096), (3072, 3072): (512, 4096)}
SMALL = {(768, 256): (40,), (256, 512): (3, 40)}
SAMPLED = 64
ONE_SHAPE = 4.0  # seconds that have to be left


def ways(
    shape: Shape, rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[QuantFormat, Parts, Product]]:
    """Name of each way: the format, the parts of a weight in it, and what `eight_bit.linear` is told."""
    source = on_device("q8_0", device)
    parts = random_parts(source, shape, device)
    stored = int8_torch.weight_rows(source, parts, eight_bit.group_for(shape[1]))
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    triton = fallback.triton_for(device) is None
    found = {}
    for way in (eight_bit.TMA, eight_bit.TRITON, eight_bit.INT_MM):
        if int8_torch.obstacle(way, capability, rows, *shape) is None and (triton or way == eight_bit.INT_MM):
            found[f"int8 by {way}"] = IN_MEMORY["int8_rows"], stored, Product(way, "")
    fmt = IN_MEMORY[f"{on_device('q4_k', device).name} as int8"]
    best = eight_bit.int8_product(rows, shape, device)
    if best.way:
        packed = random_parts(on_device("q4_k", device), shape, device)
        scale = int8_torch.weight_rows(on_device("q4_k", device), packed, eight_bit.group_for(shape[1]))[1]
        found["int8 from q4_k"] = fmt, (*packed, scale), best
    for way in fp8.fp8_ways(device, dtype):
        name = {"tensor": "fp8 as fp8", "row": "fp8_rows as fp8"}[way]
        found[f"fp8 per {way}"] = (
            IN_MEMORY[name],
            random_parts(format_named(IN_MEMORY[name].base), shape, device),
            Product(way, ""),
        )
    return found


def measure(journal: Journal, device: torch.device, small: bool = False) -> None:
    """Rows of every way, the shapes that there are aims for first; nothing is begun when no time is left."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for shape, counts in (SMALL if small else LAYERS).items():
        what = {"n": shape[0], "k": shape[1]}
        if journal.left < ONE_SHAPE:
            journal.skip(what | {"m": list(counts)}, "no time was left")
            continue
        dense = random_parts(FORMATS[PLAIN[dtype]], shape, device)[0]
        copies = copies_for(dense.nbytes, device)
        weights = [dense, *(dense.clone() for _ in range(copies - 1))]
        for m in counts:
            try:
                found = list(rows_of(shape, m, dtype, device, weights))
            except FAILURES as error:
                journal.skip(what | {"m": m}, f"{type(error).__name__}: {error}")
                continue
            journal.rows += found
            journal.write()


def rows_of(
    shape: Shape, m: int, dtype: torch.dtype, device: torch.device, weights: list[Tensor]
) -> Iterator[dict[str, object]]:
    """All ways in turns; one that fails here is told, the others go on."""
    x, copies = torch.randn(m, shape[1], device=device, dtype=dtype), len(weights)
    found = ways(shape, m, dtype, device)
    calls = {"dense": dense_call(x, weights)}
    for name, way in found.items():
        try:
            calls[name] = eight_bit_call(x, *way, copies)
            calls[name](0)
        except FAILURES as error:
            del calls[name]
            yield {
                "way": name,
                "n": shape[0],
                "k": shape[1],
                "m": m,
                "failed": f"{type(error).__name__}: {error}"[:300],
            }
    times = compare(calls, copies, device)
    for name, timing in times.items():
        row = {"way": name, "n": shape[0], "k": shape[1], "m": m} | timing.row()
        row["of_dense"] = times["dense"].median / timing.median
        row["tflop_per_s"] = 2 * m * shape[0] * shape[1] / timing.median / 1e12
        yield row | ({"error": error_of(x, *found[name])} if name in found else {})


def dense_call(x: Tensor, weights: list[Tensor]) -> Call:
    return lambda i: F.linear(x, weights[i])


def eight_bit_call(x: Tensor, fmt: QuantFormat, parts: Parts, way: Product, copies: int) -> Call:
    rotated = [parts, *(tuple(part.clone() for part in parts) for _ in range(copies - 1))]
    return lambda i: eight_bit.linear(x, fmt, rotated[i], None, way)


def error_of(x: Tensor, fmt: QuantFormat, parts: Parts, way: Product) -> float:
    rows = torch.linspace(0, len(x) - 1, min(len(x), SAMPLED), device=x.device).long()
    exact = F.linear(x[rows].double(), fmt.unpack(*parts).double())
    return ((eight_bit.linear(x, fmt, parts, None, way)[rows] - exact).norm() / exact.norm()).item()


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no shape after them")
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    journal = Journal("products8", args.seconds, args.save)
    measure(journal, device, args.small)
    journal.write()
    table = Table(title=f"8-bit products on {device_name()}")
    for column in ("way", "N", "K", "M", "us", "of dense", "TFLOP/s", "error"):
        table.add_column(column, justify="right")
    for row in (row for row in journal.rows if "us" in row):
        place = (str(row[key]) for key in ("way", "n", "k", "m"))
        error = f"{row['error']:.1e}" if "error" in row else ""
        table.add_row(*place, f"{row['us']:.1f}", f"{row['of_dense']:.2f}", f"{row['tflop_per_s']:.2f}", error)
    Console(width=100).print(table)
    if args.save:
        print(f"wrote {journal.path}", file=sys.stderr)
    return 0 if journal.rows else 1


if __name__ == "__main__":
    sys.exit(main())
