"""Conversions that are interrupted, resumed, written over their source, or run on other numbers of threads."""

import signal
from pathlib import Path

import pytest
from safetensors.torch import save_file

from flux_quant.converters import convert as convert_module
from flux_quant.converters import writer
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import Result, run
from flux_quant.converters.plan import make_plan
from flux_quant.converters.shards import Sharding
from flux_quant.converters.verify import verify


def convert(source: Path, target: Path, format_name: str, **options: object) -> Result:
    return run(make_plan(Conversion(source, target, format_name, **options)))


SLOW = """
import sys, time
from pathlib import Path
import flux_quant.converters.writer as writer
from flux_quant.converters.convert import run
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.plan import make_plan

writer.SYNC_BYTES = 1
write = writer.CheckpointWriter.write

def slowly(self, name, parts, note=None):
    write(self, name, parts, note)
    if len(self.pending) == 40:
        print("middle", flush=True)
        time.sleep(60)

writer.CheckpointWriter.write = slowly
run(make_plan(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), "q4_k_s", force=True, resume=True, checksums=True)))
"""


def test_killed_and_resumed(tmp_path, tiny_flux_file, start, monkeypatch):
    """kill -9 in the middle: the old file stays, the next run goes on, and the bytes are those of one run."""
    target = tmp_path / "out.gguf"
    target.write_text("old")
    process = start("-c", SLOW, str(tiny_flux_file), str(target))
    assert process.stdout.readline() == "middle\n", process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 3
    packed = []
    pack = convert_module.pack
    monkeypatch.setattr(convert_module, "pack", lambda *a, **k: packed.append(a[1].name) or pack(*a, **k))
    monkeypatch.setattr(convert_module, "verify", lambda *a: None)
    result = convert(tiny_flux_file, target, "q4_k_s", force=True, resume=True, checksums=True)
    assert result.resumed == result.total.tensors - len(packed) > 20 and len(packed) >= 40
    monkeypatch.undo()
    whole = convert(tiny_flux_file, tmp_path / "whole.gguf", "q4_k_s", checksums=True)
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert whole.total == result.total and sorted(p.name for p in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]
    assert verify(target).checksums == whole.total.tensors and not verify(target).problems


def test_other_options_do_not_resume(tmp_path, tiny_flux_file, monkeypatch):
    target = tmp_path / "out.gguf"
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)

    def stop(phase: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_plan(Conversion(tiny_flux_file, target, "q4_0", resume=True)), stop)
    assert len(list(tmp_path.iterdir())) == 2
    assert convert(tiny_flux_file, target, "q5_0", resume=True).resumed == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_the_same_path(tmp_path, tiny_flux):
    path = tmp_path / "model.safetensors"
    save_file(tiny_flux, path)
    convert(path, path, "fp8", force=True)
    with open_checkpoint(path) as reader:
        assert "fp8" in {info.format for info in reader.tensors.values()}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("format_name", ["q4_k_m", "q8_0", "fp8"])
def test_any_number_of_threads(tmp_path, tiny_flux_file, start, format_name):
    """The same bytes, in processes of their own because libraries fix their threads at the start."""
    suffix = ".safetensors" if format_name == "fp8" else ".gguf"
    contents = []
    for threads in ("1", "2"):
        target = tmp_path / f"{threads}{suffix}"
        arguments = ["convert", str(tiny_flux_file), "-o", str(target), "--format", format_name, "--threads", threads]
        process = start("-m", "flux_quant.cli", *arguments)
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        contents.append(target.read_bytes())
    assert contents[0] == contents[1]


def test_an_interrupted_folder(tmp_path, tiny_flux_file, monkeypatch):
    """It goes on, or makes room for other work; nothing of the other work stays in it."""
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)

    def stop(phase: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    target, options = tmp_path / "model", dict(folder=True, resume=True)
    small, large = Sharding(2_000_000), Sharding(5_000_000)
    with pytest.raises(KeyboardInterrupt):
        run(make_plan(Conversion(tiny_flux_file, target, "bf16", sharding=small, **options)), stop)
    assert [path.name for path in tmp_path.iterdir()] == [".model.part"]
    resumed = run(make_plan(Conversion(tiny_flux_file, target, "bf16", sharding=small, **options)))
    assert resumed.resumed and [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(KeyboardInterrupt):
        run(make_plan(Conversion(tiny_flux_file, target, "bf16", force=True, sharding=small, **options)), stop)
    result = run(make_plan(Conversion(tiny_flux_file, target, "f16", force=True, sharding=large, **options)))
    assert result.resumed == 0 and [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(list(target.iterdir())) == result.files + 2  # the index and config.json
