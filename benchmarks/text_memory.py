"""T5-XXL from files of full size with random weights: made, encoded with, and watched while that happens.

What counts is VmHWM, the largest resident size of the process as the kernel keeps it: RssAnon (libraries' data,
activations, scratch) and RssFile (pages of mapped files that the process has touched: libraries and the encoder's
file) together. Pages that were read ahead into the system's cache belong to no process. Linux only.

Seconds are those of a clock, and those of the processor (of all threads together, in waiting for nothing), which other
work on the machine does not change much. Measured by the suite `text` of `flux-quant bench`.
"""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from flux_quant.benchmarks.random_weights import SPREAD, random_parts
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.gguf_io import model_metadata
from flux_quant.converters.t5_gguf import t5_metadata
from flux_quant.converters.writer import create_checkpoint
from flux_quant.formats import FORMATS
from flux_quant.linear import QuantLinear
from flux_quant.loading import open_t5
from flux_quant.naming import to_stored
from flux_quant.text.encoders import Placement, t5_states

VOCABULARY, WIDTH, INNER, HEADS, BUCKETS, BLOCKS = 32128, 4096, 10240, 64, 32, 24
TOKENS = 512
PRECISE = ("norm.weight", "relative_attention_bias.weight")
TABLES = {"q8_0": "q8_0"}  # format of the token vectors; others have them in q6_k, as llama.cpp
BIAS = (BUCKETS, HEADS)
BUDGET = 3_000_000_000
TRIES = 5
EVERY = 0.02  # seconds between two looks at the memory


def shapes(blocks: int = BLOCKS) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"shared.weight": (VOCABULARY, WIDTH)}
    for i in range(blocks):
        attention, feed = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        out |= {f"{attention}.SelfAttention.{name}.weight": (WIDTH, WIDTH) for name in "qkvo"}
        if i == 0:
            out[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (BUCKETS, HEADS)
        out |= {f"{feed}.DenseReluDense.{name}.weight": (INNER, WIDTH) for name in ("wi_0", "wi_1")}
        out[f"{feed}.DenseReluDense.wo.weight"] = (WIDTH, INNER)
        out |= {f"{layer}.layer_norm.weight": (WIDTH,) for layer in (attention, feed)}
    return out | {"encoder.final_layer_norm.weight": (WIDTH,)}


def make(path: Path, name: str, blocks: int = BLOCKS) -> int:
    """A GGUF with llama.cpp's names; returns its size in bytes."""
    own = shapes(blocks)
    kinds = {ours: "f32" if ours.endswith(PRECISE) else name for ours in own}
    kinds["shared.weight"] = TABLES.get(name, "q6_k")
    names = {ours: row.names[0] for ours, row in to_stored("T5 encoder", "llama.cpp", own).items()}
    infos = [TensorInfo(names[ours], own[ours], kinds[ours]) for ours in own]
    with create_checkpoint(path, infos, model_metadata("t5encoder", name) | t5_metadata(own), force=True) as writer:
        for seed, info in enumerate(infos):
            if info.format == "f32":
                weight = torch.ones(info.shape) if len(info.shape) == 1 else torch.randn(info.shape) * SPREAD
                writer.write(info.name, (weight,))
            else:
                writer.write(info.name, random_parts(FORMATS[info.format], info.shape, torch.device("cpu"), seed))
    return path.stat().st_size


def memory(*fields: str) -> dict[str, int]:
    """Bytes, from this process' status."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    values = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    return {field: values[field] for field in fields}


def forget_peak() -> None:
    """VmHWM begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def watched(peaks: dict[str, int]) -> Iterator[None]:
    """The largest RssAnon and RssFile, each for itself, in looks every EVERY seconds."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            for field, value in memory("RssAnon", "RssFile").items():
                peaks[field] = max(peaks.get(field, 0), value)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def encode_twice(path: Path, threads: int, budget: int | None, cold: bool, blocks: int = BLOCKS) -> dict[str, object]:
    """In a process of its own: bytes and seconds of two encodings of the same tokens, the encoder opened for each.

    blocks: that the bound counts. The first opening imports libraries.
    """
    torch.set_num_threads(threads)
    import transformers  # noqa: F401

    before, peaks, clocks = memory("VmRSS"), {}, [Clock(), Clock()]
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    opening = [timed(lambda: open_t5(path)[1].close())[0] for _ in range(2)]
    dense = bound(blocks)
    if cold:
        drop_from_cache(path)
    forget_peak()
    with watched(peaks):
        outputs = [clock.encode(path, ids, budget) for clock in clocks]
    assert torch.equal(*outputs) and outputs[0].isfinite().all()
    outputs.clear()
    after = memory("VmRSS", "VmHWM")
    return {
        "before": before["VmRSS"],
        "peak": after["VmHWM"],
        "peak_anonymous": peaks["RssAnon"],
        "peak_file": peaks["RssFile"],
        "after": after["VmRSS"],
        "opening_seconds": opening,
        "seconds": [clock.seconds for clock in clocks],
        "processor_seconds": [clock.processor for clock in clocks],
        "linears_seconds": [clock.linears for clock in clocks],
        "bound": dense,
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start[0], time.process_time() - start[1]


class Clock:
    """Seconds of an encoding, seconds of the processor, and how many of those the linears of the blocks take."""

    seconds = processor = linears = began = 0.0

    def encode(self, path: Path, ids: torch.Tensor, budget: int | None) -> torch.Tensor:
        placement, states = Placement(ram_budget=budget, attach=self.attached), []
        self.seconds, self.processor = timed(lambda: states.append(t5_states(path, ids, placement)))
        return states[0]

    @contextmanager
    def attached(self, blocks: nn.ModuleList, device: torch.device) -> Iterator[None]:
        for layer in blocks.modules():
            if isinstance(layer, QuantLinear):
                layer.register_forward_pre_hook(self.start)
                layer.register_forward_hook(self.stop)
        yield

    def start(self, *_: object) -> None:
        self.began = time.process_time()

    def stop(self, *_: object) -> None:
        self.linears += time.process_time() - self.began


def drop_from_cache(path: Path) -> None:
    """Its pages leave the system's cache, if nobody uses them."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bound(blocks: int = BLOCKS) -> float:
    """Processor seconds of all products of an encoding by torch in float32: the best of TRIES of each shape."""
    shapes_used = Counter(
        shape for name, shape in shapes(blocks).items() if name.startswith("encoder.block") and len(shape) == 2
    )
    total = 0.0
    for (n, k), count in shapes_used.items():
        if (n, k) != BIAS:
            x, weight = torch.randn(TOKENS, k), torch.randn(n, k)
            total += count * min(timed(lambda x=x, weight=weight: x @ weight.t())[1] for _ in range(TRIES))
    return total
