"""Times of short pieces of device work, compared fairly: warm, out of cold caches, in turns, with their spread.

On CUDA each contender is captured into a graph of many calls, so that launches do not count, and its calls rotate over
copies of the weights that together exceed the second-level cache several times. Contenders take turns, A B C B A; the
figures are medians with the 20th and 80th percentile. On a CPU the calls are timed as they are.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch

CALLS, ROUNDS = 12, 7
CACHES = 4  # of the second level that the rotated copies exceed
COPIES = 64  # at most


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    median: float
    p20: float
    p80: float

    def row(self) -> dict[str, float]:
        return {"us": round(self.median * 1e6, 2), "p20": round(self.p20 * 1e6, 2), "p80": round(self.p80 * 1e6, 2)}


Call = Callable[[int], object]  # the number of the copy to work on


def copies_for(nbytes: int, device: torch.device) -> int:
    """How many copies of `nbytes` no cache can hold."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(COPIES, -(-CACHES * cache // nbytes)))


def compare(
    contenders: Mapping[str, Call], copies: int, device: torch.device, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Times of the contenders, each called with copy numbers 0 to copies - 1 in turn."""
    calls = max(CALLS, copies) if device.type == "cuda" else copies
    runs = {name: runner(call, calls, copies, device) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in runs if turn % 2 else reversed(runs):
            samples[name].append(runs[name]() / calls)
    return {name: summary(seconds) for name, seconds in samples.items()}


def summary(seconds: list[float]) -> Timing:
    fifths = quantiles(seconds, n=5, method="inclusive")
    return Timing(median(seconds), fifths[0], fifths[-1])


def runner(call: Call, calls: int, copies: int, device: torch.device) -> Callable[[], float]:
    """What runs all the calls once more and returns the seconds that took."""
    if device.type != "cuda":
        return lambda: timed(call, calls, copies)
    for copy in range(2):  # compiles, chooses algorithms
        call(copy % copies)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    run()
    return run


def timed(call: Call, calls: int, copies: int) -> float:
    start = time.perf_counter()
    for i in range(calls):
        call(i % copies)
    return time.perf_counter() - start


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Bytes per second of a copy within the device's memory, reading and writing counted."""
    source = torch.randint(256, (2, nbytes), dtype=torch.uint8, device=device)
    timing = compare({"copy": lambda i: source[i].copy_(source[1 - i])}, 2, device)["copy"]
    return 2 * nbytes / timing.median


def product_rate(device: torch.device, dtype: torch.dtype, m: int = 4608, n: int = 21504, k: int = 3072) -> float:
    """Operations per second of a dense product of random numbers."""
    x, weights = torch.randn(m, k, device=device, dtype=dtype), torch.randn(2, n, k, device=device, dtype=dtype)
    timing = compare({"product": lambda i: x @ weights[i].t()}, 2, device)["product"]
    return 2 * m * n * k / timing.median
