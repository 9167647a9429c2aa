"""Measures the cases of a suite, one group after the other, and keeps every row as soon as it is there.

Cases of one group are called in turns, A B B A A B ..., so that what changes on the machine meanwhile changes all of
them. Interrupted, it keeps what there is: rows of groups that are finished, and of the others the samples taken so far.
"""

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from flux_quant.benchmarks.bench.record import SKIPPED, Row, Run, write_run
from flux_quant.benchmarks.bench.suite import Case
from flux_quant.benchmarks.bench.sweep import named_budget
from flux_quant.benchmarks.journal import FAILURES

STOPS = (*FAILURES, subprocess.SubprocessError, MemoryError)  # of one case; anything else is a mistake of ours
TURNS = 2  # at least, of a group
LACK = "too little time was left"  # how the note of a row begins that could not be begun
RERUN: dict[str, Callable[[Any], str]] = {  # names in `what` that are options of `flux-quant bench`
    "format": lambda name: f"--formats {name}",
    "vram": lambda nbytes: f"--vram {named_budget(nbytes)}",
    "size": lambda name: f"--size {name}",
    "steps": lambda count: f"--steps {count}",
}


class Watcher:
    """What is told while a run goes on; this one says nothing."""

    def begins(self, suite: str, cases: int) -> None: ...

    def calls(self, case: Case) -> None: ...

    def has(self, row: Row) -> None: ...


@dataclass
class Runner:
    """run: where rows go, those of an earlier one among them; path: its file; until: of time.monotonic()."""

    run: Run
    path: Path
    repeats: int
    until: float
    base: str = "flux-quant bench"  # the command that measures a row again, without what the row itself says
    resume: bool = False
    watcher: Watcher = field(default_factory=Watcher)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def measure(self, cases: Sequence[Case]) -> None:
        """An earlier file of the day stays until there is a row."""
        self.watcher.begins(self.run.suite, len(cases))
        for group in groups(cases):
            try:
                if not (self.resume and all(self.known(case) for case in group)):
                    self.measure_group(group)
            finally:
                for case in group:
                    case.close()

    def known(self, case: Case) -> bool:
        """Whether an earlier run has it. What was skipped is tried again."""
        row = self.run.find(Row(case.what, case.subject).key)
        return row is not None and row.status != SKIPPED

    def measure_group(self, group: list[Case]) -> None:
        taken: dict[int, Row] = {}
        over: set[int] = set()
        turns = max(self.repeats, TURNS) if group[0].group else 1
        try:
            for turn in range(turns):
                for i in range(len(group)) if turn % 2 == 0 else reversed(range(len(group))):
                    if i in over:
                        continue
                    row = self.call(group[i], first=i not in taken)
                    taken[i] = added(taken[i], row) if i in taken else row
                    if row.status == SKIPPED or turn + 1 >= TURNS and samples_in(taken[i]) >= self.repeats:
                        over.add(i)
                if turn + 1 >= TURNS and self.left <= 0:
                    break
            self.keep(group, taken)
        except BaseException:
            self.keep(group, {i: interrupted(row) for i, row in taken.items() if row.status != SKIPPED})
            raise

    def call(self, case: Case, first: bool) -> Row:
        needs = case.needs * (TURNS if case.group and first else 1)
        if first and (left := self.left) <= needs:
            return Row(status=SKIPPED, note=f"{LACK}: {max(0.0, left):.0f} s, it needs {needs:.0f} s or more")
        self.watcher.calls(case)
        try:
            return case.work()
        except STOPS as error:
            return Row(status=SKIPPED, note=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def keep(self, group: list[Case], taken: dict[int, Row]) -> None:
        for i, row in sorted(taken.items()):
            case = group[i]
            row.what, row.subject, row.rerun = dict(case.what), case.subject, row.rerun or self.rerun(case)
            if row.status != SKIPPED or not self.known(case):
                put(self.run.rows, row)
            self.watcher.has(row)
        if self.run.rows:
            write_run(self.run, self.path)

    def rerun(self, case: Case) -> str:
        """The command for this row, and the rows that are measured beside it."""
        return " ".join(
            [self.base, *(option(case.what[name]) for name, option in RERUN.items() if case.what.get(name))]
        )


def groups(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """Neighbours of one group; each case without one by itself."""
    for _, found in groupby(enumerate(cases), key=lambda pair: pair[1].group or pair[0]):
        yield [case for _, case in found]


def samples_in(row: Row) -> int:
    return max(map(len, row.samples.values()), default=0)


def interrupted(row: Row) -> Row:
    row.note = "; ".join(filter(None, (row.note, f"interrupted after {samples_in(row)} samples")))
    return row


def added(row: Row, more: Row) -> Row:
    """Samples of both, the most memory, else what the later one says. A turn that fails leaves the samples before it,
    and its note."""
    if more.status == SKIPPED:
        row.note = "; ".join(filter(None, (row.note, f"after {samples_in(row)} samples: {more.note}")))
        return row
    for name, samples in more.samples.items():
        row.samples.setdefault(name, []).extend(samples)
    for name, nbytes in more.memory.items():
        row.memory[name] = max(nbytes, row.memory.get(name, 0))
    row.values |= more.values
    row.expected |= more.expected
    row.note = more.note or row.note
    return row


def put(rows: list[Row], row: Row) -> None:
    """In the place of the row of the same key, or at the end."""
    place = next((i for i, other in enumerate(rows) if other.key == row.key), None)
    if place is None:
        rows.append(row)
    else:
        rows[place] = row
