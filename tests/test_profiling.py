"""What ncu prints becomes rows, what ran becomes a digest, and the whole walks through without a card."""

import subprocess
import sys

import pytest
import torch

from flux_quant.benchmarks import ncu, profiling
from flux_quant.benchmarks.journal import Journal

HEAD = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device"'
HEAD += ',"CC","Section Name","Metric Name","Metric Unit","Metric Value"'


def line(number: int, kernel: str, metric: str, unit: str, value: str) -> str:
    return (
        f'"{number}","77","python3","127.0.0.1","{kernel}","1","7","(128, 1, 1)","(576, 1, 1)","0","9.0",'
        f'"Command line profiler metrics","{metric}","{unit}","{value}"'
    )


DRAM, STALL = next(iter(ncu.SHARES)), ncu.STALL.format
PRINTED = "\n".join(
    [
        "==PROF== Connected to process 77 (/usr/bin/python3.12)",
        "calls: two_pass q4_k M4608|fused q4_k M512",
        '==PROF== Profiling "spin_kernel" - 0: 0%....100% - 3 passes',
        "==WARNING== Note: some metrics were not collected",
        HEAD,
        line(0, "spin_kernel(long)", ncu.TIME, "ns", "1,024"),
        line(1, "dequantize_blocks", ncu.TIME, "nsecond", "21,504.00"),
        line(1, "dequantize_blocks", DRAM, "%", "87.31"),
        line(1, "dequantize_blocks", "launch__registers_per_thread", "register/thread", "40"),
        line(1, "dequantize_blocks", STALL("long_scoreboard"), "inst", "9.25"),
        line(1, "dequantize_blocks", STALL("wait"), "inst", "1.5"),
        line(1, "dequantize_blocks", STALL("barrier"), "inst", "0"),
        line(1, "dequantize_blocks", STALL("drain"), "inst", "0.75"),
        line(1, "dequantize_blocks", STALL("membar"), "inst", "2.5"),
        line(2, "void cutlass::Kernel2<sm90_gemm>(Params)", ncu.TIME, "us", "310.5"),
        line(2, "void cutlass::Kernel2<sm90_gemm>(Params)", DRAM, "", "n/a"),
        line(3, "spin_kernel(long)", ncu.TIME, "ns", "1,000"),
        line(4, "fused_kernel", ncu.TIME, "ns", "52,000"),
        line(4, "fused_kernel", "a_metric_of_next_year", "furlong", "3"),
        '"half a line","77',
        "==PROF== Disconnected from process 77",
    ]
)


def test_counters_become_rows():
    first, second, third = [row for row in ncu.of_kernels(ncu.counters(PRINTED)) if "spin" not in row["kernel"]]
    assert first == {
        "kernel": "dequantize_blocks",
        "us": 21.5,
        "dram": 87.3,
        "registers": 40.0,
        "stalls": "long_scoreboard 9.2, membar 2.5, wait 1.5",
    }
    assert second == {"kernel": "void cutlass::Kernel2<sm90_gemm>", "us": 310.5}
    assert third == {"kernel": "fused_kernel", "us": 52.0}


def test_kernels_belong_to_the_call_before_which_the_marker_came():
    rows = {row["call"]: [kernel["kernel"] for kernel in row["kernels"]] for row in profiling.counted(PRINTED)}
    assert rows == {
        "two_pass q4_k M4608": ["dequantize_blocks", "void cutlass::Kernel2<sm90_gemm>"],
        "fused q4_k M512": ["fused_kernel"],
    }


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM", HEAD, "no CSV\nat all"])
def test_nothing_counted_is_no_row(text):
    assert list(ncu.counters(text)) == [] and profiling.counted(text) == []


@pytest.fixture
def ncu_says(monkeypatch):
    """ncu is there and prints this, each run the next; gives the commands."""

    def says(*outputs: object) -> list[list[str]]:
        commands, left = [], list(outputs)

        def run(command, **options):
            commands.append(command)
            assert options["timeout"] > 0
            if isinstance(left[0], Exception):
                raise left.pop(0)
            return subprocess.CompletedProcess(command, 1, left.pop(0), "")

        monkeypatch.setattr(profiling, "which", lambda name: "/usr/bin/ncu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(profiling.subprocess, "run", run)
        return commands

    return says


@pytest.fixture
def journal():
    return Journal("profiling", 85)


def test_counters_that_a_card_lacks_are_left_out_at_the_second_try(journal, ncu_says):
    commands = ncu_says("==ERROR== Failed to find metric regex:^sm__pipe_tensor", PRINTED)
    profiling.measure_counters(journal, 30)
    assert [row["call"] for row in journal.facts["counters"]] == ["two_pass q4_k M4608", "fused q4_k M512"]
    full, essential = (command[command.index("--metrics") + 1].split(",") for command in commands)
    assert set(essential) < set(full)
    assert commands[0][commands[0].index("--clock-control") + 1] == "none"


@pytest.mark.parametrize(
    ("outputs", "why"),
    [
        (("==ERROR== ERR_NVGPUCTRPERM - no permission",) * 2, "ERR_NVGPUCTRPERM"),
        (("", ""), "counted nothing, exit code 1"),
        ((subprocess.TimeoutExpired("ncu", 9),) * 2, "ncu took more than"),
    ],
)
def test_an_ncu_that_does_not_work_is_told(journal, ncu_says, outputs, why):
    ncu_says(*outputs)
    profiling.measure_counters(journal, 30)
    assert journal.facts["counters"] == [] and why in journal.skipped[0]["why"]


def test_a_digest_counts_the_time_without_kernels():
    found = profiling.digest(
        [("a", 10.0, 20.0), ("b", 15.0, 30.0), ("Memcpy HtoD", 0.0, 95.0), ("a", 50.0, 60.0), ("b", 52.0, 55.0)]
    )
    assert found["kernels"] == 4 and found["span_us"] == 50.0 and found["busy_us"] == 30.0
    assert found["without_kernel"] == 0.4
    assert [(one["name"], one["calls"], one["us"]) for one in found["top"]] == [
        ("Memcpy HtoD", 1, 95.0),
        ("a", 2, 20.0),
        ("b", 2, 18.0),
    ]
    assert profiling.digest([("Memcpy HtoD", 0.0, 1.0)]) == {"kernels": 0}


def test_variants_compute_what_they_are_named_after():
    fmt = profiling.on_device("q4_k", torch.device("cpu"))
    calls = profiling.variants(fmt, 3, profiling.SMALL_LAYER)
    n, k = profiling.SMALL_LAYER
    assert calls["dense product"](0).shape == calls["chosen way"](1).shape == (3, n)
    assert calls["unpacking"](0).shape == (n, k)


def test_it_walks_through_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(profiling, "STEPS", profiling.STEPS[:1])
    monkeypatch.setattr(profiling, "VARIED", profiling.VARIED[:1])
    monkeypatch.setattr(sys, "argv", ["profiling", "--small"])
    assert profiling.main() == 0
    assert "Stages" in (printed := capsys.readouterr().out) and "resident" in printed


@pytest.mark.slow
def test_a_streamed_step_is_traced():
    found = profiling.streamed_row("q4_k", "8GB", small=True)
    assert found["kernels"] > 0 and found["steps"] > 0
