"""Every kernel through Triton's true launch path, up to the call that would start it on a card: see `stub_driver`.

Compiled by Triton and ptxas for an H200, its launcher by the C compiler, at sizes that change what is compiled.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launch_cases import CASES, FAULTS

SCRIPT = Path(__file__).with_name("launch_kernels.py")
CARDS = (75, 86, 120)  # beside an H200: a class of cards each

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: nothing can be launched"),
    pytest.mark.skipif(not (shutil.which("gcc") or os.environ.get("CC")), reason="Triton launches need a C compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a card is there: its driver would be the one that is loaded"),
]


def launched(request: pytest.FixtureRequest, names: list[str], *arguments: str) -> dict[str, dict]:
    """Name of a case -> what `launch_kernels.py` says about it."""
    settings = {
        "TRITON_CACHE_DIR": str(request.config.cache.mkdir("triton_launches")),
        "TRITON_DISABLE_LINE_INFO": "1",
        "PYTHONPATH": str(SCRIPT.parent),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, "--stdin", *arguments],
        input="\n".join(names),
        capture_output=True,
        text=True,
        env={**os.environ, **settings},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, dict]:
    """Of all cases that the selected tests ask for, on an H200."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    chosen = {item.callspec.params.get("name") for item in items}
    return launched(request, [name for name in CASES if name in chosen])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if case.slow else ())
        for name, case in CASES.items()
        if not case.by_hand
    ],
)
def test_launch(name, results):
    assert not results[name]["errors"], "\n".join(results[name]["errors"])
    assert not results[name]["missing"], results[name]["kernels"]


@pytest.mark.slow
@pytest.mark.parametrize("cc", CARDS)
def test_other_cards(cc, request):
    """Whatever way a card has for a layer: nothing is refused, nothing falls back to torch."""
    names = [name for name, case in CASES.items() if not case.slow]
    found = launched(request, names, "--cc", str(cc))
    assert not {name: result["errors"] for name, result in found.items() if result["errors"]}
    kernels = Counter(kernel for result in found.values() for kernel in result["kernels"])
    assert kernels.keys() >= {"vector_kernel", "dequantize_blocks", "quantize_kernel", "heads_kernel"}
    assert ("fused_kernel" in kernels) == (cc >= 80)


def test_faults_are_found(request):
    """The stub refuses what a card refuses."""
    found = launched(request, list(FAULTS), "--faults")
    for name, (_, words) in FAULTS.items():
        assert [words in error for error in found[name]["errors"]] == [True], (name, found[name])
        assert not found[name]["launches"] or name == "an odd place"
