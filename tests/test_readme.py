"""The README's numbers are those of the committed results, and what it names exists."""

import json
import re

import pytest

from flux_quant.benchmarks.aims import AIMS
from flux_quant.benchmarks.readme import PAGES, ROOT, aims_table, filled
from flux_quant.errors import UserError

README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page: str):
    text = (ROOT / page).read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(PAGES[page](text))
    assert filled(page, text) == text, "run: make report"


def test_aims_stand_beside_every_gpu_that_was_measured():
    first, second = (next(aim for aim in AIMS if aim.at_most == at_most) for at_most in (False, True))
    machine = {"device": "NVIDIA X", "date": "2026-01-02T03:04:05"}
    rows = [
        {"aim": first.text, "bound": first.bound, "measured": 3, "worst": 0.8, "missed": {"q4_k": 0.8}},
        {"aim": second.text, "bound": second.bound, "measured": 2, "worst": 0.5, "missed": {}},
    ]
    table = aims_table([{"machine": machine, "aims": rows}])
    assert "| NVIDIA X, 2026-01-02 |" in table
    assert f"| {first.text} | at least {first.bound:g} | 0.800, missed by 1 of 3 |" in table
    assert f"| {second.text} | at most {second.bound:g} | 0.500, met by 2 |" in table
    assert table.count("| not measured |") == len(AIMS) - 2
    assert aims_table([]).count("not measured") == len(AIMS)


def test_a_page_of_quality_takes_the_result_that_it_names():
    text = (ROOT / "docs/quality.md").read_text()
    torn = re.sub(r"(<!-- table: \w+ -->\n).*?(<!-- end -->)", r"\1gone\n\2", text, flags=re.DOTALL)
    assert torn != text and filled("docs/quality.md", torn) == text
    for found, message in (("quality.json", "other.json"), "names no result"), (("2026-", "1999-"), "1999-"):
        with pytest.raises(UserError, match=message):
            filled("docs/quality.md", text.replace(*found))
    with pytest.raises(UserError, match="asks for the table gone, there are formats, steps, blocks"):
        filled("docs/quality.md", text.replace("table: steps", "table: gone"))


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
