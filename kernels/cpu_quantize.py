"""Quantize on the CPU, with all its cores: which loop serves a format, and who runs it.

As many threads as torch uses each take whole batches of their own, and the sums are added in the order of the batches:
neither bytes nor sums depend on the number of threads. The loops decide (codes and scales), the codecs write the bytes.
"""

from collections.abc import Callable, Iterable
from math import fsum

import numpy as np
import torch
from torch import Tensor

from flux_quant.codecs import fp8
from flux_quant.codecs.choice import Choice, half_bytes
from flux_quant.codecs.search import SEARCHES, Affine, Search, Symmetric, row_roots, settled
from flux_quant.formats import FORMATS, QuantFormat
from flux_quant.kernels.cpu_threads import Spread, compiled, threads_for

LANES = 16  # groups that a loop works on side by side
TASK = 1 << 17  # weights per sum of squares
SLICE = 16 * TASK  # weights that a thread takes at a time: many enough that the interpreter's share is small
STORED = 1 << 19  # weights whose bytes a single thread puts together at a time
COUNTED, MOST_SHARES = 1 << 20, 64  # pairs of weights per histogram at least, histograms at most
PLAIN = {"q8_0": (0, 127, 127), "q5_1": (2, 31, 31), "q5_0": (1, -16, 31), "q4_1": (2, 15, 15), "q4_0": (1, -8, 15)}
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in `cpu_batch.read`

Parts = tuple[Tensor, ...]
Sums = tuple[float, float]


def supports(format_name: str) -> bool:
    return format_name in SEARCHES or format_name in PLAIN or format_name in ("fp8", "fp8_plain")


def quantize(
    format_name: str, weight: Tensor, importance: Tensor | None = None, search: bool = True
) -> tuple[Parts, float, float]:
    """weight (..., K) float32, float16 or bfloat16 on the CPU -> its parts, sums of squares of weight and of error.

    importance (K,) >= 0 is the mean square of each input of the layer. Without `search` the legacy types are ggml's
    reference, byte for byte; Q8_0 and FP8 have nothing to search, the other types always do.
    """
    if weight.dtype not in KINDS:
        weight = weight.float()
    weight = weight.detach().contiguous()
    with threads_for(weight.numel(), SLICE) as spread:
        if format_name not in SEARCHES and format_name not in PLAIN:
            return quantize_fp8(format_name, weight, spread)
        fmt, piece = FORMATS[format_name], STORED if spread is map else SLICE
        data = torch.empty(weight.numel() // fmt.block, fmt.nbytes((1, fmt.block)), dtype=torch.uint8)
        if format_name in SEARCHES and (search or format_name not in PLAIN):
            work = searching(format_name, weight, importance, data, piece)
        else:
            work = rounding(format_name, weight, data, piece)
        starts, count = range(0, weight.numel(), SLICE), weight.numel()
        sums = [
            pair for pairs in spread(lambda first: work(first, min(SLICE, count - first)), starts) for pair in pairs
        ]
    signal, noise = (fsum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    return (data.view(fmt.parts[0].shape(tuple(weight.shape))),), signal, noise


Work = Callable[[int, int], list[Sums]]  # first weight, how many -> sums of squares of weight and error, per task


def searching(name: str, weight: Tensor, importance: Tensor | None, data: Tensor, piece: int) -> Work:
    """What packs a slice of the weight into its rows of `data` (blocks, bytes), by `codecs.search`."""
    search, fmt = SEARCHES[name], FORMATS[name]
    groups, columns = fmt.block // search.group, weight.shape[-1]
    roots = np.empty(0, np.float32)
    if importance is not None:
        if search.by_row:
            roots = row_roots(weight.view(-1, columns)).numpy()
        importance = repeated(settled(importance), columns + 2 * LANES * LANES)
    weights = (importance, np.float32(search.spread or 0), roots)
    kernel, rule = kernel_of(search, importance is not None)

    def work(start: int, count: int) -> list[Sums]:
        blocks = count // fmt.block
        codes = torch.empty(blocks, fmt.block, dtype=torch.uint8)
        scales, mins = torch.empty(2, blocks, groups, dtype=torch.int16)
        d, m = torch.empty(2, blocks, 1)
        out = tuple(part.view(-1).numpy() for part in (codes, scales, d, mins, m))
        shape = (start, count, search.group, groups)
        source = source_of(weight)

        def run(batches: tuple[int, int]) -> Sums:
            room = None if importance is None else np.empty(LANES * search.group, np.float32)
            return kernel(source, batches, shape, room, *weights, *rule, out)

        sums = [run(batches) for batches in tasks(count, LANES * search.group)]
        store(fmt, Choice(codes, d, m, scales, mins), data[start // fmt.block :][:blocks], piece)
        return sums

    return work


def kernel_of(search: Search, weighted: bool) -> tuple[Callable, tuple[object, ...]]:
    """The loop for a search, and what it wants to know of its rule."""
    rule, trials, (lowest, highest) = search.rule, search.trials(weighted), search.scales or (0, 0)
    if isinstance(rule, Affine):
        trials = [(a / rule.high, rule.high / (1 - (a + b) / rule.high)) for a, b in trials]
        return compiled("cpu_affine", "affine"), (np.float32(trials), np.float32(highest), np.float32(rule.high))
    bounds = (np.float32(-rule.high - 1), np.float32(rule.high)) if isinstance(rule, Symmetric) else (None, None)
    integers = (np.float32(lowest), np.float32(highest), len(search.neighbours))
    return compiled("cpu_centred", "centred"), (np.float32(trials), integers, *bounds)


def rounding(name: str, weight: Tensor, data: Tensor, piece: int) -> Work:
    """What packs a slice of the weight into its rows of `data` (blocks, bytes), as ggml's reference does."""
    fmt = FORMATS[name]
    rule, divisor, top = PLAIN[name]
    kernel, block = compiled("cpu_plain", "plain"), fmt.block

    def work(start: int, count: int) -> list[Sums]:
        rows = data[start // block :][: count // block]
        codes = rows if fmt.store is None else torch.empty(len(rows), block, dtype=torch.uint8)
        d, m = torch.empty(2, len(rows), 1)
        out = (codes.view(-1).numpy(), codes.shape[1], codes.shape[1] - block, d.view(-1).numpy(), m.view(-1).numpy())
        source = source_of(weight)

        def run(batches: tuple[int, int]) -> Sums:
            return kernel(source, batches, start, count, rule, np.float32(divisor), np.float32(top), out)

        sums = [run(batches) for batches in tasks(count, LANES * block)]
        if fmt.store is None:
            rows[:, :2] = half_bytes(d)
        else:
            store(fmt, Choice(codes, d, m), rows, piece)
        return sums

    return work


def store(fmt: QuantFormat, choice: Choice, out: Tensor, piece: int) -> None:
    """The bytes of a choice, so many weights at a time.

    Torch passes over them a dozen times: in small pieces they stay in the cache, but more calls hold the interpreter's
    lock, which costs several threads more than that gains.
    """
    step = piece // fmt.block
    for first in range(0, len(out), step):
        rows = slice(first, first + step)
        out[rows] = fmt.store(Choice(*(None if part is None else part[rows] for part in choice)))


def quantize_fp8(name: str, weight: Tensor, spread: Spread) -> tuple[Parts, float, float]:
    """FP8 by the codec: every value of 16 bits once and the weights by table; few weights and float32 one by one."""
    scale = fp8.scale_for(largest_of(weight, spread)) if name == "fp8" else torch.ones(())
    data = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    flat, codes = weight.view(-1), data.view(-1)
    if weight.dtype == torch.float32 or weight.numel() < 4 << 16:
        sums = []
        for stored, target in zip(flat.split(fp8.SLICE), codes.split(fp8.SLICE), strict=True):
            values = stored.float()
            target.copy_(fp8.cast(values / scale))
            sums.append((square_sum(values), square_sum(values - target.float() * scale)))
        signal, noise = (fsum(column) for column in zip(*sums, strict=True)) if sums else (0.0, 0.0)
    else:
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(weight.dtype).float()
        table = fp8.cast(values / scale)
        counts = count_and_look_up(flat, table, codes, spread)
        seen = counts > 0
        values, packed, counts = values[seen].double(), (table[seen].float() * scale).double(), counts[seen]
        signal, noise = ((counts * part.square()).sum().item() for part in (values, values - packed))
    return ((data, scale) if name == "fp8" else (data,)), signal, noise


def largest_of(weight: Tensor, spread: Spread) -> Tensor:
    """The largest magnitude, () float32."""
    if not weight.numel():
        return torch.zeros(())
    if weight.dtype == torch.float32:
        low, high = weight.aminmax()
        return torch.maximum(-low, high)
    kernel, source = compiled("cpu_fp8", "largest_magnitude"), source_of(weight)
    found = spread(lambda ends: kernel(source, *ends), tasks(weight.numel() // LANES * LANES, LANES))
    rest = weight.view(-1)[weight.numel() // LANES * LANES :].float().abs()
    return torch.tensor(max(*found, *rest.tolist(), 0.0))


def count_and_look_up(weight: Tensor, table: Tensor, codes: Tensor, spread: Spread) -> Tensor:
    """codes = table of the bits of weight; how often each of the 65536 values occurs."""
    kernel, halves = compiled("cpu_fp8", "look_up"), halves_of(weight)
    table, codes = (part.view(torch.uint8).numpy() for part in (table, codes))
    share = max(COUNTED, -(-len(halves) // MOST_SHARES))

    def run(first: int) -> np.ndarray:
        counts = np.zeros((4, 1 << 16), np.uint32)
        kernel(halves, first, min(first + share, len(halves)), table, codes, counts)
        return counts.sum(axis=0, dtype=np.int64)

    counts = sum(spread(run, range(0, len(halves), max(share, 1))), np.zeros(1 << 16, np.int64))
    return torch.from_numpy(counts)


def tasks(count: int, batch: int) -> Iterable[tuple[int, int]]:
    """(first, last) batch of every task: the same for any number of threads."""
    batches, step = -(-count // batch), TASK // batch
    return [(first, min(first + step, batches)) for first in range(0, batches, step)]


def source_of(weight: Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """The weight for `cpu_batch.read`: its bits if it has 16, its values if it has 32."""
    kind, flat = KINDS[weight.dtype], weight.view(-1)
    halves = np.empty(0, np.uint16) if kind == 0 else halves_of(weight)
    return halves, (flat.numpy() if kind == 0 else np.empty(0, np.float32)), kind


def halves_of(weight: Tensor) -> np.ndarray:
    return weight.view(-1).view(torch.uint16).numpy()


def repeated(values: Tensor, length: int) -> np.ndarray:
    return np.resize(values.numpy(), length)


def square_sum(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item() ** 2
