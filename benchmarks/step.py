"""One step of the full-size transformer with random weights, by format: how much slower, or faster, than BF16 resident.

    python -I -m flux_quant.benchmarks.step [--formats bf16,q8_0,q4_k+int8] [--size 1024] [--seconds 75] [--save]

`q4_k+int8`: products in 8 bits, see `linear.set_compute_`.
Everything is on the device, 512 words of text, one picture. BF16 is timed first and again last: the difference is what
a ratio may be off by.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.journal import Journal, Row
from flux_quant.benchmarks.machine import device_name
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE, random_flux
from flux_quant.linear import set_compute_
from flux_quant.model import Flux, image_ids, text_ids

FORMATS = ("bf16", "q8_0", "q4_k", "q8_0+int8", "fp8+fp8", "q4_k+int8", "fp8", "q6_k", "q5_0", "q4_0", "bf16")
WORDS = 512
STEPS = 5
ONE_FORMAT = 8.0  # seconds that have to be left: building takes most of them
SMALL = dict(DEV, hidden=256, mlp=1024, context=256, head_dim=64)


def inputs(
    config: FluxConfig, size: int | tuple[int, int], words: int, device: torch.device, dtype: torch.dtype
) -> tuple:
    """size: of a square picture, or width and height."""
    columns, rows = (side // 16 for side in (size if isinstance(size, tuple) else (size, size)))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    one = torch.ones(1, device=device)
    tokens = random(1, rows * columns, config.in_channels), random(1, words, config.context), random(1, config.pooled)
    return *tokens, one * 0.5, image_ids(rows, columns, device), text_ids(words, device), one * 3.5


def seconds_of(model: Flux, arguments: tuple, device: torch.device) -> list[float]:
    """Times of STEPS steps after two more."""
    samples = []
    for i in range(STEPS + 2):
        synchronize(device)
        start = time.perf_counter()
        model(*arguments)
        synchronize(device)
        if i >= 2:
            samples.append(time.perf_counter() - start)
    return samples


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(journal: Journal, names: Sequence[str], size: int, device: torch.device, small: bool = False) -> None:
    """A row by format, written as it is known; none is begun that may end too late."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    blocks = (1, 2) if small else (DOUBLE, SINGLE)
    config = FluxConfig(**(SMALL if small else DEV), double_blocks=blocks[0], single_blocks=blocks[1])
    arguments = inputs(config, size, 16 if small else WORDS, device, dtype)
    for name in names:
        stored, _, compute = name.partition("+")
        what = {"format": stored, "compute": compute or "16-bit"}
        work = partial(format_row, stored, compute, config, arguments, device, dtype)
        if journal.row(what, work, 0.0 if small else ONE_FORMAT) is not None:
            with_ratios(journal.rows)
            journal.write()


def format_row(
    stored: str, compute: str, config: FluxConfig, arguments: tuple, device: torch.device, dtype: torch.dtype
) -> Row:
    model = random_flux(stored, device, dtype, config)
    if compute:
        set_compute_(model, compute)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    samples = seconds_of(model, arguments, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": median(samples), "samples": samples, "peak_vram": peak}


def with_ratios(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Each time over the mean of the BF16 runs, where there are any."""
    dense = [row["seconds"] for row in rows if (row["format"], row["compute"]) == ("bf16", "16-bit")]
    if dense:
        for row in rows:
            row["of_bf16"] = row["seconds"] / (sum(dense) / len(dense))
    return rows


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="names with commas between them")
    parser.add_argument("--size", type=int, default=1024, help="of the square picture, in pixels")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no format that may end after them")
    parser.add_argument("--small", action="store_true", help="a small model, to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = min(args.size, 64) if args.small else args.size
    journal = Journal("step", args.seconds, args.save, facts={"size": size, "steps": STEPS})
    measure(journal, args.formats.split(","), size, device, args.small)
    journal.write()
    table = Table(title=f"One step at {size} px on {device_name()}")
    for column in ("format", "compute", "ms", "of BF16", "peak GB"):
        table.add_column(column, justify="right")
    for row in journal.rows:
        ratio = f"{row['of_bf16']:.3f}" if "of_bf16" in row else ""
        peak = f"{row['peak_vram'] / 1e9:.2f}" if row["peak_vram"] else ""
        table.add_row(row["format"], row["compute"], f"{row['seconds'] * 1e3:.1f}", ratio, peak)
    Console(width=100).print(table)
    if args.save:
        print(f"wrote {journal.path}", file=sys.stderr)
    return 0 if journal.rows else 1


if __name__ == "__main__":
    sys.exit(main())
