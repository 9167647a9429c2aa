"""No folder of a machine gets into a result: commands, weights, messages, what a fingerprint holds."""

import json
import sys
from pathlib import Path

import pytest

from flux_quant.benchmarks import machine
from flux_quant.benchmarks.bench import places, session
from flux_quant.benchmarks.bench.record import Row, read_run
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite
from flux_quant.errors import UserError

TOLD = {
    "/home/ann/it.gguf: no such file": "it.gguf: no such file",
    "read '/mnt/big/a b/x.gguf' and /tmp/flux-quant-k3/": "read 'a b/x.gguf' and flux-quant-k3",
    f"{places.ROOT}/benchmarks/results/it.json is there": "benchmarks/results/it.json is there",
    "file:///data/ann/x.gguf, ~/models/y.gguf": "x.gguf, y.gguf",
    "lib:/opt/ann/libcuda.so.1; PATH=/opt/ann/bin": "lib:libcuda.so.1; PATH=bin",
    r"C:\Users\ann\x.gguf and D:/models/y.gguf": "x.gguf and y.gguf",
    "see https://example.org/a/b/c?d=/e": "see https://example.org/a/b/c?d=/e",
    "12.5 GB/s, 3 / 4, q4_k/q8_0, (a)/b, ../x": "12.5 GB/s, 3 / 4, q4_k/q8_0, (a)/b, ../x",
    "python -I -m flux_quant.benchmarks.tune": "python -I -m flux_quant.benchmarks.tune",
}


@pytest.mark.parametrize(("text", "expected"), TOLD.items(), ids=range(len(TOLD)))
def test_messages_keep_names_and_lose_folders(text: str, expected: str):
    assert places.told(text) == expected and places.told(expected) == expected


def test_a_home_with_a_space_in_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/Users/Ann Lee")
    monkeypatch.setenv("USERPROFILE", "/Users/Ann Lee")
    assert places.told("/Users/Ann Lee/models/x.gguf is short") == "x.gguf is short"


COMMANDS = {
    "bench step -o /scratch/ann --threads 2": "flux-quant bench step --threads 2",
    "bench -o/scratch/ann --output=/scratch/b --output c step": "flux-quant bench step",
    "bench -m /models/ann/flux.gguf": "flux-quant bench -m flux.gguf",
    "bench --model=/models/ann/flux.gguf --quick": "flux-quant bench --model flux.gguf --quick",
    "bench -m/models/ann/flux.gguf -o": "flux-quant bench -m flux.gguf",
    "bench --model ../../elsewhere/ann/x.gguf": "flux-quant bench --model x.gguf",
    f"bench -m {places.ROOT}/setup.py": "flux-quant bench -m setup.py",
    f"bench -m {places.ROOT}/docs/x.md": "flux-quant bench -m docs/x.md",
}


@pytest.mark.parametrize(("given", "kept"), COMMANDS.items())
def test_commands_leave_out_where_output_goes(given: str, kept: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(places.ROOT)
    assert places.command(given.split()) == kept


def test_words_of_a_command_stay_together():
    given = ["bench", "--note", "beside /home/ann/train.py on two cores"]
    assert places.command(given) == "flux-quant bench --note 'beside train.py on two cores'"


def test_nothing_of_a_session_names_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The model's folder, the results' and python's, in the command, the weights, the rows and what failed."""
    model = tmp_path / "ann lee" / "flux.gguf"
    model.parent.mkdir()
    model.write_bytes(b"weights")
    told = {"device": "CPU x", "date": "2026-01-02T03:04:05+00:00", "environment": {"TORCH_HOME": "~/ann/hub"}}
    monkeypatch.setattr(session.limits, "measure", lambda *_: {})
    monkeypatch.setattr(session, "fingerprint", lambda: dict(told))
    monkeypatch.setattr(sys, "argv", ["x", "bench", "it", "-m", str(model), "-o", str(tmp_path / "out")])

    def fails() -> Row:
        raise UserError(f"{model.parent.parent} has no room; /opt/ann/bin/python3 ended")

    suite = Suite("it", "", lambda asked: [Case({"n": 1}, fails)])
    ((run, path),) = session.Session(Asked(model=model), tmp_path / "out", 60.0).run([suite])
    text = path.read_text()
    assert str(tmp_path) not in text and "ann" not in text
    found = read_run(path)
    assert found.command == "flux-quant bench it -m flux.gguf" and found.weights["name"] == "flux.gguf"
    assert found.rows[0].rerun == "flux-quant bench it --model flux.gguf"
    assert found.rows[0].note == f"UserError: {tmp_path.name} has no room; python3 ended"


def test_results_of_scripts_lose_folders_too(tmp_path: Path):
    path = machine.write_result("it", {"skipped": [{"why": "/home/ann/x.so is missing"}]}, tmp_path, {"date": "2026"})
    assert json.loads(path.read_text())["skipped"] == [{"why": "x.so is missing"}]


def test_no_committed_result_names_a_folder():
    paths = list(machine.RESULTS.rglob("*.json"))
    assert len(paths) > 5
    for path in paths:
        content = json.loads(path.read_text())
        assert places.cleaned(content) == content, path
