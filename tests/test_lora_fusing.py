"""What is said of fusing LoRAs into packed weights, in the documents and by `convert`, is what was measured."""

import json
from pathlib import Path

from flux_quant.benchmarks import lora_fusing
from flux_quant.benchmarks.machine import newest_result
from flux_quant.converters.description import SURVIVES

DOCS = Path(__file__).parents[1] / "docs" / "lora.md"


def results() -> list[dict]:
    path = newest_result("lora_fusing", machine="cpu")
    return json.loads(path.read_text())["rows"]


def test_the_table_is_that_of_the_results():
    text = DOCS.read_text()
    for line in lora_fusing.table(results()):
        assert line in text


def test_the_warning_says_what_was_measured():
    measured = {row["format"]: round(row["survives"][lora_fusing.SHARES.index(0.02)][0], 2) for row in results()}
    assert {name: measured[name] for name in SURVIVES} == SURVIVES


def test_it_can_be_measured_again():
    part, noise = lora_fusing.mean("q4_k", 0.02)
    (row,) = (row for row in results() if row["format"] == "q4_k")
    assert abs(part - row["survives"][1][0]) < 0.01 and abs(noise - row["survives"][1][1]) < 0.05
