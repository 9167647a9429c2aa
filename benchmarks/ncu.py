"""What NVIDIA's Nsight Compute (`ncu --csv`) prints, as rows: a line per kernel and metric in, a row per kernel out.

Its columns by name: "ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value" (the manual, "Output Pages").
Lines of its own (==PROF==, ==WARNING==) and of the program come between. Numbers have commas between thousands.
"""

import csv
from collections.abc import Iterator

Row = dict[str, object]
Counter = tuple[str, str, str, str, float]  # number of the launch, kernel, metric, unit, value

SHARES = {  # metric -> our name; in percent of the peak
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor instructions",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
}
PLAIN = {"launch__registers_per_thread": "registers", "launch__occupancy_limit_registers": "programs by registers"}
TIME = "gpu__time_duration.sum"
SECONDS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3, "second": 1.0}
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
REASONS = (
    "long_scoreboard", "short_scoreboard", "barrier", "math_pipe_throttle", "mio_throttle", "lg_throttle", "wait",
    "not_selected", "no_instruction", "dispatch_stall", "gmma", "sleeping", "membar", "drain",
)  # fmt: skip
STALLS = {STALL.format(reason): reason for reason in REASONS}
MOST_STALLS = 3
ESSENTIAL = (TIME, *list(SHARES)[:2], *list(PLAIN)[:1])  # that every card has
METRICS = (TIME, *SHARES, *PLAIN, *STALLS)


def counters(text: str) -> Iterator[Counter]:
    """Of everything that ncu printed; what has no number (n/a, a metric that this card lacks) is passed over."""
    lines = [line for line in text.splitlines() if not line.startswith("==")]
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    for row in csv.DictReader(lines[first:]):
        try:
            value = float(row["Metric Value"].replace(",", ""))
            number, kernel, metric, unit = (row[key] for key in ("ID", "Kernel Name", "Metric Name", "Metric Unit"))
        except (KeyError, AttributeError, ValueError):
            continue
        if number is not None and number.isdigit():
            yield number, kernel, metric, unit or "", value


def of_kernels(found: Iterator[Counter]) -> list[Row]:
    """A row of each launch, in their order: shares in percent, seconds, and the reasons to wait of most warps."""
    rows: dict[str, Row] = {}
    stalls: dict[str, dict[str, float]] = {}
    for number, kernel, metric, unit, value in found:
        row = rows.setdefault(number, {"kernel": kernel.split("(")[0][:80]})
        if metric in SHARES or metric in PLAIN:
            row[SHARES.get(metric) or PLAIN[metric]] = round(value, 1)
        elif metric == TIME and unit in SECONDS:
            row["us"] = round(value * SECONDS[unit] * 1e6, 2)
        elif metric in STALLS:
            stalls.setdefault(number, {})[STALLS[metric]] = value
    for number, reasons in stalls.items():
        most = sorted(reasons.items(), key=lambda one: -one[1])[:MOST_STALLS]
        rows[number]["stalls"] = ", ".join(f"{reason} {value:.1f}" for reason, value in most if value > 0)
    return list(rows.values())
