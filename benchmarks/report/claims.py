"""The lines a report begins with: what ran, in which format and how much memory, how fast, by what account."""

from collections.abc import Iterable, Sequence

from flux_quant.benchmarks.bench.record import EMULATED, MEASURED, OURS, PREDICTED, SKIPPED
from flux_quant.benchmarks.report.inputs import Numbered, is_number, machine_name, model_name, tier_of
from flux_quant.benchmarks.report.model import Line
from flux_quant.benchmarks.report.tables import CARD, SPLITTERS, of_a_card
from flux_quant.benchmarks.report.words import NONE, TIERS, USUAL, listed, marked, number, show, show_what

SPEED = ("image", "step", "tiers", "convert")  # the first suite that has rows of a status speaks for it
QUALITY = ("quality",)
HEADLINES = (*SPEED, *QUALITY)
BITS = "bits_per_weight"
NOUNS = {"image": " a picture", "step": " a step", "convert": " to convert"}  # what times of suites are of
FIGURES = {  # what a claim without a time says
    "psnr_db": "PSNR of pictures",
    "velocity_error": "velocity error",
    "weight_snr_db": "SNR of weights",
}
MOST = 5  # formats of a claim


def claims(rows: Sequence[Numbered]) -> list[Line]:
    """Of speed one for each status that is there, with the quality measured beside it; one cell each."""
    found = []
    for status, suites in ((MEASURED, SPEED), (MEASURED, QUALITY), (EMULATED, SPEED), (PREDICTED, SPEED)):
        told = (
            [n for n in rows if n.row.status == status and n.source.run.suite == suite and sayable(n)]
            for suite in suites
        )
        if ours := next(filter(None, told), []):
            found.append(Line((claim(ours, status),), status))
    return found or [Line(("No step and no picture was measured, emulated or predicted in these results.",))]


def sayable(numbered: Numbered) -> bool:
    """Ours, in a format."""
    return numbered.row.subject == OURS and "format" in numbered.row.what


def claim(rows: Sequence[Numbered], status: str) -> str:
    """Of the first row, and of those that differ from it in format alone; of cards, those of the hardest setting."""
    first = max(rows, key=predicted_seconds) if of_a_card(rows[0].row) else rows[0]
    case = without_format(first)
    alike = [n for n in rows if without_format(n) == case and n.source is first.source]
    alike = [n for n in alike if n.row.seconds() or BITS in n.row.values] or alike  # not what others are held against
    if of_a_card(first.row):
        places = [f"{tier_of(n)} ({n.row.what[CARD]}) {format_claim(n, status)}" for n in alike if predicted_seconds(n)]
        return f"FLUX.1, {show_case(case)}: {listed(places)} a step; {basis(first, status)}."
    best = {n.row.what.get("format"): n for n in reversed(alike)}
    formats = [format_claim(n, status) for n in reversed(best.values())]
    formats = [*formats[:MOST], *([f"{len(formats) - MOST} more formats"] if len(formats) > MOST else [])]
    tier = "" if any(name in case for name in TIERS) else tier_of(first)
    head = ", ".join(filter(None, (model_name(first.source.run), tier, show_case(case))))
    noun = NOUNS.get(first.source.run.suite, "") if status != EMULATED else ""
    return f"{head}: {listed(formats)}{noun}; {basis(first, status)}."


def predicted_seconds(numbered: Numbered) -> float:
    found = numbered.row.expected.get("predicted_seconds")
    return found if is_number(found) else 0.0


def without_format(numbered: Numbered) -> dict[str, object]:
    """What is claimed of, but for the format; of cards also without what tells them apart."""
    left_out = ("format", *((CARD, *TIERS) if of_a_card(numbered.row) else ()))
    what = numbered.row.what
    return {name: tier_of(numbered) if name in TIERS else what[name] for name in what if name not in left_out}


def show_case(case: dict[str, object]) -> str:
    """What the name of the model, the suite and the usual way of computing do not say."""
    told = ("model", *SPLITTERS)
    return show_what({name: value for name, value in case.items() if name not in told and value not in USUAL})


def format_claim(numbered: Numbered, status: str) -> str:
    """q4_k_s (4.59 bits per weight) 1.25 s"""
    row = numbered.row
    name = str(row.what.get("format") or "as it is")
    bits = row.values.get(BITS)
    name += f" ({number(bits)} bits per weight)" if is_number(bits) else ""
    if status == EMULATED:
        fits = row.values.get("fits")
        return f"{name} {'does not fit' if fits is False else 'fits'}"
    seconds = row.expected.get("predicted_seconds") if status == PREDICTED else row.seconds()
    time = marked(show("seconds", seconds), status)
    if time != NONE:
        return f"{name} {time}"
    figure = next((figure for figure in FIGURES if is_number(row.values.get(figure))), "")
    return f"{name} {FIGURES[figure]} {show(figure, row.values[figure])}" if figure else name


def basis(numbered: Numbered, status: str) -> str:
    """What a claim rests on; the word of its status is always in it."""
    machine = machine_name(numbered.source.run)
    if status == EMULATED:
        return f"emulated on {machine} under a cap on its memory, which says what fits and not how fast"
    if status == PREDICTED:
        return "predicted by the planner, not run"
    return f"measured on {machine}"


def summary(rows: Iterable[Numbered]) -> str:
    """How many rows rest on what."""
    everything = list(rows)
    counts: dict[str, int] = {}
    for numbered in everything:
        counts[numbered.row.status] = counts.get(numbered.row.status, 0) + 1
    skipped = counts.pop(SKIPPED, 0)
    parts = [f"{count} {status}" for status, count in counts.items()]
    shaky = sum(bool(numbered.row.unstable()) for numbered in everything)
    parts += [f"{skipped} that did not run"] if skipped else []
    return f"{len(everything)} rows: {listed(parts)}; {shaky} unstable." if everything else "There are no rows."
