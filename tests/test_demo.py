"""`generate` and `demo` as a user runs them, on the bundled model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux_quant.benchmarks import demo
from flux_quant.cli import main
from flux_quant.components import BUNDLED
from flux_quant.converters.checkpoint import open_checkpoint

TRANSFORMER = BUNDLED / "diffusion_models/flux1-tiny.safetensors"
GENERATE = ["generate", "--model", str(BUNDLED), "--prompt", "penguin", "--steps", "2"]


def test_generate_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "picture.png"
    assert main([*GENERATE, "-o", str(path), "--seed", "3", "--prompt-t5", "octopus"]) == 0
    picture = Image.open(path)
    assert picture.size == (96, 96)
    settings = json.loads(picture.text["flux_quant"])
    assert (settings["seed"], settings["prompt_t5"], settings["model"]) == (3, "octopus", TRANSFORMER.name)
    printed = capsys.readouterr().out
    assert "s/it" in printed and "peak RAM" in printed and "denoise" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "absent.safetensors"], "absent.safetensors: no such file"),
        (["--model", str(BUNDLED / "vae/ae.safetensors")], "is a VAE"),
        (["--size", "0"], "must be positive"),
        (["--size", "wide"], "WIDTHxHEIGHT"),
        (["--steps", "0"], "steps"),
        (["--device", "toaster"], "device toaster is unknown"),
        (["--t5", str(BUNDLED / "vae/ae.safetensors")], "is a VAE"),
        (["--clip", "absent.safetensors"], "absent.safetensors"),
        (["--tokenizers", str(BUNDLED / "vae")], "no folder"),
        (["-o", "picture.jpg"], "written as .png"),
        (["-o", "absent/picture.png"], "does not exist"),
        (["-o", "old.png"], "use --force"),
    ],
    ids=lambda value: " ".join(Path(part).name for part in value) if isinstance(value, list) else "",
)
def test_generate_refuses_in_one_line(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").write_text("old")
    assert main([*GENERATE, "-o", "new.png", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0], lines
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]
    assert (tmp_path / "old.png").read_text() == "old"


def test_truncated_component_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    shutil.copytree(BUNDLED, tmp_path / "model")
    vae = tmp_path / "model/vae/ae.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1000])
    out = tmp_path / "new.png"
    model = str(tmp_path / "model")
    assert main(["generate", "-m", model, "-p", "ant", "-o", str(out), "--vae", str(vae), "--steps", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "truncated" in line and "ae.safetensors" in line
    assert not out.exists()


def test_demo_converts_draws_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:3])
    folder = tmp_path / "demo"
    for _ in range(2):  # a second run replaces the first
        assert main(["demo", "-o", str(folder)]) == 0
    assert "q4_0" in capsys.readouterr().out
    columns = {row["format"]: row for row in json.loads((folder / "report.json").read_text())["formats"]}
    assert list(columns) == ["bf16", "fp8", "q8_0", "q5_0", "q4_0"]
    for name, row in columns.items():
        path = TRANSFORMER if name == "bf16" else folder / "models" / row["file"]
        assert row["bytes"] == path.stat().st_size
        with open_checkpoint(path) as reader:
            assert name in {info.format for info in reader.tensors.values()}
    by_error = ["q8_0", "fp8", "q5_0", "q4_0"]
    for key in ("weight_snr", "psnr_mean"):
        values = [columns[name][key] for name in by_error]
        assert values == sorted(values, reverse=True), (key, values)
    sheet = Image.open(folder / "contact-sheet.png")
    assert sheet.width > 5 * 144 and sheet.height > 3 * 144
    assert len(np.unique(np.asarray(sheet))) > 100
    assert "| q8_0 |" in (folder / "report.md").read_text()
