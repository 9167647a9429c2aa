"""Every kernel compiles for every architecture it is launched on, without spills or byte loads, within its budget of
instructions per weight. Needs no GPU: see `compile_kernels.py`, which does it in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernel_budgets import GAPS, TRITON, complaints, table
from kernel_cases import CASES

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = [name for name, case in CASES.items() if case.family != "example"]

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: nothing can be compiled"),
    pytest.mark.slow,  # three minutes on two cores, one when nothing has changed
]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    """Name of a case -> what the compiler made of its launches, for all the cases that the selected tests ask for."""
    chosen = {name for item in request.session.items if item.module is request.module for name in cases_of(item)}
    settings = {
        "TRITON_CACHE_DIR": str(request.config.cache.mkdir("triton")),
        "TRITON_STORE_BINARY_ONLY": "1",
        "TRITON_DISABLE_LINE_INFO": "1",
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": str(SCRIPT.parent),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, "--stdin"],
        input="\n".join(name for name in CASES if name in chosen),
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
    )
    assert done.returncode == 0, done.stderr
    results = defaultdict(list)
    for result in map(json.loads, done.stdout.splitlines()):
        results[result["name"]].append(result)
    return results


def cases_of(item: pytest.Item) -> set[str]:
    return {item.callspec.params["name"]} if hasattr(item, "callspec") else set()


@pytest.mark.parametrize("name", KERNELS)
def test_budget(name, compiled):
    assert compiled[name], "nothing was launched"
    for result in compiled[name]:
        if "unreadable" in result and result["triton"] != TRITON:
            pytest.skip(result["unreadable"])
    found = [f"{result['label']}: {complaint}" for result in compiled[name] for complaint in complaints(result)]
    if found:
        family = [r for results in compiled.values() for r in results if r["family"] == CASES[name].family]
        pytest.fail("\n".join([*found, table(family)]), pytrace=False)


FAULTS = {  # example -> (width of its loads, its matrix instruction on sm_86 and sm_90, what is wrong with it)
    "copy_aligned": ("128", None, None, None),
    "copy_misaligned": ("U8", None, None, "loads of single bytes"),
    "multiply": ("128", "HMMA", "HGMMA", None),
    "multiply_in_one_warp": ("128", "HMMA", "HMMA", "registers are spilled"),
}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.family == "example"])
def test_instruments_find_the_faults_of_the_examples(name, compiled):
    width, ampere, hopper, fault = FAULTS[CASES[name].what]
    (result,) = compiled[name]
    mma = ampere if CASES[name].cc < 90 else hopper
    assert set(result["loads"]) == {width}
    assert set(result["mmas"]) == ({mma} if mma else set())
    assert result["loop"] == (mma is not None), "the loop over K"
    assert [fault in complaint for complaint in complaints(result)] == ([True] if fault else [])


def test_every_gap_is_one():
    """Above the aim of a case that exists; else the number can go."""
    for which, measured in GAPS.items():
        for cc, instructions in measured.items():
            assert instructions > CASES[f"{which} sm_{cc}"].aim, f"{which} sm_{cc}"
