"""What the compiled kernels are held to: no spilled registers, no byte loads, and a budget of instructions per weight.

The aims, from the rates of the cards, stand in `kernel_cases`. Where a kernel is honestly above its aim, `GAPS` has
what was measured; the budget is then that and a tenth, so that nothing grows unnoticed and the gap stays in sight.
"""

import re
from collections.abc import Iterator, Sequence

TRITON = "3.6.0"  # whose output was measured; with another version counts may be SLACK times as high
SLACK = 1.15
ROOM = 1.1
REGISTERS = 255  # of a thread, on every card; more do not exist
SHARED = {61: 48, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 120: 99}  # KiB of shared memory that a program can have
BYTES = {"U8": 1, "U16": 2, "32": 4, "64": 8, "128": 16, "256": 32}  # of a load or store, per thread

# Family and what -> compute capability -> thread-instructions per weight.
GAPS: dict[str, dict[int, float]] = {
    "dequant q5_0 planar": {61: 13.0, 75: 12.2, 80: 11.2, 86: 11.3, 89: 11.3, 90: 10.2, 120: 10.1},
    "dequant iq4_nl planar": {61: 13.8, 75: 12.9, 80: 11.9, 86: 12.0, 89: 12.0, 90: 12.2, 120: 12.1},
    "dequant q6_k planar": {61: 13.2, 75: 12.4, 80: 11.3, 86: 11.4, 89: 11.4, 90: 10.5, 120: 10.5},
    "dequant q3_k planar": {61: 14.8, 75: 14.1, 80: 13.0, 86: 13.1, 89: 13.1, 90: 11.8, 120: 11.7},
    "dequant q2_k planar": {61: 10.2},
    "dequant fp8_rows": {61: 18.4, 75: 17.1, 80: 16.2, 86: 16.2},
    "dequant fp8": {61: 15.4, 75: 15.1, 80: 14.2, 86: 14.2},
    "dequant fp8_plain": {61: 12.6, 75: 12.2, 80: 14.4, 86: 14.4},
    "dequant q5_1": {61: 15.0, 75: 13.1, 80: 12.1, 86: 12.3, 89: 12.3, 90: 12.3, 120: 11.2},
    "dequant q5_k": {61: 14.2, 75: 13.8, 80: 12.7, 86: 12.8, 89: 12.8, 90: 12.9, 120: 11.9},
    "dequant iq4_xs": {61: 13.9, 75: 13.4, 80: 12.4, 86: 12.4, 89: 12.4, 90: 12.5, 120: 12.5},
    "dequant q5_0": {75: 14.7, 86: 13.7, 90: 13.4},
    "dequant iq4_nl": {75: 14.1, 86: 13.2, 90: 13.3},
    "dequant q6_k": {75: 13.9, 86: 13.0, 90: 12.5},
    "dequant q3_k": {75: 15.5, 86: 14.4, 90: 13.7},
    "dequant q2_k": {75: 10.2},
    "expand8 q8_0 planar": {75: 23.8, 80: 23.7, 86: 23.7, 89: 23.7, 90: 23.9, 120: 23.9},
    "expand8 q5_0 planar": {75: 25.8, 80: 25.6, 86: 25.7, 89: 25.7, 90: 25.9, 120: 25.8},
    "expand8 q4_1 planar": {75: 22.2, 80: 22.1, 86: 22.1, 89: 22.1, 90: 22.3, 120: 21.9},
    "expand8 q4_0 planar": {75: 21.8, 80: 21.7, 86: 21.7, 89: 21.7, 90: 21.9, 120: 21.8},
    "expand8 iq4_nl planar": {75: 26.7, 80: 26.5, 86: 26.6, 89: 26.6, 90: 26.8, 120: 26.4},
    "expand8 q6_k planar": {75: 38.9, 80: 38.8, 86: 38.9, 89: 38.9, 90: 33.9, 120: 33.9},
    "expand8 q3_k planar": {75: 33.0, 80: 32.8, 86: 33.0, 89: 33.0, 90: 33.0, 120: 32.8},
    "expand8 q2_k planar": {75: 27.5, 80: 27.3, 86: 27.6, 89: 27.6, 90: 27.6, 120: 27.6},
    "expand8 q5_1": {75: 30.3, 80: 30.2, 86: 30.2, 89: 30.2, 90: 30.4, 120: 30.1},
    "expand8 q5_k": {75: 31.1, 80: 31.1, 86: 31.1, 89: 31.1, 90: 30.5, 120: 30.5},
    "expand8 q4_k": {75: 28.5, 80: 28.4, 86: 28.5, 89: 28.5, 90: 28.9, 120: 28.9},
    "expand8 iq4_xs": {75: 33.0, 80: 32.9, 86: 33.0, 89: 33.0, 90: 33.5, 120: 33.3},
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
    if "error" in result:
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
