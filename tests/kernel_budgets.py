"""What the compiled kernels are held to: no spilled registers, no byte loads, and a budget of instructions per weight.

The aims, from the rates of the cards, stand in `kernel_cases`. Where a kernel is honestly above its aim, `GAPS` has
what was measured; the budget is then that and a tenth, so that nothing grows unnoticed and the gap stays in sight.
"""

from collections.abc import Iterator, Sequence

TRITON = "3.6.0"  # whose output was measured; with another version counts may be SLACK times as high
SLACK = 1.15
ROOM = 1.1
REGISTERS = 255  # of a thread, on every card; more do not exist
BYTES = {"U8": 1, "U16": 2, "32": 4, "64": 8, "128": 16, "256": 32}  # of a load or store, per thread

# (family, what) -> thread-instructions per weight, the most of all architectures.
GAPS: dict[tuple[str, str], float] = {}

Result = dict[str, object]  # a line of compile_kernels.py


def budget(result: Result) -> float | None:
    """Thread-instructions per weight that this case may take; None if it has no limit."""
    if result["aim"] is None:
        return None
    measured = GAPS.get((result["family"], result["what"]))
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
    if "U8" in result["loads"]:
        yield f"{result['loads']['U8']} loads of single bytes"
    wide = per_weight(result, {width: count for width, count in result["loads"].items() if BYTES[width] >= 8})
    if wide < result["wide"]:
        yield f"{wide:.2f} bytes per weight in loads of 64 bits or more, should be {result['wide']}"
    if result["mma"] and result["mma"] not in result["mmas"]:
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


LINE = "{:30} {:>4} {:>5} {:>6} {:>12} {:>6} {:>5} {:>5} {:>5}  {:26} {:14} {:12} {}"


def row(result: Result) -> str:
    complaint = "; ".join(complaints(result))
    if "error" in result:
        return f"{result['name']:30} {complaint}"
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
    return LINE.format(result["name"], *sizes, *numbers, *counts, f"<- {complaint}" if complaint else "").rstrip()
