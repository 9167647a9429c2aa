"""From rows to tables. What is the same in all rows of a table stands above it once; everything else is a column.

A column is a function of a row that gives text, so a new name in the results appears without a change here.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from flux_quant.benchmarks.bench.record import MEASURED, OURS, PREDICTED, REPORTED, SKIPPED, Row, Scalar
from flux_quant.benchmarks.report.inputs import Numbered, machine_name, model_name, tier_of
from flux_quant.benchmarks.report.model import Column, Line, Table
from flux_quant.benchmarks.report.words import (
    BOUND,
    NONE,
    TIERS,
    between,
    is_time,
    label,
    marked,
    number,
    sampled,
    show,
    show_samples,
    show_what,
)

WIDE = 14  # columns of a table that fits a page in print,
FEWEST = 5  # of them figures, at least
OWN_TABLE = 3  # columns of memory that are worth a table of their own
MOST_NOTES = 4  # of unstable rows that are explained under a table
FLOOR = "_floor"
DETAIL = re.compile(r"_step_\d+(_low|_high)?$|_worst_tensor$|_reference$")  # figures that stay in the JSON
RATIO = "times_ours"  # of `values`
SPLITTERS = ("part", "work", "kind", "operation", "stage", "measure")  # names of a case: a table for each value
CARD = "card"  # of `what`
SOURCE = "source"  # of a row that others reported


@dataclass(frozen=True)
class Field:
    """A column to be: name, text of a row, whether it holds numbers."""

    name: str
    text: Callable[[Numbered], str]
    right: bool = True


def names_in(rows: Iterable[Numbered], part: str) -> list[str]:
    """Keys of a part of the rows, in the order they appear."""
    return list(dict.fromkeys(name for numbered in rows for name in getattr(numbered.row, part)))


def context(numbered: Numbered) -> dict[str, Scalar]:
    """What identifies a row."""
    run = numbered.source.run
    about: dict[str, Scalar] = {"suite": run.suite}
    if not of_a_card(numbered.row):
        about |= {"model": model_name(run), "machine": machine_name(run)}
    about["program"] = numbered.row.subject
    what = {name: tier_of(numbered) if name in TIERS else value for name, value in numbered.row.what.items()}
    return about | what


def of_a_card(row: Row) -> bool:
    """Whether it is about a card that it names, and neither about the machine nor the weights of its run."""
    return row.status in (PREDICTED, REPORTED) and CARD in row.what


def case_fields(rows: Sequence[Numbered]) -> tuple[list[Field], dict[str, Scalar]]:
    """(columns for what tells the rows apart, what is the same in all of them)."""
    contexts = {numbered.id: context(numbered) for numbered in rows}
    fields, same = [], {}
    for name in dict.fromkeys(name for found in contexts.values() for name in found):
        found = [show(name, contexts[numbered.id].get(name)) for numbered in rows]
        if len(set(found)) == 1:
            same[name] = contexts[rows[0].id].get(name)
        else:
            kinds = {type(contexts[numbered.id].get(name)) for numbered in rows}
            texts = dict(zip(contexts, found, strict=True))
            fields.append(Field(label(name), lambda n, texts=texts: texts[n.id], right=not kinds & {str, bool}))
    return fields, same


def status_of(numbered: Numbered) -> str:
    return numbered.row.status + (", unstable" if numbered.row.unstable() else "")


def sample_fields(rows: Sequence[Numbered]) -> list[Field]:
    return [
        Field(
            label(name),
            lambda n, name=name: marked(show_samples(name, n.row.samples.get(name, ())), n.row.status, is_time(name)),
        )
        for name in dict.fromkeys(name for numbered in rows for name in sampled(numbered.row))
    ]


def expected_fields(rows: Sequence[Numbered]) -> list[Field]:
    """What was predicted and what physics permits, right of what was measured, and how far that is above it."""
    fields = []
    for name in names_in(rows, "expected"):
        status = BOUND if name.startswith("bound") and is_time(name) else PREDICTED
        if is_time(name):
            found = lambda n, name=name, status=status: marked(show(name, n.row.expected.get(name)), status)  # noqa: E731
        else:
            found = lambda n, name=name: show(name, n.row.expected.get(name))  # noqa: E731
        fields.append(Field(label(name), found, right=is_time(name)))
    told = any("times_bound" in numbered.row.values for numbered in rows)
    if not told and any(times_bound(numbered) != NONE for numbered in rows):
        fields.append(Field("times bound", times_bound))
    return fields


def times_bound(numbered: Numbered) -> str:
    seconds, bound = numbered.row.seconds(), numbered.row.expected.get("bound_seconds")
    if numbered.row.status != MEASURED or not seconds or not isinstance(bound, int | float) or not bound > 0:
        return NONE
    return number(seconds / bound)


def show_value(numbered: Numbered, name: str) -> str:
    """With its interval where there is one: 31.2 dB (30.1 to 32.0 dB), or as a range: 26 to 35 s."""
    values = numbered.row.values
    shown = show(name, values.get(name))
    if shown != NONE and (low := values.get(f"{name}_low")) is not None:
        shown += f" ({between(name, low, values.get(f'{name}_high'))})"
    elif (most := values.get(f"{name}_most")) is not None:
        shown = between(name, values[name], most)
    return shown if name == SOURCE else marked(shown, numbered.row.status, is_time(name))


def rank(name: str) -> int:
    """Sizes come first, and last where it is from."""
    return 0 if name in ("bits_per_weight", "file_bytes") else 2 if name == SOURCE else 1


def value_fields(rows: Sequence[Numbered]) -> list[Field]:
    told = [name for name in names_in(rows, "values") if not DETAIL.search(name)]
    fields, names = [], sorted(told, key=rank)
    intervals = {f"{name}_{side}" for name in names for side in ("low", "high") if f"{name}_low" in names}
    intervals |= {f"{name}_most" for name in names}
    for name in names:
        if name in intervals or is_floor(rows, name):
            continue
        kinds = {type(numbered.row.values[name]) for numbered in rows if name in numbered.row.values}
        fields.append(Field(label(name), lambda n, name=name: show_value(n, name), right=not kinds & {str, bool}))
    return fields


def memory_fields(rows: Sequence[Numbered]) -> list[Field]:
    return [
        Field(
            f"peak {label(name)}",
            lambda n, name=name: marked(show("bytes", n.row.memory.get(name)), n.row.status, time=False),
        )
        for name in names_in(rows, "memory")
    ]


def ratio_field(rows: Sequence[Numbered], ours: dict[tuple[int, str], float]) -> list[Field]:
    """Time over ours for the same case in the same run; nothing where all are ours or say it."""
    if all(numbered.row.subject == OURS for numbered in rows) or any(RATIO in n.row.values for n in rows):
        return []

    def text(numbered: Numbered) -> str:
        seconds, base = numbered.row.seconds(), ours.get((id(numbered.source), case_key(numbered)))
        if numbered.row.status != MEASURED or not seconds or not base:
            return NONE
        return f"{number(seconds / base)} x"

    return [Field("time over ours", text)]


def case_key(numbered: Numbered) -> str:
    return repr(sorted(numbered.row.what.items()))


def our_times(rows: Iterable[Numbered]) -> dict[tuple[int, str], float]:
    """(source, case) -> median seconds of ours, measured."""
    return {
        (id(numbered.source), case_key(numbered)): seconds
        for numbered in rows
        if numbered.row.subject == OURS and numbered.row.status == MEASURED and (seconds := numbered.row.seconds())
    }


def build(title: str, rows: Sequence[Numbered]) -> list[Table]:
    """One table of the rows that were not skipped, or several with the same rows where it would be too wide; none
    without rows."""
    rows = [numbered for numbered in rows if numbered.row.status != SKIPPED]
    if not rows:
        return []
    cases, same = case_fields(rows)
    head = [Field("row", lambda n: n.id, right=False), *cases, Field("how", status_of, right=False)]
    figures = [*sample_fields(rows), *expected_fields(rows), *ratio_field(rows, our_times(rows)), *value_fields(rows)]
    told = {numbered.row.note for numbered in rows}
    remarks = [Field("remark", lambda n: n.row.note or NONE, right=False)] if len(told) > 1 else []
    remark = [f"{note[0].upper()}{note[1:]}." for note in told - {""} if not remarks]
    notes = [*all_rows(same), *floors(rows), *unstable_notes(rows), *remark]
    room = max(FEWEST, WIDE - len(head) - len(remarks))
    first, *more = pages(filled(figures, rows), filled(memory_fields(rows), rows), room)
    further = f"{title}, continued" if title else "Continued"
    others = [assemble(further, having(fields, rows), [*head, *fields], (), anchors=False) for fields in more]
    return [assemble(title, rows, [*head, *first, *remarks], notes), *others]


def filled(fields: Iterable[Field], rows: Sequence[Numbered]) -> list[Field]:
    """Those that some row has."""
    return [field for field in fields if having([field], rows)]


def having(fields: Sequence[Field], rows: Sequence[Numbered]) -> list[Numbered]:
    """Rows that have one of the fields."""
    return [numbered for numbered in rows if any(field.text(numbered) != NONE for field in fields)]


def pages(figures: list[Field], memory: list[Field], room: int) -> list[list[Field]]:
    """Fields of one table, or of several about as wide; memory stays together, and with the last ones if it fits."""
    if len(figures) + len(memory) <= room:
        return [[*figures, *memory]]
    count = max(1, ceil(len(figures) / room))
    width = ceil(len(figures) / count)
    found = [figures[i : i + width] for i in range(0, len(figures), width)] or [[]]
    if memory and (len(found[-1]) + len(memory) <= room or len(memory) < OWN_TABLE):
        found[-1] = [*found[-1], *memory]
    elif memory:
        found.append(memory)
    return found


def assemble(
    title: str, rows: Sequence[Numbered], fields: Sequence[Field], notes: Iterable[str], anchors: bool = True
) -> Table:
    """`anchors`: it is the first table of its rows, to which others point."""
    lines = tuple(
        Line(
            tuple(field.text(numbered) for field in fields),
            numbered.row.status,
            numbered.id if anchors else "",
            bool(numbered.row.unstable()),
        )
        for numbered in rows
    )
    return Table(title, tuple(Column(field.name, field.right) for field in fields), lines, tuple(notes))


def all_rows(same: dict[str, Scalar]) -> list[str]:
    """Of what is the same in all rows, what a reader would miss; that it is ours goes without saying."""
    told = {n: value for n, value in same.items() if n not in ("suite", *SPLITTERS) and value not in (None, "", OURS)}
    return [f"In all rows: {show_what(told)}."] if told else []


def floors(rows: Sequence[Numbered]) -> list[str]:
    """What nothing can be told apart below, where it is the same for all rows."""
    names = [name for name in names_in(rows, "values") if is_floor(rows, name)]
    told = [f"{label(name.removesuffix(FLOOR))} {show(name, rows[0].row.values[name])}" for name in names]
    return [f"Floors: {', '.join(told)}."] if told else []


def is_floor(rows: Sequence[Numbered], name: str) -> bool:
    found = {numbered.row.values.get(name) for numbered in rows}
    return name.endswith(FLOOR) and len(found) == 1


def unstable_notes(rows: Iterable[Numbered]) -> list[str]:
    notes = [f"{numbered.id} is unstable, {'; '.join(why)}." for numbered in rows if (why := numbered.row.unstable())]
    more = len(notes) - MOST_NOTES
    return [*notes[:MOST_NOTES], *([f"{more} more rows are unstable."] if more > 0 else [])]


def skipped_table(rows: Sequence[Numbered]) -> Table | None:
    """What did not run, and why: kept, since it is a result."""
    skipped = [numbered for numbered in rows if numbered.row.status == SKIPPED]
    if not skipped:
        return None
    fields = [
        Field("row", lambda n: n.id, right=False),
        Field("program", lambda n: n.row.subject, right=False),
        Field("case", lambda n: show_what(n.row.what) or NONE, right=False),
        Field("why", lambda n: n.row.note or "no reason given", right=False),
    ]
    return assemble("", skipped, fields, ())
