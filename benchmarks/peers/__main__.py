"""The suite `peers` as a part of the GPU suite: so many seconds, on the device that is there.

    python -I -m flux_quant.benchmarks.peers [--seconds 150] [--resume] [--small] [--save]

`flux-quant bench peers` is the same with more options. --small walks through small sizes, on a CPU too.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from flux_quant.benchmarks.bench import show
from flux_quant.benchmarks.bench.record import SKIPPED
from flux_quant.benchmarks.bench.session import Session
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.machine import RESULTS
from flux_quant.benchmarks.peers import SUITE
from flux_quant.console import stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="nothing is begun that may end later [default: 150, small: 60]")
    parser.add_argument("--repeats", type=int, default=5, help="samples of each time")
    parser.add_argument("--resume", action="store_true", help="keep today's rows of this machine and commit")
    parser.add_argument("--small", action="store_true", help="small sizes and few cases: to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    seconds = args.seconds or (60 if args.small else 150)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = Asked(device=device, quick=args.small, repeats=2 if args.small else args.repeats)
    sys.argv[1:] = ["bench", "peers", "--minutes", f"{seconds / 60:g}", "--device", device]  # what it is kept under
    with tempfile.TemporaryDirectory(prefix="flux-quant-peers-") as unsaved:
        folder = RESULTS if args.save else Path(unsaved)
        session = Session(asked, folder, seconds, args.resume, watcher=Telling())
        ((run, path),) = session.run([SUITE])
    for part in show.tables(run):
        stdout().print(part, soft_wrap=True)
    measured = [row for row in run.rows if row.status != SKIPPED]
    print(f"{len(measured)} rows, {len(run.rows) - len(measured)} left out" + (f"; wrote {path}" if args.save else ""))
    return 0 if measured else 1


class Telling(show.Watcher):
    """A line of every row: what was said stands in a log where a bar would not."""

    def has(self, row: show.Row) -> None:
        seconds = row.seconds()
        said = row.note if seconds is None else f"{1e6 * seconds:.0f} us"
        print(f"{row.subject}, {', '.join(str(value) for value in row.what.values())}: {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
