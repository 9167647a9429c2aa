"""The far end of a comparison: does one peer's work when told to, in that peer's environment.

    python -I worker.py RUNNER.py THREADS

Knows torch and the standard library alone. A line of its input that is a JSON object is a task, which takes the place
of the one before; `once` does its work and answers with seconds, by the clock and of the processor, `found` with what
it made of it. What libraries print goes to stderr.

On CUDA a turn is many calls, one after the other. `seconds` is of one of them when the host gives them out as a model
does; `device_seconds` when the device has them all before it begins, so that it waits for nobody.
"""

import importlib.util
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from types import ModuleType

import torch
from torch import Tensor

SAMPLED = 64  # rows of a product that are held against one in float64
WARM = 3  # calls on CUDA: libraries choose their kernels, compilers compile
ENOUGH, FEWEST, MOST = 0.03, 3, 200  # seconds of a turn on CUDA, and calls
QUEUED = 16  # calls that the device has before it begins: no more than its queue holds
CYCLES = 2.0e9  # of a device's clock in a second, or somewhat more
AHEAD = 1.5  # the device is kept busy for so many times the seconds in which the host gives the calls out
SHORTEST, LONGEST = 1e-3, 0.25  # seconds of that

Turn = tuple[Callable[[], dict], Callable[[], dict]]  # (what does the work once and takes the time, tells about it)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        keep_to(int(sys.argv[2]))
        runner, once, found = load(sys.argv[1]), None, None
        for line in sys.stdin:
            if line.startswith("{"):
                once = found = None  # what the last task kept on the device is let go first
                task = json.loads(line)
                device = torch.device(task.get("device", "cpu"))
                once, found = prepared(runner, task)
                answer({"ready": True, "version": version(task["distribution"]), "begun": peak()})
            else:
                answer(once() if line.strip() == "once" else {"memory": memory(device), **found()})
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


def forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, int]:
    """Bytes: the most so far; on a device since the warm-up, as a process has several tasks there."""
    if device.type == "cuda":
        return {"allocated": torch.cuda.max_memory_allocated(device)}
    return {"host_rss": peak()}


@torch.no_grad()
def prepared(runner: ModuleType, task: dict) -> Turn:
    kind = task["kind"]
    if not hasattr(runner, kind):
        raise NotImplementedError(f"has nothing to do with {kind}")
    return KINDS[kind](runner, task)


def timed(call: Callable[[], object], kept: dict, device: torch.device) -> Callable[[], dict]:
    """A call may say itself how long its work took, as `seconds`; the processor's time would be of more than that."""
    if device.type == "cuda":
        return on_cuda(call, kept, device)

    @torch.no_grad()
    def once() -> dict:
        start, used = time.perf_counter(), time.process_time()
        kept["result"] = call()
        seconds, used = time.perf_counter() - start, time.process_time() - used
        if isinstance(kept["result"], dict) and "seconds" in kept["result"]:
            return {"seconds": kept["result"].pop("seconds")}
        return {"seconds": seconds, "cpu_seconds": used}

    return once


@torch.no_grad()
def on_cuda(call: Callable[[], object], kept: dict, device: torch.device) -> Callable[[], dict]:
    """Warms up at once. Between events of the device, none of which the host waits for inside a turn."""
    for _ in range(WARM):
        kept["result"] = call()
    torch.cuda.synchronize(device)
    forget(device)
    start = time.perf_counter()
    kept["result"] = call()
    host = time.perf_counter() - start
    torch.cuda.synchronize(device)
    count = min(MOST, max(FEWEST, int(ENOUGH / max(time.perf_counter() - start, 1e-6))))

    def run(calls: int, busy: float = 0.0) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        if busy:
            torch.cuda._sleep(int(busy * CYCLES))
        begin.record()
        for _ in range(calls):
            kept["result"] = call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    @torch.no_grad()
    def once() -> dict:
        queued = min(count, QUEUED)
        busy = min(LONGEST, max(SHORTEST, AHEAD * host * queued))
        return {"seconds": run(count), "device_seconds": run(queued, busy)}

    return once


def linear(runner: ModuleType, task: dict) -> Turn:
    """The layer's weight is what comes out when an identity matrix goes in, as many rows at once as the input has."""
    given = torch.load(task["material"], weights_only=True)
    device, dtype = torch.device(task["device"]), getattr(torch, task["dtype"])
    layer, nbytes = runner.linear(given, task["how"], device, dtype)
    kept: dict = {}
    weight, x = given["weight"], given["input"].to(device, dtype)
    del given

    @torch.no_grad()
    def found() -> dict:
        some = torch.linspace(0, len(x) - 1, min(len(x), SAMPLED)).long().to(device)
        output, rows = kept["result"][some].double(), x[some].double()
        whole = through(layer, x)
        right = weight.to(device)
        told = {"weight_snr_db": decibels(right, whole), "bytes": nbytes}
        told["output_snr_db"] = decibels(rows @ right.double().T, output)
        return told | {"own_snr_db": decibels(rows @ whole.double().T, output)}

    return timed(lambda: layer(x), kept, device), found


def through(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The layer's weight (N, K) in its own dtype, on the input's device."""
    pieces, columns = [], x.shape[1]
    for i in range(0, columns, len(x)):
        few, count = torch.zeros_like(x), min(len(x), columns - i)
        few[torch.arange(count), i + torch.arange(count)] = 1
        pieces.append(layer(few)[:count].T)
    return torch.cat(pieces, dim=1)


def decibels(right: Tensor, found: Tensor) -> float | None:
    """None where nothing differs."""
    noise = power = 0.0
    for i in range(0, len(right), 1024):
        exact = right[i : i + 1024].double()
        noise += (exact - found[i : i + 1024].double()).square().sum().item()
        power += exact.square().sum().item()
    return 10 * math.log10(power / noise) if noise else None


def step(runner: ModuleType, task: dict) -> Turn:
    """A call gives tensors by name, which go to the task's `out`, and numbers, which are told."""
    kept: dict = {}

    def found() -> dict:
        result = kept["result"]
        tensors = {name: value.cpu() for name, value in result.items() if isinstance(value, Tensor)}
        torch.save(tensors, task["out"])
        return {name: value for name, value in result.items() if not isinstance(value, Tensor)}

    return timed(runner.step(task), kept, torch.device(task["device"])), found


def convert(runner: ModuleType, task: dict) -> Turn:
    return timed(runner.convert(task), {}, torch.device("cpu")), lambda: {"bytes": os.stat(task["target"]).st_size}


KINDS = {"linear": linear, "step": step, "convert": convert}

if __name__ == "__main__":
    main()
