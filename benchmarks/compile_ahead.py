"""Compile the kernels of the GPU suite's measurements before anything is timed, on all cores and without the card.

    python -I -m flux_quant.benchmarks.compile_ahead [--only tune,step] [--seconds 80] [--jobs 12] [--capability 9.0]

Triton compiles at the first launch, on one core, for a second and more: hundreds of them would take the time that the
measurements have. Processes walk what the measurements will launch on tensors without data (`kernels.ahead`), so that
Triton's cache on disk holds everything when the card is opened. The most important come first; stops at --seconds with
what there is. Without a card: --capability, with H200's multiprocessors for 9.0.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks import kernels as kernel_bench
from flux_quant.benchmarks import products8, step, tune
from flux_quant.benchmarks.machine import write_result
from flux_quant.benchmarks.random_weights import DEV, on_device
from flux_quant.formats import FORMATS, IN_MEMORY, INT8_ROWS, QuantFormat
from flux_quant.linear import QuantLinear
from flux_quant.model import Flux

if TYPE_CHECKING:
    from flux_quant.kernels.ahead import Seen

META, CUDA = torch.device("meta"), torch.device("cuda")
SHARES = 4  # processes that divide the launches of one walk
WORKERS = 12
H200 = ("NVIDIA H200", 132, 150_000_000_000)  # name, multiprocessors, bytes: where no card is asked
SIZES = (1024, 512)
BATCHES = (1, 4)
STEPS = ("bf16", *dict.fromkeys(name.split("+")[0] for name in step.FORMATS))
LINEARS = ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (21504, 3072), (3072, 15360))  # of a FLUX.1 block


def weight(fmt: QuantFormat, shape: tuple[int, int]) -> list[Tensor]:
    return [torch.empty(part.shape(shape), dtype=part.dtype, device=META) for part in fmt.parts]


def activations(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.bfloat16, device=META)


def walk_tune(name: str) -> None:
    """All configurations that the tuner tries of a format."""
    from flux_quant.kernels import tuning

    def once(call: Callable[[int], object], copies: int) -> float:
        call(0)
        return 1.0

    if name == "int8":
        tuning.measure_int8(tune.LAYER, [weight(INT8_ROWS, tune.LAYER)], torch.bfloat16, once)
    else:
        fmt = kernel_bench.formats(CUDA)[name]
        tuning.measure(fmt, tune.LAYER, [weight(fmt, tune.LAYER)], torch.bfloat16, once)


def walk_kernels(name: str) -> None:
    """Unpacking in both orders, and linear layers as the table of ways has them now."""
    from flux_quant.kernels import dispatch

    fmt = kernel_bench.formats(CUDA)[name]
    for order in {fmt, kernel_bench.file_form(fmt)}:
        dispatch.dequantize(order, weight(order, kernel_bench.UNPACKED), torch.bfloat16)
    for shape, counts in kernel_bench.LAYERS.items():
        for rows in counts if fmt.fits(shape) else ():
            dispatch.run_linear(activations(rows, shape[1]), fmt, weight(fmt, shape), None)


def walk_step(name: str) -> None:
    """A step of one double and one single block, at the sizes and batches that are measured."""
    config = FluxConfig(**DEV, double_blocks=1, single_blocks=1)
    model = flux(name, config)
    for size in SIZES:
        arguments = step.inputs(config, size, step.WORDS, META, torch.bfloat16)
        for batch in BATCHES:
            model(*(x.repeat(batch, *[1] * (x.ndim - 1)) if i < 4 or i == 6 else x for i, x in enumerate(arguments)))


def walk_eight_bit(_: str) -> None:
    """8-bit products of a block's layers, with a bias and without, and the rounding of activations for them."""
    from flux_quant.kernels import eight_bit, rows8

    packed = on_device("q4_k", CUDA)
    for shape in dict.fromkeys((*products8.LAYERS, *LINEARS)):
        bias = torch.empty(shape[0], dtype=torch.bfloat16, device=META)
        for rows in (4608, 4096, 512):
            x = activations(rows, shape[1])
            for way in eight_bit.int8_obstacles(rows, shape, META):
                if way == eight_bit.INT_MM:
                    continue  # no kernel of ours but `finish`, which walk_tune has
                for some in (None, bias):
                    eight_bit.linear(x, INT8_ROWS, weight(INT8_ROWS, shape), some, eight_bit.Product(way, ""))
            mixed = IN_MEMORY[f"{packed.name} as int8"]
            eight_bit.linear(x, mixed, weight(mixed, shape), bias, eight_bit.int8_product(rows, shape, META))
            rows8.quantize_fp8(x, "row")
            rows8.quantize_fp8(x, "tensor")


WALKS: dict[str, Callable[[str], None]] = {
    "step": walk_step,
    "kernels": walk_kernels,
    "eight_bit": walk_eight_bit,
    "tune": walk_tune,
}


@dataclass(frozen=True)
class Job:
    walk: str
    name: str
    share: tuple[int, int]


@dataclass
class Done:
    """Of one job, or of all of them."""

    kernels: Counter[str] = field(default_factory=Counter)
    hashes: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0


def jobs(walks: Sequence[str]) -> list[Job]:
    """The most important first: those of a step, then formats in the tuner's order."""
    names = {
        "step": list(STEPS),
        "kernels": kernel_bench.in_order(kernel_bench.formats(CUDA)),
        "eight_bit": [""],
        "tune": kernel_bench.in_order([*kernel_bench.formats(CUDA), "int8"]),
    }
    return [Job(walk, name, (i, SHARES)) for walk in walks for name in names[walk] for i in range(SHARES)]


def flux(name: str, config: FluxConfig) -> Flux:
    """The engine without data, its linears in a format as a card holds them."""
    with META:
        model = Flux(config).to(torch.bfloat16)
        for path, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                shape = tuple(layer.weight.shape)
                fmt = on_device(name, CUDA) if FORMATS[name].fits(shape) else FORMATS["bf16"]
                bias = torch.empty(shape[0], dtype=torch.bfloat16)
                model.set_submodule(path, QuantLinear.from_parts(fmt, weight(fmt, shape), bias))
    return model.eval()


seen: "Seen | None" = None  # of this process, once it compiles


def begin(name: str, capability: tuple[int, int], multiprocessors: int, memory: int) -> None:
    global seen
    from flux_quant.kernels import ahead

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a device
    torch.set_num_threads(1)
    seen = ahead.compile_for(ahead.Card(name, capability, multiprocessors, memory))


@torch.inference_mode()
def work(job: Job) -> Done:
    start, seen.share = time.perf_counter(), job.share
    before, errors = set(seen.kernels), len(seen.errors)
    try:
        WALKS[job.walk](job.name)
    except Exception as error:  # what cannot be walked is compiled when it is launched
        seen.errors.append(f"{job.walk} {job.name}: {type(error).__name__}: {error}")
    new = {key: kernel for key, kernel in seen.kernels.items() if key not in before}
    return Done(Counter(new.values()), set(new), seen.errors[errors:], time.perf_counter() - start)


def compile_all(
    card: tuple[str, tuple[int, int], int, int], walks: Sequence[str], workers: int, seconds: float
) -> Iterator[Done]:
    """What each job has compiled, as they end; those that have not ended in time are left."""
    context, end = multiprocessing.get_context("spawn"), time.monotonic() + seconds
    pool = ProcessPoolExecutor(workers, context, begin, card)
    try:
        futures = [pool.submit(work, job) for job in jobs(walks)]
        for future in as_completed(futures, timeout=max(0.0, end - time.monotonic())):
            yield future.result()
    except OutOfTime:
        print(f"stopped after {seconds:.0f} s: {sum(not f.done() for f in futures)} of {len(futures)} jobs are left")
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # a job may compile for long
            process.terminate()


def card_of(capability: str) -> tuple[str, tuple[int, int], int, int]:
    """Name, capability, multiprocessors and bytes, of the card here or of one that is named."""
    if capability:
        major, minor = map(int, capability.split("."))
        return H200[0], (major, minor), *H200[1:]
    about = torch.cuda.get_device_properties(0)
    return about.name, (about.major, about.minor), about.multi_processor_count, about.total_memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(WALKS), help="some of these, with commas between them")
    parser.add_argument("--seconds", type=float, default=80, help="stop then")
    parser.add_argument("--jobs", type=int, default=min(WORKERS, os.cpu_count() or 1), help="processes")
    parser.add_argument("--capability", default="", help="of a card that is not here, as 9.0")
    parser.add_argument("--small", action="store_true", help="one walk, for a card that need not be here")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    if args.small:
        args.only, args.capability, args.seconds = "eight_bit", args.capability or "9.0", min(args.seconds, 60)
        os.environ.pop("TRITON_INTERPRET", None)
    elif not args.capability and not torch.cuda.is_available():
        print("no CUDA device: name one with --capability", file=sys.stderr)
        return 1
    start, done = time.perf_counter(), Done()
    for one in compile_all(card_of(args.capability), args.only.split(","), args.jobs, args.seconds):
        done.kernels += one.kernels
        done.hashes |= one.hashes
        done.errors += one.errors
        done.seconds += one.seconds
    seconds = time.perf_counter() - start
    for error in dict.fromkeys(done.errors):
        print(f"not compiled: {error}")
    print(
        f"{len(done.hashes)} kernels in {seconds:.1f} s by {args.jobs} processes, {done.seconds:.0f} s of work: "
        + ", ".join(f"{count} {name}" for name, count in done.kernels.most_common())
    )
    if args.save:
        about = {
            "kernels": dict(done.kernels),
            "distinct": len(done.hashes),
            "errors": list(dict.fromkeys(done.errors)),
        }
        result = about | {"seconds": round(seconds, 1), "work_seconds": round(done.seconds, 1), "jobs": args.jobs}
        print(f"wrote {write_result('compile_ahead', result)}", file=sys.stderr)
    return 0 if done.hashes else 1


if __name__ == "__main__":
    sys.exit(main())
