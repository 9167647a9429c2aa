"""The quality suite on the bundled model and on a file of random weights: order of formats, floor, scan."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stream_backends import ThreadDevice

from flux_quant.benchmarks.bench.record import Row
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.quality import SUITE, figures, study, subject, suite
from flux_quant.benchmarks.quality.runs import placed, streamed, velocities, walk, watched
from flux_quant.benchmarks.quality.study import Study, Way, with_block
from flux_quant.benchmarks.quality.subject import Subject
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run as convert
from flux_quant.converters.plan import make_plan
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux


@pytest.fixture(scope="module")
def bundled() -> Iterator[Study]:
    """Three prompts, four steps; the judge's emoji take too long to render here. Floors come first, as in a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "open_judge", lambda: (None, "no judge"))
        made = Study(Subject(Asked(quick=True)))
        assert made.floors
        yield made
        made.close()


@pytest.fixture(scope="module")
def rows(bundled: Study) -> dict[Way, Row]:
    ways = [Way("q8_0"), Way("q4_0"), Way("q8_0", compute="int8"), Way("bf16", activations="bfloat16"), Way("bf16")]
    return {way: bundled.format_row(way) for way in ways}


def test_more_bits_are_better_beyond_the_intervals(rows: dict[Way, Row]):
    eight, four = rows[Way("q8_0")].values, rows[Way("q4_0")].values
    assert eight["weight_snr_db"] > four["weight_snr_db"] + 20 and eight["bits_per_weight"] > four["bits_per_weight"]
    assert eight["weight_snr_db"] >= eight["weight_snr_db_worst"] and "mlp" in four["weight_worst_tensor"]
    assert eight["velocity_error_high"] < four["velocity_error_low"]
    assert eight["psnr_db_low"] > four["psnr_db_high"] and eight["ssim"] > four["ssim"]
    assert eight["cosine_last_worst"] > four["cosine_last"]
    assert eight["velocity_error"] < rows[Way("q8_0", compute="int8")].values["velocity_error"] < four["velocity_error"]


def test_every_error_is_above_the_floor(rows: dict[Way, Row]):
    for way, row in rows.items():
        assert row.values["velocity_error_floor"] < 1e-4
        assert row.values["psnr_db_floor"] > 80
        if way != Way("bf16"):
            assert row.values["velocity_error"] > 100 * row.values["velocity_error_floor"], way
            assert row.values["psnr_db"] < row.values["psnr_db_floor"] - 15, way
            assert row.values["cosine_last"] < row.values["cosine_last_floor"], way
    same = rows[Way("bf16")].values
    assert same["velocity_error"] == 0 and same["psnr_db"] == 120 and "weight_snr_db" not in same


def test_floors_are_rows_of_their_own(bundled: Study):
    found = [bundled.floor_row(name) for name in study.FLOORS]
    assert all(row.values["velocity_error"] > 0 for row in found), "the reference was made under what is changed"
    assert max(row.values["velocity_error"] for row in found) == bundled.floor["velocity_error_floor"] > 0
    assert "says nothing of pictures" in found[0].note and "no judge" in found[0].note


def test_samples_are_those_of_the_prompts(rows: dict[Way, Row]):
    row = rows[Way("q4_0")]
    assert len(row.samples["velocity_error"]) == len(row.samples["psnr_db"]) == len(row.samples["ssim"]) == 3
    assert len(row.samples["cosine_by_step"]) == 4
    steps = [name for name in row.samples if name.startswith("velocity_error_step_")]
    assert steps == ["velocity_error_step_1", "velocity_error_step_4"]
    assert row.values["velocity_error"] == pytest.approx(sum(row.values[name] for name in steps) / 2)
    assert row.values["psnr_db"] == pytest.approx(sum(row.samples["psnr_db"]) / 3)
    assert row.values["psnr_db_worst"] == min(row.samples["psnr_db"])
    json.dumps(row.values, allow_nan=False)


def test_scan_finds_the_block_that_was_damaged(bundled: Study, monkeypatch: pytest.MonkeyPatch):
    damaged, load = "single_blocks.3", bundled.load

    def load_damaged(way: Way) -> torch.nn.Module:
        model = load(way)
        if way.format != "bf16":
            layer = model.get_submodule(f"{damaged}.linear1")
            weight = layer.fmt.unpack(*layer.parts)
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
            bad = QuantLinear.from_parts(FORMATS["f32"], (weight + noise,), layer.bias)
            model.set_submodule(f"{damaged}.linear1", bad)
        return model

    monkeypatch.setattr(bundled, "load", load_damaged)
    found = {block: bundled.block_row("q8_0", block).values for block in bundled.subject.blocks}
    assert len(found) == 7 and {values["parameters"] for values in found.values()} == {2367232, 985984}
    errors = sorted(found, key=lambda block: found[block]["velocity_error"])
    assert errors[-1] == min(found, key=lambda block: found[block]["psnr_db"]) == damaged
    assert found[damaged]["velocity_error"] > 5 * found[errors[-2]]["velocity_error"]


def test_a_block_that_is_exchanged_for_itself_changes_nothing(bundled: Study):
    model = with_block(bundled.load(Way()), bundled.load(Way()), "double_blocks.1")
    outcome = bundled.run(model, bundled.reference)
    assert figures.relative_errors(outcome.velocities, bundled.reference.velocities).max() == 0


def test_teacher_forced_answers_are_those_of_the_way(bundled: Study):
    """From one latent to the next is a step along the velocity that was measured there."""
    (drawing,), reference = bundled.subject.drawings(), bundled.reference
    before = torch.cat([drawing.noise[None], reference.way])
    for i, step in enumerate(bundled.steps):
        change = (before[step + 1] - before[step]) / (drawing.levels[step + 1] - drawing.levels[step])
        torch.testing.assert_close(reference.velocities[i], change, atol=1e-4, rtol=1e-4)


def test_watched_steps():
    assert watched(20, 5) == (0, 5, 10, 14, 19) and watched(4, 2) == (0, 3)
    assert watched(1, 4) == (0,) and watched(20, 1) == (0,)


@pytest.fixture(scope="module")
def users(tiny_flux_file: Path) -> Iterator[Study]:
    """A file of random weights without encoders beside it."""
    with pytest.MonkeyPatch.context() as patch:
        setting = replace(subject.SETTINGS["file on a CPU"], size=(64, 48), steps=3, states=2)
        patch.setitem(subject.SETTINGS, "file on a CPU", setting)
        made = Study(Subject(Asked(model=tiny_flux_file)))
        yield made
        made.close()


def test_a_file_without_encoders_has_no_image_figures(users: Study):
    found = {name: users.format_row(Way(name)) for name in ("q8_0", "q4_0")}
    for row in found.values():
        assert not {"psnr_db", "ssim", "cosine_last", "accuracy"} & {*row.values}
        assert "no image figures" in row.note and "the text is noise" in row.note
        assert (
            row.values["velocity_error_floor"] < row.values["velocity_error"]
            and len(row.samples["velocity_error"]) == 2
        )
    assert found["q8_0"].values["velocity_error"] < found["q4_0"].values["velocity_error"] / 5
    assert found["q8_0"].values["weight_snr_db"] > 40
    assert users.block_row("q4_0", "single_blocks.2").values["velocity_error"] > 0


def test_weights_that_say_they_are_random_have_no_image_figures(tiny_flux: dict, tmp_path: Path):
    from safetensors.torch import save_file

    save_file(tiny_flux, tmp_path / "model.safetensors", {"modelspec.title": subject.RANDOM_TITLE})
    assert Subject(Asked(model=tmp_path / "model.safetensors")).obstacle == "the weights are random"


def test_one_file_at_a_time(users: Study):
    folder = Path(users.subject.folder.name)
    for name in ("q8_0", "fp8", "q4_k_s"):
        users.converted(name)
        assert [path.stem for path in folder.iterdir()] == [name]


def test_streamed_blocks_answer_the_same(users: Study, tiny_flux_file: Path, tmp_path: Path):
    path = tmp_path / "q4_0.gguf"
    convert(make_plan(Conversion(tiny_flux_file, path, "q4_0")))
    drawing = users.subject.drawings()[0]
    with placed(load_flux(path), torch.device("cpu"), "16-bit"):
        model = load_flux(path)
        way = walk(model, drawing)
        expected = velocities(model, drawing, way, (0, 2))
    with streamed(model, ThreadDevice(lazy=False, compute_is_host=True)):
        assert torch.equal(velocities(model, drawing, way, (0, 2)), expected)


def test_cases_name_what_they_measure():
    made = list(SUITE.cases(Asked()))
    whats = [case.what for case in made]
    assert len({json.dumps(what, sort_keys=True) for what in whats}) == len(whats)
    assert {what["format"] for what in whats if what["part"] == "format"} == {*suite.FORMATS}
    assert {what["compute"] for what in whats if what["part"] == "format"} == {"16-bit", "int8", "fp8"}
    assert sum(what["part"] == "floor" for what in whats) == 2 and sum(what["part"] == "block" for what in whats) == 7
    assert all(what["prompts"] and what["steps"] == 20 and what["size"] == "96x96" for what in whats)
    formats = [what["format"] for what in whats if what["part"] == "format"]
    assert formats == sorted(formats, key=suite.FORMATS.index), "each format is converted to once"
    assert not [case for case in SUITE.cases(Asked(random=True)) if case.what["part"] == "block"]
    chosen = [case.what for case in SUITE.cases(Asked(formats=("q4_k", "bf16"), quick=True))]
    assert {what["format"] for what in chosen if what["part"] == "block"} == {"q4_k"}


def test_what_cannot_be_judged_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="format q9 is unknown"):
        list(SUITE.cases(Asked(formats=("q9",))))
    with pytest.raises(UserError, match="no such file"):
        list(SUITE.cases(Asked(model=tmp_path / "absent.safetensors")))
    vae = subject.BUNDLED / "vae/ae.safetensors"
    with pytest.raises(UserError, match="VAE"):
        list(SUITE.cases(Asked(model=vae)))
