"""Suite `text`: T5-XXL on the processor, 512 tokens: seconds, seconds of the processor, memory.

Files have random weights in T5-XXL's shapes. Without --random they have BLOCKS of its 24 blocks, and rows say so; with
it all of them, where RAM and drive hold the file, also under a budget of RAM and read from the drive. With --model the
encoder beside it is measured. Each sample is a process of its own that encodes the same tokens twice. The bound is
torch's own product of float32 at the same shapes in the same process: seconds of the processor of an encoding that were
nothing but the products of its linears, over the number of threads.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch

from flux_quant.benchmarks import text_memory
from flux_quant.benchmarks.bench import models
from flux_quant.benchmarks.bench.convert import check_room, last_line
from flux_quant.benchmarks.bench.record import Row, Scalar
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite, nothing
from flux_quant.benchmarks.text_memory import BUDGET, PRECISE, TABLES, TOKENS, shapes
from flux_quant.components import choose
from flux_quant.converters.mixes import ALIASES, BASES
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS as CODECS
from flux_quant.planner.doctor import ram_now
from flux_quant.text.encoders import OWN_MEMORY

FORMATS = ("q8_0", "q4_k")
BLOCKS, FEWEST, ALL = 4, 1, text_memory.BLOCKS
CASES = ((None, False), (BUDGET, False), (BUDGET, True))  # budget of RAM, file to be read from the drive
SECONDS = 30  # of a process, for all 24 blocks, on one core that is as fast as most: an estimate


@dataclass
class Encoder:
    """A file of the user's, or one of random weights that is made when it is needed and lost afterwards."""

    format: str
    blocks: int
    path: Path | None = None
    folder: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(CODECS[self.kind(name)].nbytes(shape) for name, shape in shapes(self.blocks).items())

    def kind(self, name: str) -> str:
        if name.endswith(PRECISE):
            return "f32"
        return TABLES.get(self.format, "q6_k") if name == "shared.weight" else self.format

    def file(self) -> Path:
        if self.path is None:
            check_room(Path(tempfile.gettempdir()), 1.1 * self.nbytes)
            self.folder = tempfile.TemporaryDirectory(prefix="flux-quant-text-")
            self.path = Path(self.folder.name) / f"t5xxl-{self.blocks}-blocks-{self.format}.gguf"
            text_memory.make(self.path, self.format, self.blocks)
        return self.path

    def close(self) -> None:
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = self.path = None


def encoders(asked: Asked) -> list[Encoder]:
    if asked.model is not None:
        folders = [asked.model] if asked.model.is_dir() else [asked.model.parent, asked.model.parent.parent]
        path = choose("t5", folders, "--model FOLDER")
        return [Encoder(models.label(path, models.SOURCE), ALL, path)]
    blocks = FEWEST if asked.quick else ALL if asked.random else BLOCKS
    names = [BASES.get(ALIASES.get(name, name), name) for name in asked.formats] or FORMATS[
        : 1 if asked.quick else None
    ]
    return [Encoder(name, blocks) for name in dict.fromkeys(names) if name in CODECS]


def cases(asked: Asked) -> Iterator[Case]:
    todo = encoders(asked)
    for encoder in todo:
        chosen = CASES if encoder.blocks == ALL else CASES[:1]
        share = asked.seconds / len(todo) / len(chosen)
        for number, (budget, cold) in enumerate(chosen):
            what = {"format": encoder.format, "blocks": encoder.blocks, "words": TOKENS}
            what |= {"threads": torch.get_num_threads(), "ram_budget_bytes": budget, "from_drive": cold}
            work = Encodings(encoder, budget, cold, asked.repeats, share)
            needs = SECONDS * encoder.blocks / ALL * 2
            yield Case(what, work, needs=needs, close=encoder.close if number + 1 == len(chosen) else nothing)


@dataclass
class Encodings:
    encoder: Encoder
    budget: int | None
    cold: bool
    repeats: int
    seconds: float  # after which no other process is begun

    def __call__(self) -> Row:
        if not sys.platform.startswith("linux"):
            raise UserError("memory of a process is measured on Linux alone")
        needed = self.encoder.nbytes + OWN_MEMORY
        if self.budget is None and self.encoder.path is None and needed > ram_now()[1]:
            raise UserError(f"{ram_now()[1] / 1e9:.1f} GB of RAM are free, {needed / 1e9:.1f} GB are needed")
        start, path = monotonic(), self.encoder.file()
        found = [self.encode(path)]
        while 2 * len(found) < self.repeats and monotonic() - start < self.seconds:
            found.append(self.encode(path))
        names = ("seconds", "processor_seconds", "linears_seconds")
        bound = min(one["bound"] for one in found)
        return Row(
            samples={name: [sample for one in found for sample in one[name]] for name in names},
            values={
                "file_bytes": path.stat().st_size,
                "opening_seconds": found[-1]["opening_seconds"][-1],
                "bound_processor_seconds": bound,
            },
            memory={"host_rss": max(one["peak"] for one in found)},
            expected={"bound_seconds": bound / torch.get_num_threads(), "bound_by": "compute"},
        )

    def encode(self, path: Path) -> dict:
        threads, blocks = torch.get_num_threads(), self.encoder.blocks
        call = f"encode_twice(Path({str(path)!r}), {threads}, {self.budget}, {self.cold}, {blocks})"
        code = f"import json\nfrom flux_quant.benchmarks.text_memory import *\nprint(json.dumps({call}))"
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the encoding ended with {last_line(done.stderr)}")
        return json.loads(done.stdout.splitlines()[-1])


def weights(asked: Asked) -> dict[str, Scalar]:
    if asked.model is not None:
        path = encoders(asked)[0].path
        return {"kind": "file", "name": path.name, "bytes": path.stat().st_size, "sha256": models.sha256(path)}
    return {"kind": "random", "name": "random weights of T5-XXL's shapes"}


SUITE = Suite("text", "T5-XXL on the processor: seconds, memory", cases, weights)
