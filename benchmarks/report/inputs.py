"""Reading results: files, or folders with results somewhere below. They may come from strangers and are checked."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

from flux_quant.benchmarks.bench.earlier import load
from flux_quant.benchmarks.bench.record import EMULATED, MEASURED, PREDICTED, REPORTED, SKIPPED, Row, Run
from flux_quant.benchmarks.report.words import TIERS, budget, show
from flux_quant.errors import UserError

RESULTS = Path(__file__).resolve().parent.parent / "results"
WITHIN_TIERS = ("image", "step")  # suites of what runs within the memory of a card, or without one
CPU_ONLY = "CPU only"
EARLIER = "earlier"  # kind of weights of results that are of a script and no suite
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
STATUSES = (MEASURED, EMULATED, PREDICTED, REPORTED, SKIPPED)


@dataclass(frozen=True)
class Source:
    """A run, and the name by which a reader finds it again."""

    name: str
    run: Run


@dataclass(frozen=True)
class Numbered:
    """A row with the number it has in every table: `step-3`."""

    id: str
    source: Source
    row: Row


@dataclass
class Found:
    """refused: what in folders was no result, each with its reason; pictures: name -> file"""

    sources: list[Source] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)


def gather(paths: Iterable[Path]) -> Found:
    """Results, and pictures: given ones, below a folder all, beside a result those whose names begin as its own.

    UserError for a missing path, and for a file named directly that is no result or has another schema.
    """
    found = Found()
    for given in paths:
        if not given.exists():
            raise UserError(f"{given} does not exist")
        if given.is_dir():
            gather_folder(given, found)
        elif given.suffix in PICTURES:
            found.pictures[given.name] = given
        else:
            found.sources.append(Source(given.name, read_checked(given)))
            beside = (path for path in given.parent.iterdir() if path.name.startswith(given.stem))
            found.pictures |= {path.name: path for path in sorted(beside) if path.suffix in PICTURES}
    found.sources.sort(key=lambda source: (source.run.suite, machine_name(source.run), source.run.date, source.name))
    return found


def gather_folder(folder: Path, found: Found) -> None:
    for path in sorted(folder.rglob("*")):
        name = f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"
        if path.suffix in PICTURES:
            found.pictures[name] = path
        elif path.suffix == ".json":
            try:
                found.sources.append(Source(name, read_checked(path)))
            except UserError as error:
                found.refused.append(str(error).replace(str(path), name))


def read_checked(path: Path) -> Run:
    """Of `flux-quant bench` or an earlier script; every field of the type it is documented with, samples without what
    is no number."""
    run = load(path)
    sound = isinstance(run.suite, str) and isinstance(run.command, str) and isinstance(run.date, str)
    if not sound or not all(isinstance(part, dict) for part in (run.weights, run.machine, run.limits)):
        raise UserError(f"{path} is no result of a benchmark: suite, command, date, weights, machine or limits")
    for i, row in enumerate(run.rows):
        if problem := problem_of(row):
            raise UserError(f"{path} is no result of a benchmark: row {i + 1}: {problem}")
        row.samples = {name: [float(x) for x in kept if is_number(x)] for name, kept in row.samples.items()}
    return run


def problem_of(row: Row) -> str:
    """What is wrong with a row; nothing for a sound one."""
    for name in ("what", "samples", "values", "memory", "expected"):
        part = getattr(row, name)
        if not isinstance(part, dict):
            return f"{name} is no object"
        allowed = list if name == "samples" else str | int | float | bool | None
        if wrong := [key for key, value in part.items() if not isinstance(value, allowed)]:
            return f"{name}.{wrong[0]} has the wrong type"
    if row.status not in STATUSES:
        return f"status is {row.status!r}, there are {', '.join(STATUSES)}"
    if not all(isinstance(text, str) for text in (row.subject, row.note, row.rerun)):
        return "subject, note or rerun is no text"
    return ""


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not isnan(value)


def number_rows(sources: Iterable[Source]) -> list[Numbered]:
    """All rows, numbered within their suite in the order of `sources`."""
    counts: dict[str, int] = {}
    rows = []
    for source in sources:
        for row in source.run.rows:
            counts[source.run.suite] = counts.get(source.run.suite, 0) + 1
            rows.append(Numbered(f"{source.run.suite}-{counts[source.run.suite]}", source, row))
    return rows


def latest(sources: Iterable[Source]) -> tuple[list[Source], list[Source]]:
    """(the newest run of every suite, machine and weights; the earlier ones)."""
    newest: dict[tuple[str, ...], Source] = {}
    everything = list(sources)
    for source in everything:
        same = (source.run.suite, machine_name(source.run), model_name(source.run))
        if same not in newest or source.run.date >= newest[same].run.date:
            newest[same] = source
    kept = [source for source in everything if any(source is other for other in newest.values())]
    return kept, [source for source in everything if not any(source is other for other in kept)]


def machine_name(run: Run) -> str:
    """What a reader knows the machine by: its GPU, or else its processor."""
    for name in ("device", "gpu", "processor", "cpu"):
        found = run.machine.get(name)
        found = found.get("name") if isinstance(found, dict) else found
        if isinstance(found, str) and found:
            return found
    return "an unnamed machine"


def model_name(run: Run) -> str:
    """What was measured with; a quick look is not held against a whole run."""
    name, kind = run.weights.get("name"), run.weights.get("kind")
    if kind == EARLIER:
        return ""
    quick = ", a quick look" if "--quick" in run.command.split() else ""
    return ("shipped model" if kind == "shipped" else str(name or kind or "unnamed weights")) + quick


def tier_of(numbered: Numbered) -> str:
    """8 GB, or CPU only; nothing for a row without a limit on memory, but of a machine that has no card."""
    what = numbered.row.what
    name = next((name for name in TIERS if what.get(name) is not None), "")
    if not name and numbered.source.run.suite in WITHIN_TIERS and machine_name(numbered.source.run).startswith("CPU "):
        return CPU_ONLY
    nbytes = budget(what.get(name))
    return str(what.get(name, "")) if nbytes is None else CPU_ONLY if nbytes == 0 else show("vram", nbytes)
