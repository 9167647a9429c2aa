"""How long a conversion takes and how much memory it needs, against `cp` of the same file on the same disk.

    python -I -m flux_quant.benchmarks.conversion build/flux1-random.safetensors [MORE...] [--save]

Every conversion is a process of its own; its memory is the largest resident size, mapped pages of the input included,
less that of a process that has only imported the converters. Between runs the file is read once, so that each finds
as much of it in the system's cache as the others do. The ratio to `cp` is of one run on one machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from flux_quant.benchmarks.machine import write_result

SUFFIXES = {"fp8": ".safetensors", "fp8_plain": ".safetensors", "bf16": ".safetensors"}
WORK = """
import json, resource, sys, time
from pathlib import Path
from flux_quant.converters.convert import run
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.plan import make_plan
import torch

torch.set_num_threads(int(sys.argv[4]))
from flux_quant.kernels import cpu_quantize

baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
out = {"baseline_kb": baseline}
if sys.argv[3] != "nothing":
    result = run(make_plan(Conversion(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], force=True)))
    snr = result.total.deviation.snr
    out |= {"bytes": result.file_bytes, "snr_db": round(snr, 2) if snr < 999 else None}
out |= {"seconds": time.perf_counter() - start, "peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
print(json.dumps(out))
"""


def read_through(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


def copy_seconds(source: Path, folder: Path) -> float:
    target = folder / "copy"
    read_through(source)
    start = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    os.sync()
    return seconds


def convert(source: Path, target: Path, format_name: str, threads: int) -> dict[str, float]:
    command = [sys.executable, "-I", "-c", WORK, str(source), str(target), format_name, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(source: Path, formats: Iterable[str], threads: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        seconds = copy_seconds(source, Path(folder))
        nbytes = source.stat().st_size
        print(f"{source.name}, cp: {seconds:.1f} s, {nbytes / seconds / 1e9:.2f} GB/s", flush=True)
        rows = []
        for name in formats:
            target = Path(folder) / f"out{SUFFIXES.get(name, '.gguf')}"
            read_through(source)
            found = convert(source, target, name, threads)
            target.unlink()
            row = {
                "format": name,
                "seconds": round(found["seconds"], 1),
                "times_cp": round(found["seconds"] / seconds, 2),
                "memory_gb": round((found["peak_kb"] - found["baseline_kb"]) * 1024 / 1e9, 3),
                "bytes": found["bytes"],
                "snr_db": found["snr_db"],
            }
            rows.append(row)
            print(row, flush=True)
    return {"bytes": nbytes, "cp_seconds": round(seconds, 1), "results": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, nargs="+")
    parser.add_argument("--formats", nargs="+", default=["q8_0", "fp8", "q4_k_s"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    measured = [measure(source, args.formats, args.threads) for source in args.sources]
    if args.save:
        torch.set_num_threads(args.threads)  # what the fingerprint says
        print(f"wrote {write_result('conversion', {'threads': args.threads, 'sources': measured})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
