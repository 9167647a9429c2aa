"""What `flux-quant bench` tells: progress on stderr while it measures, tables of rows on stdout when it has."""

import sys
from collections.abc import Iterable
from statistics import quantiles
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flux_quant import console
from flux_quant.benchmarks.bench.record import MEASURED, OURS, SKIPPED, Row, Run
from flux_quant.benchmarks.bench.runner import LACK, Watcher
from flux_quant.benchmarks.bench.suite import Case
from flux_quant.benchmarks.bench.sweep import named_budget

MARK = "~"  # of an unstable row
NAMED = 3  # rows that are left out for the same reason; the file names all


class Progressing(Watcher):
    """A bar where stderr is a terminal; elsewhere a line for every row."""

    def __init__(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
        self.suite, self.task = "", None

    def __enter__(self) -> "Progressing":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def begins(self, suite: str, cases: int) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.suite, self.task = suite, self.bar.add_task(suite, total=cases)

    def calls(self, case: Case) -> None:
        self.bar.update(self.task, description=escape(f"{self.suite}: {words(case.what)}, {case.subject}"))

    def has(self, row: Row) -> None:
        self.bar.advance(self.task)
        if self.bar.disable:
            console.say(f"{self.suite}: {line(row)}")
        elif row.status == SKIPPED:
            self.bar.console.print(escape(f"{self.suite}: {line(row)}"), highlight=False)


def words(what: dict) -> str:
    return ", ".join(said(name, value) for name, value in what.items() if value is not None)


def said(name: str, value: object) -> str:
    if name == "vram":
        return named_budget(value)
    return value if isinstance(value, str) else f"{name} {value}"


def line(row: Row) -> str:
    return f"{named(row)}: {row.note if row.status == SKIPPED else found(row)}"


def named(row: Row) -> str:
    return words(row.what) + ("" if row.subject == OURS else f", {row.subject}")


def found(row: Row) -> str:
    """Time, or what is expected of it, or the first numbers that there are."""
    if (seconds := row.seconds()) is not None:
        return f"{duration(seconds)}{f' {MARK}' if row.unstable() else ''}"
    times = [f"{name.partition('_')[0]} {duration(row.expected[name])}" for name in EXPECTED if name in row.expected]
    return ", ".join(times or [f"{name} {short(value)}" for name, value in list(row.values.items())[:2]]) or row.note


EXPECTED = ("predicted_seconds", "bound_seconds")


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tables(run: Run) -> Iterable[Table | str]:
    """Rows that were had, then what was left out and why."""
    rows = [row for row in run.rows if row.status != SKIPPED]
    if rows:
        out = console.table("case", "found", "middle half", "status")
        for column in out.columns[1:]:
            column.no_wrap = True
        for row in rows:
            out.add_row(named(row), found(row), spread(row), "" if row.status == MEASURED else row.status)
        yield out
    if unstable := [row for row in rows if row.unstable()]:
        yield f"{MARK} {len(unstable)} of {len(rows)} rows scatter: the machine was busy, or the work is too short"
    for note, left_out in grouped(row for row in run.rows if row.status == SKIPPED).items():
        more = f" and {len(left_out) - NAMED} more" if len(left_out) > NAMED else ""
        yield f"left out: {'; '.join(map(named, left_out[:NAMED]))}{more}: {note}"


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By note. Seconds that were left differ from row to row and are all the same want of time."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(LACK if LACK in row.note else row.note, []).append(row)
    return found


def spread(row: Row) -> str:
    samples = row.samples.get("seconds", [])
    if len(samples) < 3:
        return ""
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return f"{duration(low)} to {duration(high)}"


def listing(name: str, cases: Iterable[Case]) -> Table:
    """What a suite would measure."""
    out = console.table("case", "who", "in turns with", left=3)
    out.title = name
    for case in cases:
        out.add_row(words(case.what), case.subject, case.group)
    return out
