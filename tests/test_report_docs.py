"""docs/report/ is what `make report` makes of benchmarks/results/. What matplotlib draws may differ from version to
version, so plots are compared by the digest of their data."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from flux_quant.benchmarks.report import drawing
from flux_quant.benchmarks.report.inputs import gather
from flux_quant.benchmarks.report.rendering import html, markdown, plots
from flux_quant.benchmarks.report.sections import report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs/report"
REMEDY = "run: make report"


@pytest.fixture(scope="module")
def made():
    return report(gather([ROOT / "benchmarks/results", ROOT / "docs/contact-sheet.png"]))


def undrawn(page: str) -> str:
    """Without the inside of plots, whose digest stands in their first tag."""
    return re.sub(r"(<svg[^>]*>).*?</svg>", r"\1", page, flags=re.DOTALL)


def test_markdown_is_of_these_results(made):
    assert (DOCS / "report.md").read_text() == markdown(made, DOCS / "report.md").rstrip() + "\n", REMEDY


def test_page_is_of_these_results(made):
    assert undrawn((DOCS / "report.html").read_text()) == undrawn(html(made)).rstrip() + "\n", REMEDY


def test_plots_are_of_these_results(made):
    digests = {f"{plot.slug}.svg": drawing.digest(plot) for section in made.sections for plot in section.plots}
    found = {path.name: ET.parse(path).getroot().get("data-digest") for path in (DOCS / "report-plots").iterdir()}
    assert found == digests and set(digests) == set(plots(made)), REMEDY


def test_links_of_the_report_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", (DOCS / "report.md").read_text()):
        assert (DOCS / target).exists(), target
