"""The GPU suite: everything that only a CUDA device can tell. One JSON per part in `benchmarks/results/`.

    python -I -m flux_quant.benchmarks.gpu                      # the call `kernels`
    python -I -m flux_quant.benchmarks.gpu --only streaming     # another call: peers, training; or parts: tests,aims
    python -I -m flux_quant.benchmarks.gpu --dry-run            # all calls on small sizes, on a CPU too; keeps nothing

Each part is a process of its own with a limit in time, so that one that hangs or crashes costs only itself. A call is
what fits into nine minutes. How each part ended is written as soon as it has, beside those of the same day.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import torch

from flux_quant.benchmarks.machine import RESULTS, device_name, result_path, write_result
from flux_quant.errors import UserError

TESTS = Path(__file__).parents[1] / "tests"
UNTIL = "FLUX_QUANT_TESTS_UNTIL"  # as tests/conftest.py reads it: tests that would begin later are skipped
LAST_TEST = 25  # seconds that collecting the report, and a test that has begun, may take
WORKERS = 12  # test processes, where pytest-xdist is installed: most of the time goes into compiling kernels
SLOWEST = 20
SUITE = "gpu"


@dataclass(frozen=True)
class Part:
    module: str
    seconds: int  # it is stopped then
    arguments: tuple[str, ...] = ()


COMPILE = "flux_quant.benchmarks.compile_ahead"
AIMS = Part("flux_quant.benchmarks.aims", 15)
CALLS: dict[str, dict[str, Part]] = {  # parts that measure until a time stop by themselves before they are stopped
    "kernels": {
        "compile": Part(COMPILE, 80, ("--save", "--seconds", "75")),
        "tests": Part("flux_quant.benchmarks.gpu", 150, ("--tests",)),
        "tune": Part("flux_quant.benchmarks.tune", 90, ("--save", "--seconds", "75")),
        "kernels": Part("flux_quant.benchmarks.kernels", 100, ("--save", "--seconds", "88")),
        "products8": Part("flux_quant.benchmarks.products8", 35, ("--save", "--seconds", "28")),
        "step": Part("flux_quant.benchmarks.step", 70, ("--save", "--seconds", "64")),
        "aims": AIMS,
    },
    "streaming": {
        "compile_step": Part(COMPILE, 35, ("--only", "step", "--seconds", "30")),
        "streaming": Part("flux_quant.benchmarks.streaming", 350, ("--save", "--seconds", "325")),
        "side_paths": Part("flux_quant.benchmarks.side_paths", 60, ("--save", "--seconds", "52")),
        "aims": AIMS,
    },
    "peers": {
        "offloaders": Part("flux_quant.benchmarks.offloaders", 205, ("--save", "--seconds", "190")),
        "peers": Part("flux_quant.benchmarks.peers", 200, ("--save", "--seconds", "150")),
        "profiling": Part("flux_quant.benchmarks.profiling", 100, ("--save", "--seconds", "85")),
        "aims": AIMS,
    },
    "training": {
        "training": Part("flux_quant.benchmarks.tiny_flux.improve", 530, ("--save", "--seconds", "510")),
    },
}
PARTS = {name: part for parts in CALLS.values() for name, part in parts.items()}


def run_tests() -> bool:
    """The tests that need a GPU, and those that launch kernels; counted by outcome, failures by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "gpu or kernel", "--import-mode=importlib", f"--junitxml={report}", "-p", "no:cacheprovider"]
        settings = {UNTIL: str(time.time() + PARTS["tests"].seconds - LAST_TEST)}
        if find_spec("xdist") is not None:
            options += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
            settings["OMP_NUM_THREADS"] = "1"  # so many processes with threads for all cores would wait for each other
        start = time.monotonic()
        command = [sys.executable, "-I", "-m", "pytest", "-q", *map(str, test_files()), *options]
        done = subprocess.run(command, cwd=TESTS.parent, env={**os.environ, **settings})
        seconds = time.monotonic() - start
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}
    slowest = sorted(cases, key=lambda case: -float(case.get("time", 0)))[:SLOWEST]
    result = {
        "ok": done.returncode == 0,
        "seconds": round(seconds, 1),
        "outcomes": dict(Counter(outcomes.values())),
        "failed": [name for name, what in outcomes.items() if what == "failed"],
        "slowest": {f"{case.get('classname')}::{case.get('name')}": float(case.get("time", 0)) for case in slowest},
    }
    print(f"wrote {write_result('gpu-tests', result)}")
    return done.returncode == 0


def test_files() -> list[Path]:
    """Those that name what is run here: every process collects them anew, and all of them together take long."""
    return [path for path in sorted(TESTS.glob("test_*.py")) if re.search(r"mark\.gpu|kernel_device", path.read_text())]


def outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def run(name: str, part: Part, dry: bool) -> dict[str, object]:
    """One part in its process -> how it ended and how long it took."""
    arguments = ["--small"] if dry else list(part.arguments) or ["--save"]
    print(f"--- {name}, at most {part.seconds} s", flush=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-I", "-m", part.module, *arguments], start_new_session=True)
    try:
        code = process.wait(part.seconds)
        outcome = "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {part.seconds} s"
    finally:
        stop(process)
    seconds = round(time.monotonic() - start, 1)
    print(f"--- {name}: {outcome}, {seconds} s", flush=True)
    return {"outcome": outcome, "seconds": seconds}


def stop(process: subprocess.Popen) -> None:
    """With everything it has started: a test process that lives on would hold memory of the device."""
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def parts_of(only: str | None, dry: bool) -> list[str]:
    """Names of the parts that were asked for, each once; a call stands for its parts. UserError for unknown names."""
    names = (only or (",".join(CALLS) if dry else next(iter(CALLS)))).split(",")
    parts: list[str] = []
    for name in names:
        if name not in CALLS and name not in PARTS:
            raise UserError(f"unknown part {name}; choose from {', '.join(dict.fromkeys([*CALLS, *PARTS]))}")
        parts += CALLS.get(name, [name])
    return [*dict.fromkeys(parts)]


def note(name: str, outcome: dict[str, object]) -> Path:
    """Written beside how other parts ended on the same day."""
    path = result_path(SUITE)
    earlier = json.loads(path.read_text())["parts"] if path.exists() else {}
    return write_result(SUITE, {"parts": earlier | {name: outcome}})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help=f"calls ({', '.join(CALLS)}) or parts ({', '.join(PARTS)}), commas between them")
    parser.add_argument("--allow-skip", action="store_true", help="without CUDA, succeed and do nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="every part on small sizes, on any device; keeps nothing"
    )
    parser.add_argument("--tests", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        chosen = parts_of(args.only, args.dry_run)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if not torch.cuda.is_available() and not args.dry_run:
        print(f"GPU suite skipped: no CUDA device (torch {torch.__version__})", file=sys.stderr)
        return 0 if args.allow_skip else 1
    if args.tests:
        return 0 if run_tests() else 1
    print(f"GPU suite on {device_name()}")
    outcomes = {}
    for name in chosen:
        if args.dry_run and name == "tests":
            continue
        outcomes[name] = run(name, PARTS[name], args.dry_run)
        if not args.dry_run:
            note(name, outcomes[name])
    if not args.dry_run:
        print(f"results are in {RESULTS}")
    return 0 if all(row["outcome"] == "ok" for row in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
