"""Every suite of `flux-quant bench` measures: a quick look at each, on this machine, and what its rows hold."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux_quant.benchmarks import streaming
from flux_quant.benchmarks.bench import convert, image, kernels, models, session, step, text
from flux_quant.benchmarks.bench.limits import OTHERS
from flux_quant.benchmarks.bench.prepared import Prepared, Sampled, on_processor
from flux_quant.benchmarks.bench.record import EMULATED, MEASURED, OURS, SKIPPED, Row, read_run
from flux_quant.benchmarks.bench.runner import Runner
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.stage import STAND_IN, NoReadings, Stage, open_link
from flux_quant.cli import main
from flux_quant.components import BUNDLED, recommended_size
from flux_quant.errors import UserError
from flux_quant.planner.gpus import GPUS

LIMITS = {
    "ram_copy_gb_per_s": 10.0,
    "cpu_tflop_per_s": {"fp32": 0.05},
    "device_copy_gb_per_s": 900.0,
    "gpu_tflop_per_s": {"bf16": 100.0},
}
QUICK = Asked(quick=True, repeats=2, limits=LIMITS)


def measured(folder: Path, suite: object, asked: Asked = QUICK) -> list[Row]:
    run = session.Run(suite.name, "", "2026-01-02", {}, {"device": "x"})
    runner = Runner(run, folder / "it.json", asked.repeats, float("inf"))
    runner.measure(list(suite.cases(asked)))
    rows = read_run(runner.path).rows
    assert rows and {row.status for row in rows} == {MEASURED}, [row.note for row in rows]
    assert len({row.key for row in rows}) == len(rows)
    return rows


def test_kernels(tmp_path: Path):
    rows = measured(tmp_path, kernels.SUITE)
    unpacked = [row for row in rows if row.what["operation"] == "dequantize"]
    subjects = {row.subject.split()[0] for row in unpacked}
    assert subjects == {OURS, "torch", "gguf-py"} and {row.what["format"] for row in unpacked} == set(kernels.QUICK)
    for row in unpacked:
        assert row.values.get("wrong_values", 0) == 0 and len(row.samples["seconds"]) == 2
        assert row.expected["bound_seconds"] == pytest.approx(row.values["bytes_moved"] / 10e9)
    products = [row for row in rows if row.what["operation"] == "linear"]
    assert {row.subject for row in products} == {OURS, kernels.DENSE} and {row.what["m"] for row in products} == {1, 32}
    for row in products:
        assert row.values["operations"] == 2 * row.what["n"] * row.what["k"] * row.what["m"]
        assert row.values.get("relative_error", 0) < 1e-5 and row.expected["bound_by"] in ("compute", "copy")


def test_kernels_of_a_sweep():
    cases = list(kernels.cases(Asked(formats=("q4_k_s", "fp8"))))
    found = {case.what["format"] for case in cases}
    assert found == {"q4_k", "fp8", "f32"}
    every = {case.what["format"] for case in kernels.cases(Asked()) if case.what["operation"] == "dequantize"}
    assert {"q2_k", "iq4_nl", "q5_1"} < every and not set(kernels.SAME) & every
    on_cuda = list(kernels.cases(Asked(device="cuda", formats=("q8_0",))))
    assert kernels.CHAIN in {case.subject for case in on_cuda}, "and nothing was made yet"


def test_weights_are_let_go_when_a_group_is_over():
    cases = list(kernels.cases(replace(QUICK, formats=("q8_0",))))
    for case in cases:
        case.work()
    for case in cases:
        case.close()
    assert all(not case.work.state.made for case in cases)
    held = [cell.cell_contents for case in cases for cell in case.close.__closure__ if cell.cell_contents is not None]
    shared = [one for found in held if isinstance(found, tuple) for one in found if isinstance(one, Prepared)]
    assert shared and not any(one.made for one in shared)


def test_short_calls_are_repeated_and_rotate_over_copies():
    calls: list[int] = []
    run = on_processor(calls.append, 3, warm=2)
    before = len(calls)
    assert run() > 0 and len(calls) - before > 100 and calls[:6] == [0, 1, 2, 0, 1, 2]
    threads = []
    work = Sampled(lambda: (lambda i: threads.append(torch.get_num_threads()), 1, Row()), torch.device("cpu"), 3)
    before = torch.get_num_threads()
    assert work().samples["seconds"][0] > 0 and set(threads) == {3} and torch.get_num_threads() == before


def test_step(tmp_path: Path):
    rows = measured(tmp_path, step.SUITE)
    assert [row.what["format"] for row in rows] == ["bf16", "q4_k_s"]
    assert rows[0].what["size"] == "x".join(map(str, recommended_size(models.transformer(QUICK))))
    assert rows[0].values["bits_per_weight"] > 2.5 * rows[1].values["bits_per_weight"]
    assert rows[0].expected == rows[1].expected and rows[0].expected["bound_by"] == "compute"


def test_step_of_random_weights(tmp_path: Path):
    (row,) = measured(tmp_path, step.SUITE, replace(QUICK, random=True, formats=("q4_0",)))
    assert row.what["blocks"] == 3 and len(row.samples["seconds"]) == 2 and row.what["format"] == "q4_0"
    assert step.weights(Asked(device="cuda"))["kind"] == "random", "the shipped model is too small for a card"
    (full, *_) = step.cases(Asked(random=True, limits=LIMITS))
    assert full.needs > 100 and full.what["blocks"] == 57


def test_steps_of_full_size_need_their_ram(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "ram_now", lambda: (8 * 10**9, 8 * 10**9))
    (case, *_) = step.cases(Asked(random=True, formats=("q8_0",)))
    with pytest.raises(UserError, match="8.0 GB of RAM are free, 15.7 GB are needed"):
        case.work()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Stage:
    here = Stage(open_link(1 << 20), GPUS[STAND_IN].machine(), NoReadings(), 0)
    monkeypatch.setattr(step, "open_stage", lambda: here)
    return here


def test_steps_on_a_card_are_those_of_streaming(stand_in: Stage):
    """Walked through on the stand-in: resident first, then under budgets, a format at a time in RAM."""
    asked = Asked(device="cuda", random=True, quick=True, formats=("q8_0", "q4_0"), vram=(4 * 10**9, 12 * 10**9))
    cases = list(step.on_cuda(asked))
    assert [case.what["vram"] for case in cases] == 2 * [None, 4 * 10**9, 12 * 10**9]
    formats: step.Formats = cases[0].work.args[0]
    rows = []
    for case in cases:
        rows.append(case.work())
        assert formats.open == case.what["format"]
        case.close()
    assert formats.bench is None and formats.open is None
    assert [row.status for row in rows] == 2 * [MEASURED, EMULATED, MEASURED], "12 GB are the card itself"
    for row in rows:
        assert len(row.samples["seconds"]) in (streaming.TIMED, streaming.TIMED_SLOW) and row.note == ""
        assert len(row.samples["first_seconds"]) == streaming.WARM and row.expected["predicted_seconds"] > 0
        assert row.memory["host_rss"] > 0 and "host_pinned" in row.memory
    assert rows[0].values["bytes_moved"] == 0 < rows[1].values["bytes_moved"]


def test_a_card_that_holds_no_model_has_a_predicted_bound(stand_in: Stage):
    limits = {OTHERS: 3 << 20}
    asked = Asked(device="cuda", random=True, quick=True, formats=("q4_0",), vram=(4 * 10**9,), limits=limits)
    (_, case) = step.on_cuda(asked)
    row = case.work()
    assert case.work.args[0].stage.others == 3 << 20, "what this process took since is its own"
    case.close()
    assert "predicted" in row.note and row.expected["bound_seconds"] > 0


@pytest.mark.slow
def test_image(tmp_path: Path):
    rows = measured(tmp_path, image.SUITE, replace(QUICK, steps=(2,)))
    assert [row.what["format"] for row in rows] == ["bf16", "q4_k_s"]
    for row in rows:
        phases = [name for name in row.samples if name.endswith("_seconds") and name.split("_")[0] in PHASES]
        assert len(phases) == len(PHASES) and len(row.samples["first_seconds"]) == 1
        assert row.samples["seconds"][0] == pytest.approx(sum(row.samples[name][0] for name in phases))
        assert row.samples["step_seconds"][1] == pytest.approx(row.samples["denoise_seconds"][1] / 2)
        assert row.memory["host_rss"] > 50e6


PHASES = ("load", "text", "modulation", "denoise", "decode")


def test_pictures_of_random_weights_are_not_made():
    (case,) = image.cases(Asked(random=True))
    with pytest.raises(UserError, match="text encoders"):
        case.work()


def test_a_sweep_is_a_product():
    asked = Asked(formats=("q8_0", "q4_0"), sizes=((64, 64), (96, 64)), steps=(1, 2, 3))
    cases = list(image.cases(asked))
    assert len(cases) == 12 and len({json.dumps(case.what) for case in cases}) == 12
    assert len({case.group for case in cases}) == 6, "formats take turns"


@pytest.mark.slow
def test_convert(tmp_path: Path):
    rows = measured(tmp_path, convert.SUITE, replace(QUICK, formats=("q4_0",)))
    (row,) = rows
    assert row.what["format"] == "q4_0" and row.values["file_bytes"] < row.values["source_bytes"] / 2.5
    assert row.samples["times_cp"] == [a / b for a, b in zip(row.samples["seconds"], row.samples["cp_seconds"])]  # noqa: B905
    assert 0 < row.memory["host_rss"] < 2e9 and 15 < row.values["weight_snr_db"] < 30


def test_sources_of_conversion(monkeypatch: pytest.MonkeyPatch):
    few, own = convert.sources(Asked())
    assert own.path == models.transformer(Asked()) and own.nbytes == own.path.stat().st_size
    assert "1 double and 2 single blocks" in few.name and 1.2e9 < few.nbytes < 1.8e9 and few.path is None
    (whole,) = convert.sources(Asked(random=True, quick=True))
    assert whole.name == few.name
    (mine,) = convert.sources(Asked(model=BUNDLED))
    assert mine.path == own.path
    for free, blocks in ((60e9, "19 double and 38 single"), (26e9, "9 double and 17 single"), (1e9, "1 double")):
        monkeypatch.setattr(convert.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        (some,) = convert.sources(Asked(random=True))
        assert blocks in some.name
    with pytest.raises(UserError, match="1.0 GB free, 2.4 GB are needed"):
        some.file()


def test_a_conversion_that_fails_says_why(tmp_path: Path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="the conversion ended with .*UserError"):
        convert.convert(broken, tmp_path / "out.gguf", "q8_0", 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's own account of a process' memory")
def test_text(tmp_path: Path):
    (row,) = measured(tmp_path, text.SUITE, replace(QUICK, formats=("q4_k",)))
    assert row.what["blocks"] == 1 and row.what["words"] == 512 and len(row.samples["seconds"]) == 2
    assert row.memory["host_rss"] > row.values["file_bytes"] > 150e6
    assert 0 < row.expected["bound_seconds"] < row.samples["processor_seconds"][0]


def test_text_of_all_blocks_needs_ram_and_place(monkeypatch: pytest.MonkeyPatch):
    cases = list(text.cases(Asked(random=True, formats=("q8_0",))))
    assert len(cases) == len(text.CASES) and {case.what["blocks"] for case in cases} == {24}
    assert cases[0].work.encoder.nbytes == pytest.approx(5.06e9, rel=0.01)
    monkeypatch.setattr(text, "ram_now", lambda: (6 * 10**9, 6 * 10**9))
    with pytest.raises(UserError, match="6.0 GB of RAM are free, 7.1 GB are needed"):
        cases[0].work()
    few = list(text.cases(Asked()))
    assert {case.what["blocks"] for case in few} == {text.BLOCKS} and len(few) == len(text.FORMATS)


@pytest.mark.parametrize("name", session.SUITES)
def test_every_suite_is_there_and_lists_its_cases(name: str, capsys):
    suite = session.suite_named(name)
    assert suite.name == name and suite.about and "\n" not in suite.about
    assert main(["bench", name, "--list", "--quick"]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.slow
def test_the_verb_writes_what_it_measured(tmp_path: Path, capsys):
    assert main(["bench", "step", "tiers", "--quick", "--formats", "q4_0", "-o", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "q4_0" in err and "written: " in out
    runs = {run.suite: run for run in map(read_run, tmp_path.glob("*/*.json"))}
    assert set(runs) == {"step", "tiers"} and runs["step"].weights["kind"] == "shipped"
    assert runs["step"].limits["ram_copy_gb_per_s"] > 0 and runs["step"].machine["cores"] > 0
    rows = runs["step"].rows
    assert rows[0].rerun == "flux-quant bench step --quick --formats q4_0 --size 96x96" and rows[0].status != SKIPPED
