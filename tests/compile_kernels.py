"""Compile the kernels for every architecture, without a GPU, and tell what the compiler made of them.

    python tests/compile_kernels.py                              one JSON line per launch
    python tests/compile_kernels.py --table dequant q4_k sm_90   a table, of the cases whose names hold all these words

Names are read from standard input with `--stdin`. `test_kernel_budgets.py` runs this in a process of its own, because
pytest's has triton in interpreter mode.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kernel_budgets import Result, table
from kernel_cases import CASES, Case

if TYPE_CHECKING:
    from sass import Launch, Report

WARP = 32  # threads
SHARE = 40  # cases that a process compiles


def measure(name: str) -> list[Result]:
    """What was compiled for a case: a flat record per launch, or one with the `error`."""
    import triton

    import sass

    case, start = CASES[name], time.perf_counter()
    about = dict(name=name, label=name, family=case.family, what=case.what, cc=case.cc, triton=triton.__version__)
    try:
        with sass.recording(case.cc) as launches:
            case.run()
    except Exception as error:  # whatever the compiler raises is the result
        return [about | dict(error=f"{type(error).__name__}: {error}"[:2000])]
    try:
        results = [about | judged(case, launch, sass.examine(launch.cubin)) for launch in launches]
    except sass.Unreadable as error:
        return [about | dict(unreadable=str(error))]
    return [result | dict(seconds=(time.perf_counter() - start) / len(results)) for result in results]


def judged(case: Case, launch: "Launch", seen: "Report") -> Result:
    """What there is in a launch, and what it is held to."""
    weights = case.weights(launch, seen.loop)
    sizes = dict(kernel=launch.kernel, threads=launch.threads, shared_bytes=launch.shared_bytes, weights=weights)
    if weights is None:
        return dict(label=f"{case.name} {launch.kernel}", aim=None, wide=0, mma="") | sizes | vars(seen)
    tile = "x".join(str(launch.arguments[key]) for key in case.shown)
    return dict(
        label=f"{case.name} {tile} w{launch.threads // WARP}" if tile else case.name,
        aim=case.aim(launch) if callable(case.aim) else case.aim,
        wide=case.wide,
        mma=case.mma,
        per_weight=seen.instructions * launch.threads / weights,
        slow=seen.conversions * launch.threads / weights,
        **sizes,
        **vars(seen),
    )


def measure_share(names: list[str]) -> list[Result]:
    """In a process of its own: Triton compiles e4m3 for the architecture that a process has asked for first, and only
    for that. It also prints the code that ptxas refuses, which must not come between our results."""
    sys.stdout = sys.stderr
    return [result for name in names for result in measure(name)]


def measure_all(names: list[str], jobs: int) -> Iterator[Result]:
    """By architecture, in shares that keep all jobs busy."""
    shares = []
    for cc in sorted({CASES[name].cc for name in names}):
        same = [name for name in names if CASES[name].cc == cc]
        shares += [same[start : start + SHARE] for start in range(0, len(same), SHARE)]
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        for results in pool.imap(measure_share, shares, chunksize=1):
            yield from results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="compile only the cases whose names hold all of them")
    parser.add_argument("--table", action="store_true", help="a table for reading instead of JSON")
    parser.add_argument("--stdin", action="store_true", help="read names of cases, one per line")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args()
    words = [f" {word} " for word in options.words]
    names = sys.stdin.read().splitlines() if options.stdin else list(CASES)
    names = [name for name in names if all(word in f" {name} " for word in words)]
    results = []
    for result in measure_all(names, min(options.jobs, len(names) or 1)):
        results.append(result)
        if not options.table:
            print(json.dumps(result), flush=True)
    if options.table:
        print(table(sorted(results, key=lambda result: names.index(result["name"]))))


if __name__ == "__main__":
    main()
