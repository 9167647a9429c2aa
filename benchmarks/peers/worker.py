"""The far end of a comparison: does one peer's work when told to, in that peer's environment.

    python -I worker.py RUNNER.py THREADS

Knows torch and the standard library alone. The first line of its input is the task as JSON; then `once` does the work
and answers with seconds, by the clock and of the processor, `found` with what it made of it. What libraries print goes
to stderr.
"""

import importlib.util
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import torch

CHUNK = 512  # rows of an identity matrix that are pushed through a layer at once


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        keep_to(int(sys.argv[2]))
        task = json.loads(sys.stdin.readline())
        once, found = prepared(load(sys.argv[1]), task)
        begun = peak()
        answer({"ready": True, "version": version(task["distribution"]), "begun": begun})
        for line in sys.stdin:
            answer(once() if line.strip() == "once" else {**found(), "peak": peak()})
    except Exception as error:
        text = " ".join(str(error).split()) or "without a word"
        answer({"error": f"{type(error).__name__}: {text[:300]}"})


def keep_to(cores: int) -> None:
    """Threads of every library that asks the system how many cores there are."""
    torch.set_num_threads(cores)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("runner", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak() -> int:
    """Bytes: the largest resident size so far."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
    except OSError:
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size << 10


@torch.no_grad()
def prepared(runner: ModuleType, task: dict) -> tuple[Callable[[], dict], Callable[[], dict]]:
    """(what does the work once and takes the time, what tells about it)"""
    kind = task["kind"]
    if not hasattr(runner, kind):
        raise NotImplementedError(f"has nothing to do with {kind}")
    return KINDS[kind](runner, task)


def timed(call: Callable[[], object], kept: dict, device: torch.device) -> Callable[[], dict]:
    """A call may say itself how long its work took, as `seconds`; the processor's time would be of more than that."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    @torch.no_grad()
    def once() -> dict:
        wait()
        start, used = time.perf_counter(), time.process_time()
        kept["result"] = call()
        wait()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        if isinstance(kept["result"], dict) and "seconds" in kept["result"]:
            return {"seconds": kept["result"].pop("seconds")}
        return {"seconds": seconds, "cpu_seconds": used}

    return once


def linear(runner: ModuleType, task: dict) -> tuple[Callable[[], dict], Callable[[], dict]]:
    """The layer's output on the task's input, and its weight as it comes out of the layer, go to the task's `out`."""
    given = torch.load(task["material"], weights_only=True)
    device, dtype = torch.device(task["device"]), getattr(torch, task["dtype"])
    layer, nbytes = runner.linear(given, task["how"], device, dtype)
    kept: dict = {}
    (rows, columns), x = given["weight"].shape, given["input"].to(device, dtype)
    del given

    @torch.no_grad()
    def found() -> dict:
        weight = torch.empty(rows, columns)
        for i in range(0, columns, CHUNK):
            few = torch.zeros(min(CHUNK, columns - i), columns, device=device, dtype=dtype)
            few[torch.arange(len(few)), i + torch.arange(len(few))] = 1
            weight[:, i : i + len(few)] = layer(few).float().T
        torch.save({"output": kept["result"].float().cpu(), "weight": weight}, task["out"])
        return {"bytes": nbytes}

    return timed(lambda: layer(x), kept, device), found


def step(runner: ModuleType, task: dict) -> tuple[Callable[[], dict], Callable[[], dict]]:
    """A call gives tensors by name, which go to the task's `out`, and numbers, which are told."""
    kept: dict = {}

    def found() -> dict:
        result = kept["result"]
        torch.save({name: value for name, value in result.items() if isinstance(value, torch.Tensor)}, task["out"])
        return {name: value for name, value in result.items() if not isinstance(value, torch.Tensor)}

    return timed(runner.step(task), kept, torch.device(task["device"])), found


def convert(runner: ModuleType, task: dict) -> tuple[Callable[[], dict], Callable[[], dict]]:
    return timed(runner.convert(task), {}, torch.device("cpu")), lambda: {"bytes": os.stat(task["target"]).st_size}


KINDS = {"linear": linear, "step": step, "convert": convert}

if __name__ == "__main__":
    main()
