"""A report from runs: which rows go where. Every row is in exactly one table of figures, or among what did not run."""

from collections.abc import Sequence

from flux_quant.benchmarks.bench.record import PREDICTED, REPORTED, SKIPPED, Row
from flux_quant.benchmarks.report import facts, tables
from flux_quant.benchmarks.report.claims import HEADLINES, claims, summary
from flux_quant.benchmarks.report.inputs import (
    CPU_ONLY,
    EARLIER,
    Found,
    Numbered,
    Source,
    latest,
    machine_name,
    number_rows,
    tier_of,
)
from flux_quant.benchmarks.report.model import Report, Section, Table
from flux_quant.benchmarks.report.pictures import read_pictures
from flux_quant.benchmarks.report.series import plots

TITLE = "flux_quant: benchmarks"
PEERS = "peers"
SUITES = {  # suite -> heading, what has to be known to read its tables; in the order of the report
    "image": ("Pictures, end to end", ""),
    "step": ("Steps", ""),
    "tiers": ("Tiers", ""),
    "convert": ("Conversion", ""),
    "quality": (
        "Quality",
        "Against the same model in BF16 from the same noise. A floor is the most that BF16 differs from itself when "
        "its sums are made in another order: below it nothing can be told apart. Figures of weights are not quality "
        "of pictures.",
    ),
    PEERS: ("Other programs side by side", "Times over ours are of the same case in the same run."),
    "kernels": ("Kernels", ""),
    "text": ("Text encoders", ""),
}
KINDS = {  # (name, value) -> heading
    ("part", "format"): "Formats",
    ("part", "floor"): "Floors: BF16 again, with its sums in another order",
    ("part", "block"): "Sensitivity: one block packed, all others as they are",
    ("work", "step"): "One step of the transformer",
    ("work", "convert"): "Conversion to GGUF",
    ("work", "linear"): "Linear layers",
    ("work", "offload"): "Less memory than the model needs",
}
ABOUT_SCRIPTS = (
    "Of scripts that are no suites of flux-quant bench. What their figures mean stands at the beginning of the script "
    "in benchmarks/ that the file is named after."
)
ABOUT_TIERS = (
    "Times, predictions and bounds are of one step unless a heading says otherwise. Predictions for a card are for "
    "the most precise format with which a picture takes hardly longer than with the fastest. What others report is of "
    "other programs, as published."
)
ORIGINS = {PREDICTED: "predicted, not run", REPORTED: "as others report it"}  # of rows about a card
READING = (
    "Measured figures are plain. (In brackets): emulated, on a larger card under a cap; that says what fits, and its "
    "times are not those of a smaller card. ≈: predicted by the planner. “In quotes”: reported by others. ≥: a "
    "physical bound. ± is half of the middle half of the samples, over the median. A row is called unstable when its "
    "samples scatter too much to be believed."
)


def report(found: Found) -> Report:
    newest, earlier = latest(found.sources)
    rows, old = split(number_rows([*newest, *earlier]), newest)
    scripts = [numbered for numbered in rows if of_a_script(numbered)]
    rows = [numbered for numbered in rows if not of_a_script(numbered)]
    sections = [
        *tier_sections(rows),
        Section("Plots", plots=tuple(plots(rows))),
        *suite_sections([numbered for numbered in rows if not in_a_tier(numbered)]),
        Section("What was drawn", pictures=tuple(read_pictures(found.pictures))),
        skipped_section([*rows, *scripts, *old]),
        machines_section(newest),
        Section(
            "How to run it again",
            ("Every file, and the command that wrote it; then the command of every row.",),
            (facts.runs_table([*newest, *earlier]), *facts.rerun_tables([*rows, *scripts, *old])),
        ),
        Section("Single scripts", (ABOUT_SCRIPTS,), tuple(all_tables(scripts)), folded=True)
        if scripts
        else Section(""),
        Section("Earlier runs", tables=tuple(all_tables(old)), folded=True),
        Section("Files that were not read", tuple(found.refused)),
    ]
    kept = tuple(section for section in sections if not section.empty)
    return Report(TITLE, tuple(claims(rows)), f"{summary([*rows, *scripts, *old])} {READING}", kept)


def split(rows: Sequence[Numbered], newest: Sequence[Source]) -> tuple[list[Numbered], list[Numbered]]:
    """(of the newest runs, of others)"""
    current = {id(source) for source in newest}
    inside = [numbered for numbered in rows if id(numbered.source) in current]
    return inside, [numbered for numbered in rows if id(numbered.source) not in current]


def of_a_script(numbered: Numbered) -> bool:
    """Whether it is no suite's, nor of a script that took the rows of one."""
    run = numbered.source.run
    return run.weights.get("kind") == EARLIER and run.suite not in HEADLINES


def in_a_tier(numbered: Numbered) -> bool:
    return bool(tier_of(numbered)) and numbered.source.run.suite != PEERS


def tier_sections(rows: Sequence[Numbered]) -> list[Section]:
    """Tables by memory, smallest first."""
    tiers: dict[str, list[Numbered]] = {}
    for numbered in rows:
        if in_a_tier(numbered) and numbered.row.status != SKIPPED:
            tiers.setdefault(tier_of(numbered), []).append(numbered)
    found = []
    for tier in sorted(tiers, key=size_of):
        for title, members in kinds(tiers[tier], told=False):
            name = tier if tier == CPU_ONLY else f"{tier} of VRAM"
            found += tables.build(f"{name}: {title}" if title else name, members)
    return [Section("By memory", (ABOUT_TIERS,), tuple(found))] if found else []


def size_of(tier: str) -> tuple[float, str]:
    """Of "8 GB", for sorting; words come first."""
    head = tier.split(" ")[0].removesuffix("GB").removesuffix("GiB")
    return (float(head) if head.replace(".", "", 1).isdigit() else -1.0, tier)


def suite_sections(rows: Sequence[Numbered]) -> list[Section]:
    found = {suite: [] for suite in SUITES}
    for numbered in rows:
        found.setdefault(numbered.source.run.suite, []).append(numbered)
    sections = []
    for suite, members in found.items():
        title, about = SUITES.get(suite, (suite.replace("_", " ").capitalize(), ""))
        built = tuple(suite_tables(members))
        if built:
            sections.append(Section(title, (about,) if about else (), built))
    return sections


def suite_tables(rows: Sequence[Numbered]) -> list[Table]:
    return [table for title, members in kinds(rows) for table in tables.build(title, members)]


def all_tables(rows: Sequence[Numbered]) -> list[Table]:
    """Of earlier runs, a table for each."""
    found = []
    for source in dict.fromkeys(id(numbered.source) for numbered in rows):
        members = [numbered for numbered in rows if id(numbered.source) == source]
        for title, alike in kinds(members):
            name = ", ".join(filter(None, (members[0].source.name, title)))
            found += tables.build(name, alike)
    return found


def kinds(rows: Sequence[Numbered], told: bool = True) -> list[tuple[str, list[Numbered]]]:
    """(title, rows) of what belongs in one table: one suite, one kind of case, and what was not run here apart from the
    rest. `told`: the reader knows which suite it is."""
    groups: dict[tuple[str, ...], list[Numbered]] = {}
    for numbered in rows:
        suite = numbered.source.run.suite
        title = SUITES.get(suite, (suite, ""))[0].lower()
        origin = ORIGINS.get(numbered.row.status, "") if tables.of_a_card(numbered.row) else ""
        head = "" if told or origin else title
        groups.setdefault((suite, head, kind_of(numbered.row), origin), []).append(numbered)
    return [(", ".join(filter(None, key[1:])), found) for key, found in groups.items()]


def kind_of(row: Row) -> str:
    name = next((name for name in tables.SPLITTERS if isinstance(row.what.get(name), str)), "")
    value = str(row.what.get(name, ""))
    return KINDS.get((name, value), value.replace("_", " "))


def skipped_section(rows: Sequence[Numbered]) -> Section:
    table = tables.skipped_table(rows)
    return Section("What did not run", tables=(table,) if table else ())


def machines_section(sources: Sequence[Source]) -> Section:
    """Fingerprint and limits of every machine, of its newest run."""
    newest: dict[str, Source] = {}
    for source in sources:
        name = machine_name(source.run)
        if name not in newest or source.run.date > newest[name].run.date:
            newest[name] = source
    found = []
    for name, source in newest.items():
        found += [
            facts.facts_table(f"{name}, as of {source.run.date[:10]}", source.run.machine),
            facts.facts_table(f"{name}: what it can do, measured", source.run.limits),
        ]
    return Section("Machines", tables=tuple(table for table in found if table))
