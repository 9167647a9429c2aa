"""Compiling ahead: the cache holds what true launches ask for, walks cover the measurements, time ends it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from flux_quant.benchmarks import compile_ahead, kernels, step  # noqa: E402 - needs triton

HERE = Path(__file__).parent
COMPILING = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}

WALKED = """
from flux_quant.benchmarks import compile_ahead as it
it.begin("NVIDIA H200", (9, 0), 132, 150 * 10**9)
asked = []
for walk, name in {(job.walk, job.name) for job in it.jobs(list(it.WALKS))}:
    done = it.work(it.Job(walk, name, (1, 1)))  # the part of nobody: nothing is compiled
    assert not done.errors and not done.hashes, done
    asked.append(walk)
print(len(asked))
"""


def output(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=COMPILING, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton.backends.nvidia") is None, reason="a Triton without NVIDIA's compiler")
def test_true_launches_find_everything_compiled(tmp_path):
    def compiled(what: str, folder: Path) -> list[str]:
        return json.loads(output(str(HERE / "compiled_ahead.py"), what, str(folder)).splitlines()[-1])

    for name in "ab":
        (tmp_path / name).mkdir()
    ahead = compiled("ahead", tmp_path / "a")
    assert {"vector_kernel", "fused_kernel", "persistent_kernel", "quantize_kernel", "gelu_kernel"} <= set(ahead)
    assert compiled("launch", tmp_path / "a") == []
    assert compiled("launch", tmp_path / "b") == ahead


@pytest.mark.slow
def test_every_walk_can_be_gone():
    found = len({(job.walk, job.name) for job in compile_ahead.jobs(list(compile_ahead.WALKS))})
    assert int(output("-I", "-c", WALKED)) == found


def test_jobs_cover_the_formats_that_are_measured_important_ones_first():
    jobs = compile_ahead.jobs(["tune"])
    assert [job.name for job in jobs[:: compile_ahead.SHARES]][: len(kernels.FIRST)] == list(kernels.FIRST)
    assert {job.name for job in jobs} == {*kernels.formats(torch.device("cuda")), "int8"}
    assert {job.name for job in compile_ahead.jobs(["step"])} == {name.split("+")[0] for name in step.FORMATS}
    shares = [job.share for job in jobs if job.name == "q4_k"]
    assert shares == [(i, compile_ahead.SHARES) for i in range(compile_ahead.SHARES)]


def test_time_ends_it(capsys):
    card = compile_ahead.card_of("8.6")
    assert card[1] == (8, 6)
    assert list(compile_ahead.compile_all(card, ["tune"], 1, 0.0)) == []
    assert "stopped after 0 s" in capsys.readouterr().out


def test_without_a_card_one_must_be_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["compile_ahead"])
    assert compile_ahead.main() == 1 and "--capability" in capsys.readouterr().err
