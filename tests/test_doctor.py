"""What `flux-quant doctor` and `flux-quant plan` say, on any machine; and what they refuse, in one line."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux_quant.cli import main
from flux_quant.components import BUNDLED, find_components
from flux_quant.planner import doctor, rates, surroundings
from flux_quant.planner.doctor import GpuReport, diagnose, machine_of
from flux_quant.planner.rates import Effort
from given_files import alimama

BRIEF = Effort(seconds=0.001, cpu_side=64, copy_bytes=1 << 20, disk_bytes=1 << 20)
CARD = GpuReport(
    name="A card",
    capability=(8, 9),
    total=8 << 30,
    free=7 << 30,
    driver=None,
    triton="works",
    pinned=12e9,
    pageable=6e9,
    device_copy=250e9,
    flops={"fp16": 30e12, "bf16": 30e12, "fp8": 60e12},
    attention=20e12,
)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FLUX_QUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path, tiny_flux_file) -> Path:
    return Path(shutil.copy(tiny_flux_file, tmp_path / "flux.safetensors"))


def test_measured_once(tmp_path, no_gpu, monkeypatch):
    """The second time nothing is measured but memory; a damaged file, or an older one, is measured again."""
    report = diagnose(tmp_path, effort=BRIEF)
    assert report.gpu is None and machine_of(report) is None and "no CUDA GPU" in report.missing[0]
    assert all(rate > 0 for rate in report.cpu_flops.values()) and set(report.cpu_flops) == {"fp32", "bf16"}
    assert 0 < report.ram_free <= report.ram and report.ram_pinned <= report.ram
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("machine-cpu-") and kept.suffix == ".json"
    changed = json.loads(kept.read_text()) | {"cpu_flops": {"fp32": 1.0, "bf16": 2.0}, "ram_free": -1}
    kept.write_text(json.dumps(changed))
    again = diagnose(tmp_path, effort=BRIEF)
    assert again.cpu_flops == {"fp32": 1.0, "bf16": 2.0} and again.ram_free > 0
    assert diagnose(tmp_path, refresh=True, effort=BRIEF).cpu_flops != again.cpu_flops
    for damage in ("{", "[]", json.dumps({"gpu": None, "missing": []}), json.dumps(changed | {"new": 1})):
        kept.write_text(damage)
        assert diagnose(tmp_path, effort=BRIEF).cpu_flops != again.cpu_flops


def test_a_folder_that_cannot_be_written(tmp_path, no_gpu):
    """The report is made all the same, and says what it could not do."""
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept"):
        report = diagnose(tmp_path / "file" / "below", effort=BRIEF)
    assert report.disk is None and any("drive: not measured" in line for line in report.missing)


def test_drive(tmp_path):
    """A plausible rate, or the reason for none; nothing is left behind."""
    rate, why = rates.disk_rate(tmp_path / "new", BRIEF)
    assert (rate is None) == bool(why) and (rate is None or 1e5 < rate <= rates.IMPLAUSIBLE)
    assert not list((tmp_path / "new").iterdir())
    full, why = rates.disk_rate(tmp_path, replace(BRIEF, disk_bytes=1 << 60))
    assert full is None and "nearly full" in why[0] and not list(tmp_path.glob("*.tmp"))


def test_medians():
    times = iter([9.0, 0.0, 1.0, 1.0, 4.0, 4.0, 6.0, 9.0, 9.0])
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates.time, "perf_counter", lambda: next(times))
        next(times)
        assert rates.seconds_of(lambda: calls.append(1), 4.0) == 2.0
    assert len(calls) == 4, "one that does not count, and three"


def test_a_measured_machine_and_what_it_lacks():
    report = replace(diagnosed_without_gpu(), gpu=CARD, disk=None)
    machine = machine_of(report)
    assert (machine.dtype, machine.usable, machine.pinned, machine.triton) == ("bf16", 7 << 30, 12e9, True)
    assert machine.disk == doctor.DISK and machine.cpu == report.cpu_flops["fp32"] and "measured" in machine.source
    rows = dict(doctor.lines_of(report))
    assert rows["from pinned RAM"] == "12.0 GB/s" and rows["GPU, fp8"] == "60.0 TFLOP/s" and "8.9" in rows["GPU"]
    old = replace(CARD, triton="compute capability 6.1, Triton kernels need 7.0", flops={"fp32": 6e12})
    assert not machine_of(replace(report, gpu=old)).triton and machine_of(replace(report, gpu=old)).dtype == "fp32"
    lines = doctor.lacking(old)
    assert "6.1" in lines[0] and "bfloat16" in lines[1] and not doctor.lacking(CARD)


def diagnosed_without_gpu() -> doctor.Report:
    words = dict(system="s", processor="p", python="3", torch="2", date="2026-01-01")
    numbers = dict(cores=4, threads=4, ram=16 << 30, ram_free=8 << 30, ram_pinned=4 << 30, disk=1e9)
    return doctor.Report(**words, **numbers, cpu_flops={"fp32": 1e11}, gpu=None, missing=())


def test_rates_of_a_gpu_tried_on_the_processor(monkeypatch):
    """The same code on tensors of the processor: every product that this torch has, and every copy."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name, value in dict(M=64, K=64, N=128, FLUX_TOKENS=32).items():
        monkeypatch.setattr(rates, name, value)
    cpu = torch.device("cpu")
    found = rates.gpu_rates(cpu, (8, 9), BRIEF)
    assert {"fp16", "bf16"} <= set(found) <= {"fp16", "bf16", "int8", "fp8"} and min(found.values()) > 0
    assert set(rates.gpu_rates(cpu, (6, 1), BRIEF)) == {"fp32"}
    assert set(rates.copy_rates(cpu, BRIEF)) == {"pinned", "pageable", "device"}
    assert rates.attention_rate(cpu, (6, 1), BRIEF) > 0 and "cpu" in doctor.triton_state(cpu)


@pytest.mark.gpu
def test_rates_of_a_gpu(tmp_path):
    report = diagnose(tmp_path, effort=replace(BRIEF, seconds=0.02, copy_bytes=64 << 20))
    gpu, machine = report.gpu, machine_of(report)
    numbers = [gpu.pinned, gpu.pageable, gpu.device_copy, gpu.attention, *gpu.flops.values()]
    assert all(math.isfinite(n) and n > 1e8 for n in numbers) and gpu.device_copy > gpu.pinned
    assert gpu.free <= gpu.total and machine.dtype in gpu.flops and gpu.triton
    assert read_back(tmp_path).gpu.flops == gpu.flops


def read_back(folder: Path) -> doctor.Report:
    return diagnose(folder, effort=BRIEF)


# --- On the command line ----------------------------------------------------------------------------------------------


def test_doctor_verb(cache, no_gpu, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "Effort", lambda: BRIEF)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "processor, fp32" in out and "missing: no CUDA GPU" in out and str(cache) in out and "measuring" in err
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["gpu"] is None and not err, "measured before"


def test_plan_verb(model, no_gpu, capsys):
    assert main(["plan", str(model), "--gpu", "rtx-4060-8gb", "--ram", "16GB", "--size", "512x768"]) == 0
    out, err = capsys.readouterr()
    for part in (
        "512 x 768",
        "predicted",
        "2 double",
        "3 single",
        "RTX 4060",
        "CUDA context",
        "decode",
        "s a step",
        "T5",
    ):
        assert part in out
    lines = [line for line in out.splitlines() if not line.startswith(("-", str(model)))]
    assert not err and "\x1b" not in out and max(map(len, lines)) <= 100


def test_plan_verb_as_json(model, no_gpu, capsys):
    """The small model in a budget that holds its working memory and some of its blocks."""
    options = ["--vram", "720MB", "--batch", "2", "--negative", "--json", "--size", "256"]
    assert main(["plan", str(model), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] and found["peak_bytes"] <= found["budget"]["nbytes"] == 720_000_000
    assert found["work"]["passes"] == 2
    assert [phase["name"] for phase in found["phases"]] == ["text", "modulation", "denoise", "decode"]
    assert all(phase["peak_bytes"] == sum(phase["parts"].values()) for phase in found["phases"])
    assert any("RTX 3060" in reason for reason in found["reasons"]), "whose rates were taken"


def test_plan_with_what_lies_beside(model, tmp_path, no_gpu, capsys):
    """Factors of a LoRA count in their blocks in the dtype of the activations; a net by its bytes and its time."""
    net, lora = tmp_path / "net.safetensors", tmp_path / "lora.safetensors"
    save_file(alimama().state_dict(), net)
    file, width = find_components(BUNDLED).transformer, 256
    key = "lora_unet_double_blocks_1_img_attn_proj"
    factors = {"lora_down": torch.zeros(24, width), "lora_up": torch.zeros(width, 24)}
    save_file({f"{key}.{name}.weight": factor for name, factor in factors.items()}, lora)
    made = []
    for more in ([], ["--lora", str(lora)], ["--controlnet", str(net)]):
        assert main(["plan", str(file), "--gpu", "3060", "--size", "256", "--json", *more]) == 0
        made.append(json.loads(capsys.readouterr().out))
    plain, adapted, controlled = made
    assert adapted["resident_bytes"] - plain["resident_bytes"] == 2 * 2 * 24 * width
    assert adapted["step_seconds"] > plain["step_seconds"]
    assert controlled["work"]["controlnets"] > 0 and controlled["step_seconds"] > 1.2 * plain["step_seconds"]


def test_plan_for_this_machine(model, cache, monkeypatch, capsys):
    """With a card of its own: free memory less a reserve, rates as measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(surroundings, "diagnose", lambda: replace(diagnosed_without_gpu(), gpu=CARD))
    assert main(["plan", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["budget"]["nbytes"] == (7 << 30) - 500_000_000 and found["machine"]["name"] == "A card"
    assert main(["plan", str(model), "--vram", "20GB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"]["nbytes"] == 7 << 30, "no more than is free"


MISTAKES = {
    "nothing to plan for": ([], "--gpu"),
    "an unknown card": (["--gpu", "rtx 9999"], "not in the table"),
    "two cards": (["--gpu", "5060 ti"], "rtx-5060-ti-16gb"),
    "no unit": (["--vram", "8"], "8GB"),
    "RAM without a unit": (["--gpu", "3060", "--ram", "lots"], "RAM 'lots'"),
    "too little": (["--vram", "300MB"], "at least"),
    "an odd size": (["--gpu", "3060", "--size", "1000x1000"], "multiples of 16"),
    "no size": (["--gpu", "3060", "--size", "big"], "WIDTHxHEIGHT"),
    "no pictures": (["--gpu", "3060", "--batch", "0"], "batch 0"),
    "another dtype": (["--gpu", "3060", "--compute", "int4"], "float, int8, fp8"),
    "a product the card lacks": (["--gpu", "3060", "--compute", "fp8"], "no fp8"),
    "no such LoRA": (["--gpu", "3060", "--lora", "/nowhere/lora.safetensors"], "/nowhere/lora.safetensors"),
}


@pytest.mark.parametrize(("options", "part"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(model, no_gpu, capsys, options, part):
    assert main(["plan", str(model), *options]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and part in err and err.count("\n") == 1


def test_not_a_transformer(tmp_path, no_gpu, tiny_flux_file, capsys):
    assert main(["plan", str(tmp_path / "none.gguf"), "--gpu", "3060"]) == 2
    assert "none.gguf" in capsys.readouterr().err
    assert main(["plan", str(tiny_flux_file), "--gpu", "3060", "--t5", str(tiny_flux_file)]) == 2
    assert "T5 encoder is needed here" in capsys.readouterr().err
