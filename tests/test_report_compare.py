"""What changed between two results: shifted samples are found, the same ones are not, and machines are not mixed up."""

import numpy as np
import pytest

import report_runs
from flux_quant.benchmarks.bench.record import SKIPPED, Row, write_run
from flux_quant.benchmarks.report.compare import IMPROVEMENT, REGRESSION, SAME, UNKNOWN, Change, compare, ratio
from flux_quant.benchmarks.report.inputs import Found, Numbered, Source
from flux_quant.cli import main
from flux_quant.errors import UserError
from report_runs import run


def found(*runs) -> Found:
    return Found([Source(f"{i}.json", one) for i, one in enumerate(runs)])


def lines(made, title: str) -> list:
    return [line for one in made.sections if one.title == title for table in one.tables for line in table.lines]


def titles(made) -> set[str]:
    return {section.title for section in made.sections}


def test_identical_results_have_no_change():
    made = compare(found(run("step", report_runs.step_rows())), found(run("step", report_runs.step_rows())))
    assert titles(made) == {"Within the interval"} and len(lines(made, "Within the interval")) == 8
    assert made.claims[0].cells[0].startswith("0 regressions and 0 improvements")


@pytest.mark.parametrize(("shift", "title"), [(1.2, "Regressions"), (0.8, "Improvements")])
def test_shifted_rows_are_found(shift, title):
    rows = report_runs.step_rows()
    rows[4].samples["seconds"] = [x * shift for x in rows[4].samples["seconds"]]
    made = compare(found(run("step", report_runs.step_rows())), found(run("step", rows)))
    (line,) = lines(made, title)
    assert line.cells[0] == "step-5" and "q8_0" in line.cells[1] and f"{shift:.3f}" in line.cells
    assert len(lines(made, "Within the interval")) == 7


def test_more_per_second_is_better():
    def rated(rate):
        return found(run("kernels", [Row({"a": 1}, samples={"gb_per_s": [rate, rate * 1.01, rate * 0.99]})]))

    assert lines(compare(rated(10), rated(20)), "Improvements") and lines(compare(rated(20), rated(10)), "Regressions")


def change(a: list[float], b: list[float], name: str = "seconds") -> Change:
    numbered = Numbered("x", Source("x", run("s", [])), Row())
    return Change(numbered, numbered, name, (0, 0), *ratio(a, b))


def test_verdicts():
    wide, shifted = [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.5, 4.5]
    assert change(wide, shifted).verdict == SAME
    assert change([1.0, 1.01, 1.02], [1.1, 1.11, 1.12]).verdict == REGRESSION
    assert change([1.0, 1.01, 1.02], [0.9, 0.91, 0.92]).verdict == IMPROVEMENT
    assert change([1.0, 1.0], [2.0, 2.0]).verdict == UNKNOWN and change([1.0], [2.0]).interval is None


def test_interval_agrees_with_scipy():
    """An outside judge: percentiles of the ratio of medians, both samples drawn anew."""
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    a, b = rng.normal(1.0, 0.1, 25), rng.normal(1.1, 0.1, 31)

    def statistic(x, y, axis):
        return np.median(y, axis=axis) / np.median(x, axis=axis)

    judge = stats.bootstrap((a, b), statistic, n_resamples=20_000, method="percentile", rng=0).confidence_interval
    _, interval = ratio(a, b)
    assert interval == pytest.approx((judge.low, judge.high), rel=0.01)


def test_interval_covers_no_change_as_often_as_it_says():
    """Of 60 pairs from one distribution, few lie beyond: 5 % for many samples, more for few."""
    rng = np.random.default_rng(0)
    beyond = 0
    for _ in range(60):
        _, (low, high) = ratio(rng.normal(1, 0.05, 30), rng.normal(1, 0.05, 30))
        beyond += not low <= 1 <= high
    assert beyond <= 9


def test_rows_of_one_side_are_named():
    a, b = report_runs.step_rows(), report_runs.step_rows()
    a[0].what["steps"], b[1].what["steps"] = 8, 8
    made = compare(found(run("step", a)), found(run("step", b)))
    assert {line.cells[0] for line in lines(made, "Rows of A alone")} == {"step-1", "step-2"}
    assert {line.cells[0] for line in lines(made, "Rows of B alone")} == {"step-1", "step-2"}


def test_what_no_longer_runs_is_named():
    rows = report_runs.step_rows()
    rows[0] = Row(rows[0].what, status=SKIPPED, note="out of memory")
    made = compare(found(run("step", report_runs.step_rows())), found(run("step", rows)))
    (line,) = lines(made, "What runs in one of them alone")
    assert "out of memory" in line.cells and "emulated" in line.cells and "skipped" in line.cells


def test_figures_without_scatter_are_compared():
    rows = report_runs.step_rows()
    rows[0].values["moved_bytes"] *= 2
    rows[1].memory["device"] += 10**9
    rows[2].values["stall_seconds"] = 99.0  # a time: left to the samples
    made = compare(found(run("step", report_runs.step_rows())), found(run("step", rows)))
    assert [line.cells[0] for line in lines(made, "Figures without samples that changed")] == ["step-1", "step-2"]


def test_times_that_were_emulated_stay_in_brackets():
    made = compare(found(run("step", report_runs.step_rows())), found(run("step", report_runs.step_rows(1.5))))
    times = {line.status: line.cells[3:5] for line in lines(made, "Regressions")}
    assert all(cell.startswith("(") for cell in times["emulated"])
    assert not any(cell.startswith("(") for cell in times["measured"])


def test_machines_are_not_mixed_up():
    a, b = found(run("step", report_runs.step_rows())), found(run("step", report_runs.step_rows(), "Card B"))
    with pytest.raises(UserError, match="Test Card 9000, B of Card B.*--across-machines"):
        compare(a, b)
    made = compare(a, b, across_machines=True)
    assert len(lines(made, "Within the interval")) == 8 and "different machines" in made.summary
    assert ("device", "Test Card 9000", "Card B") in {
        line.cells for line in lines(made, "What differs in the machines")
    }


def test_nothing_in_common_is_said():
    with pytest.raises(UserError, match="no row in common"):
        compare(found(run("step", report_runs.step_rows())), found(run("convert", report_runs.convert_rows())))


def test_verb_compares(tmp_path, capsys):
    write_run(run("step", report_runs.step_rows()), tmp_path / "a.json")
    write_run(run("step", report_runs.step_rows(1.3)), tmp_path / "b.json")
    assert main(["report", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "8 regressions" in out or "7 regressions" in out  # one row scatters widely
    page = tmp_path / "c.html"
    assert main(["report", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "-o", str(page)]) == 0
    assert "Regressions" in page.read_text()
