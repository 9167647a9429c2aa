"""Measured tables that come with the package, with invented ones in a temporary folder: how they get there, who reads
them, in which order, and what happens to those that no longer fit the kernels."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux_quant.benchmarks import ship_table
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.kernels import dispatch, eight_bit, fallback, tables
from flux_quant.kernels.tables import FUSED, TWO_PASS, VECTOR, Step

pytest.importorskip("triton")

from flux_quant.kernels import configurations, matmul  # noqa: E402 - needs triton

CUDA = torch.device("cuda")
HOPPER = (9, 0)
STEPS = (Step(1, VECTOR, 2), Step(700, FUSED, 10), Step(None, TWO_PASS))
INT8 = (Step(64, "triton", 7), Step(4608, "tma", 1), Step(None, "int_mm"))


def result(card: str = "NVIDIA H200", count: int = 132, **formats: tuple[Step, ...]) -> dict:
    """As `tune --save` writes it."""
    machine = dict(
        device=card, capability="9.0", multiprocessors=count, torch="2.11", triton="3.6", date="d", commit="c"
    )
    table = {name: tables.rows_of(steps, HOPPER) for name, steps in formats.items()}
    return {"suite": "tune", "machine": machine, "layer": [9216, 3072], "table": table, "left_out": []}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch):
    """Where the package has its tables; this machine has an H200 that nobody measured."""
    place = tmp_path / "measured"
    properties = SimpleNamespace(multi_processor_count=132)
    for name, value in dict(name="NVIDIA H200", capability=HOPPER, properties=properties).items():
        monkeypatch.setattr(torch.cuda, f"get_device_{name}", lambda device=None, value=value: value)
    monkeypatch.setattr(fallback, "obstacle", lambda device, minimum: None)
    monkeypatch.setattr(tables, "MEASURED", place)
    monkeypatch.setattr(tables, "table_file", lambda device: tmp_path / "own.json")
    tables.forget()
    yield place
    tables.forget()


def ship(folder: Path, content: dict, name: str = "2026-01-01-tune.json") -> Path:
    path = folder.parent / name
    path.write_text(json.dumps(content))
    return ship_table.ship(path, folder)


def why(rows: int, name: str = "q4_k") -> str:
    return dispatch.explain(FORMATS[name], (rows, 9216, 3072), "cuda")


def test_a_shipped_table_is_followed(folder):
    assert "derived for sm_90, not measured" in why(600)
    assert ship(folder, result(q4_k=STEPS, int8=INT8)) == folder / "nvidia-h200.json"
    assert ": fused (up to 700 rows; table measured on NVIDIA H200)" in why(600)
    assert dispatch.way_for(FORMATS["q4_k"], 600, (9216, 3072), torch.bfloat16, CUDA).config == 10
    assert "derived" in why(600, "q5_k"), "nobody measured that format"
    chosen = eight_bit.int8_product(512, (9216, 3072), CUDA)
    assert (chosen.way, chosen.config) == ("tma", 1) and chosen.why.endswith("table measured on NVIDIA H200")
    assert tables.summary(CUDA) == "measured on NVIDIA H200: int8, q4_k; others derived for sm_90, not measured"


def test_own_measurements_go_first_then_the_card_then_its_class(folder):
    def limit() -> int:
        return tables.steps_for(CUDA, "q4_k")[0][0].rows

    ship(folder, result("NVIDIA GH200", 100, q4_k=(Step(16, FUSED, 0), Step(None, TWO_PASS))))
    ship(folder, result("NVIDIA H100", 114, q4_k=(Step(32, FUSED, 2), Step(None, TWO_PASS))))
    assert limit() == 32 and "measured on NVIDIA H100, sm_90 too" in why(20), "the most similar one of the class"
    ship(folder, result(q4_k=(Step(64, FUSED, 4), Step(None, TWO_PASS))))
    assert limit() == 64
    tables.store(CUDA, {"q4_k": (Step(128, FUSED, 8), Step(None, TWO_PASS))}, {"q4_k": None})
    assert limit() == 128 and "measured on NVIDIA H200, on this machine" in why(100)


def test_another_class_does_not_follow_it(folder, monkeypatch):
    ship(folder, result(q4_k=STEPS))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a 3060")
    tables.forget()
    assert "derived for sm_86, not measured" in why(600)
    assert "flux-quant tune" in tables.summary(CUDA)


def test_a_table_of_other_kernels_is_refused_and_not_followed(folder, monkeypatch):
    target = ship(folder, result(q4_k=STEPS, q8_0=(Step(2, VECTOR, 0), Step(None, TWO_PASS))))
    monkeypatch.setattr(matmul, "CONFIGS", tuple(c for i, c in enumerate(matmul.CONFIGS) if i != 10))
    tables.forget()
    assert "derived for sm_90" in why(600), "q4_k's tile is gone"
    assert "measured" in why(1, "q8_0"), "q8_0 does not use it"
    before = target.read_text()
    with pytest.raises(UserError, match="not a table of these kernels: fused has no configuration"):
        ship(folder, json.loads((folder.parent / "2026-01-01-tune.json").read_text()))
    assert target.read_text() == before


def test_numbers_may_move(folder, monkeypatch):
    ship(folder, result(q4_k=STEPS))
    monkeypatch.setattr(matmul, "CONFIGS", matmul.CONFIGS[::-1])
    tables.forget()
    config = tables.step_for(tables.steps_for(CUDA, "q4_k")[0], 600).config
    assert config == len(matmul.CONFIGS) - 1 - 10


@pytest.mark.parametrize("path", [VECTOR, FUSED, "tma", "triton"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_contents_tell_all_configurations_apart(path, capability):
    for number in range(len(configurations.configurations(path, capability))):
        content = configurations.content(path, number, capability)
        assert configurations.number_of(path, json.loads(json.dumps(content)), capability) == number


def test_formats_of_two_runs_stand_together(folder):
    ship(folder, result(q4_k=STEPS))
    stored = json.loads(ship(folder, result(q8_0=STEPS), "2026-01-02-tune.json").read_text())
    assert set(stored["table"]) == set(stored["measured"]) == {"q4_k", "q8_0"}


BROKEN = {
    "no card": (dict(machine=dict(device="CPU", date="d")), "not a table of these kernels: 'capability'"),
    "nothing measured": (dict(table={}), "has measured no format"),
    "a number": (dict(table={"q4_k": [dict(rows=None, path="fused", config=10)]}), "fused has no configuration 10"),
    "a limit": (dict(table={"q4_k": [dict(rows=8, path="two_pass", config=None)]}), "the last step has a limit"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_result_of_a_card_is_refused(folder, change, message):
    with pytest.raises(UserError, match=message):
        ship(folder, result(q4_k=STEPS) | change)
    assert not folder.exists()


def test_files_that_cannot_be_read_are_passed_over(folder):
    ship(folder, result(q4_k=STEPS))
    for name, text in {"a.json": "", "b.json": "[]", "c.json": '{"card": "x"}'}.items():
        (folder / name).write_text(text)
    tables.forget()
    assert [one.card for one in tables.shipped()] == ["NVIDIA H200"]


def test_the_command(folder, monkeypatch, capsys):
    monkeypatch.setattr(ship_table, "newest_results", lambda: [])
    monkeypatch.setattr(sys, "argv", ["ship_table", "--folder", str(folder)])
    assert ship_table.main() == 2 and "nobody has measured a card" in capsys.readouterr().err
    path = folder.parent / "2026-01-03-tune.json"
    path.write_text(json.dumps(result(q4_k=STEPS)))
    monkeypatch.setattr(sys, "argv", ["ship_table", str(path), "--folder", str(folder)])
    assert ship_table.main() == 0
    printed = capsys.readouterr().out
    assert "derived" in printed and "700" in printed and str(tables.FUSED_UP_TO[HOPPER]) in printed


@pytest.mark.parametrize("path", sorted(tables.MEASURED.glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_fits_the_kernels(path):
    stored = json.loads(path.read_text())
    assert set(tables.table_in(stored, tuple(stored["capability"]))) == set(stored["table"])
