"""Where the time of a kernel and of a step goes: variants with a stage left out, counters of ncu, a trace.

    python -I -m flux_quant.benchmarks.profiling [--seconds 85] [--small] [--save]

`variants`: reading the packed bytes alone, unpacking alone, the dense product alone, and every whole way, in turns:
differences place the time. `counters`, where ncu works: chosen calls with their shares of the peak of memory,
multiprocessors and tensor cores, warps, registers, the three reasons for which warps wait most. `steps`: one step by
torch's profiler, resident and streamed: kernels by time, and how long the device had none, which is what launches cost.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from shutil import which

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.journal import FAILURES, Journal, Row
from flux_quant.benchmarks.kernels import copies_of
from flux_quant.benchmarks.ncu import ESSENTIAL, METRICS, counters, of_kernels
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, PLAIN, SINGLE, on_device, random_flux, random_parts
from flux_quant.benchmarks.stage import open_stage
from flux_quant.benchmarks.step import SMALL, WORDS, inputs, synchronize
from flux_quant.benchmarks.streaming import Bench, Case
from flux_quant.benchmarks.timing import compare
from flux_quant.formats import FORMATS, INT8_ROWS, QuantFormat
from flux_quant.kernels import dispatch, eight_bit, fallback, tables

LAYER, SMALL_LAYER = (9216, 3072), (768, 256)
CALLS = {  # name -> format, rows of input, way; the most telling first
    "two_pass q4_k M4608": ("q4_k", 4608, tables.TWO_PASS),
    "fused q4_k M512": ("q4_k", 512, tables.FUSED),
    "vector q4_k M1": ("q4_k", 1, tables.VECTOR),
    "two_pass q8_0 M4608": ("q8_0", 4608, tables.TWO_PASS),
    "int8 by tma M4608": ("int8", 4608, eight_bit.TMA),
    "fused q8_0 M512": ("q8_0", 512, tables.FUSED),
    "vector q8_0 M1": ("q8_0", 1, tables.VECTOR),
}
VARIED = tuple((name, rows) for name in ("q4_k", "q8_0") for rows in (4608, 512, 1))
STEPS = (("q4_k", None), ("q4_k", "8GB"))  # format, budget
TOP = 12
OURS = (sys.executable, "-I", "-m", "flux_quant.benchmarks.profiling", "--under-ncu")
NAMES, MARKER = "calls: ", "spin_kernel"  # what torch.cuda._sleep launches
UNDER_NCU, ONE_VARIANT, RESIDENT, STREAMED = 15.0, 2.0, 12.0, 30.0  # seconds that have to be left


def place() -> tuple[torch.device, torch.dtype]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32


# --- counters of ncu --------------------------------------------------------------------------------------------------


def call_of(name: str, shape: tuple[int, int], rows: int | None = None) -> Callable[[], object]:
    """A call of CALLS on this device."""
    from flux_quant.kernels import triton_path

    form, count, way = CALLS[name]
    device, dtype = place()
    x = torch.randn(rows or count, shape[1], device=device, dtype=dtype)
    if form == "int8":
        fmt, parts = INT8_ROWS, random_parts(INT8_ROWS, shape, device)
        return lambda: eight_bit.linear(x, fmt, parts, None, eight_bit.Product(way, ""))
    fmt = on_device(form, device)
    parts = random_parts(fmt, shape, device)
    return lambda: triton_path.run(way, x, fmt, parts, None, None)


def under_profiler() -> None:
    """In the process that ncu watches: each call that this card can do, compiled before, with a marker before it."""
    calls = {}
    for name in CALLS:
        try:
            call = call_of(name, LAYER)
            for _ in range(2):
                call()
            calls[name] = call
        except FAILURES as error:
            print(f"{name}: {type(error).__name__}", file=sys.stderr)
    print(NAMES + "|".join(calls), flush=True)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls.values():
        torch.cuda._sleep(1)
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def command_of(metrics: Sequence[str]) -> list[str]:
    options = ["--clock-control", "none", "--csv", "--print-units", "base", "--profile-from-start", "off"]
    return ["ncu", *options, "--metrics", ",".join(metrics), *OURS]


def counted(text: str) -> list[Row]:
    """A row for each call, with its kernels, from what ncu and the process have printed."""
    names = next((line[len(NAMES) :].split("|") for line in text.splitlines() if line.startswith(NAMES)), [])
    groups: list[list[Row]] = []
    for row in of_kernels(counters(text)):
        if MARKER in str(row["kernel"]):
            groups.append([])
        elif groups:
            groups[-1].append(row)
    return [{"call": name, "kernels": group} for name, group in zip(names, groups, strict=False)]


def measure_counters(journal: Journal, keep: float) -> None:
    """In all but `keep` of the seconds that are left; with fewer counters where this ncu or card lacks some."""
    journal.facts["counters"], what = [], {"what": "counters"}
    if which("ncu") is None or not torch.cuda.is_available():
        return journal.skip(what, "no CUDA device" if which("ncu") else "no ncu on the PATH")
    said = "no time was left"
    for metrics in (METRICS, ESSENTIAL):
        if (limit := journal.left - keep) < UNDER_NCU:
            break
        with tempfile.TemporaryDirectory() as folder:  # for ncu's lock file: somebody else's would stop it
            env = {**os.environ, "TMPDIR": folder}
            try:
                done = subprocess.run(command_of(metrics), capture_output=True, text=True, timeout=limit, env=env)
            except subprocess.TimeoutExpired:
                said = f"ncu took more than {limit:.0f} s"
                continue
        if found := counted(done.stdout):
            journal.facts["counters"] = found
            return journal.write()
        errors = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("==ERROR==")]
        said = " ".join(errors)[:300] or f"ncu counted nothing, exit code {done.returncode}"
    return journal.skip(what, said)


# --- variants ---------------------------------------------------------------------------------------------------------


def variants(fmt: QuantFormat, rows: int, shape: tuple[int, int]) -> dict[str, Callable[[int], object]]:
    """name -> call on copy i: the stages of a layer by themselves, and every way that this device has."""
    device, dtype = place()
    parts, dense = copies_of(fmt, shape, device), copies_of(FORMATS[PLAIN[dtype]], shape, device)
    x, out = torch.randn(rows, shape[1], device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype)
    count = len(parts)
    found = {
        "reading": lambda i: parts[i % count][0].view(torch.int32).amax(),
        "unpacking": lambda i: dispatch.dequantize(fmt, parts[i % count], dtype, out),
        "dense product": lambda i: F.linear(x, dense[i % len(dense)][0]),
        "chosen way": lambda i: dispatch.linear(x, fmt, parts[i % count]),
    }
    if fallback.triton_for(device) is None:
        from flux_quant.kernels import triton_path

        for way in (tables.TWO_PASS, tables.FUSED, tables.VECTOR):
            if triton_path.refusal(way, fmt, rows, shape, dtype, device) is None:
                found[way] = lambda i, way=way: triton_path.run(way, x, fmt, parts[i % count], None, None)
    return found


def variant_row(name: str, rows: int, shape: tuple[int, int]) -> Row:
    device, _ = place()
    fmt = on_device(name, device)
    calls = variants(fmt, rows, shape)
    found = compare(calls, len(copies_of(fmt, shape, device)), device)
    times = {what: timing.median * 1e6 for what, timing in found.items()}
    row = {"format": name, "n": shape[0], "k": shape[1], "m": rows}
    row["us"] = {what: round(us, 2) for what, us in times.items()}
    whole = times.get(tables.TWO_PASS, times["chosen way"])
    return row | {"two_pass_beyond_its_stages_us": round(whole - times["unpacking"] - times["dense product"], 2)}


# --- a step -----------------------------------------------------------------------------------------------------------


Interval = tuple[str, float, float]  # name, start, end in microseconds


def digest(intervals: Iterable[Interval]) -> Row:
    """Work by name and the time without any, between the first start and the last end; copies are told apart."""
    every = sorted(intervals, key=lambda one: one[1])
    kernels = [one for one in every if not one[0].startswith(("Memcpy", "Memset"))]
    if not kernels:
        return {"kernels": 0}
    totals: dict[str, list[float]] = {}
    for name, start, end in every:
        total = totals.setdefault(name, [0, 0.0])
        total[0], total[1] = total[0] + 1, total[1] + end - start
    span, busy, reached = max(end for *_, end in kernels) - kernels[0][1], 0.0, float("-inf")
    for _, start, end in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    top = sorted(totals.items(), key=lambda one: -one[1][1])[:TOP]
    return {
        "kernels": len(kernels),
        "span_us": round(span, 1),
        "busy_us": round(busy, 1),
        "without_kernel": round(1 - busy / span, 4) if span else 0.0,
        "top": [{"name": name[:120], "calls": count, "us": round(us, 1)} for name, (count, us) in top],
    }


def traced(run: Callable[[], object]) -> list[Interval]:
    """What ran on the device, or, without one, torch's operators."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        synchronize(place()[0])
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = (event for event in profile.events() if event.device_type == wanted)
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


@torch.inference_mode()
def resident_row(name: str, small: bool) -> Row:
    device, dtype = place()
    blocks = (1, 1) if small else (DOUBLE, SINGLE)
    config = FluxConfig(**(SMALL if small else DEV), double_blocks=blocks[0], single_blocks=blocks[1])
    model = random_flux(name, device, dtype, config)
    arguments = inputs(config, 64 if small else 1024, 16 if small else WORDS, device, dtype)
    for _ in range(2):
        model(*arguments)
    synchronize(device)
    return {"format": name, "vram": None, "steps": 1} | digest(traced(lambda: model(*arguments)))


def streamed_row(name: str, vram: str, small: bool) -> Row:
    """All steps of a row of `streaming`: a few that warm up among them."""
    bench = Bench(name, open_stage(), small, assume=True)
    with bench.opened():
        bench.modulation(vram)
        rows = []
        events = traced(lambda: rows.append(bench.step(Case(64 if small else 1024, vram))))
    return {"format": name, "vram": vram, "steps": len(rows[0]["samples"])} | digest(events)


def measure_steps(journal: Journal, small: bool) -> None:
    rows = journal.facts.setdefault("steps", [])
    for name, vram in STEPS:
        if vram is not None and not small:
            measure_counters(journal, STREAMED)
        work = partial(resident_row, name, small) if vram is None else partial(streamed_row, name, vram, small)
        needs = 0.0 if small else STREAMED if vram else RESIDENT
        journal.into(rows, {"what": "step", "format": name, "vram": vram}, work, needs)


def measure(journal: Journal, small: bool = False) -> None:
    """Variants first: they need nothing that may be missing; then the resident step, ncu, a streamed step."""
    rows, shape = journal.facts.setdefault("variants", []), SMALL_LAYER if small else LAYER
    for name, count in VARIED:
        what, count = {"what": "variants", "format": name, "m": count}, min(count, 16) if small else count
        with torch.inference_mode():
            journal.into(rows, what, partial(variant_row, name, count, shape), 0.0 if small else ONE_VARIANT)
    measure_steps(journal, small)


def shown(journal: Journal) -> Iterable[Table]:
    table = Table(title="Stages, microseconds")
    names = list(dict.fromkeys(what for row in journal.facts["variants"] for what in row["us"]))
    for column in ("format", "M", *names):
        table.add_column(column, justify="right")
    for row in journal.facts["variants"]:
        table.add_row(row["format"], str(row["m"]), *(f"{row['us'][n]:.1f}" if n in row["us"] else "" for n in names))
    yield table
    for row in journal.facts["steps"]:
        idle = f", {row['without_kernel']:.1%} of the time without one" if "without_kernel" in row else ""
        table = Table(title=f"{row['format']}, {row['vram'] or 'resident'}: {row['kernels']} kernels{idle}")
        for column in ("name", "calls", "us"):
            table.add_column(column, justify="left" if column == "name" else "right")
        for one in row.get("top", ()):
            table.add_row(one["name"], str(one["calls"]), f"{one['us']:.0f}")
        yield table
    for row in journal.facts.get("counters", ()):
        table = Table(title=row["call"])
        names = list(dict.fromkeys(key for kernel in row["kernels"] for key in kernel))
        for name in names:
            table.add_column(name)
        for kernel in row["kernels"]:
            table.add_row(*(str(kernel.get(name, "")) for name in names))
        yield table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=85, help="nothing is begun that may end later")
    parser.add_argument("--small", action="store_true", help="small sizes, on a CPU too: to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--under-ncu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.under_ncu:
        with torch.inference_mode():
            under_profiler()
        return 0
    journal = Journal("profiling", args.seconds, args.save)
    measure(journal, args.small)
    journal.write()
    Console(width=150).print(*shown(journal))
    if args.save:
        print(f"wrote {journal.path}", file=sys.stderr)
    return 0 if journal.facts["variants"] else 1


if __name__ == "__main__":
    sys.exit(main())
