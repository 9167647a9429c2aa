"""What is told of a machine: nvidia-smi's words, NVML, memory at its peak, limits; results of scripts read as runs."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flux_quant.benchmarks import machine
from flux_quant.benchmarks.bench import limits, memory, nvidia, nvml
from flux_quant.benchmarks.bench.earlier import load
from flux_quant.benchmarks.bench.record import EMULATED, SKIPPED, Run, read_run, write_run
from flux_quant.errors import UserError

ANSWER = (
    "580.95.05, 00000000:01:00.0, 1, 170.00, 168.42, 1777, 2130, 7300, 63, 0x0000000000000004, 4, 4, 8, 16, Disabled\n"
)
MEMORY = """
==============NVSMI LOG==============
GPU 00000000:01:00.0
    FB Memory Usage
        Total                             : 12288 MiB
        Reserved                          : 233 MiB
        Used                              : 1 MiB
    BAR1 Memory Usage
        Total                             : {bar} MiB
        Used                              : 3 MiB
"""


def asked(refuses: tuple[str, ...] = (), answer: str = ANSWER, bar: int = 16384):
    """nvidia-smi of a driver that does not know some fields."""

    def run(arguments):
        if arguments[0] == "-q":
            return 0, MEMORY.format(bar=bar)
        fields = arguments[0].partition("=")[2].split(",")
        for field in fields:
            if field in refuses:
                return 2, f'Field "{field}" is not a valid field to query.\n'
        cells = dict(zip(nvidia.FIELDS, answer.strip().split(", "), strict=True))
        return 0, ", ".join(cells[field] for field in fields) + "\n"

    return run


def test_a_card_is_told_as_it_is_under_load():
    found = nvidia.query(asked())
    assert found == {
        "driver": "580.95.05",
        "pci": "00000000:01:00.0",
        "vram_used_mib": 1,
        "power_limit_w": 170.0,
        "power_w": 168.42,
        "clock_mhz": 1777,
        "clock_max_mhz": 2130,
        "memory_clock_mhz": 7300,
        "temperature_c": 63,
        "throttled_by": "power cap",
        "pcie_generation": 4,
        "pcie_generation_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "display": False,
        "resizable_bar": True,
    }


def test_fields_that_a_driver_does_not_know_are_none():
    found = nvidia.query(asked(refuses=("display_active", "clocks_throttle_reasons.active"), bar=256))
    assert found["display"] is None and found["throttled_by"] is None
    assert found["pcie_width"] == 8 and found["resizable_bar"] is False


def test_values_that_a_card_does_not_tell_are_none():
    found = nvidia.query(asked(answer=ANSWER.replace("170.00", "[N/A]").replace("Disabled", "[Not Supported]")))
    assert found["power_limit_w"] is None and found["display"] is None


@pytest.mark.parametrize("answer", [(127, ""), (9, "No devices were found"), (0, ""), (0, "one, two\n")])
def test_without_a_card_nothing_is_told(answer):
    found = nvidia.query(lambda _: answer)
    assert set(found) == {*(name for name, _ in nvidia.FIELDS.values()), "resizable_bar"} and not any(found.values())


REASONS = {"0x0": "none", "0x1": "idle", "0x84": "power cap, power brake", "0x1004": "power cap, 0x1000", "[N/A]": None}


@pytest.mark.parametrize(("mask", "names"), REASONS.items())
def test_reasons_have_names(mask: str, names: str | None):
    assert nvidia.mask(mask) == names


def fake_nvml(processes: list[SimpleNamespace], joules: list[int]) -> ModuleType:
    library = ModuleType("pynvml")
    library.NVMLError = type("NVMLError", (Exception,), {})
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    library.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=7 * 10**9)
    library.nvmlDeviceGetComputeRunningProcesses = lambda handle: processes

    def energy(handle: object) -> int:
        if not joules:
            raise library.NVMLError("not supported")
        return joules.pop(0)

    library.nvmlDeviceGetTotalEnergyConsumption = energy
    return library


def test_nvml_tells_energy_and_memory(monkeypatch: pytest.MonkeyPatch):
    import os

    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=5 * 10**9)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([SimpleNamespace(pid=0, usedGpuMemory=1), mine], [12_500]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="abc"))
    card = nvml.Card.open()
    assert card.handle == b"GPU-abc" and card.device_bytes() == 7 * 10**9 and card.process_bytes() == 5 * 10**9
    assert card.joules() == 12.5 and card.joules() is None, "cards before Volta do not count"
    mine.usedGpuMemory = None
    assert card.process_bytes() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.Card.open() is None


def test_memory_at_its_peak_is_seen():
    with memory.watched("cpu") as before:
        pass
    with memory.watched("cpu") as peaks:
        torch.ones(60_000_000, dtype=torch.uint8)
    assert peaks.joules is None and set(peaks.memory) == {"host_rss"}
    assert peaks.memory["host_rss"] >= before.memory["host_rss"]
    if memory.forget_peak():
        assert 55e6 < peaks.memory["host_rss"] - before.memory["host_rss"] < 200e6


def test_memory_is_looked_at_where_the_system_forgets_no_peak(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "forget_peak", lambda: False)
    with memory.watched("cpu") as peaks:
        block = torch.ones(1000)
    assert peaks.memory["host_rss"] > block.nbytes
    monkeypatch.setattr(memory, "status", lambda *_: None)
    with memory.watched("cpu") as peaks:
        pass
    assert peaks.memory["host_rss"] > 0, "of the process since it began"


def test_status_is_read():
    text = "Name:\tpython\nVmHWM:\t  1234 kB\nRssAnon:\t 5 kB\n"
    assert memory.status("VmHWM", text) == 1234 * 1024 and memory.status("VmRSS", text) is None


def test_a_machine_is_measured_without_a_gpu(tmp_path: Path):
    found = limits.measure(torch.device("cpu"), tmp_path, quick=True)
    assert found["ram_copy_gb_per_s"] > 0 and set(found["cpu_tflop_per_s"]) == {"fp32", "bf16"}
    assert found["disk_read_gb_per_s"] or found["not_measured"]
    assert "posix_fadvise" in found["disk_how"] and not list(tmp_path.iterdir())
    assert json.dumps(found) and limits.under_load(torch.device("cpu")) == {}


def test_a_fingerprint_says_what_decides(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLUX_QUANT_SOMETHING", "7")
    found = machine.fingerprint()
    assert found["environment"]["FLUX_QUANT_SOMETHING"] == "7" and found["torch"] == torch.__version__
    assert {"processor", "cores", "ram_gb", "gguf", "diffusers", "transformers", "triton", "commit"} <= set(found)
    assert found["dirty"] in (True, False, None) and json.dumps(found)
    assert machine.instructions("flags\t\t: fpu avx2 amx_bf16\n") == ["avx2", "amx_bf16"]
    assert machine.instructions("no such line") == []


def test_results_lie_by_machine_and_date(tmp_path: Path):
    told = {"date": "2026-01-02T03:04:05+00:00"}
    first = machine.write_result("it", {"rows": []}, tmp_path, told)
    assert first == tmp_path / machine.slug(machine.device_name()) / "2026-01-02-it.json"
    later = machine.write_result("it", {"rows": []}, tmp_path, {"date": "2026-02-01T00:00:00+00:00"})
    machine.write_result("it-too", {"rows": []}, tmp_path, {"date": "2026-03-01T00:00:00+00:00"})
    assert machine.newest_result("it", tmp_path) == later and machine.newest_result("other", tmp_path) is None
    assert [machine.suite_in(path) for path in (first, tmp_path / "demo.json")] == ["it", ""]


def test_results_of_scripts_and_of_bench_leave_each_other_alone(tmp_path: Path):
    """Both have suites named kernels and step; `aims` looks for the script's."""
    told = {"date": "2026-01-02T03:04:05+00:00"}
    script = machine.write_result("it", {"rows": [1]}, tmp_path, told)
    newer = script.with_name("2026-01-03-it.json")
    write_run(Run("it", "", told["date"], {}, told), newer)
    assert machine.newest_result("it", tmp_path) == script
    for rows in ([2], [2, 3]):  # as a journal does, which writes one file again and again
        later = machine.write_result("it", {"rows": rows}, tmp_path, {"date": "2026-01-03T09:00:00+00:00"})
    assert later.name == "2026-01-03T090000-it.json" and read_run(newer).rows == []
    assert machine.newest_result("it", tmp_path) == later and json.loads(later.read_text())["rows"] == [2, 3]
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_results_of_scripts_are_read_as_runs(tmp_path: Path):
    path = tmp_path / "it.json"
    step = {"what": "step", "format": "q8_0", "size": 512, "vram": "8GB", "seconds": 2.0, "samples": [9.0, 2.0, 2.5]}
    step |= {"warm": 1, "compute": 1.0, "copies": 1.5, "peak": 7 * 10**9, "stall": 0.1, "predicted": {"seconds": 1.9}}
    kernel = {"format": "q4_k", "n": 8, "us": 5.0, "dense": {"us": 3.0, "p20": 1, "p80": 4}, "of_dense": 0.6}
    skipped = {"what": "step", "format": "bf16", "why": "no room"}
    content = {"suite": "streaming", "machine": told(), "rows": [step], "linear": [kernel], "skipped": [skipped]}
    path.write_text(json.dumps(content))
    run = load(path)
    streamed, product, missing = run.rows
    assert run.suite == "step" and run.weights["name"] == "streaming" and run.date == told()["date"]
    assert streamed.status == EMULATED and streamed.samples["seconds"] == [2.0, 2.5]
    assert streamed.what == {"part": "rows", "what": "step", "format": "q8_0", "size": 512, "vram": 8 * 10**9}
    assert streamed.expected == {"predicted_seconds": 1.9, "bound_seconds": 1.5, "bound_by": "copies"}
    assert streamed.memory == {"process": 7 * 10**9} and streamed.values["stall"] == 0.1
    assert product.samples == {"seconds": [5e-6], "dense_seconds": [3e-6]} and product.values["of_dense"] == 0.6
    assert (missing.status, missing.note) == (SKIPPED, "no room")


def told() -> dict:
    return {"device": "x", "date": "2026-01-02T03:04:05+00:00"}


def test_every_committed_result_is_read():
    paths = list(machine.RESULTS.glob("*/*.json"))
    assert paths
    for path in paths:
        run = load(path)
        assert run.rows and run.machine["device"], path
        assert len({row.key for row in run.rows}) == len(run.rows), path


@pytest.mark.parametrize("content", ["{", "[]", '{"suite": "x"}', '{"schema": 9, "suite": "x", "machine": {}}'])
def test_what_is_no_result_is_refused(content: str, tmp_path: Path):
    path = tmp_path / "it.json"
    path.write_text(content)
    with pytest.raises(UserError, match="it.json"):
        load(path)
