"""The full-size transformer with random weights in less memory than it needs: peaks, step times, stalls, RAM.

    python -I -m flux_quant.benchmarks.streaming [--formats q8_0,bf16 | --model FILE] [--seconds 330] [--small] [--save]

Each format is built in RAM once and stays behind one streamer. Without a limit all blocks are on the device: their step
is `compute`. Under each budget the planner's plan is carried out as `generate` does it (`runtime.Residence`: revised
after each of the first steps, with its ladder when memory runs out), then further steps are timed with events of the
device, the host never waiting. `ratio` is their median over the larger of compute and bytes / rate of the link, that
rate measured by copies alone. Rows that name an emulated link ran over a slower one (see `links`). JSON after each row.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks import text_and_vae
from flux_quant.benchmarks.journal import FAILURES, Journal, Row
from flux_quant.benchmarks.machine import device_name
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE, random_flux
from flux_quant.benchmarks.stage import Stage, open_stage, ram
from flux_quant.benchmarks.step import SMALL, inputs
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS as CODECS
from flux_quant.loading import load_flux
from flux_quant.model import Flux
from flux_quant.modulation import Call, HoistedModulation, Rows, hoisted_bytes, widened
from flux_quant.planner import plan as planner
from flux_quant.planner.footprint import Work, t5_xxl
from flux_quant.planner.plan import Plan
from flux_quant.planner.steptime import step_seconds
from flux_quant.runtime import Memory, Residence, fitted, hoisted_globs, prepare, sizes_of
from flux_quant.streaming import BlockStreamer, Ring, StreamPlan, block_bytes
from flux_quant.streaming.device import COMPUTE
from flux_quant.text.encoders import give_back

FORMATS = ("q8_0", "bf16", "q4_k", "fp8")
BUDGETS = ("4GB", "6GB", "8GB", "10GB", "12GB", "16GB")
SIZES = (1024, 512)
WORDS = 512
WARM, TIMED, TIMED_SLOW = 3, 5, 3  # steps; fewer where one takes longer than SLOW
SLOW = 0.5
MODULATION_STEPS = 20
BUILDING, MEASURING = 40.0, 6.0  # seconds that have to be left for a format, and for a row
ONE_FORMAT = 65.0  # seconds for a format over this machine's own link: guessed, no card has been measured


@dataclass(frozen=True)
class Case:
    size: int = 1024
    vram: str | None = None  # all that is free
    link: float | None = None  # bytes/s, emulated
    batch: int = 1

    def row(self) -> Row:
        emulated = {} if self.link is None else {"emulated_gb_per_s": self.link / 1e9}
        return {"size": self.size, "batch": self.batch, "vram": self.vram} | emulated


OWN_LINK = tuple(Case(size, vram) for size in SIZES for vram in (None, *BUDGETS))
MANY_SLOW = (
    *(Case(size, vram, rate) for rate in (24e9, 12e9) for size in SIZES for vram in ("4GB", "8GB", "12GB")),
    Case(batch=4),  # as much compute beside the same bytes as a card of a quarter of the speed has
    *(Case(1024, "8GB", rate, 4) for rate in (None, 24e9, 12e9)),
)
FEW_SLOW = (Case(1024, "8GB", 12e9), Case(512, "8GB", 24e9), Case(1024, "4GB", 24e9))
ON_STAND_IN = (Case(64), Case(64, "4GB"), Case(64, "4GB", 2e7), Case(64, batch=2), Case(64, "8GB", None, 2))


def cases(name: str, small: bool) -> tuple[Case, ...]:
    if small:
        return ON_STAND_IN
    return OWN_LINK + (MANY_SLOW if name == FORMATS[0] else FEW_SLOW)


@dataclass
class Bench:
    """One model in RAM, and its blocks behind a streamer."""

    name: str
    stage: Stage
    small: bool
    assume: bool = False  # where no resident step was measured, as on a small card, the planner's compute stands for it
    compute: dict[tuple[int, int], float] = field(default_factory=dict)  # (size, batch) -> seconds of a resident step
    model: Flux | None = None
    streamer: BlockStreamer | None = None
    steering: Rows | None = None

    @contextmanager
    def opened(self) -> Iterator[Row]:
        """Gives the row of what that cost in RAM."""
        gc.collect(), give_back()
        before, start = ram(), time.perf_counter()
        self.model = build(self.name, self.stage, self.small)
        built, then = ram(), time.perf_counter()
        self.streamer = attached(self.model, self.stage)
        seconds = {"build_seconds": then - start, "attach_seconds": time.perf_counter() - then}
        try:
            give_back()
            yield ram_row(self.model, self.streamer, before, built, ram()) | seconds
        finally:
            self.streamer.detach()
            self.model = self.streamer = self.steering = None
            gc.collect(), give_back()
            self.stage.readings.forget()

    def modulation(self, vram: str) -> Row:
        """All modulations of a picture before its first step; their weights are not in pinned RAM."""
        stage, memory = self.stage, self.stage.memory(vram)
        one = torch.ones(1, device=stage.place)
        calls = [Call(one * level, one.expand(1, self.model.config.pooled), one * 3.5) for level in levels()]
        self.streamer.replan(one_slot(self.model))
        samples = []
        with stage.capped(memory):
            for _ in range(2):
                marks = Marks(stage)
                found = HoistedModulation(self.model).rows(calls, stage.place, stage.dtype)
                marks.add()
                samples += marks.seconds()
            held = stage.held()
        self.steering = found[0]
        nbytes = hoisted_bytes(self.model)
        found = {"bytes": nbytes, "copies": nbytes / stage.rate(None), "seconds": samples[-1], "samples": samples}
        return found | {"budget": memory.budget.nbytes} | held

    def step(self, case: Case) -> Row:
        stage, memory = self.stage, self.stage.memory(case.vram, case.link)
        rate, plan = stage.rate(case.link), self.plan(case, memory)
        known = self.compute.get((case.size, case.batch))
        assumed = known is None and bool(plan.stream.streamed)
        if assumed and not self.assume:
            raise UserError("the step with all blocks on the device was not measured")
        if assumed:
            known = plan.compute
        self.streamer.replan(one_slot(self.model))
        with stage.capped(memory):
            residence = Residence(self.model, plan, memory)
            residence.streamer, residence.outside = self.streamer, ()
            count = TIMED_SLOW if plan.step > SLOW else TIMED
            samples = residence.run(lambda: self.run(case, residence, count))
            held, seen = stage.held(), self.streamer.metrics()
        seconds, plan = median(samples[WARM:]), residence.plan
        if not plan.stream.streamed:
            self.compute[case.size, case.batch] = known = seconds
        copies = plan.stream.streamed_bytes / rate
        share = [time * known / sum(planner.block_times(plan)) for time in planner.block_times(plan)]
        bound = max(known, copies)
        return {
            "seconds": seconds,
            "samples": samples,
            "warm": WARM,
            "compute": known,
            **({"compute_predicted": True} if assumed else {}),
            "copies": copies,
            "ratio": seconds / bound,
            "ratio_with_slots": seconds / step_seconds(plan.stream, share, rate),
            "link_gb_per_s": rate / 1e9,
            "link_gb_per_s_beside_compute": seen.bytes_per_second / 1e9,
            "stall": seen.stall,
            "stall_ms": {block: round(stall * 1e3, 3) for block, stall in seen.stall_seconds.items()},
            "misses": seen.misses,
            "resyncs": seen.resyncs,
            "budget": memory.budget.nbytes,
            **held,
            "predicted": {"peak": plan.peak, "seconds": plan.step},
            "plan": plan_row(plan.stream),
            "changes": residence.changes,
        }

    def plan(self, case: Case, memory: Memory) -> Plan:
        """The planner's; on the stand-in, whose small model fits any budget, one that gives up half of it."""
        work = Work(size=(case.size, case.size), batch=case.batch, words=WORDS, steps=MODULATION_STEPS)
        plan = memory.plan(sizes_of(self.model), work, t5_xxl("q8_0"))
        if self.small and case.vram:
            plan, _ = planner.shed(plan, plan.stream.device_bytes // 2, "the small model")
        return fitted(plan, self.model)

    @torch.no_grad()
    def run(self, case: Case, residence: Residence, count: int) -> list[float]:
        """Seconds of WARM steps, after the first of which the plan may be revised, and of `count` more."""
        stage = self.stage
        words = 16 if self.small else WORDS
        img, txt, *_, image_places, text_places, _ = inputs(
            self.model.config, case.size, words, stage.place, stage.dtype
        )
        img, txt = (x.repeat(case.batch, 1, 1) for x in (img, txt))
        steering = widened(self.steering, case.batch)
        with stage.emulating(case.link):
            marks = Marks(stage)
            for step in range(WARM + count):
                self.model(img, txt, None, None, image_places, text_places, steering=steering)
                marks.add()
                if step < WARM - 1:
                    stage.link.finish()  # so that the revision sees this step, as it would see it some steps later
                    residence.after_step()
            return marks.seconds()


class Marks:
    """Moments of the compute queue, one after the other."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.events = stage, []
        self.add()

    def add(self) -> None:
        event = self.stage.link.event(timed=True)
        self.stage.link.record(event, COMPUTE)
        self.events.append(event)

    def seconds(self) -> list[float]:
        self.stage.link.finish()
        return [self.stage.link.seconds(begin, end) for begin, end in pairwise(self.events)]


def levels() -> list[float]:
    return [1 - i / MODULATION_STEPS for i in range(MODULATION_STEPS)]


def build(name: str, stage: Stage, small: bool) -> Flux:
    """Random weights of a format, or those of a file, as `generate` keeps them in RAM."""
    if name not in CODECS:
        model = load_flux(name)
        prepare(model, stage.place, "16-bit")
        return model
    blocks = (2, 3) if small else (DOUBLE, SINGLE)
    config = FluxConfig(**(SMALL if small else DEV), double_blocks=blocks[0], single_blocks=blocks[1])
    return random_flux(name, torch.device("cpu"), stage.dtype, config, stage.place)


def one_slot(model: Flux) -> StreamPlan:
    """Nothing stays, and next to nothing is on the device: between two rows, so that none inherits memory."""
    names = [block.name for block in sizes_of(model).blocks]
    sizes, _ = block_bytes(model, names, exclude=hoisted_globs(model))
    return StreamPlan(tuple(names), sizes, rings=(Ring(max(sizes), 1),))


def attached(model: Flux, stage: Stage) -> BlockStreamer:
    """All blocks in pinned RAM."""
    first = one_slot(model)
    return BlockStreamer(model, first, stage.link, sum(first.sizes), exclude=hoisted_globs(model))


def model_tensors(model: Flux) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def ram_row(model: Flux, streamer: BlockStreamer, before: int | None, built: int | None, after: int | None) -> Row:
    """What the model took of RAM when it was built, and with its blocks behind the streamer."""
    nbytes, seen = sum(tensor.nbytes for tensor in model_tensors(model)), streamer.metrics()
    row = {"bytes": nbytes, "pinned": seen.pinned_bytes, "pageable": seen.pageable_bytes}
    if None in (before, built, after):
        return row
    return row | {"built": built - before, "streaming": after - before, "ram_ratio": (after - before) / nbytes}


def plan_row(stream: StreamPlan) -> Row:
    kept = sorted(stream.resident)
    return {
        "resident": [stream.names[i] for i in kept],
        "rings": [asdict(ring) for ring in stream.rings],
        "device_bytes": stream.device_bytes,
        "streamed_bytes": stream.streamed_bytes,
    }


def measure(journal: Journal, stage: Stage, names: list[str], small: bool) -> None:
    """All rows; the most telling first. Text encoder and VAE come when the first format has been measured."""
    for number, name in enumerate(names):
        if journal.left < BUILDING and not small:
            journal.skip({"format": name}, f"{journal.left:.0f} s were left, it needs {BUILDING:.0f} s")
        else:
            try:
                kept = 0.0 if small else ONE_FORMAT * (len(names) - number - 1)
                measure_format(journal, Bench(name, stage, small), cases(name, small), kept)
            except FAILURES as error:
                journal.skip({"format": name}, f"{type(error).__name__}: {error}")
        if number == 0:
            text_and_vae.measure(journal, stage, small)


def measure_format(journal: Journal, bench: Bench, chosen: tuple[Case, ...], kept: float = 0.0) -> None:
    """`kept`: seconds that emulated links leave to the formats that follow."""
    what, needs = {"format": Path(bench.name).name}, 0.0 if bench.small else MEASURING
    with bench.opened() as memory_row:
        journal.row({"what": "ram"} | what, lambda: memory_row)
        if journal.row({"what": "modulation", "vram": "4GB"} | what, lambda: bench.modulation("4GB"), needs) is None:
            return
        for case in chosen:
            left = needs if case in OWN_LINK else needs + kept
            row = journal.row({"what": "step"} | what | case.row(), step_of(bench, case), left)
            if row is not None:
                print(line_of(row), flush=True)


def step_of(bench: Bench, case: Case) -> Callable[[], Row]:
    return lambda: bench.step(case)


def line_of(row: Row) -> str:
    link = f", emulated {row['emulated_gb_per_s']:.0f} GB/s" if "emulated_gb_per_s" in row else ""
    peak = f", peak {row['peak'] / 1e9:.2f} GB" if "peak" in row else ""
    return (
        f"{row['format']} {row['size']} px x {row['batch']}, {row['vram'] or 'no limit'}{link}: "
        f"{row['seconds'] * 1e3:.1f} ms, {row['ratio']:.3f} of the bound, stall {row['stall'] * 1e3:.1f} ms{peak}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help="names with commas between them")
    parser.add_argument("--model", help="a file with real weights, instead of random ones in --formats")
    parser.add_argument("--seconds", type=float, default=330, help="no row is begun that may end later")
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too: to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.small:
        print("streaming is measured on a CUDA device; --small walks through without one", file=sys.stderr)
        return 1
    names = [args.model] if args.model else args.formats.split(",")[: 1 if args.small else None]
    journal = Journal("streaming-of-a-file" if args.model else "streaming", args.seconds, args.save)
    stage = open_stage()
    journal.facts |= {"native_gb_per_s": stage.link.native / 1e9, "others": stage.others}
    measure(journal, stage, names, args.small)
    journal.facts["emulated"] = {f"{rate / 1e9:.0f}": samples for rate, samples in stage.rates.items()}
    journal.write()
    table = Table(title=f"Streaming on {device_name()}: {len(journal.rows)} rows, {len(journal.skipped)} left out")
    for column in ("what", "rows", "worst ratio"):
        table.add_column(column, justify="right")
    for what in dict.fromkeys(str(row["what"]) for row in journal.rows):
        rows = [row for row in journal.rows if row["what"] == what]
        ratios = [row["ratio"] for row in rows if "ratio" in row]
        table.add_row(what, str(len(rows)), f"{max(ratios):.3f}" if ratios else "")
    Console(width=100).print(table)
    if args.save:
        print(f"wrote {journal.path}", file=sys.stderr)
    return 0 if journal.rows else 1


if __name__ == "__main__":
    sys.exit(main())
