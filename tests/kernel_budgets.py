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
    "dequant fp8": {61: 10.5},
    "dequant q5_1": {61: 12.2, 75: 10.4},
    "dequant q5_k": {61: 10.6, 75: 10.1},
    "dequant iq4_xs": {61: 11.1, 75: 11.1, 90: 10.2, 120: 10.1},
    "dequant fp8_rows": {61: 13.3, 75: 12.0, 80: 10.9, 86: 11.0},
    "dequant q5_0": {75: 10.4},
    "dequant iq4_nl": {75: 11.2, 86: 10.3, 90: 10.4},
    "dequant q6_k": {75: 11.4, 86: 10.4, 90: 10.4},
    "dequant q3_k": {75: 17.2, 86: 16.2, 90: 15.8},
    "dequant q2_k": {75: 10.6},
    "expand8 q8_0 planar": {75: 24.4, 86: 24.2, 90: 24.5, 120: 24.6},
    "expand8 q5_0 planar": {75: 22.5, 86: 22.5, 90: 22.7, 120: 22.6},
    "expand8 q4_1 planar": {75: 21.6, 86: 21.5, 90: 21.7, 120: 21.7},
    "expand8 q4_0 planar": {75: 21.1, 86: 21.0, 90: 21.2, 120: 21.1},
    "expand8 iq4_nl planar": {75: 23.9, 86: 23.6, 90: 23.9, 120: 23.9},
    "expand8 q6_k planar": {75: 32.1, 86: 32.0, 90: 32.3, 120: 32.2},
    "expand8 q3_k planar": {75: 27.9, 86: 27.8, 90: 27.1, 120: 26.9},
    "expand8 q2_k planar": {75: 25.6, 86: 25.5, 90: 24.7, 120: 24.6},
    "expand8 q5_1": {75: 25.6, 86: 25.5, 90: 25.7, 120: 25.7},
    "expand8 q5_k": {75: 27.6, 86: 27.6, 90: 27.2, 120: 27.3},
    "expand8 q4_k": {75: 27.9, 86: 27.9, 90: 28.3, 120: 28.3},
    "expand8 iq4_xs": {75: 26.4, 86: 26.4, 90: 26.1, 120: 26.1},
    "rows8 int8 3072": {75: 22.2, 80: 22.5, 86: 22.6, 89: 22.6, 90: 22.4, 120: 22.8},
    "rows8 int8 15360": {75: 26.4, 80: 26.8, 86: 26.9, 89: 26.9, 90: 26.7, 120: 27.0},
    "vector iq4_nl planar M1": {75: 6.7, 90: 6.7},
    "vector iq4_nl planar M2": {75: 7.9},
    "vector q6_k planar M2": {75: 9.1},
    "vector q3_k planar M1": {75: 5.9, 90: 6.1},
    "vector q3_k planar M2": {75: 8.9, 86: 9.4},
    "vector q2_k planar M1": {75: 3.8, 90: 4.0},
    "vector q2_k planar M2": {75: 6.3, 86: 6.9},
    "vector q5_k M2": {75: 8.5},
    "vector iq4_xs M1": {75: 7.7, 80: 8.0, 90: 8.1},
    "vector iq4_xs M2": {75: 10.9, 86: 11.9},
    "pointwise modulated_norm": {80: 28.6, 86: 28.6, 89: 28.6, 90: 29.4, 120: 29.4},
    "fused q5_0 planar M512": {90: 5.8},
    "fused iq4_nl planar M512": {90: 7.0},
    "fused q6_k planar M512": {90: 6.0},
    "fused q3_k planar M512": {90: 6.8},
    "fused q5_1 M512": {90: 6.0},
    "fused q5_k M512": {90: 5.8},
    "fused iq4_xs M512": {90: 7.5},
    "fused q4_k tiles": {90: 5.9},
    "fused q8_0 planar tiles": {90: 6.0},
    "vector q5_0 planar M1": {90: 4.9},
    "vector q6_k planar M1": {90: 5.9},
    "vector q5_1 M1": {90: 5.5},
    "vector q5_k M1": {90: 4.9},
    "fused q5_0 M512": {86: 9.4},
    "fused iq4_nl M512": {86: 8.9},
    "fused q3_k M512": {86: 11.2},
    "vector q3_k M1": {86: 15.1},
    "vector q2_k M1": {86: 7.7},
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
    """Bytes per weight that are moved by loads or stores, counted by width; 0 where there are no weights."""
    if result["weights"] is None:
        return 0
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
    rates = result.get("per_weight"), limit, result["aim"], result.get("slow"), per_weight(result, result["loads"])
    numbers = ["-" if rate is None else f"{rate:.2f}" for rate in rates]
    counts = (
        " ".join(f"{name}x{count}" for name, count in sorted(result[key].items()))
        for key in ("loads", "stores", "mmas")
    )
    sizes = result["registers"], result["stack_bytes"], result["shared_bytes"]
    return LINE.format(result["label"], *sizes, *numbers, *counts, f"<- {complaint}" if complaint else "").rstrip()
