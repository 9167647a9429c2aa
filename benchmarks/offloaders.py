"""What other offloaders take for the same transformer under the same cap: seconds of a step, memory, RAM.

    python -I -m flux_quant.benchmarks.offloaders [--ways "accelerate cpu_offload"] [--seconds 170] [--small] [--save]

diffusers' FluxTransformer2DModel in BF16 with random weights, under diffusers' group offloading with streams, layer by
layer and block by block, mmgp's profile for little memory, and accelerate's `cpu_offload`; and diffusers' GGUF against
our engine on one file, which has fewer blocks so that it is written quickly (rows say how many). None plans for a
budget: each runs under the smallest cap that it does not fail under. Ways are processes of their own, so that none
inherits pinned memory. Where weights are slow to make and to pin, the others have fewer blocks as well.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from flux_quant.benchmarks.journal import FAILURES, Journal, Row
from flux_quant.benchmarks.links import CudaLink, HostLink
from flux_quant.benchmarks.machine import package_version
from flux_quant.benchmarks.offloader_ways import (
    FULL,
    REDUCED,
    SMALLEST,
    WAYS,
    Dense,
    Step,
    Way,
    affordable,
    config_of,
    nbytes_of,
)
from flux_quant.benchmarks.random_weights import DEV
from flux_quant.benchmarks.stage import STAND_IN, NoReadings, Stage, memory_in_use
from flux_quant.benchmarks.step import SMALL, inputs
from flux_quant.benchmarks.streaming import Marks
from flux_quant.planner.gpus import GPUS
from flux_quant.runtime import CudaReadings
from flux_quant.streaming.memory import linux_memory

WORDS = 512
WARM, FEWEST, MOST, ENOUGH = 2, 2, 5, 4.0  # steps, and seconds of timed ones
STARTING, LONGEST = 20.0, 75.0  # seconds that have to be left for a way, and that one may take


def bare_stage() -> Stage:
    """Nothing is measured: others do not plan."""
    machine = GPUS[STAND_IN].machine()
    if not torch.cuda.is_available():
        return Stage(HostLink(), machine, NoReadings(), 0)
    others, link = memory_in_use(), CudaLink()
    free, total = torch.cuda.mem_get_info(link.device)
    return Stage(link, replace(machine, total=total, usable=free), CudaReadings(link.device), others)


def ram_left() -> int:
    return linux_memory().available if sys.platform.startswith("linux") else 0


@torch.no_grad()
def rows_of(way: Way, small: bool, folder: Path) -> Iterator[Row]:
    stage = bare_stage()
    asked = Dense(small, SMALLEST if small else REDUCED) if way.gguf else affordable(stage, small)
    start, left = time.perf_counter(), ram_left()
    step = way.make(stage, asked, folder)
    common: Row = {"attach_seconds": round(time.perf_counter() - start, 2)}
    if not small and asked.blocks != FULL:
        common["reduced_to"] = asked.blocks
    if not way.gguf:
        common["weight_bytes"] = nbytes_of(asked.config)
    config = config_of(SMALL if small and not way.gguf else DEV, REDUCED)
    dtype = stage.dtype if way.gguf else torch.bfloat16
    for size in (64,) if small else way.sizes:
        arguments = inputs(config, size, 16 if small else WORDS, stage.place, dtype)
        for vram in way.caps:
            what = {"size": size, "vram": vram} | common
            try:
                yield what | timed(step, arguments, stage, vram) | {"ram": left - ram_left()}
                break
            except torch.OutOfMemoryError:
                yield what | {"why": "did not fit: out of GPU memory"}
            except FAILURES as error:
                yield what | {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                break


def timed(step: Step, arguments: tuple, stage: Stage, vram: str | None) -> Row:
    memory = stage.memory(vram)
    with stage.capped(memory) if vram else nullcontext():
        for _ in range(WARM):
            marks = Marks(stage)
            step(arguments)
            marks.add()
            (last,) = marks.seconds()
        marks = Marks(stage)
        for _ in range(max(FEWEST, min(MOST, int(ENOUGH / max(last, 1e-3))))):
            step(arguments)
            marks.add()
        samples = marks.seconds()
        held = stage.held()
    return {"seconds": median(samples), "samples": samples} | held


# --- All of them: each way in a process of its own --------------------------------------------------------------------


def run_way(name: str, journal: Journal, small: bool, folder: Path) -> None:
    arguments = ["--way", name, "--folder", str(folder), *(["--small"] if small else [])]
    command = [sys.executable, "-I", "-m", "flux_quant.benchmarks.offloaders", *arguments]
    seconds = max(1.0, min(LONGEST, journal.left))
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds)
        said, problem = done.stdout, last_line(done.stderr) if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        said, problem = error.stdout or b"", f"stopped after {seconds:.0f} s"
    for line in (said or b"").decode(errors="replace").splitlines():
        if line.startswith("{"):
            row = {"way": name} | json.loads(line)
            if "why" in row:
                journal.skip({key: row[key] for key in ("way", "size", "vram")}, row["why"])
            else:
                journal.row(row, dict)
                print(f"{name}, {row['size']} px, {row['vram'] or 'no limit'}: {row['seconds']:.3f} s", flush=True)
    if problem:
        journal.skip({"way": name}, problem)


def missing(name: str, versions: dict[str, str | None]) -> str:
    """The first package that a way lacks; empty where it has all."""
    library = WAYS[name].library if name in WAYS else ""
    wanted = ("diffusers", "accelerate", library) if library else ()
    return next((package for package in wanted if versions[package] is None), "")


def last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "ended without a word"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", default=";".join(WAYS), help="names with semicolons between them")
    parser.add_argument("--seconds", type=float, default=170, help="no way is begun that may end later")
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too: to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        with nullcontext(args.folder) if args.folder else TemporaryDirectory(prefix="flux-quant-gguf-") as folder:
            for row in rows_of(WAYS[args.way], args.small, Path(folder)):
                print(json.dumps(row), flush=True)
        return 0
    if not torch.cuda.is_available() and not args.small:
        print("offloaders are measured on a CUDA device; --small walks through without one", file=sys.stderr)
        return 1
    names = ("diffusers", "accelerate", "transformers", "gguf", "mmgp", "optimum-quanto")
    versions = {name: package_version(name) for name in names}
    journal = Journal("offloaders", args.seconds, args.save, facts={"versions": versions})
    with TemporaryDirectory(prefix="flux-quant-gguf-") as folder:
        for name in args.ways.split(";"):
            if lacking := missing(name, versions):
                journal.skip({"way": name}, f"{lacking} is not installed")
            elif journal.left < STARTING and not args.small:
                journal.skip({"way": name}, f"{journal.left:.0f} s were left, it needs {STARTING:.0f} s")
            else:
                run_way(name, journal, args.small, Path(folder))
    print(f"{len(journal.rows)} rows, {len(journal.skipped)} left out")
    journal.write()
    if args.save:
        print(f"wrote {journal.path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
