"""The README's numbers are those of the committed results, and what it names exists."""

import re

from flux_quant.benchmarks.readme import ROOT, TABLES, filled

README = ROOT / "README.md"


def test_tables_are_those_of_the_results():
    text = README.read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(TABLES)
    assert filled(text) == text, "run: python -I -m flux_quant.benchmarks.readme"


def test_links_lead_somewhere():
    for folder in (ROOT, ROOT / "docs"):
        for page in folder.glob("*.md"):
            for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
