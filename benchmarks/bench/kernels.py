"""Suite `kernels`: weights unpacked and multiplied on this device, each against what others do with the same weights.

dequantize: a whole weight into memory that is there already; ours; on a CPU the codec in torch operations, gguf-py, and
ours on one thread as gguf-py has one; on CUDA the chain of operations of today's loaders. Bound: the bytes at the rate
of a copy. linear: layers of T5-XXL on a CPU, of FLUX.1 and T5 on CUDA; ours, and torch's product with the dense weight.
Bound: the larger of operations and bytes. Weights rotate over copies that no cache holds on CUDA.
"""

from collections.abc import Iterator
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor

from flux_quant.benchmarks import kernels as layers
from flux_quant.benchmarks.bench.prepared import Prepared, Sampled
from flux_quant.benchmarks.bench.record import OURS, Row, Scalar
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite
from flux_quant.benchmarks.kernels import Shape, eager_weight, eighth, file_form, ours, product, unpacking
from flux_quant.benchmarks.random_weights import PLAIN
from flux_quant.benchmarks.timing import Call
from flux_quant.converters.mixes import ALIASES, BASES
from flux_quant.formats import FORMATS, QuantFormat
from flux_quant.kernels import dispatch

UNPACKED_ON_CPU: Shape = (4096, 4096)
LAYERS_ON_CPU: dict[Shape, tuple[int, ...]] = {  # of T5-XXL: (N, K) -> rows of input
    (4096, 4096): (1, 77, 512),
    (10240, 4096): (512,),
    (4096, 10240): (512,),
}
MULTIPLIED_ON_CPU = ("fp8", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_xs")
QUICK = ("q8_0", "q4_k")
SAME = ("fp8_plain",)  # fp8 without a scale: the same loops
CODEC, CHAIN, DENSE = "torch codec", "torch, unpacked first", "torch, dense"

Parts = list[tuple[Tensor, ...]]


def chosen(asked: Asked, device: torch.device) -> tuple[dict[str, QuantFormat], dict[str, QuantFormat]]:
    """Formats as they are kept on the device: those that are unpacked and multiplied, and those that are unpacked only.

    The bulk of the recipes that were asked for, else all; on a processor some are enough for the products.
    """
    wanted = [BASES.get(ALIASES.get(name, name), name) for name in asked.formats] or list(QUICK if asked.quick else ())
    found = {name: fmt for name, fmt in layers.formats(device, tuple(wanted)).items() if wanted or name not in SAME}
    if wanted or device.type == "cuda":
        return found, {}
    multiplied = {name: found.pop(name) for name in MULTIPLIED_ON_CPU}
    return multiplied, found


def cases(asked: Asked) -> Iterator[Case]:
    """The more telling ones first."""
    device = torch.device(asked.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    on_cpu = device.type != "cuda"
    unpacked_shape = UNPACKED_ON_CPU if on_cpu else layers.UNPACKED
    sizes = LAYERS_ON_CPU if on_cpu else layers.LAYERS
    if asked.quick:
        unpacked_shape, sizes = eighth(unpacked_shape), layers.small({UNPACKED_ON_CPU: (1, 32)})
    formats, others = chosen(asked, device)
    for name, fmt in formats.items():
        yield from unpacked(asked, name, fmt, unpacked_shape, dtype)
    for shape, counts in sizes.items():
        fitting = {name: fmt for name, fmt in formats.items() if fmt.fits(shape)}
        weights = Weights(fitting, shape, device, dtype)
        for rows in counts:
            yield from multiplied(asked, weights, rows)
    for name, fmt in others.items():
        yield from unpacked(asked, name, fmt, unpacked_shape, dtype)


# --- dequantize -------------------------------------------------------------------------------------------------------


def unpacked(asked: Asked, name: str, fmt: QuantFormat, shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    if not fmt.fits(shape):
        return
    device, threads = torch.device(asked.device), torch.get_num_threads()
    parts = Prepared(partial(layers.copies_of, fmt, shape, device))
    out = Prepared(partial(torch.empty, shape, dtype=dtype, device=device))
    moved = fmt.nbytes(shape) + shape[0] * shape[1] * dtype.itemsize
    expected = copy_bound(asked, moved)
    what = {"operation": "dequantize", "format": name, "n": shape[0], "k": shape[1]}

    def row(**values: object) -> Row:
        return Row(values={"weights": shape[0] * shape[1], "bytes_moved": moved} | values, expected=expected)

    def by_us() -> tuple[Call, int, Row]:
        copies, target = parts.get(), out.get()
        target.fill_(torch.nan)
        dispatch.dequantize(fmt, copies[0], dtype, target)
        wrong = int((target != fmt.unpack(*copies[0]).to(dtype)).sum())
        return unpacking(fmt, copies, dtype, target), len(copies), row(wrong_values=wrong)

    def by_codec() -> tuple[Call, int, Row]:
        copies, target = parts.get(), out.get()
        return lambda i: target.copy_(fmt.unpack(*copies[i])), len(copies), row()

    contenders = [(OURS, threads, by_us)]
    if device.type == "cuda":
        contenders.append((CHAIN, threads, partial(by_chain, file_form(fmt), shape, device, dtype, row)))
    else:
        contenders.append((CODEC, threads, by_codec))
    if device.type != "cuda" and fmt.block > 1:
        contenders.append((f"gguf-py {version('gguf')}", 1, partial(by_gguf, fmt, parts, row)))
        if threads > 1:
            contenders.append((OURS, 1, by_us))
    for subject, count, make in contenders:
        work = Sampled(make, device, count, asked.warm)
        place = what | ({} if device.type == "cuda" else {"threads": count})
        yield Case(place, work, subject, group=f"dequantize {name}", close=closing(work, parts, out))


def by_chain(fmt: QuantFormat, shape: Shape, device: torch.device, dtype: torch.dtype, row) -> tuple[Call, int, Row]:
    copies = layers.copies_of(fmt, shape, device)
    return lambda i: eager_weight(fmt, copies[i], dtype), len(copies), row()


def by_gguf(fmt: QuantFormat, parts: Prepared[Parts], row) -> tuple[Call, int, Row]:
    import gguf

    copies = [copy[0].numpy() for copy in parts.get()]
    kind = gguf.GGMLQuantizationType[fmt.name.upper()]
    return lambda i: gguf.quants.dequantize(copies[i], kind), len(copies), row()


def closing(work: Sampled, *shared: Prepared):
    def close() -> None:
        for one in (work.state, *shared):
            one.drop()

    return close


def copy_bound(asked: Asked, moved: int) -> dict[str, object]:
    rate = asked.limits.get("ram_copy_gb_per_s" if asked.device == "cpu" else "device_copy_gb_per_s")
    return {"bound_seconds": moved / rate / 1e9, "bound_by": "copy"} if rate else {}


# --- linear -----------------------------------------------------------------------------------------------------------


class Weights:
    """A layer's weight in several formats and dense, as often as no cache holds; made when they are used."""

    def __init__(self, formats: dict[str, QuantFormat], shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.formats, self.shape, self.device, self.dtype = formats, shape, device, dtype
        self.dense = Prepared(self.plain)
        self.packed = {name: Prepared(partial(layers.copies_of, fmt, shape, device)) for name, fmt in formats.items()}

    def plain(self) -> list[Tensor]:
        return [parts[0] for parts in layers.copies_of(FORMATS[PLAIN[self.dtype]], self.shape, self.device)]

    def drop(self) -> None:
        for one in (self.dense, *self.packed.values()):
            one.drop()


def multiplied(asked: Asked, weights: Weights, rows: int) -> Iterator[Case]:
    (n, k), device, dtype = weights.shape, weights.device, weights.dtype
    x = Prepared(lambda: torch.randn(rows, k, device=device, dtype=dtype))
    what = {"operation": "linear", "n": n, "k": k, "m": rows}
    flops = 2 * rows * n * k

    def expected(nbytes: int) -> dict[str, object]:
        return product_bound(asked, flops, nbytes + dtype.itemsize * rows * (n + k))

    def dense() -> tuple[Call, int, Row]:
        copies = weights.dense.get()
        row = Row(values={"operations": flops}, expected=expected(n * k * dtype.itemsize))
        return product(x.get(), copies), len(copies), row

    def packed(name: str, fmt: QuantFormat) -> tuple[Call, int, Row]:
        copies = weights.packed[name].get()
        way = dispatch.way_for(fmt, rows, weights.shape, dtype, device, copies[0]).path
        error = layers.relative_error(x.get(), fmt, copies[0])
        row = Row(values={"operations": flops, "relative_error": error, "way": way})
        row.expected = expected(fmt.nbytes(weights.shape))
        return ours(x.get(), fmt, copies), len(copies), row

    contenders = [(PLAIN[dtype], DENSE, dense)]
    contenders += [(name, OURS, partial(packed, name, fmt)) for name, fmt in weights.formats.items()]
    for name, subject, make in contenders:
        work = Sampled(make, device, warm=asked.warm)
        close = closing(work, x, *([weights] if (name, subject) == contenders[-1][:2] else []))
        yield Case(what | {"format": name}, work, subject, group=f"linear {n} {k} {rows}", close=close)


def product_bound(asked: Asked, flops: float, moved: int) -> dict[str, object]:
    if asked.device == "cpu":
        rate = (asked.limits.get("cpu_tflop_per_s") or {}).get("fp32")
    else:
        rate = (asked.limits.get("gpu_tflop_per_s") or {}).get("bf16")
    copies = copy_bound(asked, moved)
    if not rate or not copies:
        return {}
    seconds, by = max((flops / rate / 1e12, "compute"), (copies["bound_seconds"], "copy"))
    return {"bound_seconds": seconds, "bound_by": by}


def weights(asked: Asked) -> dict[str, Scalar]:
    return {"kind": "random", "name": "random weights"}


SUITE = Suite("kernels", "weights unpacked and multiplied on this device, beside what others do", cases, weights)
