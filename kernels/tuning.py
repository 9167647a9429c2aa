"""A machine measures once which way is fastest, and keeps the table: see `tables`.

For every format one layer of FLUX.1's shape is run with each way that the device has, at powers of two of rows, and the
fastest is noted. Neighbouring numbers of rows with the same winner become one step of the table.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from flux_quant.formats import QuantFormat
from flux_quant.kernels import fallback, tables, triton_path
from flux_quant.kernels.tables import FUSED, TWO_PASS, VECTOR, Step

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SLACK = 0.97  # a way must be so much faster than two passes to replace them

Seconds = Callable[[Callable[[int], object], int], float]  # (call with the number of a copy, copies) -> time of a call
Copies = list[tuple[Tensor, ...]]


def options(fmt: QuantFormat, rows: int, shape: tuple[int, int], x: Tensor) -> Iterator[Step]:
    """Ways that this device has for so many rows, with the configurations worth trying; two passes first."""
    yield Step(rows, TWO_PASS)
    for path in (VECTOR, FUSED):
        if triton_path.refusal(path, fmt, rows, shape, x.dtype, x.device) is None:
            for config in triton_path.candidates(path, fmt, rows, shape, x.device):
                yield Step(rows, path, config)


def measure(
    fmt: QuantFormat, shape: tuple[int, int], copies: Copies, dtype: torch.dtype, seconds: Seconds
) -> dict[int, dict[Step, float]]:
    """rows -> way -> seconds of one product."""
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device=copies[0][0].device, dtype=dtype)
        times = {}
        for step in options(fmt, rows, shape, x):
            try:
                times[step] = seconds(
                    lambda i, x=x, s=step: triton_path.run(s.path, x, fmt, copies[i], None, s.config), len(copies)
                )
            except Exception as error:  # a configuration that this card cannot run is no candidate
                if not fallback.is_tritons(error):
                    raise
        found[rows] = times
    return found


def steps_of(times: Mapping[int, Mapping[Step, float]]) -> tuple[Step, ...]:
    """The table of a format: the winner of each number of rows; beyond the last of them two passes."""
    steps: list[Step] = []
    for rows, by_way in sorted(times.items()):
        winner = min(by_way, key=by_way.get)
        dense = min((t for step, t in by_way.items() if step.path == TWO_PASS), default=float("inf"))
        if by_way[winner] > SLACK * dense:
            winner = next(step for step in by_way if step.path == TWO_PASS)
        if steps and (steps[-1].path, steps[-1].config) == (winner.path, winner.config):
            steps.pop()
        steps.append(Step(rows, winner.path, winner.config))
    if steps and steps[-1].path == TWO_PASS:
        steps.pop()
    return *steps, Step(None, TWO_PASS)


def tune(
    device: torch.device,
    weights: Iterable[tuple[QuantFormat, tuple[int, int], Copies]],
    dtype: torch.dtype,
    seconds: Seconds,
) -> tuple[tables.Table, dict[str, object]]:
    """Measure and store -> the table, and the microseconds behind it. `weights`: formats with copies of a weight."""
    table, evidence = {}, {}
    for fmt, shape, copies in weights:
        name = triton_path.file_format(fmt)
        times = measure(fmt, shape, copies, dtype, seconds)
        table[name] = steps_of(times)
        evidence[name] = {
            rows: {f"{step.path} {step.config}": round(t * 1e6, 1) for step, t in by_way.items()}
            for rows, by_way in times.items()
        }
    tables.store(device, table, evidence)
    return table, evidence
