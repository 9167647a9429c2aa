"""What the compiled kernels are held to: no spilled registers, no byte loads, and a budget of instructions per weight.

The aims, from the rates of the cards, stand in `kernel_cases`. Where a kernel is honestly above its aim, `GAPS` has
what was measured; the budget is then that and a tenth, so that nothing grows unnoticed and the gap stays in sight.
"""

import re
from collections.abc import Iterator, Sequence

TRITON = "3.6.0"  # whose output was measured
SLACK = 1.6  # on counts of another version: those of 3.7.1 are 0.8 to 1.5 times as high
ROOM = 1.1
REGISTERS = 255  # of a thread, on every card; more do not exist
SHARED = {61: 48, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB of shared memory that a program can have
BYTES = {"U8": 1, "U16": 2, "32": 4, "64": 8, "128": 16, "256": 32, "TMA": 0}  # per thread; one alone fetches a tile

# Family and what -> compute capability -> thread-instructions per weight.
GAPS: dict[str, dict[int, float]] = {
    "dequant iq4_nl planar": {61: 10.4, 75: 10.1},
    "dequant q3_k planar": {61: 10.5},
    "dequant q2_k planar": {61: 10.3},
    "dequant fp8": {61: 15.4, 75: 15.1, 80: 14.2, 86: 14.2},
    "dequant fp8_plain": {61: 12.6, 75: 12.2, 80: 14.4, 86: 14.4},
    "dequant q5_1": {61: 12.2, 75: 10.4},
    "dequant q5_k": {61: 10.6, 75: 10.1},
    "dequant iq4_xs": {61: 11.1, 75: 11.1, 90: 10.2, 120: 10.1},
    "dequant fp8_rows": {61: 18.4, 75: 17.1, 80: 16.2, 86: 16.2},
    "dequant q5_0": {75: 10.4},
    "dequant iq4_nl": {75: 11.2, 86: 10.3, 90: 10.4},
    "dequant q6_k": {75: 11.4, 86: 10.4, 90: 10.4},
    "dequant q3_k": {75: 17.2, 86: 16.2, 90: 15.8},
    "dequant q2_k": {75: 10.6},
    "expand8 q8_0 planar": {75: 24.4, 80: 24.2, 86: 24.2, 89: 24.2, 90: 24.5, 120: 24.6},
    "expand8 q5_0 planar": {75: 22.5, 80: 22.4, 86: 22.5, 89: 22.5, 90: 22.7, 120: 22.6},
    "expand8 q4_1 planar": {75: 21.6, 80: 21.5, 86: 21.5, 89: 21.5, 90: 21.7, 120: 21.7},
    "expand8 q4_0 planar": {75: 21.1, 80: 20.9, 86: 21.0, 89: 21.0, 90: 21.2, 120: 21.1},
    "expand8 iq4_nl planar": {75: 23.9, 80: 23.6, 86: 23.6, 89: 23.6, 90: 23.9, 120: 23.9},
    "expand8 q6_k planar": {75: 32.1, 80: 31.9, 86: 32.0, 89: 32.0, 90: 32.3, 120: 32.2},
    "expand8 q3_k planar": {75: 27.9, 80: 27.7, 86: 27.8, 89: 27.8, 90: 27.1, 120: 26.9},
    "expand8 q2_k planar": {75: 25.6, 80: 25.5, 86: 25.5, 89: 25.5, 90: 24.7, 120: 24.6},
    "expand8 q5_1": {75: 25.6, 80: 25.5, 86: 25.5, 89: 25.5, 90: 25.7, 120: 25.7},
    "expand8 q5_k": {75: 27.6, 80: 27.5, 86: 27.6, 89: 27.6, 90: 27.2, 120: 27.3},
    "expand8 q4_k": {75: 27.9, 80: 27.7, 86: 27.9, 89: 27.9, 90: 28.3, 120: 28.3},
    "expand8 iq4_xs": {75: 26.4, 80: 26.4, 86: 26.4, 89: 26.4, 90: 26.1, 120: 26.1},
    "rows8 int8 3072": {75: 22.2, 80: 22.5, 86: 22.6, 89: 22.6, 90: 22.4, 120: 22.8},
    "rows8 int8 15360": {75: 26.4, 80: 26.8, 86: 26.9, 89: 26.9, 90: 26.7, 120: 27.0},
    "pointwise modulated_norm": {80: 28.6, 86: 28.6, 89: 28.6, 90: 29.4, 120: 29.4},
}

Result = dict[str, object]  # a line of compile_kernels.py


def budget(result: Result) -> float | None:
    """Thread-instructions per weight that this case may take; None if it has no limit."""
    if result["aim"] is None:
        return None
    measured = GAPS.get(f"{result['family']} {result['what']}", {}).get(result["cc"])
    most = result["aim"] if measured is None else measured * ROOM
    return most if result["triton"] == TRITON else most * SLACK


def complaints(result: Result) -> Iterator[str]:
    """What is wrong with one kernel on one architecture."""
    if "error" in result:
        yield f"does not compile: {result['error']}"
        return
    if "unreadable" in result:
        yield f"compiles, but cannot be judged: {result['unreadable']}"
        return
    if result["stack_bytes"] or result["local"]:
        yield f"{result['stack_bytes']} bytes of stack, {result['local']} accesses: registers are spilled"
    if result["registers"] > REGISTERS:
        yield f"{result['registers']} registers"
    if result["shared_bytes"] > SHARED[result["cc"]] << 10:
        yield f"{result['shared_bytes']} bytes of shared memory, sm_{result['cc']} has {SHARED[result['cc']]} KiB"
    if "U8" in result["loads"]:
        yield f"{result['loads']['U8']} loads of single bytes"
    wide = per_weight(result, {width: count for width, count in result["loads"].items() if BYTES[width] >= 8})
    if wide < result["wide"]:
        yield f"{wide:.2f} bytes per weight in loads of 64 bits or more, should be {result['wide']}"
    if result["mma"] and not any(re.fullmatch(result["mma"], name) for name in result["mmas"]):
        yield f"no {result['mma']} among its matrix instructions: {result['mmas']}"
    limit = budget(result)
    if limit is not None and result["per_weight"] > limit:
        yield f"{result['per_weight']:.2f} instructions per weight, budget {limit:.2f}"


def per_weight(result: Result, accesses: dict[str, int]) -> float:
    """Bytes per weight that are moved by loads or stores, counted by width."""
    return sum(BYTES[width] * count for width, count in accesses.items()) * result["threads"] / result["weights"]


def table(results: Sequence[Result]) -> str:
    """For reading: one line per case, with budget and aim, complaints behind it."""
    columns = (
        "case",
        "regs",
        "stack",
        "shared",
        "instr/weight",
        "budget",
        "aim",
        "slow",
        "read",
        "loads",
        "stores",
        "mma",
    )
    return "\n".join([LINE.format(*columns, "").rstrip(), *(row(result) for result in results)])


LINE = "{:44} {:>4} {:>5} {:>6} {:>12} {:>6} {:>5} {:>5} {:>5}  {:26} {:14} {:12} {}"


def row(result: Result) -> str:
    complaint = "; ".join(complaints(result))
    if "error" in result or "unreadable" in result:
        return f"{result['label']:44} {complaint}"
    limit = budget(result)
    numbers = (
        f"{result['per_weight']:.2f}",
        "-" if limit is None else f"{limit:.2f}",
        "-" if limit is None else f"{result['aim']:g}",
        f"{result['slow']:.2f}",
        f"{per_weight(result, result['loads']):.2f}",
    )
    counts = (
        " ".join(f"{name}x{count}" for name, count in sorted(result[key].items()))
        for key in ("loads", "stores", "mmas")
    )
    sizes = result["registers"], result["stack_bytes"], result["shared_bytes"]
    return LINE.format(result["label"], *sizes, *numbers, *counts, f"<- {complaint}" if complaint else "").rstrip()
