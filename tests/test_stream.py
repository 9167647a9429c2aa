"""Reading ahead and writing behind: order, bounds, errors on both sides."""

import threading

import pytest
import torch

from flux_quant.converters import stream
from flux_quant.converters.stream import WriteBehind, read_ahead

SIZE = 1000  # bytes of an item


def item(number: int) -> tuple[torch.Tensor]:
    return (torch.full((SIZE,), number % 256, dtype=torch.uint8),)


@pytest.fixture(autouse=True)
def small_budget(monkeypatch):
    monkeypatch.setattr(stream, "AHEAD_BYTES", 3 * SIZE)
    monkeypatch.setattr(stream, "BEHIND_BYTES", 3 * SIZE)


def test_everything_in_order():
    written = []
    with read_ahead(range(50), item) as reading, WriteBehind(lambda *job: written.append(job)) as writing:
        for number, parts in reading:
            writing.put(str(number), parts, number)
    assert [name for name, *_ in written] == [str(n) for n in range(50)]
    assert all(parts[0][0] == note for _, parts, note in written)


def test_reading_stays_within_its_budget():
    """While the first item is worked on, no more than the budget is read; one item always may be."""
    started: list[int] = []
    limit = threading.Event()

    def read(number: int) -> tuple[torch.Tensor]:
        started.append(number)
        if len(started) > 4:  # three that fit and one that waits for room
            limit.set()
        return item(number)

    with read_ahead(range(50), read) as reading:
        next(iter(reading))
        assert not limit.wait(0.3) and len(started) <= 4


def test_an_item_larger_than_the_budget_passes(monkeypatch):
    monkeypatch.setattr(stream, "AHEAD_BYTES", 10)
    monkeypatch.setattr(stream, "BEHIND_BYTES", 10)
    written = []
    with read_ahead(range(3), item) as reading, WriteBehind(lambda name, *_: written.append(name)) as writing:
        for number, parts in reading:
            writing.put(number, parts, None)
    assert written == [0, 1, 2]


class Broken(Exception):
    pass


def fails_at(number: int):
    def read(found: int) -> tuple[torch.Tensor]:
        if found == number:
            raise Broken
        return item(found)

    return read


def test_errors_of_the_reader_arrive():
    seen = []
    with pytest.raises(Broken), read_ahead(range(50), fails_at(7)) as reading:
        for number, _ in reading:
            seen.append(number)
    assert seen == list(range(len(seen))) and len(seen) <= 7


@pytest.mark.parametrize("number", [0, 7, 49])
def test_errors_of_the_writer_arrive(number):
    def write(name: int, *_: object) -> None:
        if name == number:
            raise Broken

    with pytest.raises(Broken), WriteBehind(write) as writing:
        for i in range(50):
            writing.put(i, item(i), None)


def test_leaving_early_ends_both_threads():
    before = threading.active_count()
    nothing = WriteBehind(lambda *job: None)
    with pytest.raises(Broken), read_ahead(range(10**6), item) as reading, nothing as writing:
        for number, parts in reading:
            writing.put(number, parts, None)
            assert writing.worker.thread.is_alive() and threading.active_count() > before
            raise Broken
    assert threading.active_count() == before
