"""Reports as plain values: every row is in them, and nothing that was not measured is called so."""

import json
from dataclasses import replace

import pytest

import report_runs
from flux_quant.benchmarks.bench.record import EMULATED, MEASURED, OURS, PREDICTED, REPORTED, SKIPPED, Row, write_run
from flux_quant.benchmarks.report import tables, words
from flux_quant.benchmarks.report.inputs import RESULTS, Found, Source, gather, latest, number_rows, tier_of
from flux_quant.benchmarks.report.model import Report, Table
from flux_quant.benchmarks.report.sections import report
from flux_quant.errors import UserError
from report_runs import all_runs, run

NAN = float("nan")
MARKS = {EMULATED: "(", PREDICTED: "≈", REPORTED: "“"}


def found(*runs) -> Found:
    return Found([Source(f"{i}.json", one) for i, one in enumerate(runs)])


def tables_of(made: Report) -> list[Table]:
    return [table for section in made.sections for table in section.tables]


def section(made: Report, title: str):
    return next(one for one in made.sections if one.title == title)


def ids_shown(made: Report) -> list[str]:
    return [line.anchor for table in tables_of(made) for line in table.lines if line.anchor]


@pytest.fixture(scope="module")
def given() -> Found:
    return found(*all_runs().values())


@pytest.fixture(scope="module")
def made(given) -> Report:
    return report(given)


def test_every_row_is_in_one_table(given, made):
    rows = [row for source in given.sources for row in source.run.rows]
    assert len(ids_shown(made)) == len(set(ids_shown(made))) == len(rows)
    skipped = section(made, "What did not run").tables[0]
    assert len(skipped.lines) == sum(row.status == SKIPPED for row in rows)
    assert "needs 6.9 GB | has 6.0 GB" in skipped.lines[0].cells + skipped.lines[1].cells
    assert f"{len(rows)} rows" in made.summary


def test_every_row_of_the_committed_results_is_in_the_report():
    committed = gather([RESULTS])
    assert len(set(ids_shown(report(committed)))) == sum(len(source.run.rows) for source in committed.sources)


def test_every_value_of_a_row_has_a_cell(given, made):
    """Each figure is found in a line of its row, in the words of `show`; intervals and floors within others."""
    text = {}
    for table in tables_of(made):
        for line in table.lines:
            text.setdefault(line.cells[0], []).extend([*line.cells, *table.notes])
    for numbered in number_rows(latest(given.sources)[0]):
        shown = " ".join(text[numbered.id])
        row = numbered.row
        for name, value in {**row.values, **row.what}.items():
            if name in tables.SPLITTERS:
                continue  # in the heading
            expected = words.show(name, tier_of(numbered) if name == "vram" else value)
            assert expected.split(" ")[0] in shown, (numbered.id, name)
        for nbytes in row.memory.values():
            assert words.size(nbytes) in shown


@pytest.mark.parametrize("status", [EMULATED, PREDICTED, REPORTED])
def test_figures_show_what_they_rest_on(made, status):
    """No time of a row that was not measured stands there bare; nor does a prediction beside a measured row."""
    seen = 0
    for table in tables_of(made):
        for line in table.lines:
            for column, cell in zip(table.columns, line.cells, strict=True):
                timed = column.name in ("time", "predicted", "stall", "step", "picture") and cell != words.NONE
                if timed and line.status == status and column.name != "predicted":
                    assert cell.startswith(MARKS[status]), (column.name, cell)
                    seen += 1
                if timed and column.name == "predicted":
                    assert cell.startswith("≈")
                if column.name == "bound" and cell != words.NONE:
                    assert cell.startswith("≥")
                if column.name == "how":
                    assert cell.partition(",")[0] == line.status
    assert seen


def test_claims_name_their_basis(made):
    assert [claim.status for claim in made.claims] == [MEASURED, MEASURED, EMULATED, PREDICTED]
    for claim in made.claims:
        text = claim.cells[0]
        others = {MEASURED, EMULATED, PREDICTED} - {claim.status}
        assert claim.status in text and not any(word in text for word in others)
    measured, quality, emulated, predicted = (claim.cells[0] for claim in made.claims)
    assert "q8_0 (8.50 bits per weight) PSNR of pictures 34.0 dB" in quality and "Test Card 9000" in quality
    assert "q8_0 (8.50 bits per weight) 540 ms" in measured and "24 GB" in measured and "Test Card 9000" in measured
    assert "fits" in emulated and " ms" not in emulated and " s " not in emulated
    assert "8 GB (RTX 4060) q4_k_s ≈15 s" in predicted and "Test Card" not in predicted


@pytest.mark.parametrize("status", [EMULATED, PREDICTED, REPORTED, SKIPPED])
def test_a_report_without_measurements_claims_none(status):
    rows = [replace(row, status=status) for row in report_runs.step_rows()]
    claims = report(found(run("step", rows))).claims
    assert all("measured" not in claim.cells[0].replace("No step and no picture was measured", "") for claim in claims)
    assert all(claim.status != MEASURED for claim in claims)


def test_cards_are_not_the_machine_of_the_run(made):
    for table in section(made, "By memory").tables:
        for line in table.lines:
            if line.cells[0].startswith("tiers"):
                assert not any("Test Card" in text for text in (*line.cells, *table.notes))


def test_tiers_are_in_order_of_memory(made):
    titles = [table.title.partition(":")[0] for table in section(made, "By memory").tables]
    assert list(dict.fromkeys(titles)) == ["CPU only", *(f"{n} GB of VRAM" for n in (4, 6, 8, 12, 24))]


def test_unstable_rows_are_marked_and_prompts_are_no_scatter():
    rows = report_runs.step_rows()
    quality = [
        Row({"part": "format", "format": "q8_0"}, samples={"psnr_db": [20.0, 60.0, 90.0]}, values={"psnr_db": 57})
    ]
    made = report(found(run("step", rows), run("quality", quality)))
    marked = {line.anchor for table in tables_of(made) for line in table.lines if line.unstable and line.anchor}
    assert marked == {"step-3"} and "; 1 unstable" in made.summary
    assert any("step-3 is unstable" in note for table in tables_of(made) for note in table.notes)


def test_peers_stand_beside_ours(made):
    table = section(made, "Other programs side by side").tables[0]
    ratios = table.columns.index(next(column for column in table.columns if column.name == "time over ours"))
    assert [line.cells[ratios] for line in table.lines] == ["1 x", "1.50 x"]


def test_ratios_are_within_a_run():
    """A peer of another run has no ratio: the machine may have been busy then."""
    ours, peer = report_runs.peer_rows()[:2]
    made = report(found(run("peers", [ours]), run("peers", [peer], "Test Card 2")))
    table = section(made, "Other programs side by side").tables[0]
    texts = {line.cells[0]: line.cells for line in table.lines}
    assert "1.50 x" not in [cell for cells in texts.values() for cell in cells]


def test_a_quick_look_does_not_stand_for_a_run():
    whole, quick = run("step", report_runs.step_rows()), run("step", report_runs.step_rows(), date="2027-01-01")
    quick.command += " --quick"
    newest, earlier = latest(found(whole, quick).sources)
    assert len(newest) == 2 and not earlier


def test_a_machine_without_a_card_is_a_tier():
    row = Row({"format": "q8_0", "size": "96x96"}, samples={"seconds": [1.0]})
    made = report(found(run("step", [row], "CPU Test Processor")))
    assert section(made, "By memory").tables[0].title == "CPU only: steps"
    assert "CPU only" in made.claims[0].cells[0] and "1 s a step" in made.claims[0].cells[0]


def test_earlier_runs_are_kept_apart():
    newer, older = run("step", report_runs.step_rows()), run("step", report_runs.step_rows(2.0), date="2025-01-01")
    made = report(found(older, newer))
    assert len(ids_shown(made)) == 18
    old = section(made, "Earlier runs")
    inside = {line.cells[0] for table in old.tables for line in table.lines}
    assert old.folded and inside and inside <= {f"step-{n}" for n in range(10, 19)}
    assert "540 ms" in made.claims[0].cells[0]


ODD = {
    "no rows": [],
    "all skipped": [Row({"a": 1}, status=SKIPPED, note="")],
    "nothing known": [Row()],
    "no numbers": [Row({"vram": None, "format": None}, samples={"seconds": []}, values={"fits": None, "x": NAN})],
    "odd numbers": [Row({"vram": -1, "format": 3}, samples={"seconds": [0.0, 0.0, 0.0]}, values={"x": float("inf")})],
    "odd words": [Row({"vram": "lots", "tier": ""}, values={"psnr_db": "n/a", "psnr_db_low": 1.0, "times_ours": ""})],
    "bound of 0": [Row({"vram": 8e9}, samples={"seconds": [1]}, expected={"bound_seconds": 0, "bound_by": None})],
}  # fmt: skip


@pytest.mark.parametrize("suite", ["step", "tiers", "quality", "convert", "peers", "another"])
@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_odd_rows(suite, rows):
    made = report(found(run(suite, rows)))
    assert len(ids_shown(made)) == len(rows) and made.claims and made.summary


def test_other_files_are_named_in_folders_and_refused_alone(tmp_path):
    write_run(run("step", report_runs.step_rows()), tmp_path / "card" / "a.json")
    (tmp_path / "card" / "old.json").write_text(json.dumps({"suite": "demo", "formats": []}))
    (tmp_path / "card" / "text.json").write_text("no json")
    seen = gather([tmp_path])
    assert [source.name for source in seen.sources] == [f"{tmp_path.name}/card/a.json"]
    assert len(seen.refused) == 2 and not any(str(tmp_path) in line for line in seen.refused)
    assert section(report(seen), "Files that were not read").text == tuple(seen.refused)
    for name in ("old.json", "text.json"):
        with pytest.raises(UserError, match=name):
            gather([tmp_path / "card" / name])
    with pytest.raises(UserError, match="does not exist"):
        gather([tmp_path / "nothing"])


BROKEN = {
    "rows.0.samples": [1.0],
    "rows.0.values": {"a": [1]},
    "rows.0.status": "guessed",
    "rows.0.note": 3,
    "rows.0.what": None,
    "weights": [],
    "suite": 7,
}


@pytest.mark.parametrize(("place", "value"), BROKEN.items(), ids=BROKEN)
def test_results_of_the_wrong_shape_are_refused(tmp_path, place, value):
    path = tmp_path / "run.json"
    write_run(run("step", [Row({"a": 1})]), path)
    content = json.loads(path.read_text())
    part = content
    *parents, last = place.split(".")
    for name in parents:
        part = part[int(name) if name.isdigit() else name]
    part[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"run\.json is no result"):
        gather([path])


def test_samples_that_are_no_numbers_are_left_out(tmp_path):
    path = tmp_path / "run.json"
    write_run(run("step", [Row({"a": 1}, samples={"seconds": [1.0, None, float("nan"), 3]})]), path)
    assert gather([path]).sources[0].run.rows[0].samples == {"seconds": [1.0, 3.0]}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("seconds", 0.00125, "1.25 ms"),
        ("seconds", 0, "0 s"),
        ("step_seconds", 150, "2.50 min"),
        ("picture_seconds_at_least", 9_360, "2.60 h"),
        ("file_bytes", 12_723_103_104, "12.7 GB"),
        ("bytes_moved", 0, "0 GB"),
        ("vram", 8_000_000_000, "8 GB"),
        ("weight_snr_db", 23.19, "23.2 dB"),
        ("psnr_db_floor", float("inf"), "∞"),
        ("pinned_gb_per_s", 24.5, "24.5 GB/s"),
        ("cosine_last", 0.99964, "0.99964"),
        ("times_cp", 0.95123, "0.951"),
        ("resident_share", 0.21, "21%"),
        ("fits", False, "no"),
        ("anything", None, "-"),
        ("anything", float("nan"), "-"),
        ("tokens", 4608, "4,608"),
    ],
)
def test_numbers_in_words(name, value, text):
    assert words.show(name, value) == text


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [("8GB", 8e9), ("7.5 GiB", 7.5 * 2**30), ("CPU only", 0), (6e9, 6e9), ("lots", None), (True, None), (None, None)],
)
def test_budgets(value, nbytes):
    assert words.budget(value) == nbytes


def test_our_own_name_goes_without_saying(made):
    assert not any(OURS in note for table in tables_of(made) for note in table.notes)
