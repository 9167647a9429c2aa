"""A report as one HTML page that refers to nothing outside of it, or as Markdown with its plots in a folder.

Names and notes come from strangers' files. In HTML Jinja2's autoescape makes text of everything; in Markdown `escaped`
does, for every value that a template prints.
"""

import base64
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from flux_quant.benchmarks.report import drawing
from flux_quant.benchmarks.report.model import Picture, Plot, Report
from flux_quant.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).resolve().parent / "templates"
# What means something in Markdown; an underscore within a word does not.
MARKDOWN = re.compile(r"[\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_])|^[#+](?=\s)|^-(?=\s)")
ADDRESS = re.compile(r"https?://[^\s<>()\[\]|\"'`]+")


def html(report: Report, with_plots: bool = True) -> str:
    page = environment(autoescape=True)
    page.filters |= {"svg": drawing.inline, "data": data_address, "parts": parts}
    return page.get_template("report.html").render(report=report, plots=with_plots)


def markdown(report: Report, place: Path | None = None) -> str:
    """place: the file that it is for. Beside it a folder has the `plots`; pictures are linked where they are. Without a
    place there are neither."""
    page = environment(finalize=escaped)
    page.filters["code"] = code
    page.globals |= {"plot_address": lambda plot: as_is(quote(f"{folder_of(place).name}/{file_of(plot)}"))}
    page.globals |= {"picture_address": lambda picture: as_is(relative(picture.path, place.parent))}
    return page.get_template("report.md").render(report=report, plots=place is not None)


def plots(report: Report) -> dict[str, bytes]:
    """Plots for Markdown: name -> content."""
    return {file_of(plot): drawing.as_file(plot).encode() for section in report.sections for plot in section.plots}


def file_of(plot: Plot) -> str:
    return f"{plot.slug}.svg"


def folder_of(place: Path) -> Path:
    """report.md -> report-plots"""
    return place.with_name(f"{place.stem}-plots")


def relative(path: Path, folder: Path) -> str:
    """An address of a file for a page in the folder."""
    try:
        return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
    except ValueError:  # on another drive
        return path.resolve().as_uri()


def environment(**options: object) -> "Environment":
    """UserError without Jinja2."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise UserError("reports need Jinja2: pip install Jinja2 matplotlib") from None
    loader = FileSystemLoader(TEMPLATES)
    return Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)


def data_address(picture: Picture) -> str:
    return f"data:image/{picture.kind};base64,{base64.b64encode(picture.data).decode()}"


def parts(text: str) -> list[tuple[str, bool]]:
    """Text in pieces, each with whether it is an address to be linked."""
    found, end = [], 0
    for match in ADDRESS.finditer(text):
        found += [(text[end : match.start()], False), (match[0], True)]
        end = match.end()
    return [piece for piece in [*found, (text[end:], False)] if piece[0]]


def as_is(text: str) -> str:
    from markupsafe import Markup

    return Markup(text)


def escaped(value: object) -> str:
    """One line of Markdown that shows `value` literally; addresses stay, GitHub links them."""
    if hasattr(value, "__html__"):
        return str(value)
    text = " ".join(str(value).split())
    return "".join(piece if address else MARKDOWN.sub(r"\\\g<0>", piece) for piece, address in parts(text))


def code(text: str) -> str:
    """A span of code in a cell of a table: a bar would end the cell, so it is escaped even there (GFM, 4.10)."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return as_is(f"{fence}{pad}{line}{pad}{fence}") if line else as_is("")
