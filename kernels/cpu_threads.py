"""Loops in numba and the threads that run them. They release the interpreter's lock, so ordinary threads will do."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from zlib import crc32

import torch

Spread = Callable[[Callable, Iterable], Iterable]  # `map`, by several threads


@contextmanager
def threads_for(work: int, least: int) -> Iterator[Spread]:
    """A `map` by as many threads as torch uses and the work is worth, at `least` so much of it for each.

    Meanwhile torch itself uses one: its idle threads would wait in a loop, on the cores that ours need. That number
    belongs to the process, so one caller at a time has the threads; another one waits, as it would for the cores. (A
    Python thread that calls torch for the first time in such a moment takes the one for its own number.)
    """
    if min(torch.get_num_threads(), -(-work // least)) <= 1:
        yield map
        return
    with turns(os.getpid()):
        own = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield partial(spread_out, pool(min(own, -(-work // least)), os.getpid()))
        finally:
            torch.set_num_threads(own)


def spread_out(threads: ThreadPoolExecutor, function: Callable, tasks: Iterable) -> list:
    """The results of `function` for all tasks, or the first error, and no task runs on after that."""
    futures = [threads.submit(function, task) for task in tasks]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@cache
def turns(process: int) -> Lock:
    return Lock()


@cache
def pool(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay: a new one costs the matrix product milliseconds. A forked process has none of its parent's."""
    return ThreadPoolExecutor(count)


@cache
def compiled(module: str, name: str) -> Callable:
    """A loop that numba compiles at its first call and keeps on disk.

    numba looks at the file of the loop only, so the name it is kept under holds a checksum of all files it is made of.
    """
    kernel = getattr(import_module(f"flux_quant.kernels.{module}"), name)
    stamp = crc32(b"".join(path.read_bytes() for path in sources(module)))
    kernel.py_func.__qualname__ = f"{name}_{stamp:08x}"
    with suppress(RuntimeError):  # no folder that can be written: compiled again by every process
        kernel.enable_caching()
    return kernel


def sources(module: str) -> list[Path]:
    """The file of a module of this package and those of the modules of this package that it imports, and so on."""
    left, found = [module], set()
    while left:
        path = Path(__file__).with_name(f"{left.pop()}.py")
        if path not in found:
            found.add(path)
            left += re.findall(r"^from flux_quant\.kernels\.(\w+) import", path.read_text(), re.MULTILINE)
    return sorted(found)
