"""Options and verbs about memory and speed, on a machine without a GPU."""

import json

import pytest

from flux_quant.cli import main
from flux_quant.components import BUNDLED

PICTURE = ["generate", "--model", str(BUNDLED), "--prompt", "red apple", "--size", "64x64", "--steps", "1"]


def run(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments]) or 0
    except SystemExit as stopped:
        return stopped.code or 0


MISTAKES = {
    "vram without a gpu": ([*PICTURE, "-o", "a.png", "--device", "cpu", "--vram", "8GB"], "is about a CUDA GPU"),
    "compute": ([*PICTURE, "-o", "a.png", "--compute", "int4"], "compute int4 is unknown; choose one of 16-bit"),
    "metrics": ([*PICTURE, "-o", "a.png", "--metrics", "no/such/m.json"], "no/such"),
    "ram": ([*PICTURE, "-o", "a.png", "--device", "cpu", "--ram-budget", "much"], "write it as a number with its unit"),
}


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not list(tmp_path.iterdir())


def test_tune_needs_a_gpu(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert run("tune") == 2
    assert capsys.readouterr().err.startswith("error: nothing to tune: ")


def test_metrics_and_int8(tmp_path, capsys):
    picture, measured = tmp_path / "a.png", tmp_path / "m.json"
    options = ["--device", "cpu", "--compute", "int8", "--ram-budget", "3GB", "--metrics", measured]
    assert run(*PICTURE, "-o", picture, *options) == 0
    found = json.loads(measured.read_text())
    assert {"load", "text", "modulation", "denoise", "decode"} <= set(found["seconds"])
    assert found["settings"]["compute"] == "int8" and found["peak_ram"] > 0 and picture.exists()
