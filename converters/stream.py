"""Reading, computing and writing at the same time: one thread reads ahead, one writes behind, both bounded in bytes.

Neither knows what a tensor means. An error in a thread is raised where its results are used; leaving the context, for
whatever reason, ends both threads before anything else happens.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import Tensor

from flux_quant.converters.container import as_bytes

AHEAD_BYTES = BEHIND_BYTES = 1 << 28
PAGE = 4096

Item = TypeVar("Item")
Parts = tuple[Tensor, ...]


class Budget:
    """Bytes on their way. `take` waits until they fit; one item always does."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.closed = limit, 0, False
        self.changed = threading.Condition()

    def take(self, nbytes: int) -> bool:
        """False if it was closed meanwhile."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or not self.used or self.used + nbytes <= self.limit)
            self.used += nbytes
            return not self.closed

    def give(self, nbytes: int) -> None:
        with self.changed:
            self.used -= nbytes
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class Worker(Generic[Item]):
    """A thread with a budget, and the error that ended it."""

    def __init__(self, work: Callable[[], None], limit: int) -> None:
        self.budget, self.queue, self.error = Budget(limit), queue.SimpleQueue(), None
        self.thread = threading.Thread(target=self.guarded, args=(work,), daemon=True)

    def guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised again in the main thread
            self.error = error
            self.budget.close()

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def nbytes(parts: Parts) -> int:
    return sum(part.nbytes for part in parts)


def touch(parts: Parts) -> None:
    """Bring the pages of mapped tensors into memory."""
    for part in parts:
        if part.device.type == "cpu" and part.is_contiguous():
            as_bytes(part)[::PAGE].sum()


@contextmanager
def read_ahead(items: Sequence[Item], read: Callable[[Item], Parts]) -> Iterator[Iterable[tuple[Item, Parts]]]:
    """Every item with what `read` gives for it, in order; the next ones are read while this one is worked on."""

    def work() -> None:
        for item in items:
            parts = read(item)
            if not worker.budget.take(nbytes(parts)):
                return
            touch(parts)
            worker.queue.put((item, parts))
        worker.queue.put(None)

    def results() -> Iterator[tuple[Item, Parts]]:
        while True:
            while True:
                worker.check()
                try:
                    found = worker.queue.get(timeout=0.1)
                    break
                except queue.Empty:
                    continue
            if found is None:
                return
            size = nbytes(found[1])
            yield found
            del found
            worker.budget.give(size)

    worker = Worker(work, AHEAD_BYTES)
    worker.thread.start()
    try:
        yield results()
    finally:
        worker.budget.close()
        worker.thread.join()


class WriteBehind:
    """Hands (arguments, parts) to a function in another thread, in order."""

    def __init__(self, write: Callable[..., None]) -> None:
        self.write = write
        self.worker: Worker = Worker(self.work, BEHIND_BYTES)

    def work(self) -> None:
        while (job := self.worker.queue.get()) is not None:
            if not self.worker.budget.closed:
                self.write(*job)
            self.worker.budget.give(nbytes(job[1]))
            del job

    def put(self, name: str, parts: Parts, note: object) -> None:
        self.worker.budget.take(nbytes(parts))
        self.worker.check()
        self.worker.queue.put((name, parts, note))

    def __enter__(self) -> "WriteBehind":
        self.worker.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits until everything is written; after an error, nothing more is."""
        if kind is not None:
            self.worker.budget.close()
        self.worker.queue.put(None)
        self.worker.thread.join()
        if kind is None:
            self.worker.check()
