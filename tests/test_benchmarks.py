"""The benchmarks themselves: the chain they compare with is right, aims are judged, a dry run walks all parts."""

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from flux_quant.benchmarks import aims, eager, gpu, timing
from flux_quant.benchmarks.random_weights import random_parts
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, IN_MEMORY

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", eager.CHAINS)
def test_the_chain_of_torch_operations_is_the_format(name):
    fmt = FORMATS[name]
    (data,) = fmt.pack(torch.randn(7, 512))
    assert torch.equal(eager.unpack(fmt, data, torch.float32), fmt.unpack(data))
    halves = eager.unpack(fmt, data, torch.float16)
    assert (halves - fmt.unpack(data)).norm() < 2e-3 * fmt.unpack(data).norm()


@pytest.mark.parametrize(
    "fmt", [FORMATS["q4_k"], FORMATS["fp8"], FORMATS["bf16"], IN_MEMORY["fp8_rows"]], ids=lambda fmt: fmt.name
)
def test_random_weights_are_weights(fmt):
    parts = random_parts(fmt, (200, 512), CPU)
    weight = fmt.unpack(*parts)
    assert weight.shape == (200, 512) and 0.01 < weight.std() < 0.03
    assert len(weight.unique(dim=0)) > 30  # rows repeat, but not all the same


def test_contenders_take_turns_and_see_every_copy():
    calls = []
    contenders = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    times = timing.compare(contenders, 3, CPU, rounds=2)
    assert set(times) == {"a", "b"} and all(t.p20 <= t.median <= t.p80 for t in times.values())
    assert calls == [(name, i) for name in "baab" for i in range(3)]


def results(of_dense: float, of_copy: float) -> aims.Results:
    shape = {"format": "q4_k", "n": 18432, "k": 3072}
    rows = [dict(shape, m=m, of_dense=of_dense, gb_per_s=70.0) for m in (1, 512, 4608)]
    unpacking = [{"format": "q4_k", "of_copy": of_copy}, {"format": "q4_k", "of_copy": 0.1}]
    kernels = {"copy_gb_per_s": 100.0, "linear": rows, "unpacking": unpacking}
    products = {
        "rows": [{"way": f"int8 by {way}", "n": 1, "k": 2, "m": 4608, "of_dense": x} for way, x in WAYS.items()]
    }
    return {"kernels": kernels, "products8": products, "step": {"rows": [{"format": "q8_0", "of_bf16": 1.07}]}}


WAYS = {"tma": 1.5, "triton": 1.2}


def test_aims_are_judged():
    good = {row["aim"]: row for row in aims.judged(results(0.95, 0.9))}
    assert [row["measured"] for row in good.values()] == [1, 1, 1, 0, 1, 1, 0, 1, *[0] * 8]
    assert not any(row["missed"] for row in good.values())
    bad = {row["aim"]: row for row in aims.judged(results(0.5, 0.8))}
    missed = {aim: row["missed"] for aim, row in bad.items() if row["missed"]}
    assert missed == {
        "unpacking, share of the copy bandwidth": {"q4_k": 0.8},
        "linear at 4608 rows, of dense": {"q4_k 18432 x 3072": 0.5},
        "linear at 512 rows, of dense": {"q4_k 18432 x 3072": 0.5},
    }
    assert [row["measured"] for row in aims.judged({})] == [0] * len(aims.AIMS)


@pytest.mark.parametrize("call", gpu.CALLS)
def test_parts_of_the_gpu_suite_fit_nine_minutes_and_exist(call):
    assert sum(part.seconds for part in gpu.CALLS[call].values()) <= 540
    assert all(find_spec(part.module) for part in gpu.CALLS[call].values())


@pytest.mark.parametrize("name", [name for name, part in gpu.PARTS.items() if "--seconds" in part.arguments])
def test_parts_that_measure_until_a_time_stop_by_themselves_first(name):
    part = gpu.PARTS[name]
    assert int(part.arguments[-1]) < part.seconds and part.arguments[-2] == "--seconds"


def test_calls_and_parts_are_named():
    first, *others = gpu.CALLS
    assert gpu.parts_of(None, dry=False) == list(gpu.CALLS[first])
    assert gpu.parts_of(f"tests,{others[0]},aims", dry=False) == ["tests", *gpu.CALLS[others[0]]]
    assert gpu.parts_of(None, dry=True) == list(gpu.PARTS)
    with pytest.raises(UserError, match="unknown part test;"):
        gpu.parts_of("test", dry=False)


def test_no_file_with_tests_for_a_gpu_is_overlooked(request):
    marked = {item.path for item in request.session.items if any(item.iter_markers("gpu"))}
    marked |= {item.path for item in request.session.items if any(item.iter_markers("kernel"))}
    assert marked <= set(gpu.test_files()), "as far as they are collected in this run"
    assert Path(__file__).parent / "test_dequant.py" in gpu.test_files()


def test_outcomes_of_one_day_stand_together(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "result_path", lambda suite: tmp_path / f"{suite}.json")
    written = {}
    monkeypatch.setattr(gpu, "write_result", lambda suite, result: written.update(result))
    for name in ("tests", "kernels", "tests"):
        gpu.note(name, {"outcome": name, "seconds": len(written)})
        (tmp_path / "gpu.json").write_text(json.dumps(written))
    assert written["parts"] == {
        "tests": {"outcome": "tests", "seconds": 1},
        "kernels": {"outcome": "kernels", "seconds": 1},
    }


def test_a_part_that_hangs_or_fails_costs_only_itself(capfd, monkeypatch):
    hanging = gpu.Part("timeit", 1, ("-n1", "-r1", "import time; time.sleep(60)"))
    assert gpu.run("hanging", hanging, dry=False)["outcome"] == "stopped after 1 s"
    assert gpu.run("failing", gpu.Part("timeit", 20, ("1/0",)), dry=False)["outcome"] == "exit code 1"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc who still runs")
def test_a_part_that_is_stopped_leaves_nothing_running(tmp_path, capfd):
    sign = tmp_path / "child"
    begin = "import subprocess; child = subprocess.Popen(['sleep', '60'])"
    child = f"{begin}; open({str(sign)!r}, 'w').write(str(child.pid)); child.wait()"
    assert "stopped" in gpu.run("parent", gpu.Part("timeit", 3, ("-n1", "-r1", child)), dry=False)["outcome"]
    status = Path(f"/proc/{sign.read_text()}/stat")
    for _ in range(100):  # the process that adopts it has to notice its end
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child still runs")


@pytest.mark.slow
def test_a_dry_run_walks_through(tmp_path):
    command = [
        sys.executable,
        "-I",
        "-m",
        "flux_quant.benchmarks.gpu",
        "--dry-run",
        "--only",
        "tune,step,products8,aims",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 4 and not list(tmp_path.iterdir())
