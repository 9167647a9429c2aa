"""The measurements of the GPU suite in time: what aims ask for first, the rest left out by name, nothing lost."""

import json
from contextlib import contextmanager

import pytest
import torch

from flux_quant.benchmarks import aims, kernels, products8, step, streaming
from flux_quant.benchmarks.journal import Journal

CPU = torch.device("cpu")


@pytest.fixture
def journal(tmp_path):
    return Journal("some", float("inf"), save=True, folder=tmp_path)


def kept(journal: Journal) -> dict:
    return json.loads(journal.path.read_text())


def test_cases_of_aims_are_measured_first():
    found = [
        (shape, m)
        for shape, counts, chained in kernels.passes(kernels.LAYERS, kernels.COMPILED)
        if not chained
        for m in counts
    ]
    everything = {(shape, m) for shape, counts in kernels.LAYERS.items() for m in counts}
    assert set(found) == everything and len(found) == len(everything)
    wanted = [kernels.is_aim(shape, m) for shape, m in found]
    assert wanted == sorted(wanted, reverse=True)
    for rows in (4608, 512):
        assert {shape for shape, m in found if m == rows} == {
            s for s, counts in kernels.LAYERS.items() if rows in counts
        }
    assert ((18432, 3072), 1) in found[: wanted.count(True)]
    assert [*kernels.passes(kernels.LAYERS, kernels.COMPILED)][-1] == (
        kernels.COMPILED,
        kernels.LAYERS[kernels.COMPILED],
        True,
    )


def test_formats_of_aims_come_first():
    found = list(kernels.formats(torch.device("cuda")))
    assert found[:4] == ["q8_0", "q4_k", "fp8", "q5_k"] and len(set(found)) == len(found)
    names = [name.split("+")[0] for name in step.FORMATS]
    assert names.index("q8_0") < 3 and names.index("q4_k") < 3, "after BF16, which they are compared with"


def test_without_time_everything_is_named_and_nothing_measured(journal):
    journal.seconds = 0.0
    kernels.measure(journal, CPU, ["q8_0"], tiny=True)
    left = kept(journal)["skipped"]
    assert {row["what"] for row in left} == {"unpacking", "linear"} and not kept(journal)["linear"]
    journal.skipped.clear()
    products8.measure(journal, CPU, small=True)
    assert [row["why"] for row in journal.skipped] == ["no time was left"] * len(products8.SMALL)


def test_rows_are_kept_as_they_come_and_a_failure_costs_itself(journal, monkeypatch):
    calls = []

    def row(name, *_):
        calls.append(name)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("too large")
        return {"format": name, "of_copy": 1.0}

    monkeypatch.setattr(kernels, "unpacking_row", row)
    monkeypatch.setattr(kernels, "LAYERS", {kernels.COMPILED: ()})
    monkeypatch.setattr(kernels.pointwise, "measure", lambda *_: iter(()))
    kernels.measure(journal, CPU, ["q8_0", "q4_k"], tiny=True)
    assert [row["format"] for row in kept(journal)["unpacking"]] == ["q4_k"]
    assert "too large" in kept(journal)["skipped"][0]["why"]


def test_a_way_that_fails_leaves_the_others(monkeypatch):
    real = products8.eight_bit.linear

    def linear(x, fmt, parts, bias, how):
        if fmt.compute == "int8":
            raise RuntimeError("no kernel image")
        return real(x, fmt, parts, bias, how)

    monkeypatch.setattr(products8.eight_bit, "linear", linear)
    dense = [torch.randn(32, 256) for _ in range(2)]
    rows = list(products8.rows_of((32, 256), 3, torch.float32, CPU, dense))
    assert {row["way"] for row in rows if "failed" in row} == {"int8 by int_mm", "int8 from q4_k"}
    assert "dense" in {row["way"] for row in rows if "us" in row}
    assert list(aims.eight_bits("int8 by")({"products8": {"rows": rows}})) == []


def test_a_step_is_compared_as_soon_as_it_is_known(journal, monkeypatch):
    seconds = {"bf16": 2.0, "q8_0": 3.0}
    monkeypatch.setattr(step, "format_row", lambda name, *_: {"seconds": seconds[name]})
    step.measure(journal, ["bf16", "q8_0"], 64, CPU, small=True)
    assert [row["of_bf16"] for row in kept(journal)["rows"]] == [1.0, 1.5]


def test_emulated_links_leave_time_to_the_other_formats(journal):
    class Model:
        name, small = "q8_0", False

        @contextmanager
        def opened(self):
            yield {}

        def modulation(self, vram):
            return {}

        def step(self, case):
            return {"seconds": 1.0, "ratio": 1.0, "stall": 0.0, "format": "q8_0"}

    journal.seconds = 3 * streaming.ONE_FORMAT
    streaming.measure_format(journal, Model(), streaming.cases("q8_0", small=False), 3 * streaming.ONE_FORMAT)
    steps = [row for row in kept(journal)["rows"] if row["what"] == "step"]
    assert len(steps) == len(streaming.OWN_LINK) and not any("emulated_gb_per_s" in row for row in steps)
    assert len(kept(journal)["skipped"]) == len(streaming.MANY_SLOW)
    budgets = {(row["size"], row["vram"]) for row in steps}
    assert {(size, f"{gb}GB") for size in (512, 1024) for gb in (4, 6, 8, 10, 12, 16)} < budgets, "as the aim has it"
