"""Suite `convert`: how long a conversion takes and how much memory it needs, against `cp` of the same file.

Sources: the model that is measured; beside the shipped one, which is small, some blocks of FLUX.1's size with random
weights; with --random all of them, or as many as the drive holds twice. Every conversion is a process of
its own. Its memory is the largest resident size, mapped pages of the input included, less that of the process before it
began. Before each run the source is read once, so that it lies in the system's cache as far as it fits; `cp` is run
directly before each conversion, and `times_cp` is the ratio of the two.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flux_quant.benchmarks.bench import models
from flux_quant.benchmarks.bench.record import Row
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite, nothing
from flux_quant.benchmarks.make_full_size import infos, make
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS as CODECS

FORMATS, QUICK = ("q8_0", "fp8", "q4_k_s", "q4_0"), ("q8_0",)
ROOM = 2.2  # times the source: beside it lies a copy, or what it becomes
FEW = 0.05  # of the blocks: 1 double and 2 single ones
STARTING, SPEED = 5.0, 150e6  # seconds of a process, bytes of source per second: what calls take at most, usually
WORK = """
import json, resource, sys, time
from pathlib import Path
from flux_quant.converters.convert import run
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.plan import make_plan
import torch

torch.set_num_threads(int(sys.argv[4]))
from flux_quant.kernels import cpu_quantize

def largest():  # ru_maxrss begins at what the parent had when it started this process
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

baseline = largest()
start = time.perf_counter()
result = run(make_plan(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], force=True)))
seconds, snr = time.perf_counter() - start, result.total.deviation.snr
peak = largest()
out = {"bytes": result.file_bytes, "parameters": result.total.parameters, "seconds": seconds}
out |= {"snr_db": round(snr, 2) if snr < 999 else None, "baseline": baseline, "peak": peak}
print(json.dumps(out))
"""


@dataclass
class Source:
    """A file of the user's, or one that is made when it is needed and lost afterwards."""

    name: str
    nbytes: int
    path: Path | None = None
    fraction: float = 0.0  # of FLUX.1's blocks, with random weights
    folder: Path | None = field(default=None, repr=False)

    def file(self) -> Path:
        if self.path is None:
            check_room(Path(tempfile.gettempdir()), ROOM * self.nbytes)
            self.folder = Path(tempfile.mkdtemp(prefix="flux-quant-convert-"))
            self.path = self.folder / "flux1-random.safetensors"
            make(self.path, self.fraction)
        return self.path

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder)
            self.path = self.folder = None


def check_room(folder: Path, nbytes: float) -> None:
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise UserError(f"{folder} has {free / 1e9:.1f} GB free, {nbytes / 1e9:.1f} GB are needed")


def random_source(fraction: float) -> Source:
    tensors = infos(fraction)
    blocks = {name: len({info.name.split(".")[1] for info in tensors if info.name.startswith(name)}) for name in KINDS}
    name = f"random weights, {blocks['double_blocks']} double and {blocks['single_blocks']} single blocks of FLUX.1"
    return Source(name, sum(CODECS[info.format].nbytes(info.shape) for info in tensors), fraction=fraction)


KINDS = ("double_blocks", "single_blocks")


def sources(asked: Asked) -> list[Source]:
    if asked.random:
        room = shutil.disk_usage(tempfile.gettempdir()).free / 1.1 / ROOM
        return [random_source(FEW if asked.quick else min(1.0, room / random_source(1.0).nbytes))]
    path = models.transformer(asked)
    nbytes = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    own = [Source(path.name, nbytes, path)]
    return own if asked.model or asked.quick else [random_source(FEW), *own]


def cases(asked: Asked) -> Iterator[Case]:
    for source in sources(asked):
        formats = asked.formats or (QUICK if asked.quick else FORMATS)
        for name in formats:
            what = {"format": name, "source": source.name, "threads": torch.get_num_threads()}
            close = source.close if name == formats[-1] else nothing
            work = Conversions(source, name)
            yield Case(what, work, needs=STARTING + source.nbytes / SPEED, group=f"convert {source.name}", close=close)


@dataclass
class Conversions:
    source: Source
    format: str

    def __call__(self) -> Row:
        source = self.source.file()
        with tempfile.TemporaryDirectory(prefix="flux-quant-convert-") as folder:
            copied = copy_seconds(source, Path(folder))
            target = Path(folder) / f"out{models.suffix_of(self.format)}"
            read_through(source)
            found = convert(source, target, self.format, torch.get_num_threads())
        seconds, nbytes = found["seconds"], self.source.nbytes
        return Row(
            samples={
                "seconds": [seconds],
                "cp_seconds": [copied],
                "times_cp": [seconds / copied],
                "gb_per_s": [nbytes / seconds / 1e9],
            },
            values={
                "source_bytes": nbytes,
                "file_bytes": found["bytes"],
                "parameters": found["parameters"],
                "bits_per_weight": 8 * found["bytes"] / found["parameters"],
                "weight_snr_db": found["snr_db"],
            },
            memory={"host_rss": found["peak"] - found["baseline"]},
        )


def files_of(source: Path) -> list[Path]:
    return [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())


def read_through(source: Path) -> None:
    for path in files_of(source):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def copy_seconds(source: Path, folder: Path) -> float:
    """Of `cp`, as a program: its start is part of it, as it is for everybody."""
    target = folder / "copy"
    read_through(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    os.sync()
    return seconds


def convert(source: Path, target: Path, format_name: str, threads: int) -> dict[str, float]:
    """In a process of its own; its clock starts when everything is imported."""
    command = [sys.executable, "-I", "-c", WORK, str(source), str(target), format_name, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"the conversion ended with {last_line(done.stderr)}")
    return json.loads(done.stdout)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


SUITE = Suite("convert", "conversion: seconds, times cp, memory", cases)
