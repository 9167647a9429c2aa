"""The regression guard: bytes and copies of a step, allocations, operators, launches, memory of a conversion.

Timings say nothing on a busy machine; these counts are the same on all of them. `guard_counts.py` says what each means
and prints them; `guard.json` has the budgets, which are what was counted. Whoever makes something better lowers them,
whoever makes it worse on purpose says so in the commit that raises them. Instructions of kernels: test_kernel_budgets.
"""

import json
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from guard_counts import BUDGETS, Counting, complaints, conversion, operators, streamed
from torch import nn

from flux_quant.model import GELU
from flux_quant.streaming import BlockStreamer

budgets = json.loads(BUDGETS.read_text())
COUNTED = budgets["torch"]  # by this version; others may do the same with other operators
SLACK = 1.25
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the largest resident size is Linux's")


def found(counts: Iterator[tuple[str, float]], allowed: dict[str, float] = budgets["counts"]) -> list[str]:
    exact = torch.__version__.startswith(COUNTED)
    loose = {name: most * (1 if exact or "launches" in name else SLACK) for name, most in allowed.items()}
    return list(complaints(dict(counts), loose))


def check(counts: Iterator[tuple[str, float]]) -> None:
    worse = found(counts)
    assert not worse, "\n" + "\n".join(worse)


def test_streaming():
    check(streamed())


def test_operators_and_allocations():
    check(operators())


@on_linux
@pytest.mark.slow
def test_memory_of_a_conversion():
    check(conversion())


def test_every_budget_is_counted():
    """And is no more generous than a tenth; that of a process's memory has a quarter of room."""
    counts = {**dict(streamed()), **dict(operators())}
    assert {*counts, "peak MB of a conversion of 636 to Q8_0"} == set(budgets["counts"])
    if torch.__version__.startswith(COUNTED):
        for name, count in counts.items():
            assert budgets["counts"][name] <= 1.1 * count, f"{name} is {count:g}: lower its budget"


class InHalves(Counting):
    """Mutant: a block is two copies."""

    def copy(self, to, source):
        middle = len(source) // 2
        super().copy(to[:middle], source[:middle])
        super().copy(to[middle:], source[middle:])


class Twice(Counting):
    """Mutant: every byte crosses the link twice."""

    def copy(self, to, source):
        self.nbytes += source.nbytes
        super().copy(to, source)


class Allocates(BlockStreamer):
    """Mutant: a new slot for every load."""

    def _take_slot(self, ring, block):
        self.device.allocate(ring.slots[0].buffer.numel())
        return super()._take_slot(ring, block)


STREAMERS = {
    "copies per block": dict(device=InHalves),
    "bytes over weights": dict(device=Twice),
    "device allocations": dict(streamer=Allocates),
}


@pytest.mark.parametrize("words", STREAMERS)
def test_streaming_mutants_are_found(words: str):
    worse = found(streamed(**STREAMERS[words]))
    assert worse and all(words in line for line in worse)


class Cloned(nn.Module):
    """Mutant: the input is copied on its way in."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.clone())


def with_copies(model: nn.Module) -> None:
    for block in model.double_blocks:
        block.img_mlp[0] = Cloned(block.img_mlp[0])


def with_another_launch(model: nn.Module) -> None:
    for block in model.double_blocks:
        block.img_mlp[1] = nn.Sequential(GELU(), GELU())


MUTANTS: dict[str, Callable[[nn.Module], None]] = {"storages": with_copies, "launches": with_another_launch}


@pytest.mark.skipif(not torch.__version__.startswith(COUNTED), reason=f"budgets are exact with torch {COUNTED}")
@pytest.mark.parametrize("words", MUTANTS)
def test_mutants_of_blocks_are_found(words: str):
    worse = found(operators(MUTANTS[words]))
    assert any(words in line and "double block" in line for line in worse)
    assert not any("single block" in line for line in worse)


HOARD = """
from flux_quant.converters import checkpoint
checkpoint.FileReader.forget = lambda self, name: None
"""


@on_linux
@pytest.mark.slow
def test_a_conversion_that_keeps_what_it_read_is_found():
    assert found(conversion(HOARD))
