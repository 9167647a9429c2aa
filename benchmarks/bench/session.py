"""One call of `flux-quant bench`: the machine is told and measured once, then each suite writes its file."""

import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import torch

from flux_quant.benchmarks.bench import limits, models, places
from flux_quant.benchmarks.bench.record import SKIPPED, Row, Run, read_run, slug
from flux_quant.benchmarks.bench.runner import Runner, Watcher
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite
from flux_quant.benchmarks.machine import aside, fingerprint, now, result_path
from flux_quant.errors import UserError

HOME = "flux_quant.benchmarks"
SUITES = {  # name -> module with SUITE, its part of the time; in the order in which all of them run
    "tiers": (f"{HOME}.bench.tiers", 1),
    "kernels": (f"{HOME}.bench.kernels", 3),
    "step": (f"{HOME}.bench.step", 1),
    "image": (f"{HOME}.bench.image", 2),
    "quality": (f"{HOME}.quality", 6),
    "convert": (f"{HOME}.bench.convert", 2),
    "text": (f"{HOME}.bench.text", 2),
    "peers": (f"{HOME}.peers", 4),
}


def suite_named(name: str) -> Suite:
    if name not in SUITES:
        raise UserError(f"suite {name}: there is none of that name; choose from {', '.join(SUITES)}")
    return import_module(SUITES[name][0]).SUITE


@dataclass
class Session:
    """folder: of results; seconds: that everything may take; note: what has to be known of this run."""

    asked: Asked
    folder: Path
    seconds: float
    resume: bool = False
    note: str = ""
    watcher: Watcher = field(default_factory=Watcher)

    def run(self, suites: Sequence[Suite]) -> Iterable[tuple[Run, Path]]:
        """What each suite found, and its file. A suite may take its part of the time that is left, the last one all."""
        until = time.monotonic() + self.seconds
        device = torch.device(self.asked.device)
        machine = fingerprint()
        others = machine.get(limits.USED)  # before this process takes any
        machine |= limits.under_load(device) | ({"note": self.note} if self.note else {})
        self.folder.mkdir(parents=True, exist_ok=True)
        can = limits.measure(device, self.folder, self.asked.quick)
        can |= {} if others is None else {limits.OTHERS: others << 20}
        for number, suite in enumerate(suites):
            parts = [part_of(other) for other in suites[number:]]
            share = (until - time.monotonic()) * parts[0] / sum(parts)
            day = self.path(suite.name, str(machine["date"])[:10])
            run, path = self.begun(suite, machine, can, day)
            runner = Runner(run, path, self.asked.repeats, time.monotonic() + share, self.base(suite.name), self.resume)
            runner.watcher = self.watcher
            runner.measure(self.cases(suite, replace(self.asked, limits=can, seconds=share), len(suites) == 1))
            yield run, settled(run, path, day)

    def cases(self, suite: Suite, asked: Asked, alone: bool) -> list[Case]:
        """Where one of many suites has nothing to measure, it says why and the others go on."""
        try:
            return list(suite.cases(asked))
        except UserError as error:
            if alone:
                raise
            return [Case({"suite": suite.name}, lambda error=error: Row(status=SKIPPED, note=str(error)))]

    def begun(self, suite: Suite, machine: dict, can: dict, day: Path) -> tuple[Run, Path]:
        """A new run with its file, or what goes on with the rows and in the file of an earlier one of the day.

        day: the file of the day's first run, which a new one leaves alone while it is measured
        """
        try:
            weights = (suite.weights or models.weights_of)(self.asked)
        except UserError:  # which the cases say
            weights = {"kind": "none", "name": "none"}
        run = Run(suite.name, places.command(sys.argv[1:]), now(), weights, machine, can)
        files = runs_of(day)
        for path, earlier in reversed(files.items()) if self.resume else ():
            if earlier and same(earlier, run):
                run.rows = earlier.rows
                return run, path
        return run, aside(day, run.date) if files else day

    def path(self, suite: str, date: str) -> Path:
        """Of one suite there is a file a day for each kind of weights, and one for a quick look."""
        asked = self.asked
        kind = "-random" if asked.random else f"-{slug(asked.model.stem)}" if asked.model else ""
        return result_path(f"{suite}{kind}{'-quick' if asked.quick else ''}", self.folder, date)

    def base(self, suite: str) -> str:
        asked = self.asked
        weights = (
            ["--random"] if asked.random else ["--model", shlex.quote(places.shown(asked.model))] if asked.model else []
        )
        return " ".join(["flux-quant bench", suite, *weights, *(["--quick"] if asked.quick else [])])


def part_of(suite: Suite) -> int:
    return SUITES.get(suite.name, ("", 1))[1]


def runs_of(day: Path) -> dict[Path, Run | None]:
    """The first run of a day and what later ones left aside, in their order; None for a file of another kind."""
    found: dict[Path, Run | None] = {}
    for path in [day, *sorted(day.parent.glob(f"{day.name[:10]}T??????{day.name[10:]}"))]:
        if path.exists():
            try:
                found[path] = read_run(path)
            except UserError:
                found[path] = None
    return found


def settled(run: Run, path: Path, day: Path) -> Path:
    """Where a run lies that is through: as the day's, unless the one that is there holds rows that it has not."""
    if path == day or not path.exists():
        return path
    earlier = runs_of(day).get(day)
    have = {row.key for row in measured(run)}
    if earlier is None and day.exists() or earlier and any(row.key not in have for row in measured(earlier)):
        return path
    return path.replace(day)


def measured(run: Run) -> list[Row]:
    return [row for row in run.rows if row.status != SKIPPED]


def same(earlier: Run, run: Run) -> bool:
    """Whether rows of both may stand beside each other: machine, commit, weights, threads."""
    return earlier.weights == run.weights and all(
        earlier.machine.get(name) == run.machine.get(name) for name in ("device", "commit", "torch", "threads")
    )
