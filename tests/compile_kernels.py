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

from kernel_budgets import table
from kernel_cases import CASES


def measure(name: str) -> list[dict[str, object]]:
    """What was compiled for a case: a flat record per launch, or one with the `error`."""
    import triton

    import sass

    case, start = CASES[name], time.perf_counter()
    about = dict(name=name, label=name, family=case.family, what=case.what, cc=case.cc, triton=triton.__version__)
    about |= dict(wide=case.wide, mma=case.mma)
    try:
        with sass.recording(case.cc) as launches:
            case.run()
    except Exception as error:  # whatever the compiler raises is the result
        return [about | dict(error=f"{type(error).__name__}: {error}"[:2000])]
    results = []
    for launch in launches:
        try:
            seen = sass.examine(launch.cubin)
        except sass.Unreadable as error:
            results.append(about | dict(unreadable=str(error)))
            continue
        weights = case.weights(launch, seen.loop)
        tile = "x".join(str(launch.arguments[key]) for key in case.shown)
        label = f"{name} {tile} w{launch.threads // sass.WARP}" if tile else name
        sizes = dict(threads=launch.threads, shared_bytes=launch.shared_bytes, weights=weights)
        rates = dict(per_weight=seen.instructions, slow=seen.conversions)
        rates = {key: count * launch.threads / weights for key, count in rates.items()}
        aim = case.aim(launch) if callable(case.aim) else case.aim
        results.append(about | dict(label=label, kernel=launch.kernel, aim=aim) | sizes | vars(seen) | rates)
        results[-1]["seconds"], start = time.perf_counter() - start, time.perf_counter()
    return results


def measure_all(names: list[str], jobs: int) -> Iterator[dict[str, object]]:
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for results in pool.imap(measure, names):
            yield from results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="compile only the cases whose names hold all of them")
    parser.add_argument("--table", action="store_true", help="a table for reading instead of JSON")
    parser.add_argument("--stdin", action="store_true", help="read names of cases, one per line")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args()
    words = [f" {word} " for word in options.words]
    names = sys.stdin.read().splitlines() if options.stdin else CASES
    names = [name for name in names if all(word in f" {name} " for word in words)]
    results = []
    for result in measure_all(names, min(options.jobs, len(names) or 1)):
        results.append(result)
        if not options.table:
            print(json.dumps(result), flush=True)
    if options.table:
        print(table(results))


if __name__ == "__main__":
    main()
