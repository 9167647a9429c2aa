"""The README's numbers are those of the committed results, and what it names exists."""

import json
import re

from flux_quant.benchmarks.readme import ROOT, TABLES, filled

README = ROOT / "README.md"


def test_tables_are_those_of_the_results():
    text = README.read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(TABLES)
    assert filled(text) == text, "run: python -I -m flux_quant.benchmarks.readme"


def test_sentences_about_turbo_and_inpainting():
    text, results = " ".join(README.read_text().split()), ROOT / "benchmarks/results"
    turbo = json.loads((results / "tiny_turbo.json").read_text())["variants"]
    near, plain = (turbo[name]["psnr_to_base_40"] for name in ("turbo 8", "base 8"))
    assert f"come to {near:.1f} dB of the picture of 40, without it to {plain:.1f}" in text
    ways = json.loads((results / "tiny_inpainting.json").read_text())["ways"]
    net, none = (ways[name]["restored"]["psnr"] for name in ("net, 20 steps", "no net, 20 steps"))
    assert f"restored to {net:.1f} dB, {none:.1f} without it" in text


def test_links_lead_somewhere():
    for folder in (ROOT, ROOT / "docs"):
        for page in folder.glob("*.md"):
            for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
