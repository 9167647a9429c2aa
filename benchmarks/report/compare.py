"""What changed from results A to results B: the same rows of both, by the ratio of their medians.

The interval of a ratio is a bootstrap's (percentiles, Efron 1979): both samples are drawn anew with replacement. It
knows the scatter within a run and nothing of what differs between two runs, and of few samples it is too narrow.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flux_quant.benchmarks.bench.record import OURS, SKIPPED, Row
from flux_quant.benchmarks.report.facts import flat
from flux_quant.benchmarks.report.inputs import (
    Found,
    Numbered,
    is_number,
    latest,
    machine_name,
    model_name,
    number_rows,
)
from flux_quant.benchmarks.report.model import Column, Line, Report, Section, Table
from flux_quant.benchmarks.report.tables import context
from flux_quant.benchmarks.report.words import (
    higher_is_better,
    is_time,
    label,
    listed,
    marked,
    sampled,
    show,
    show_what,
)
from flux_quant.errors import UserError

RESAMPLES, CONFIDENCE = 10_000, 0.95
FEWEST = 3  # samples on either side for an interval
CHANGED = 0.001  # of figures that are no samples: from here on they are listed
REGRESSION, IMPROVEMENT, SAME, UNKNOWN = "regression", "improvement", "same", "unknown"
COLUMNS = (
    Column("row", right=False),
    Column("case", right=False),
    Column("figure", right=False),
    *map(Column, ("A", "B", "B / A", "95 % interval", "samples")),
)


@dataclass(frozen=True)
class Change:
    """A kind of samples of one row: medians, ratio B / A with its interval, None where there are too few samples."""

    a: Numbered
    b: Numbered
    name: str
    medians: tuple[float, float]
    ratio: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return UNKNOWN
        low, high = self.interval
        if low <= 1 <= high:
            return SAME
        return IMPROVEMENT if (low > 1) == higher_is_better(self.name) else REGRESSION


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """(median of b over median of a, its 95 % interval), the same every time."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found = float(np.median(b) / np.median(a))
    if min(len(a), len(b)) < FEWEST:
        return found, None
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(side, (RESAMPLES, len(side))), axis=1) for side in (a, b)]
    if not (medians[0] > 0).all():
        return found, None
    low, high = np.quantile(medians[1] / medians[0], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return found, (float(low), float(high))


def compare(a: Found, b: Found, across_machines: bool = False) -> Report:
    """UserError for results of different machines, unless it is asked for, and for results with nothing in common."""
    machines = [{machine_name(source.run) for source in found.sources} for found in (a, b)]
    if not across_machines and not machines[0] & machines[1]:
        names = [listed(sorted(side)) or "nothing" for side in machines]
        raise UserError(
            f"A is of {names[0]}, B of {names[1]}: times of two machines say nothing of a change; "
            "--across-machines compares them all the same"
        )
    sides = [by_key(found, across_machines) for found in (a, b)]
    shared = [(sides[0][key], sides[1][key]) for key in sides[0] if key in sides[1]]
    if not shared:
        raise UserError("A and B have no row in common: other suites, weights or cases")
    changes = [change for pair in shared for change in changes_of(*pair)]
    verdicts = {kind: [c for c in changes if c.verdict == kind] for kind in (REGRESSION, IMPROVEMENT, SAME, UNKNOWN)}
    stopped = [(x, y) for x, y in shared if (x.row.status == SKIPPED) != (y.row.status == SKIPPED)]
    lonely = [[side[key] for key in side if key not in other] for side, other in (sides, sides[::-1])]
    sections = [
        Section("Regressions", tables=changes_tables(verdicts[REGRESSION])),
        Section("Improvements", tables=changes_tables(verdicts[IMPROVEMENT])),
        Section("What runs in one of them alone", tables=stopped_tables(stopped)),
        Section("Figures without samples that changed", tables=figures_tables(shared)),
        Section("Too few samples for an interval", tables=changes_tables(verdicts[UNKNOWN])),
        Section("Within the interval", tables=changes_tables(verdicts[SAME]), folded=True),
        Section("Rows of A alone", tables=lonely_tables(lonely[0])),
        Section("Rows of B alone", tables=lonely_tables(lonely[1])),
        Section("What differs in the machines", tables=machine_tables(a, b)),
        Section("Files that were not read", (*a.refused, *b.refused)),
    ]
    claim = f"{counted(verdicts[REGRESSION], 'regression')} and {counted(verdicts[IMPROVEMENT], 'improvement')} beyond "
    claim += f"the interval, {len(verdicts[SAME])} within it, {len(verdicts[UNKNOWN])} with too few samples; "
    claim += f"{len(lonely[0])} rows of A and {len(lonely[1])} of B have no counterpart."
    about = "B / A is of medians; its interval is a bootstrap's over the samples of both. " + (
        "A and B are of different machines. " if machines[0] != machines[1] else ""
    )
    about += f"Of {len(changes)} comparisons one in twenty lies beyond its interval by chance."
    return Report("flux_quant: B against A", (Line((claim,)),), about, tuple(s for s in sections if not s.empty))


def by_key(found: Found, across_machines: bool) -> dict[tuple[str, ...], Numbered]:
    """Rows of the newest runs by suite, weights, case, program and, unless machines are mixed, machine."""
    newest, _ = latest(found.sources)
    rows = {}
    for numbered in sorted(number_rows(newest), key=lambda n: n.source.run.date):
        run = numbered.source.run
        machine = "" if across_machines else machine_name(run)
        rows[(run.suite, model_name(run), machine, numbered.row.key)] = numbered
    return rows


def changes_of(a: Numbered, b: Numbered) -> Iterator[Change]:
    if SKIPPED in (a.row.status, b.row.status):
        return
    for name in sampled(a.row):
        medians = a.row.seconds(name), b.row.seconds(name)
        if a.row.status == b.row.status and medians[0] and medians[1] is not None:
            yield Change(a, b, name, medians, *ratio(a.row.samples[name], b.row.samples[name]))


def case(numbered: Numbered) -> str:
    return show_what({name: value for name, value in context(numbered).items() if value != OURS})


def changes_tables(changes: Sequence[Change]) -> tuple[Table, ...]:
    """The largest change first."""
    ordered = sorted(changes, key=lambda change: -abs(np.log(change.ratio)) if change.ratio > 0 else 0)
    lines = tuple(
        Line(
            (
                change.b.id,
                case(change.b),
                label(change.name),
                *(marked(show(change.name, x), change.b.row.status) for x in change.medians),
                f"{change.ratio:.3f}",
                f"{change.interval[0]:.3f} to {change.interval[1]:.3f}" if change.interval else "-",
                f"{len(change.a.row.samples[change.name])} and {len(change.b.row.samples[change.name])}",
            ),
            change.b.row.status,
            unstable=bool(change.a.row.unstable() or change.b.row.unstable()),
        )
        for change in ordered
    )
    return (Table("", COLUMNS, lines),) if lines else ()


def figures_tables(pairs: Iterable[tuple[Numbered, Numbered]]) -> tuple[Table, ...]:
    """Bytes, decibels, counts: what has no scatter. Times and rates among the values are left to the samples."""
    lines = []
    for a, b in pairs:
        for name, old, new in figures(a.row, b.row):
            change = f"{new / old:.3f}" if old else "-"
            lines.append(Line((b.id, case(b), label(name), show(name, old), show(name, new), change), b.row.status))
    return (Table("", COLUMNS[:6], tuple(lines)),) if lines else ()


def figures(a: Row, b: Row) -> Iterator[tuple[str, float, float]]:
    for part in ("values", "memory"):
        old, new = getattr(a, part), getattr(b, part)
        for name in old:
            known = is_number(old[name]) and is_number(new.get(name)) and not is_time(name)
            if known and abs(new[name] - old[name]) > CHANGED * abs(old[name]):
                yield (f"{name}_bytes" if part == "memory" else name), old[name], new[name]


def stopped_tables(pairs: Iterable[tuple[Numbered, Numbered]]) -> tuple[Table, ...]:
    lines = tuple(
        Line((b.id, case(b), a.row.status, b.row.status, b.row.note or a.row.note or "-"), b.row.status)
        for a, b in pairs
    )
    columns = tuple(Column(name, right=False) for name in ("row", "case", "A", "B", "why"))
    return (Table("", columns, lines),) if lines else ()


def lonely_tables(rows: Iterable[Numbered]) -> tuple[Table, ...]:
    lines = tuple(Line((n.id, case(n), n.row.status), n.row.status) for n in rows)
    columns = tuple(Column(name, right=False) for name in ("row", "case", "how"))
    return (Table("", columns, lines),) if lines else ()


def machine_tables(a: Found, b: Found) -> tuple[Table, ...]:
    """Facts that are not the same on both sides, of the newest run of each."""
    if not a.sources or not b.sources:
        return ()
    runs = [max(found.sources, key=lambda source: source.run.date).run for found in (a, b)]
    known = [dict(flat({"date": run.date[:10], "command": run.command} | run.machine)) for run in runs]
    names = [name for name in {**known[0], **known[1]} if known[0].get(name) != known[1].get(name)]
    lines = tuple(Line((name, known[0].get(name, "-"), known[1].get(name, "-"))) for name in names)
    columns = tuple(Column(name, right=False) for name in ("what", "A", "B"))
    return (Table("", columns, lines),) if lines else ()


def counted(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
