"""A machine measures once which way is fastest, and keeps the table: see `tables`.

For every format one layer of FLUX.1's shape is run with each way that the device has, at powers of two of rows, and the
fastest is noted. Neighbouring numbers of rows with the same winner become one step of the table.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flux_quant.formats import INT8_ROWS, QuantFormat
from flux_quant.kernels import eight_bit, fallback, tables, triton_path
from flux_quant.kernels.tables import FUSED, TWO_PASS, VECTOR, Step

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MANY = 4608  # of int8 alone: its ways differ with many rows too
SLACK = 0.97  # a way must be so much faster than two passes to replace them

Seconds = Callable[[Callable[[int], object], int], float]  # (call with the number of a copy, copies) -> time of a call
Copies = list[tuple[Tensor, ...]]
Times = dict[int, dict[Step, float]]  # rows -> way -> seconds


def options(fmt: QuantFormat, rows: int, shape: tuple[int, int], x: Tensor) -> Iterator[Step]:
    """Ways that this device has for so many rows, with the configurations worth trying; two passes first."""
    yield Step(rows, TWO_PASS)
    for path in (VECTOR, FUSED):
        if triton_path.refusal(path, fmt, rows, shape, x.dtype, x.device) is None:
            for config in triton_path.candidates(path, fmt, rows, shape, x.device):
                yield Step(rows, path, config)


def measure(fmt: QuantFormat, shape: tuple[int, int], copies: Copies, dtype: torch.dtype, seconds: Seconds) -> Times:
    """rows -> way -> seconds of one product."""
    found = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device=copies[0][0].device, dtype=dtype)
        found[rows] = timed(
            options(fmt, rows, shape, x),
            lambda step, i, x=x: triton_path.run(step.path, x, fmt, copies[i], None, step.config),
            copies,
            seconds,
        )
    return found


def int8_options(rows: int, shape: tuple[int, int], device: torch.device) -> Iterator[Step]:
    """Ways of an int8 product, each with all its tiles."""
    from flux_quant.kernels import int8, int8_tma

    capability = torch.cuda.get_device_capability(device)
    for way, reason in eight_bit.int8_obstacles(rows, shape, device).items():
        if reason is None:
            usable = int8.configs_for(capability, rows)
            tiles = {eight_bit.TMA: int8_tma.CONFIGS, eight_bit.TRITON: int8.table_for(capability)}.get(way, (None,))
            for number, tile in enumerate(tiles):
                if way != eight_bit.TRITON or tile in usable:
                    yield Step(rows, way, None if tile is None else number)


def measure_int8(shape: tuple[int, int], copies: Copies, dtype: torch.dtype, seconds: Seconds) -> Times:
    """As `measure`, for int8 rows; activations are quantized each time."""
    found = {}
    for rows in (*ROWS, MANY):
        x = torch.randn(rows, shape[1], device=copies[0][0].device, dtype=dtype)
        found[rows] = timed(
            int8_options(rows, shape, x.device),
            lambda step, i, x=x: eight_bit.linear(
                x, INT8_ROWS, copies[i], None, eight_bit.Product(step.path, "", step.config)
            ),
            copies,
            seconds,
        )
    return found


def timed(
    steps: Iterable[Step], run: Callable[[Step, int], object], copies: Copies, seconds: Seconds
) -> dict[Step, float]:
    """Seconds of each way that the card of these copies can go, whichever card is the current one."""
    times = {}
    for step in steps:
        try:
            with fallback.current(copies[0][0].device):
                times[step] = seconds(partial(run, step), len(copies))
        except Exception as error:  # a configuration that does not run here is no candidate
            if not fallback.is_refusal(error):
                raise
    return times


def int8_steps_of(times: Times) -> tuple[Step, ...]:
    """The winner of each number of rows; the last one has no limit."""
    steps: list[Step] = []
    for rows, by_way in sorted(times.items()):
        winner = min(by_way, key=by_way.get)
        if steps and (steps[-1].path, steps[-1].config) == (winner.path, winner.config):
            steps.pop()
        steps.append(Step(rows, winner.path, winner.config))
    return *steps[:-1], replace(steps[-1], rows=None)


def steps_of(times: Times) -> tuple[Step, ...]:
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
    enough: Callable[[], bool] = lambda: False,
) -> tuple[tables.Table, dict[str, object]]:
    """Measure and store, format by format -> the table, and the microseconds behind it.

    `weights`: formats, shapes and copies of a weight; int8 rows among them if int8 is to be tuned. No format is begun
    once it is `enough`: what was measured by then is the table.
    """
    table, evidence = {}, {}
    for fmt, shape, copies in weights:
        if fmt is INT8_ROWS:
            name, times = "int8", measure_int8(shape, copies, dtype, seconds)
            table[name] = int8_steps_of(times)
        else:
            name, times = triton_path.file_format(fmt), measure(fmt, shape, copies, dtype, seconds)
            table[name] = steps_of(times)
        evidence[name] = {rows: microseconds(by_way) for rows, by_way in times.items()}
        tables.store(device, {name: table[name]}, {name: evidence[name]})
        if enough():
            break
    return table, evidence


def microseconds(by_way: Mapping[Step, float]) -> dict[str, float]:
    return {f"{step.path} {step.config}": round(seconds * 1e6, 1) for step, seconds in by_way.items()}
