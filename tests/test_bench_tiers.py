"""Predictions for tiers are those of `flux-quant plan`; what users report has its source."""

import json
from pathlib import Path

import pytest

from flux_quant.benchmarks.bench import tiers
from flux_quant.benchmarks.bench.published import REPORTS
from flux_quant.benchmarks.bench.record import PREDICTED, REPORTED, Row
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.make_full_size import infos
from flux_quant.cli import main
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.gguf_io import model_metadata
from flux_quant.converters.recipe import build
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.planner.gpus import GPUS

HEADER = 1 << 20


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory):
    """(model, recipe) -> a file with the header of FLUX.1 at full size and nothing behind it; it takes no place."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def file(model: str, recipe: str) -> Path:
        if (model, recipe) not in made:
            suffix = ".safetensors" if recipe == "bf16" else ".gguf"
            tensors = infos(1.0, guidance=model == "dev")
            chooser = build(recipe, "FLUX.1", suffix, [info.name for info in tensors])
            kinds = [chooser.choose(info.name, info.shape, "bf16", lambda: True)[0] for info in tensors]
            packed = [TensorInfo(info.name, info.shape, kind) for info, kind in zip(tensors, kinds, strict=True)]
            path = folder / f"{model}-{recipe}{suffix}"
            made[model, recipe] = hollow(path, packed, recipe)
        return made[model, recipe]

    return file


def hollow(path: Path, packed: list[TensorInfo], recipe: str) -> Path:
    before = set(path.parent.iterdir())
    with pytest.raises(UserError, match="enough"), create_checkpoint(path, packed, metadata_of(path, recipe)):
        (begun,) = set(path.parent.iterdir()) - before
        with begun.open("rb") as source:
            header = source.read(HEADER)
        raise UserError("enough")
    data = sum(FORMATS[info.format].nbytes(info.shape) for info in packed)
    size = 8 + int.from_bytes(header[:8], "little") + data if path.suffix == ".safetensors" else data + HEADER
    with path.open("wb") as target:
        target.write(header)
        target.truncate(size)
    return path


def metadata_of(path: Path, recipe: str) -> dict:
    return model_metadata("flux", recipe) if path.suffix == ".gguf" else {}


@pytest.fixture(scope="module")
def rows() -> list[tuple[dict, str, Row]]:
    return [(case.what, case.subject, case.work()) for case in tiers.cases(Asked())]


QUESTIONS = [(card, setting) for card in tiers.TIERS.values() for setting in tiers.SETTINGS]


@pytest.mark.parametrize(("card", "setting"), QUESTIONS, ids=str)
def test_every_prediction_is_what_plan_says(card, setting, files, rows, capsys):
    place = f"{GPUS[card].vram} GB"
    found = [(what, row) for what, _, row in rows if (what["tier"], what["setting"]) == (place, str(setting))]
    ((what, row),) = found
    assert what["card"] == GPUS[card].name and row.status == PREDICTED
    file = files(setting.model, what["format"])
    words = row.rerun.split()
    assert words[:2] == ["flux-quant", "plan"] and words[2] == f"flux1-{setting.model}-{what['format']}"
    assert main(["plan", str(file), *words[3:], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["step_seconds"] == row.expected["predicted_seconds"]
    assert said["seconds"] == row.values["picture_seconds"] and said["peak_bytes"] == row.memory["device"]
    assert said["streamed_bytes"] == row.values["bytes_moved"]
    assert row.expected["bound_seconds"] < row.expected["predicted_seconds"], "nothing is faster than its bound"
    assert row.memory["device"] <= GPUS[card].usable


def test_the_format_is_the_most_precise_that_costs_little():
    setting = tiers.SETTINGS[1]
    recipe, plan = tiers.best("rtx-3090-24gb", setting)
    assert recipe == "bf16" and not plan.stream.streamed
    recipe, plan = tiers.best("rtx-4060-8gb", setting)
    others = [tiers.plan_of("rtx-4060-8gb", setting, name).seconds for name in tiers.CANDIDATES[1:]]
    assert recipe != "bf16" and plan.seconds <= (1 + tiers.SLACK) * min(others)
    with pytest.raises(UserError, match="would stream"):
        tiers.best("rtx-4060-8gb", setting, ("bf16",))


def test_bounds_are_those_of_the_datasheet():
    """shared figures of a step at 1024 x 1024: 59.5 TFLOP in linears, 14.9 in attention."""
    work = tiers.Setting("dev", (1024, 1024), 1).work
    linears, attention = tiers.operations(tiers.full_size("dev", "q8_0"), work)
    assert linears == pytest.approx(59.5e12, rel=0.01) and attention == pytest.approx(14.9e12, rel=0.01)
    seconds, by = tiers.bound(tiers.plan_of("rtx-3060-12gb", tiers.SETTINGS[2], "q8_0"), GPUS["rtx-3060-12gb"])
    assert seconds == pytest.approx(2.92, rel=0.01) and by == "compute"


def test_a_machine_without_a_gpu_has_its_bound_alone(rows):
    found = [row for what, _, row in rows if what["tier"] == tiers.CPU_ONLY]
    assert len(found) == len(tiers.SETTINGS)
    assert all(row.status == PREDICTED and "predicted_seconds" not in row.expected for row in found)
    slower = tiers.on_cpu(tiers.SETTINGS[0], {"cpu_tflop_per_s": {"fp32": 0.1}})
    assert slower.expected["bound_seconds"] == pytest.approx(2 * found[0].expected["bound_seconds"])


def test_what_users_report_has_its_source_and_a_tier(rows):
    found = [(what, subject, row) for what, subject, row in rows if row.status == REPORTED]
    assert len(found) == len(REPORTS) and len({Row(what, subject).key for what, subject, _ in rows}) == len(rows)
    for what, subject, row in found:
        assert row.values["source"].startswith("https://") and subject and int(what["tier"].split()[0]) in tiers.TIERS
        assert not row.samples, "nobody here measured it"
    assert {int(what["tier"].split()[0]) for what, _, _ in found} == set(tiers.TIERS)


def test_formats_that_were_asked_for_are_all_there():
    cases = list(tiers.cases(Asked(formats=("bf16", "q4_k_s"))))
    kinds = {case.what["format"] for case in cases if "format" in case.what}
    assert kinds == {"bf16", "q4_k_s"} and not any("Forge" in case.subject for case in cases)
    rows = [case.work() for case in cases]
    assert {row.values.get("fits") for row in rows} >= {True, False}
