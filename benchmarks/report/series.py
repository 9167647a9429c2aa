"""From rows to the points of plots. A plot is a row of `SPECS`: which names to look for on either axis."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from flux_quant.benchmarks.bench.record import OURS, PREDICTED, REPORTED, SKIPPED
from flux_quant.benchmarks.report.inputs import Numbered, is_number, machine_name, model_name
from flux_quant.benchmarks.report.model import Plot, Series
from flux_quant.benchmarks.report.tables import SPLITTERS, of_a_card
from flux_quant.benchmarks.report.words import BOUND, TIERS, USUAL, budget, show_what

MOST = 6  # plots of one spec; the tables hold the rest


@dataclass(frozen=True)
class Spec:
    """x, y: names, the first that a row has; of samples the median. `bound`: also a name, drawn as a line of its own.

    over: names of `what` that are no part of what tells plots apart: those of the x axis and of the series
    """

    slug: str
    title: str
    suites: tuple[str, ...]
    x: tuple[str, ...]
    y: tuple[str, ...]
    labels: tuple[str, str]
    about: str
    bound: str = ""
    predicted: str = ""
    shape: str = "lines"
    scale: tuple[float, float] = (1.0, 1.0)
    over: tuple[str, ...] = ("format", "vram", "tier")
    named: tuple[str, ...] = ("format", "compute", "activations")  # of `what`: what a series is called by
    only: tuple[str, str] = ("", "")  # a name of `what` and its value
    tiered: bool = True  # False: only rows that name no memory
    least: int = 2  # points, below which there is nothing to see


GB = 1e-9
SPECS = (
    Spec(
        "step-time",
        "Time of a step against VRAM",
        ("step",),
        ("vram", "tier"),
        ("seconds", "step_seconds"),
        ("VRAM, GB", "seconds per step"),
        "The thin line is the physical bound: the larger of computing and copying at full rate.",
        bound="bound_seconds",
        predicted="predicted_seconds",
        scale=(GB, 1.0),
    ),
    Spec(
        "step-cpu",
        "Time of a step by format",
        ("step",),
        ("format",),
        ("seconds",),
        ("", "seconds per step"),
        "Without a card. The bar across is the physical bound.",
        bound="bound_seconds",
        shape="bars",
        over=("format",),
        tiered=False,
    ),
    Spec(
        "tiers",
        "Predicted time of a step by card",
        ("tiers",),
        ("tier",),
        (),
        ("VRAM of the card, GB", "seconds per step"),
        "Each place is a card of that memory, in the format that the table of its tier names. The thin line is the "
        "physical bound of these cards.",
        bound="bound_seconds",
        predicted="predicted_seconds",
        scale=(GB, 1.0),
        over=("tier", "card", "format"),
        named=(),
    ),
    Spec(
        "bytes-moved",
        "Bytes moved in a step",
        ("step",),
        ("vram", "tier"),
        ("bytes_moved", "moved_bytes"),
        ("VRAM, GB", "GB per step"),
        "From host memory to the card.",
        scale=(GB, GB),
    ),
    Spec(
        "stall",
        "Waiting for bytes in a step",
        ("step",),
        ("vram", "tier"),
        ("stall_seconds",),
        ("VRAM, GB", "seconds stalled per step"),
        "How long the card had nothing to compute because a block had not arrived.",
        scale=(GB, 1.0),
    ),
    Spec(
        "size-quality",
        "Quality against size",
        ("quality",),
        ("bits_per_weight",),
        ("psnr_db",),
        ("bits per weight", "PSNR of pictures, dB"),
        "Pictures against those of the reference from the same noise. Each point is a format; higher and further left "
        "is better.",
        shape="points",
        over=("format", "compute", "activations"),
        only=("part", "format"),
    ),
    Spec(
        "size-weights",
        "Error of weights against size",
        ("quality",),
        ("bits_per_weight",),
        ("weight_snr_db",),
        ("bits per weight", "SNR of weights, dB"),
        "No quality of pictures. Each point is a format; higher and further left is better.",
        shape="points",
        over=("format", "compute", "activations"),
        only=("part", "format"),
    ),
    Spec(
        "conversion",
        "Speed of conversion",
        ("convert",),
        ("format",),
        ("gb_per_s", "read_gb_per_s", "seconds"),
        ("", "GB/s of source"),
        "Longer is faster.",
        shape="bars",
        over=("format",),
        least=1,
    ),
)


def find(numbered: Numbered, names: Iterable[str]) -> tuple[str, object]:
    """(name, value) of the first name that the row has in its case, values, samples or expectations."""
    row = numbered.row
    for name in names:
        if row.samples.get(name):
            return name, median(row.samples[name])
        for part in (row.what, row.values, row.expected):
            if part.get(name) is not None:
                return name, part[name]
    return "", None


def plots(rows: Sequence[Numbered]) -> list[Plot]:
    return [plot for spec in SPECS for plot in plots_of(spec, rows)]


def plots_of(spec: Spec, rows: Sequence[Numbered]) -> list[Plot]:
    """One plot for each machine, model and case of what is not on its axes."""
    groups: dict[tuple[str, ...], list[Numbered]] = {}
    for numbered in rows:
        if shown(spec, numbered):
            groups.setdefault(place(spec, numbered), []).append(numbered)
    found = []
    for named, members in groups.items():
        series = bars(spec, members) if spec.shape == "bars" else lines(spec, members)
        if sum(len(one.points) for one in series if one.kind != BOUND) < spec.least:
            continue
        names = tuple(dict.fromkeys(category(spec, numbered) for numbered in members)) if spec.shape == "bars" else ()
        case = ", ".join(filter(None, named))
        found.append(Plot(spec.slug, spec.title, *spec.labels, series, spec.shape, names, case, spec.about))
    found.sort(key=lambda plot: -sum(len(one.points) for one in plot.series))
    return [replace(plot, slug=f"{spec.slug}-{i + 1}") for i, plot in enumerate(found[:MOST])]


def shown(spec: Spec, numbered: Numbered) -> bool:
    row, (name, value) = numbered.row, spec.only
    alike = not name or row.what.get(name) == value
    alike &= spec.tiered or all(row.what.get(tier) is None for tier in TIERS)
    return row.status not in (SKIPPED, REPORTED) and numbered.source.run.suite in spec.suites and alike


def place(spec: Spec, numbered: Numbered) -> tuple[str, ...]:
    """What tells the plots of a spec apart."""
    what = numbered.row.what
    rest = tuple(show_what({name: what[name]}) for name in what if name not in (*spec.over, *SPLITTERS))
    if of_a_card(numbered.row):
        return rest
    model = () if "model" in what else (model_name(numbered.source.run),)
    return (*model, *rest, machine_name(numbered.source.run))


def series_name(spec: Spec, numbered: Numbered) -> str:
    """q4_k_s, or with what else is not as usual: q4_k_s int8."""
    what = numbered.row.what
    parts = [str(what[name]) for name in spec.named if what.get(name) and what[name] not in USUAL]
    parts += [] if numbered.row.subject == OURS else [numbered.row.subject]
    return " ".join(parts) or "all"


def lines(spec: Spec, members: Sequence[Numbered]) -> tuple[Series, ...]:
    """By format and status; bounds by format."""
    points: dict[tuple[str, str], set[tuple[float, float]]] = {}
    for numbered in members:
        name, x = find(numbered, spec.x)
        x = budget(x) if name in TIERS else x
        if not is_number(x) or name in TIERS and not x:
            continue
        name, status = series_name(spec, numbered), numbered.row.status
        _, y = find(numbered, spec.y)
        for kind, value in (
            (status, y),
            (PREDICTED, numbered.row.expected.get(spec.predicted)),
            (BOUND, numbered.row.expected.get(spec.bound)),
        ):
            if is_number(value):
                points.setdefault((name, kind), set()).add((x * spec.scale[0], value * spec.scale[1]))
    return tuple(Series(name, kind, tuple(sorted(found))) for (name, kind), found in points.items())


def category(spec: Spec, numbered: Numbered) -> str:
    return str(find(numbered, spec.x)[1] or "all")


def bars(spec: Spec, members: Sequence[Numbered]) -> tuple[Series, ...]:
    """By program and status; x is the place among `Plot.names`. All bars of a plot are of one name on y."""
    name = next((name for name in spec.y if any(find(n, (name,))[0] for n in members)), "")
    names = list(dict.fromkeys(category(spec, numbered) for numbered in members))
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for numbered in members:
        _, y = find(numbered, (name,))
        if is_number(y):
            place = names.index(category(spec, numbered))
            points.setdefault((numbered.row.subject, numbered.row.status), []).append((place, y * spec.scale[1]))
        bound = numbered.row.expected.get(spec.bound)
        if is_number(bound):
            points.setdefault((numbered.row.subject, BOUND), []).append(
                (names.index(category(spec, numbered)), bound * spec.scale[1])
            )
    return tuple(Series(program, kind, tuple(found)) for (program, kind), found in points.items())
