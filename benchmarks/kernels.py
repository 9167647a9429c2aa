"""Kernels on this device: unpacking, and linear layers at FLUX's and T5's shapes, checked and timed.

    python -I -m flux_quant.benchmarks.kernels [--formats q8_0,q4_k] [--seconds 120] [--small] [--save]

Columns: `dense`, torch's product with the weight in 16 bits; `ours`; `eager`, unpacking by a chain of torch operations
as GGUF loaders do today; `compiled`, the same chain under torch.compile; `int8`, `fp8`, our 8-bit products. Errors are
relative, against a product in float64 with the unpacked weight. Ceilings are measured in the same run. What `aims` asks
for comes first, torch.compile last; nothing is begun after --seconds; every row is written when it is known.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from flux_quant.benchmarks import eager, pointwise
from flux_quant.benchmarks.journal import FAILURES, Journal, Row
from flux_quant.benchmarks.machine import device_name
from flux_quant.benchmarks.random_weights import PLAIN, on_device, random_parts
from flux_quant.benchmarks.timing import Call, Timing, compare, copies_for, copy_bandwidth, product_rate
from flux_quant.formats import FORMATS, IN_MEMORY, QuantFormat
from flux_quant.kernels import dispatch

Shape = tuple[int, int]
UNPACKED: Shape = (21504, 3072)  # FLUX.1's widest layer
LAYERS: dict[Shape, tuple[int, ...]] = {  # (N, K) -> rows of input
    (21504, 3072): (4608,),
    (3072, 15360): (4608,),
    (9216, 3072): (1, 16, 77, 512, 4096),
    (12288, 3072): (512, 4096),
    (3072, 12288): (512, 4096),
    (3072, 3072): (512, 4096),
    (18432, 3072): (1,),
    (4096, 4096): (77, 512),
    (10240, 4096): (512,),
    (4096, 10240): (512,),
}
AIMED, AIMED_VECTOR = (4608, 512, 1), (18432, 3072)  # rows of input that there are aims for; of one row: this layer
COMPILED: Shape = (9216, 3072)  # where torch.compile is tried: it takes seconds per format
ONE_CASE, COMPILING = 1.5, 12.0  # seconds that have to be left
FIRST = ("q8_0", "q4_k", "fp8", "q5_k", "q6_k", "q4_0", "int8", "fp8_rows")  # most files are in; then the others
SAMPLED = 64  # rows of the product that are checked


def formats(device: torch.device, names: Sequence[str] = ()) -> dict[str, QuantFormat]:
    """As they are kept on the device."""
    packed = [fmt.name for fmt in FORMATS.values() if not fmt.is_plain and (not names or fmt.name in names)]
    found = {name: on_device(name, device) for name in packed}
    found |= {} if names else {"fp8_rows": IN_MEMORY["fp8_rows"]}
    return {name: found[name] for name in in_order(found)}


def in_order(names: Iterable[str]) -> list[str]:
    """The most important formats first."""
    return sorted(names, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def copies_of(fmt: QuantFormat, shape: Shape, device: torch.device) -> list[tuple[Tensor, ...]]:
    """A random weight as often as no cache can hold."""
    parts = random_parts(fmt, shape, device)
    count = copies_for(sum(part.nbytes for part in parts), device)
    return [parts, *(tuple(part.clone() for part in parts) for _ in range(count - 1))]


def file_form(fmt: QuantFormat) -> QuantFormat:
    return FORMATS[fmt.native] if fmt.native else fmt


def eager_weight(fmt: QuantFormat, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    if len(parts) == 1 and fmt.block > 1:
        return eager.unpack(fmt, parts[0], dtype)
    weight = parts[0].to(dtype)
    return weight * parts[1].to(dtype) if len(parts) > 1 else weight


def unpacking_row(
    name: str, order: QuantFormat, shape: Shape, device: torch.device, dtype: torch.dtype, ceiling: float
) -> Row:
    """Time of unpacking a whole weight, bytes moved per second, and whether every value is the codec's, rounded."""
    parts, out = copies_of(order, shape, device), torch.full(shape, torch.nan, dtype=dtype, device=device)
    dispatch.dequantize(order, parts[0], dtype, out)
    wrong = int((out != order.unpack(*parts[0]).to(dtype)).sum())
    times = compare({"ours": unpacking(order, parts, dtype, out)}, len(parts), device)
    rate = (order.nbytes(shape) + out.nbytes) / times["ours"].median
    row = {"format": name, "order": "planar" if order.native else "native", "wrong": wrong}
    return row | times["ours"].row() | {"gb_per_s": rate / 1e9, "of_copy": rate / ceiling}


def product(x: Tensor, weights: Sequence, unpack: Callable[..., Tensor] | None = None) -> Call:
    """torch's product with copy i, unpacked first if it is packed."""
    if unpack is None:
        return lambda i: F.linear(x, weights[i % len(weights)])
    return lambda i: F.linear(x, unpack(*weights[i % len(weights)]))


def ours(x: Tensor, fmt: QuantFormat, parts: list[tuple[Tensor, ...]]) -> Call:
    return lambda i: dispatch.linear(x, fmt, parts[i % len(parts)])


def unpacking(fmt: QuantFormat, parts: list[tuple[Tensor, ...]], dtype: torch.dtype, out: Tensor) -> Call:
    return lambda i: dispatch.dequantize(fmt, parts[i], dtype, out)


@dataclass
class Layer:
    """One weight in a format, as often as no cache can hold it, packed as the device has it and as files do."""

    name: str
    fmt: QuantFormat
    shape: Shape
    device: torch.device
    dtype: torch.dtype
    chain: Callable[..., Tensor] | None = None  # compiled

    def __post_init__(self) -> None:
        self.parts = copies_of(self.fmt, self.shape, self.device)
        self.native = copies_of(file_form(self.fmt), self.shape, self.device)

    def row(self, m: int, dense: list[Tensor]) -> Row:
        """How exact, how fast, by which way, for m rows of input."""
        x, file_fmt = torch.randn(m, self.shape[1], device=self.device, dtype=self.dtype), file_form(self.fmt)
        contenders = {
            "dense": product(x, dense),
            "ours": ours(x, self.fmt, self.parts),
            "eager": product(x, self.native, lambda *parts: eager_weight(file_fmt, parts, self.dtype)),
        }
        if self.chain is not None:
            contenders["compiled"] = product(x, self.native, self.chain)
        times = compare(contenders, max(len(self.parts), len(self.native), len(dense)), self.device)
        return {
            "format": self.name,
            "n": self.shape[0],
            "k": self.shape[1],
            "m": m,
            "way": dispatch.way_for(self.fmt, m, self.shape, self.dtype, self.device, self.parts[0]).path,
            "error": relative_error(x, self.fmt, self.parts[0]),
            **{who: timing.row() for who, timing in times.items()},
            **rates(times["ours"], times["dense"], self.fmt, self.shape, m),
        }


def is_aim(shape: Shape, m: int) -> bool:
    return m in AIMED and (m > 1 or shape == AIMED_VECTOR)


def passes(layers: dict[Shape, tuple[int, ...]], compiled: Shape) -> Iterator[tuple[Shape, tuple[int, ...], bool]]:
    """(layer, rows of input, whether torch.compile takes part): aims, the rest, then torch.compile's layer anew."""
    for wanted in (True, False):
        for shape, counts in layers.items():
            some = tuple(m for m in counts if is_aim(shape, m) == wanted)
            if some:
                yield shape, some, False
    yield compiled, layers[compiled], True


def rates(ours: Timing, dense: Timing, fmt: QuantFormat, shape: Shape, m: int) -> dict[str, float]:
    moved = fmt.nbytes(shape) + 2 * m * sum(shape)
    return {
        "of_dense": dense.median / ours.median,
        "gb_per_s": moved / ours.median / 1e9,
        "tflop_per_s": 2 * m * shape[0] * shape[1] / ours.median / 1e12,
    }


def compiled_chain(
    fmt: QuantFormat, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Callable[..., Tensor] | None:
    """The eager chain under torch.compile; None where that fails."""
    torch._dynamo.reset()
    try:
        chain = torch.compile(lambda *parts: eager_weight(fmt, parts, dtype), dynamic=False)
        chain(*random_parts(fmt, shape, device))
    except Exception as error:  # any: it is somebody else's compiler
        print(f"torch.compile of {fmt.name}: {type(error).__name__}", file=sys.stderr)
        return None
    return chain


def relative_error(x: Tensor, fmt: QuantFormat, parts: tuple[Tensor, ...]) -> float:
    """Of `linear` against float64, on some rows of x."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), SAMPLED), device=x.device).long()
    out = dispatch.linear(x, fmt, parts)[rows]
    exact = F.linear(x[rows].double(), fmt.unpack(*parts).double())
    return ((out - exact).norm() / exact.norm()).item()


def small(layers: dict[Shape, tuple[int, ...]]) -> dict[Shape, tuple[int, ...]]:
    """Every case on an eighth of the size, to see that it runs."""
    return {eighth(shape): tuple(min(m, 32) for m in counts) for shape, counts in layers.items()}


def eighth(shape: Shape) -> Shape:
    return shape[0] // 8, max(256, shape[1] // 8 // 256 * 256)


def measure(journal: Journal, device: torch.device, names: Sequence[str] = (), tiny: bool = False) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen, layers = formats(device, names), small(LAYERS) if tiny else LAYERS
    copy = copy_bandwidth(device, 1 << 22 if tiny else 1 << 30)
    rate = product_rate(device, dtype, *((64, 64, 64) if tiny else ()))
    journal.facts |= {"dtype": str(dtype), "copy_gb_per_s": copy / 1e9, "product_tflop_per_s": rate / 1e12}
    sections = {name: journal.facts.setdefault(name, []) for name in ("pointwise", "unpacking", "linear")}
    shape = eighth(UNPACKED) if tiny else UNPACKED
    for name, fmt in chosen.items():
        for order in dict.fromkeys((fmt, file_form(fmt))):
            what = {"what": "unpacking", "format": name, "order": "planar" if order.native else "native"}
            work = partial(unpacking_row, name, order, shape, device, dtype, copy)
            journal.into(sections["unpacking"], what, work, ONE_CASE)
    compiled = eighth(COMPILED) if tiny else COMPILED
    for number, (shape, counts, chained) in enumerate(passes(layers, compiled)):
        if number == 1:  # the largest layer is through; these are short
            found = list(pointwise.measure(device, dtype, copy, tiny)) if journal.left > ONE_CASE else []
            sections["pointwise"].extend(found)
        measure_layer(journal, sections["linear"], chosen, shape, counts, (device, dtype), chained, tiny)


def measure_layer(
    journal: Journal,
    rows: list[Row],
    chosen: dict[str, QuantFormat],
    shape: Shape,
    counts: tuple[int, ...],
    place: tuple[torch.device, torch.dtype],
    chained: bool,
    tiny: bool,
) -> None:
    """All formats of a layer. Rows that there are already are replaced: by those that torch.compile took part in."""
    if journal.left < ONE_CASE:
        return journal.skip({"what": "linear", "n": shape[0], "k": shape[1], "m": list(counts)}, "no time was left")
    dense = [parts[0] for parts in copies_of(FORMATS[PLAIN[place[1]]], shape, place[0])]
    for name, fmt in chosen.items():
        if not fmt.fits(shape) or (chained and tiny and name != "q8_0"):
            continue
        what = {"what": "linear", "format": name, "n": shape[0], "k": shape[1]}
        if journal.left < (COMPILING if chained and not tiny else ONE_CASE):
            journal.skip(what | {"m": list(counts)}, "no time was left")
            continue
        try:
            chain = compiled_chain(file_form(fmt), shape, place[1], place[0]) if chained else None
            layer = Layer(name, fmt, shape, *place, chain)
        except FAILURES as error:
            journal.skip(what, f"{type(error).__name__}: {error}")
            continue
        for m in counts if chain or not chained else ():
            old = [row for row in rows if (row["format"], row["n"], row["k"], row["m"]) == (name, *shape, m)]
            if journal.into(rows, what | {"m": m}, partial(layer.row, m, dense), ONE_CASE) and old:
                rows.remove(old[0])


def tables(result: dict[str, object]) -> Iterator[Table]:
    ceilings = f"copy {result['copy_gb_per_s']:.0f} GB/s, product {result['product_tflop_per_s']:.1f} TFLOP/s"
    unpack = Table(title=f"Unpacking, {ceilings}")
    for column in ("format", "order", "wrong values", "us", "GB/s", "of copy"):
        unpack.add_column(column, justify="right")
    for row in result["unpacking"]:
        numbers = f"{row['us']:.1f}", f"{row['gb_per_s']:.0f}", f"{row['of_copy']:.2f}"
        unpack.add_row(row["format"], row["order"], str(row["wrong"]), *numbers)
    yield unpack
    points = Table(title="Pointwise")
    for column in ("what", "ours us", "torch us", "GB/s", "of copy"):
        points.add_column(column, justify="right")
    for row in result["pointwise"]:
        numbers = (
            f"{row['ours']['us']:.1f}",
            f"{row['torch']['us']:.1f}",
            f"{row['gb_per_s']:.0f}",
            f"{row['of_copy']:.2f}",
        )
        points.add_row(row["what"], *numbers)
    yield points
    linear = Table(title="Linear")
    contenders = ("dense", "ours", "eager", "compiled")
    for column in ("format", "N", "K", "M", "way", "error", *contenders, "of dense", "GB/s", "TFLOP/s"):
        linear.add_column(column, justify="right")
    for row in result["linear"]:
        place = row["format"], *(str(row[key]) for key in ("n", "k", "m")), row["way"], f"{row['error']:.1e}"
        times = (f"{row[who]['us']:.1f}" if who in row else "" for who in contenders)
        linear.add_row(*place, *times, *(f"{row[key]:.2f}" for key in ("of_dense", "gb_per_s", "tflop_per_s")))
    yield linear


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default="", help="names with commas between them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after them")
    parser.add_argument("--small", action="store_true", help="every case on small shapes, to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    journal = Journal("kernels", args.seconds, args.save)
    measure(journal, device, [name for name in args.formats.split(",") if name], args.small)
    journal.write()
    console = Console(width=160)
    console.print(f"on {device_name()}")
    console.print(*tables(journal.facts))
    if args.save:
        print(f"wrote {journal.path}", file=sys.stderr)
    return 0 if journal.facts["unpacking"] else 1


if __name__ == "__main__":
    sys.exit(main())
