"""The verbs as a user meets them: output, exit codes, and one line for every mistake."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_quant.cli import main
from flux_quant.converters import output


@pytest.fixture
def model(tmp_path, tiny_flux_file) -> Path:
    return Path(shutil.copy(tiny_flux_file, tmp_path / "flux.safetensors"))


def listing(folder: Path) -> list[tuple[str, int]]:
    """Everything below a folder with sizes and times: what a failing command must not change."""
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_inspect_a_file(model, capsys):
    assert main(["inspect", str(model)]) == 0
    out, err = capsys.readouterr()
    for part in ("FLUX.1 dev, BFL names, safetensors", "92 tensors, 8,228,416 parameters", "3 x single_blocks", "bf16"):
        assert part in out
    assert not err and max(map(len, out.splitlines())) <= 120 and "\x1b" not in out


def test_inspect_json(model, capsys):
    assert main(["inspect", str(model), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["family"], summary["container"], summary["tensors"]) == ("FLUX.1 dev", "safetensors", 92)
    assert summary["components"] == [{"prefix": "", "name": "FLUX.1", "variant": "dev", "naming": "BFL"}]
    assert summary["formats"]["bf16"] == {"tensors": 92, "parameters": 8228416, "bytes": 2 * 8228416}
    assert sum(summary["blocks"].values()) == 2 * 8228416 and summary["bytes"] == model.stat().st_size
    assert set(summary["blocks"]) == {"outside blocks"} | {f"double_blocks.{i}" for i in range(2)} | {
        f"single_blocks.{i}" for i in range(3)
    }


def test_inspect_a_directory(model, tmp_path, capsys):
    """Also nested; a damaged file is named, and the others are listed all the same."""
    (tmp_path / "loras").mkdir()
    save_file({"lora_up.weight": torch.ones(2, 2)}, tmp_path / "loras" / "lora.safetensors")
    assert main(["inspect", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "flux.safetensors" in out and "loras/lora.safetensors" in out and "unknown" in out and not err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03")
    assert main(["inspect", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "flux.safetensors" in out and "bad.gguf" in err and err.count("\n") == 1
    assert main(["inspect", str(tmp_path), "--json"]) == 2
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_convert(model, tmp_path, capsys):
    target = tmp_path / "out.gguf"
    assert main(["convert", str(model), "-o", str(target), "--format", "q8_0", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "q8_0" in out and "8.50" in out and "exact" in out and "verified" in out and not err
    assert main(["convert", str(target), "-o", str(tmp_path / "b.gguf"), "--format", "q4_0"]) == 0
    assert capsys.readouterr().err.startswith("warning: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.gguf", "flux.safetensors", "out.gguf"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_verify_and_diff(model, tmp_path, capsys):
    """Exit codes 0 and 1; a damaged byte is found by its checksum and named."""
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    for target, format_name in ((a, "q8_0"), (b, "q4_k_m")):
        assert main(["convert", str(model), "-o", str(target), "-f", format_name, "--checksums"]) == 0
    capsys.readouterr()
    assert main(["verify", str(a), "--against", str(model)]) == 0
    out, _ = capsys.readouterr()
    assert "FLUX.1 dev" in out and "92 checksums are right" in out and "45." in out and "no problems" in out
    assert main(["diff", str(a), str(a)]) == 0
    assert "exact" in (said := capsys.readouterr().out) and said.endswith("the same tensors and metadata\n")
    assert main(["diff", str(a), str(b)]) == 1
    assert "q5_k" in (said := capsys.readouterr().out) and said.endswith("the files differ\n")
    assert main(["diff", str(a), str(b), "--json"]) == 1 and json.loads(capsys.readouterr().out)
    data = bytearray(a.read_bytes())
    data[-100] ^= 1
    a.write_bytes(data)
    assert main(["verify", str(a), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "final_layer" in problem and "SHA-256" in problem


def test_split_and_merge(model, tmp_path, capsys):
    merged, parts = tmp_path / "all.safetensors", tmp_path / "parts"
    assert main(["merge-components", str(model), "-o", str(merged)]) == 0
    assert main(["split", str(merged), "-o", str(parts)]) == 0
    assert "FLUX.1, 92 tensors" in capsys.readouterr().out
    assert main(["diff", str(model), str(parts / "transformer.safetensors")]) == 0


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_dry_run_writes_nothing(model, tmp_path, capsys):
    before = listing(tmp_path)
    assert main(["convert", str(model), "-o", str(tmp_path / "out.gguf"), "--format", "q4_0", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "double_blocks.*.img_mlp.0.weight" in out and "nothing was written" in out and listing(tmp_path) == before


def test_force_replaces(model, tmp_path):
    target = tmp_path / "out.gguf"
    target.write_text("old")
    assert main(["convert", str(model), "-o", str(target), "--format", "q4_0", "--force"]) == 0
    assert target.read_bytes()[:4] == b"GGUF"


def truncate(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def absurd_header(folder: Path) -> None:
    path = folder / "flux.safetensors"
    path.write_bytes(b"\xff" * 6 + b"\0\0" + path.read_bytes()[8:])


def truncated_gguf(folder: Path) -> None:
    assert main(["convert", str(folder / "flux.safetensors"), "-o", str(folder / "x.gguf"), "--format", "q4_0"]) == 0
    truncate(folder / "x.gguf", 1_000_000)


def vae(folder: Path) -> None:
    names = ("encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight")
    save_file({name: torch.ones(4, 3, 3, 3) for name in names}, folder / "vae.safetensors")


def t5(folder: Path) -> None:
    name = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    save_file({name: torch.ones(32, 32)}, folder / "t5.safetensors")


def lora(folder: Path) -> None:
    save_file({"lora.up": torch.ones(32, 32)}, folder / "lora.safetensors")


def directory(folder: Path) -> None:
    (folder / "out.gguf").mkdir()


def existing(folder: Path) -> None:
    (folder / "out.gguf").write_text("old")


def nothing(folder: Path) -> None:
    pass


CONVERT = "convert flux.safetensors -o out.gguf --format q8_0"
MISTAKES: dict[str, tuple[str, Callable[[Path], object], str]] = {  # command, preparation, what the line must say
    "missing file": ("convert nix.safetensors -o out.gguf --format q8_0", nothing, "nix.safetensors: No such file"),
    "missing file, inspect": ("inspect nix.gguf", nothing, "nix.gguf: No such file"),
    "empty directory as source": (
        "convert sub -o out.gguf --format q8_0",
        lambda d: (d / "sub").mkdir(),
        "sub holds no",
    ),
    "empty file": ("inspect empty.safetensors", lambda d: (d / "empty.safetensors").touch(), "is empty"),
    "empty directory": ("inspect sub", lambda d: (d / "sub").mkdir(), "holds no .safetensors or .gguf file"),
    "not a checkpoint": ("inspect a.txt", lambda d: (d / "a.txt").write_text("hello world"), "neither safetensors"),
    "header cut": (CONVERT, lambda d: truncate(d / "flux.safetensors", 1000), "truncated"),
    "data cut": (CONVERT, lambda d: truncate(d / "flux.safetensors", 5_000_000), "truncated"),
    "absurd header": (CONVERT, absurd_header, "absurd"),
    "truncated GGUF": ("convert x.gguf -o out.gguf --format q4_0", truncated_gguf, "truncated"),
    "VAE": ("convert vae.safetensors -o out.gguf --format q8_0", vae, "a VAE is not written as .gguf"),
    "T5": ("convert t5.safetensors -o out.gguf --format q8_0", t5, "not a T5 v1.1 encoder"),
    "LoRA": ("convert lora.safetensors -o out.gguf --format q8_0", lora, "no model that is known"),
    "unknown format": ("convert flux.safetensors -o out.gguf --format q9", nothing, "unknown format q9; choose one of"),
    "container": ("convert flux.safetensors -o out.safetensors --format q8_0", nothing, "stored in a .gguf file"),
    "output exists": (CONVERT, existing, "exists; use --force"),
    "output is a directory": (CONVERT + " --force", directory, "is a directory"),
    "output is the input": (
        "convert flux.safetensors -o flux.safetensors --format fp8",
        nothing,
        "exists; use --force",
    ),
    "no such directory": ("convert flux.safetensors -o a/b.gguf --format q8_0", nothing, "does not exist"),
    "output is a device": ("convert flux.safetensors -o /dev/null --format q8_0 --force", nothing, "/dev/null"),
    "unknown option": (CONVERT + " --fast", nothing, "No such option: --fast"),
    "unknown verb": ("quantize flux.safetensors", nothing, "No such command 'quantize'"),
    "option missing": ("convert flux.safetensors -o out.gguf", nothing, "Missing option '--format'"),
    "no row": (CONVERT + " --set img_in", nothing, "should be GLOB=FORMAT"),
    "row without tensors": (CONVERT + " --keep nothing.*", nothing, "no tensor matches nothing.*"),
    "recipe missing": (CONVERT + " --recipe nix.txt", nothing, "nix.txt: No such file"),
    "LoRA missing": (CONVERT + " --lora nix.safetensors:0.5", nothing, "nix.safetensors: No such file"),
    "imatrix missing": (CONVERT + " --imatrix nix.dat", nothing, "nix.dat: No such file"),
    "unknown search": (CONVERT + " --search slow", nothing, "choose full or none"),
    "two ways to split": (CONVERT + " --shard-size 1MB --shard-by block", nothing, "exclude each other"),
    "no size": (CONVERT + " --shard-size big", nothing, "big is no size"),
    "unknown device": (CONVERT + " --device abacus", nothing, "device abacus"),
    "unknown component": (CONVERT + " --components vae", nothing, "holds no vae"),
    "nothing to split": (
        "split a.txt -o parts",
        lambda d: (d / "a.txt").write_text("hello world"),
        "neither safetensors",
    ),
    "merge twice": ("merge-components flux.safetensors flux.safetensors -o x.safetensors", nothing, "both hold"),
    "verify nothing": ("verify nix.gguf", nothing, "nix.gguf: No such file"),
    "no threads": (CONVERT + " --threads 0", nothing, "--threads"),
}


@pytest.mark.parametrize(("command", "prepare", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(model, tmp_path, monkeypatch, capsys, command, prepare, message):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    capsys.readouterr()
    check_failure(tmp_path, capsys, command.split(), message)


def check_failure(folder: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    before = listing(folder)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not out and listing(folder) == before


def test_no_space(model, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5, 5))
    arguments = ["convert", str(model), "-o", str(tmp_path / "out.gguf"), "--format", "q8_0"]
    check_failure(tmp_path, capsys, arguments, "no space for")


def test_unwritable_directory(model, tmp_path, monkeypatch, capsys):
    """Permissions do not stop root, so the answer of the system is replaced; then the refusal itself."""
    arguments = ["convert", str(model), "-o", str(tmp_path / "out.gguf"), "--format", "q8_0"]
    with monkeypatch.context() as patch:
        patch.setattr(output.os, "access", lambda _, mode: mode == os.R_OK)
        check_failure(tmp_path, capsys, arguments, "no permission to write")

    def refuse(path: Path, *_: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(output.os, "open", refuse)
    check_failure(tmp_path, capsys, arguments, "Permission denied")


def test_disk_fills_up(model, tmp_path, start):
    """A limit on the size of files stands for a full disk: the system refuses in the middle of the work."""
    target = tmp_path / "out.gguf"
    target.write_text("old")
    before = listing(tmp_path)
    command = ["-m", "flux_quant.cli", "convert", str(model), "-o", str(target), "--format", "q8_0", "--force"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))  # noqa: E731
    process = start(*command, preexec_fn=limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and not out and listing(tmp_path) == before
    assert err.startswith("error: cannot write") and "File too large" in err and err.count("\n") == 1


SLOW = """
import signal, sys, time
import flux_quant.converters.convert as convert
from flux_quant.cli import main

def check(*_):
    print("middle", flush=True)
    time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from programs in the background
convert.{function} = check
sys.exit(main(sys.argv[1:]))
"""
SIGNALS = [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]


@pytest.mark.parametrize("function", ["check_numbers", "compare"])
@pytest.mark.parametrize(("number", "code", "message"), SIGNALS, ids=["SIGINT", "SIGTERM"])
def test_stopped_in_the_middle(model, tmp_path, start, function, number, code, message):
    target = tmp_path / "out.gguf"
    target.write_text("old")
    before = listing(tmp_path)
    arguments = ["convert", str(model), "-o", str(target), "--format", "q8_0", "--force"]
    process = start("-c", SLOW.format(function=function), *arguments)
    assert process.stdout.readline() == "middle\n"
    assert len(listing(tmp_path)) == len(before) + 1, "the temporary file is there while the work goes on"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "", message)
    assert listing(tmp_path) == before


def test_import_costs_nothing():
    code = "import sys, flux_quant.cli; print([m for m in ('torch', 'gguf', 'numpy', 'rich') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flux-quant"])
    assert main() == 0 and main(["--help"]) == 0 and main(["convert", "--help"]) == 0
    out, err = capsys.readouterr()
    assert "inspect" in out and "--dry-run" in out and not err
