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
from flux_quant.benchmarks.machine import fingerprint, now, result_path
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
            run, path = self.begun(suite, machine, can)
            runner = Runner(run, path, self.asked.repeats, time.monotonic() + share, self.base(suite.name), self.resume)
            runner.watcher = self.watcher
            runner.measure(self.cases(suite, replace(self.asked, limits=can, seconds=share), len(suites) == 1))
            yield run, path

    def cases(self, suite: Suite, asked: Asked, alone: bool) -> list[Case]:
        """Where one of many suites has nothing to measure, it says why and the others go on."""
        try:
            return list(suite.cases(asked))
        except UserError as error:
            if alone:
                raise
            return [Case({"suite": suite.name}, lambda error=error: Row(status=SKIPPED, note=str(error)))]

    def begun(self, suite: Suite, machine: dict, can: dict) -> tuple[Run, Path]:
        """A new run, with the rows of an earlier one of the day that it resumes."""
        try:
            weights = (suite.weights or models.weights_of)(self.asked)
        except UserError:  # which the cases say
            weights = {"kind": "none", "name": "none"}
        path = self.path(suite.name, str(machine["date"])[:10])
        run = Run(suite.name, places.command(sys.argv[1:]), now(), weights, machine, can)
        if self.resume and path.exists():
            earlier = read_run(path)
            if same(earlier, run):
                run.rows = earlier.rows
        return run, path

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


def same(earlier: Run, run: Run) -> bool:
    """Whether rows of both may stand beside each other: machine, commit, weights, threads."""
    return earlier.weights == run.weights and all(
        earlier.machine.get(name) == run.machine.get(name) for name in ("device", "commit", "torch", "threads")
    )
