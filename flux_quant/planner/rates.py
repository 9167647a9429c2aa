"""How fast this machine really is: copies, matrix products, attention, reading from the drive, timed for a moment each.

Rates are in bytes/s and FLOP/s. Shapes are those of a layer of FLUX.1 at 1024 x 1024 pixels.
"""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

M, K, N = 4096, 3072, 12288  # a layer of FLUX.1 at 1024 x 1024
FLUX_HEADS, FLUX_TOKENS, FLUX_CHANNELS = 24, 4608, 128
PIECE, READERS = 8 << 20, 4  # of reading from the drive, as the streamer does it
IMPLAUSIBLE = 20e9  # bytes/s no drive gives: the file was still in memory
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LOWEST = {"fp16": (7, 0), "bf16": (8, 0), "int8": (7, 5), "fp8": (8, 9)}  # compute capability of fast products


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    seconds: float = 0.2  # at least, of each rate
    cpu_side: int = 1024  # of square matrices
    copy_bytes: int = 256 << 20
    disk_bytes: int = 512 << 20


def seconds_of(run: Callable[[], object], least: float, finish: Callable[[], None] = lambda: None) -> float:
    """The median of runs that last `least` seconds together, after one that does not count."""
    samples: list[float] = []
    run(), finish()
    while sum(samples) < least or len(samples) < 3:
        start = time.perf_counter()
        run(), finish()
        samples.append(time.perf_counter() - start)
    return median(samples)


def cpu_rate(dtype: torch.dtype, effort: Effort) -> float:
    """FLOP/s of a matrix product with torch's threads."""
    side = effort.cpu_side
    a, b = (torch.ones(side, side, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, effort.seconds)


def disk_rate(folder: Path, effort: Effort) -> tuple[float | None, list[str]]:
    """bytes/s of reading a file that was just written to the folder and then dropped from memory; or why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < 4 * effort.disk_bytes:
            return None, [f"reading from the drive: not measured, {folder} is nearly full"]
        path = folder / f"read-{os.getpid()}.tmp"
        try:
            return read_rate(path, effort.disk_bytes)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        return None, [f"reading from the drive: not measured, {folder}: {error.strerror}"]


def read_rate(path: Path, nbytes: int) -> tuple[float | None, list[str]]:
    if not hasattr(os, "posix_fadvise"):
        return None, ["reading from the drive: not measured, this system does not drop files from memory on request"]
    piece = os.urandom(min(PIECE, nbytes))
    with path.open("wb") as file:
        for start in range(0, nbytes, len(piece)):
            file.write(piece[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    buffers = [bytearray(PIECE) for _ in range(READERS)]

    def read(reader: int) -> None:
        with path.open("rb", buffering=0) as file:
            for start in range(reader * PIECE, nbytes, READERS * PIECE):
                file.seek(start)
                file.readinto(buffers[reader])

    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))
    rate = nbytes / (time.perf_counter() - start)
    if rate > IMPLAUSIBLE:
        return None, [f"reading from the drive: not measured, {path.parent} keeps files in memory"]
    return rate, []


def copy_rates(device: torch.device, effort: Effort) -> dict[str, float]:
    """bytes/s from pinned and pageable memory, and within the device, read and written."""
    target = torch.empty(effort.copy_bytes, dtype=torch.uint8, device=device)
    sources = {
        "pinned": torch.zeros(effort.copy_bytes, dtype=torch.uint8).pin_memory(),
        "pageable": torch.zeros(effort.copy_bytes, dtype=torch.uint8),
        "device": torch.zeros_like(target),
    }

    def rate(source: torch.Tensor) -> float:
        moved = effort.copy_bytes * (2 if source.is_cuda else 1)
        return moved / timed(lambda: target.copy_(source, non_blocking=True), device, effort)

    return {name: rate(source) for name, source in sources.items()}


def timed(run: Callable[[], object], device: torch.device, effort: Effort) -> float:
    return seconds_of(run, effort.seconds, lambda: torch.cuda.synchronize(device))


def gpu_rates(device: torch.device, capability: tuple[int, int], effort: Effort) -> dict[str, float]:
    """FLOP/s of a layer's product by dtype, for those the card has fast products of; fp32 where it has no others."""
    rates = {}
    for name in [name for name, lowest in LOWEST.items() if capability >= lowest] or ["fp32"]:
        try:
            rates[name] = 2 * M * K * N / timed(product(name, device), device, effort)
        except (RuntimeError, AttributeError):  # not in this build of torch, or not for this card
            continue
    return rates


def product(name: str, device: torch.device) -> Callable[[], object]:
    """x (M, K) times w (N, K) transposed."""
    kind = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(name) or DTYPES[name]
    x, w = (torch.ones(rows, K, device=device).to(kind) for rows in (M, N))
    if name == "int8":
        return lambda: torch._int_mm(x, w.t())
    if name == "fp8":
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)
    return lambda: F.linear(x, w)


def attention_rate(device: torch.device, capability: tuple[int, int], effort: Effort) -> float:
    dtype = next((DTYPES[name] for name in ("bf16", "fp16") if capability >= LOWEST[name]), torch.float32)
    q = torch.randn(1, FLUX_HEADS, FLUX_TOKENS, FLUX_CHANNELS, device=device, dtype=dtype)
    flops = 4 * FLUX_HEADS * FLUX_TOKENS**2 * FLUX_CHANNELS
    return flops / timed(lambda: F.scaled_dot_product_attention(q, q, q), device, effort)
