"""Tables of what surrounds the rows: where they come from, how to run them again, what machines they are of."""

from collections.abc import Sequence
from itertools import groupby

from flux_quant.benchmarks.report.inputs import Numbered, Source, machine_name, model_name
from flux_quant.benchmarks.report.model import Column, Line, Table
from flux_quant.benchmarks.report.words import NONE, has_unit, label, listed, show


def rerun_tables(rows: Sequence[Numbered]) -> list[Table]:
    """Which command measures which rows again; neighbours with one command share a line."""
    lines = []
    with_commands = [numbered for numbered in rows if numbered.row.rerun]
    for (_, command), found in groupby(with_commands, key=lambda n: (n.source.run.suite, n.row.rerun)):
        ids = [numbered.id for numbered in found]
        lines.append(Line((ids[0] if len(ids) == 1 else f"{ids[0]} to {ids[-1].rpartition('-')[2]}", command)))
    columns = (Column("rows", right=False), Column("command", right=False, code=True))
    return [Table("", columns, tuple(lines))] if lines else []


def runs_table(sources: Sequence[Source]) -> Table:
    """Where everything comes from."""
    lines = tuple(
        Line(
            (run.suite, machine_name(run), model_name(run), run.date[:10], str(len(run.rows)), source.name, run.command)
        )
        for source in sources
        for run in (source.run,)
    )
    names = ("suite", "machine", "model", "date", "rows", "file", "command")
    return Table("", tuple(Column(name, name == "rows", name == "command") for name in names), lines)


def facts_table(title: str, facts: dict[str, object]) -> Table | None:
    """A fingerprint or limits, nested ones by the names of both."""
    lines = tuple(Line((name, value)) for name, value in flat(facts))
    return Table(title, (Column("what", right=False), Column("value", right=False)), lines) if lines else None


def flat(facts: dict[str, object], prefix: str = "", parent: str = "") -> list[tuple[str, str]]:
    """(name, value); what is nested has the unit of its parent where it has none."""
    found = []
    for name, value in ((str(name), value) for name, value in facts.items()):
        words = f"{prefix} {label(name)}".strip()
        unit = name if has_unit(name) or not parent else parent
        if isinstance(value, dict):
            found += flat(value, words, unit)
        elif isinstance(value, list | tuple):
            found.append((words, listed([show(unit, part) for part in value]) or NONE))
        else:
            found.append((words, show(unit, value)))
    return found
