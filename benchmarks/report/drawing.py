"""Plots as SVG. Text stays text, in the font and colour of the page: readable on a phone, in the dark and in print.

The same plot gives the same bytes with the same matplotlib. `digest` is of the data alone and stands in every SVG, so
that a test can tell an old plot from a new one whatever matplotlib drew it.
"""

import hashlib
import io
import re
from dataclasses import astuple
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING

from flux_quant.benchmarks.bench.record import EMULATED, MEASURED, PREDICTED
from flux_quant.benchmarks.report.model import Plot
from flux_quant.benchmarks.report.words import BOUND
from flux_quant.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.2, 3.6  # inches of 72 units: nearly a phone's width, so that text keeps its size there
COLOURS = (
    "#2f7fc1",
    "#d9730d",
    "#3a9a5b",
    "#c2453d",
    "#8a63c9",
    "#a07d2c",
    "#c2569b",
    "#4aa3a8",
)  # on white or black
MOST_TICKS, LONGEST = 10, 36  # places with their own tick; characters of a name
DECADES = 20  # between the highest and the lowest point: from here on the scale is logarithmic
LETTER, LINE, DOT = 5.4, 9, 5  # points of a name's letter, its height, and of a dot
SIDES = ((5, 3, 0), (-5, 3, 1), (5, -10, 0), (-5, -10, 1), (5, 13, 0), (-5, -20, 1))  # dx, dy, whether left of it
INK = "#010203"  # becomes the colour of the page's text
LINES = {  # kind -> how its points and the lines between them look
    MEASURED: dict(marker="o", linestyle="-"),
    EMULATED: dict(marker="o", linestyle="--", markerfacecolor="none"),
    PREDICTED: dict(marker="x", linestyle=":"),
    BOUND: dict(marker="_", linestyle="-", linewidth=0.8, alpha=0.7),
}
HATCHES = {EMULATED: "///", PREDICTED: "..."}
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
}


def digest(plot: Plot) -> str:
    return hashlib.sha256(repr(astuple(plot)).encode()).hexdigest()[:16]


def need_matplotlib() -> None:
    """UserError where it is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("plots need matplotlib: pip install matplotlib, or ask for --no-plots") from None


def inline(plot: Plot) -> str:
    """For a page: no background, text in the colour of the page's own."""
    return draw(plot).replace(INK, "currentColor")


def as_file(plot: Plot) -> str:
    """By itself: black on white."""
    svg = draw(plot).replace(INK, "#222222")
    opened = svg.index(">") + 1
    return f'{svg[:opened]}<rect width="100%" height="100%" fill="#ffffff"/>{svg[opened:]}\n'


@lru_cache(maxsize=64)
def draw(plot: Plot) -> str:
    """An `<svg>` element without width and height. A page and its Markdown have the same ones."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE | {"svg.hashsalt": plot.slug}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        (draw_bars if plot.shape == "bars" else draw_lines)(axes, plot)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return tidied(buffer.getvalue(), plot)


def tidied(svg: str, plot: Plot) -> str:
    """The element alone: no metadata, no style for the whole page, no ids but those it refers to."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([^;\"]*)'[^;\"]*", r"font: \1sans-serif", svg)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    head += f'viewBox="0 0 {WIDTH * 72:g} {HEIGHT * 72:g}" role="img" '
    head += f'aria-label="{escape(plot.whole_title)}" data-digest="{digest(plot)}" '
    head += 'stroke-linejoin="round" font-family="system-ui, sans-serif">'
    return head + svg[svg.index(">") + 1 :]


def colour_of(name: str, plot: Plot) -> str:
    names = list(dict.fromkeys(one.name for one in plot.series))
    return COLOURS[names.index(name) % len(COLOURS)]


def draw_lines(axes: "Axes", plot: Plot) -> None:
    """Lines over x; of "points" each has its name beside it."""
    for one in sorted(plot.series, key=lambda one: one.kind == BOUND):
        xs, ys = zip(*one.points, strict=True)
        axes.plot(xs, ys, color=colour_of(one.name, plot), **LINES[one.kind])
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    heights = [y for one in plot.series for _, y in one.points if y > 0]
    if heights and max(heights) > DECADES * min(heights) and plot.shape == "lines":
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    places = sorted({x for one in plot.series for x, _ in one.points})
    if plot.shape == "points":
        name_points(axes, plot)
        return
    if len(places) <= MOST_TICKS:
        axes.set_xticks(places, [f"{x:g}" for x in places])
    legend(axes, plot)


def name_points(axes: "Axes", plot: Plot) -> None:
    """Names beside their points, on the side where they cover no other name, if there is one."""
    axes.margins(0.12)
    axes.figure.draw_without_rendering()
    scale = 72 / axes.figure.dpi
    places = {point: axes.transData.transform(point) * scale for one in plot.series for point in one.points}
    taken = [(x - DOT / 2, y - DOT / 2, DOT, DOT) for x, y in places.values()]
    for one in plot.series:
        for point in one.points:
            x, y = places[point]
            width = LETTER * len(plain(one.name))
            boxes = [(x + dx - width * left, y + dy, width, LINE) for dx, dy, left in SIDES]
            side = next((i for i, box in enumerate(boxes) if not any(overlap(box, other) for other in taken)), 0)
            taken.append(boxes[side])
            dx, dy, left = SIDES[side]
            style = dict(textcoords="offset points", ha="right" if left else "left", fontsize=9)
            axes.annotate(plain(one.name), point, (dx, dy), color=colour_of(one.name, plot), **style)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Of boxes: left, bottom, width, height."""
    return all(a[i] < b[i] + b[i + 2] and b[i] < a[i] + a[i + 2] for i in (0, 1))


def draw_bars(axes: "Axes", plot: Plot) -> None:
    """Lying bars, the first name on top; a group for each name."""
    stacked = [one for one in plot.series if one.kind != BOUND]
    height = 0.8 / max(1, len(stacked))
    for i, one in enumerate(stacked):
        places = [x + (i - (len(stacked) - 1) / 2) * height for x, _ in one.points]
        colour, hatch = colour_of(one.name, plot), HATCHES.get(one.kind)
        fill = "none" if hatch else colour
        axes.barh(places, [y for _, y in one.points], height, color=fill, edgecolor=colour, hatch=hatch)
    for one in plot.series:
        if one.kind == BOUND:
            xs, ys = zip(*one.points, strict=True)
            axes.plot(ys, xs, color=INK, marker="|", markersize=14, linestyle="none")
    axes.set_yticks(range(len(plot.names)), [plain(name) for name in plot.names])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(plot.y)
    if len(plot.series) > 1:
        legend(axes, plot)


def legend(axes: "Axes", plot: Plot) -> None:
    """Colours by name, then ways of drawing, below the plot."""
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(one.name for one in plot.series))
    names = names if len(names) > 1 else []
    kinds = [kind for kind in LINES if any(one.kind == kind for one in plot.series)]
    handles = [Line2D([], [], color=colour_of(name, plot), linewidth=4, label=plain(name)) for name in names]
    handles += [
        Line2D([], [], color=colour_of(plot.series[0].name, plot) if not names else INK, label=kind, **look(kind, plot))
        for kind in kinds
    ]
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=3, columnspacing=1.2, handlelength=1.6)


def look(kind: str, plot: Plot) -> dict[str, object]:
    return LINES[kind] if plot.shape == "lines" else {"linewidth": 1}


def plain(name: str) -> str:
    """Without what matplotlib reads as mathematics, or as no name at all; cut where it would leave no room."""
    name = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    return name.replace("$", r"\$").lstrip("_") or "?"
