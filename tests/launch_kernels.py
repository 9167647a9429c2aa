"""Launch the kernels through Triton's true launch path, without a card: see `stub_driver`. One JSON line per case.

    python tests/launch_kernels.py                       every case
    python tests/launch_kernels.py --cc 75 linear M1     for another card, the cases whose names hold all these words

With `--stdin`, names of cases are read, one per line. `test_launches.py` runs this in a process of its own.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # read when triton is imported

import stub_driver
import torch
from launch_cases import CASES, FAULTS, Case


def launch(case: Case, launches: list[stub_driver.Launch], memory: stub_driver.Memory) -> dict[str, object]:
    """What a case launched, and what went wrong: an error, or a kernel that torch replaced."""
    from flux_quant.kernels import fallback, triton_path

    launches.clear(), memory.forget(), fallback.FAILED.clear(), triton_path.free_scratch()
    error, start = None, time.perf_counter()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.run()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    failed = [f"{name}: {what}" for (name, _), what in fallback.FAILED.items()]
    names = {one.kernel for one in launches}
    missing = [name for name in case.kernels if not any(one.startswith(name) for one in names)]
    return dict(
        name=case.name,
        errors=[*([error] if error else []), *failed],
        missing=sorted(missing),
        launches=len(launches),
        kernels=sorted(names),
        registers=max((one.registers for one in launches), default=0),
        seconds=round(time.perf_counter() - start, 2),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only the cases whose names hold all of them")
    parser.add_argument("--stdin", action="store_true", help="read names of cases, one per line")
    parser.add_argument("--faults", action="store_true", help="launch what a card would refuse")
    parser.add_argument("--cc", type=int, default=90, choices=stub_driver.CARDS, help="compute capability (default 90)")
    options = parser.parse_args()
    cases = {name: one for name, (one, _) in FAULTS.items()} if options.faults else CASES
    names = sys.stdin.read().splitlines() if options.stdin else list(cases)
    words = [f" {word} " for word in options.words]
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Triton prints the code that ptxas refuses: not between our results
    with tempfile.TemporaryDirectory() as folder, stub_driver.launching(options.cc, Path(folder)) as (launches, memory):
        from flux_quant.kernels import fp8

        fp8.works = lambda way, device, dtype: True  # it looks at values, of which there are none
        for name in names:
            if all(word in f" {name} " for word in words):
                print(json.dumps(launch(cases[name], launches, memory)), file=results, flush=True)


if __name__ == "__main__":
    main()
