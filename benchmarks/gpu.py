"""The GPU suite: everything that only a CUDA device can tell. One JSON per part in `benchmarks/results/`.

python -I -m flux_quant.benchmarks.gpu [--allow-skip]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

from flux_quant.benchmarks.machine import device_name, write_result

TESTS = Path(__file__).parents[1] / "tests"


def run_tests() -> bool:
    """The tests marked `gpu`, counted by outcome, failures by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "gpu", "--import-mode=importlib", f"--junitxml={report}", "-p", "no:cacheprovider"]
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-I", "-m", "pytest", str(TESTS), *options], cwd=TESTS.parent)
        seconds = time.monotonic() - start
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}
    result = {
        "ok": done.returncode == 0,
        "seconds": round(seconds, 1),
        "outcomes": dict(Counter(outcomes.values())),
        "failed": [name for name, what in outcomes.items() if what == "failed"],
    }
    print(f"wrote {write_result('gpu-tests', result)}")
    return done.returncode == 0


def outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


SUITES = {"tests": run_tests}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--allow-skip", action="store_true", help="without CUDA, succeed and do nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"GPU suite skipped: no CUDA device (torch {torch.__version__})", file=sys.stderr)
        return 0 if args.allow_skip else 1
    print(f"GPU suite on {device_name()}")
    outcomes = {name: suite() for name, suite in SUITES.items()}
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
