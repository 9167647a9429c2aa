"""Carries out a plan: blocks on the device as it says, revised as the steps show how it goes, less if memory runs out.

    memory = Memory.of(torch.device("cuda"), vram="8GB")
    plan = memory.plan(sizes_of(model), Work(size=(1024, 1024)), encoder)
    with memory.capped(), Residence(model, plan, memory) as residence:
        tokens = residence.run(lambda: denoise(model, ..., callback=residence.after_step))

Lack of memory costs a rung of a ladder, each said once: fewer residents, then smaller rings; what does not fit even so
is an error that says the minimum. What happened is in `residence.metrics()`.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from math import inf
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import nn

from flux_quant.errors import UserError
from flux_quant.kernels import fallback
from flux_quant.linear import QuantLinear, repack_, set_compute_
from flux_quant.lora import tensors_by_block, tensors_by_module
from flux_quant.modulation import hoisted_modules, move_without_, placed
from flux_quant.planner import plan as planner
from flux_quant.planner.doctor import Report, diagnose, machine_of
from flux_quant.planner.footprint import CONTEXT, Model, Tensors, TextEncoder, Work
from flux_quant.planner.gpus import Machine
from flux_quant.planner.memory import Budget, amount, parse_amount
from flux_quant.planner.plan import Plan, Seen
from flux_quant.planner.steptime import Host
from flux_quant.streaming import BlockStreamer, StreamPlan, block_bytes, pin_budget, rings_for
from flux_quant.streaming.device import StreamDevice

RUNGS = 8  # of the ladder, at most
GIVEN_UP, MOST_GIVEN_UP = 0.1, 0.5  # of what the blocks take on the device: at the first rung, then twice as much

Log = Callable[[str], None]
T = TypeVar("T")


class Readings(Protocol):
    """What the device says of its memory, in bytes."""

    def free(self) -> int: ...

    def now(self) -> int:
        """Held by this process, CUDA's own part included."""
        ...

    def held(self) -> int:
        """By this process at most since the last `forget`, CUDA's own part included."""
        ...

    def forget(self) -> None: ...


class CudaReadings:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def now(self) -> int:
        return torch.cuda.memory_reserved(self.device) + CONTEXT

    def held(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) + CONTEXT

    def forget(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)


@dataclass
class Memory:
    """A device, what may be taken there and of RAM, and what plans for it go by."""

    device: torch.device | StreamDevice
    machine: Machine
    budget: Budget
    host: Host
    readings: Readings
    ram_budget: int | None = None  # bytes to pin; None: as many as suit the machine
    log: Log = lambda line: None

    @classmethod
    def of(cls, device: torch.device, vram: str | None = None, ram: str | None = None, log: Log = print) -> "Memory":
        """Of a CUDA device; its rates are measured at the first time and kept (`doctor`).

        vram: the most to take there, "8GB" (what is free, less a reserve, if None). ram: the most RAM for weights.
        """
        report = diagnose()
        machine = machine_of(report)
        budget = Budget.of(vram, machine.usable, "free memory of this GPU")
        pinned, host = host_for(report, parse_amount(ram, "RAM budget") if ram else None)
        return cls(device, machine, budget, host, CudaReadings(device), pinned, log)

    def plan(self, model: Model, work: Work, encoder: TextEncoder | None) -> Plan:
        """UserError with the minimum, and what would lower it, if the work does not fit."""
        return planner.plan(model, work, self.machine, self.budget, encoder, self.host)

    @contextmanager
    def capped(self) -> Iterator[None]:
        """Within it torch takes no more than the budget: rather an error that can be handled than a spill."""
        if not isinstance(self.device, torch.device):
            yield
            return
        device = placed(self.device)  # `cuda` alone will not do here
        share = (self.budget.nbytes - CONTEXT) / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
            torch.cuda.empty_cache()

    @property
    def place(self) -> torch.device:
        return self.device if isinstance(self.device, torch.device) else self.device.device

    @property
    def free(self) -> int:
        """Bytes that a phase may still take."""
        return max(0, min(self.readings.free(), self.budget.nbytes - self.readings.now()))

    @contextmanager
    def streaming(self, blocks: nn.ModuleList, device: object = None) -> Iterator[None]:
        """The blocks of an encoder pass through two slots, one after the other."""
        names = [str(i) for i in range(len(blocks))]
        sizes, _ = block_bytes(blocks, names)
        plan = StreamPlan(names, sizes, frozenset(), rings_for(sizes))
        with BlockStreamer(blocks, plan, self.device, self.ram_budget):
            yield


def host_for(report: Report, ram: int | None) -> tuple[int | None, Host]:
    """Bytes to pin (None: as many as suit the machine), and where weights lie that stream; `ram`: bytes for them."""
    host = Host.of(report.ram, sys.platform == "win32")
    if ram is None:
        return None, host
    pinned = min(pin_budget(), ram)
    return pinned, replace(host, pinned=pinned, pageable=max(0, ram - pinned))


class Whole:
    """A model that fits its device: what a `Residence` offers, for all of it at once."""

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self.model, self.device = model, device

    def __enter__(self) -> "Whole":
        move_without_(self.model, self.device, hoisted_modules(self.model))
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, work: Callable[[], T]) -> T:
        return work()

    def after_step(self, state: object = None) -> None:
        pass

    def metrics(self) -> dict[str, object]:
        return {}


@dataclass
class Residence:
    """The blocks of a model on a device that may be too small for them."""

    model: nn.Module
    plan: Plan
    memory: Memory
    changes: list[str] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    hoisted: bool = True  # modulation is given to the model: what evaluates it stays away

    last: float = 0.0  # when the last step ended

    def __enter__(self) -> "Residence":
        self.plan = fitted(self.plan, self.model, self.hoisted)
        left = hoisted_modules(self.model) if self.hoisted else ()
        factors, self.outside = tensors_by_block(self.model, self.plan.stream.names, left)
        self.streamer = self.climb(
            lambda: BlockStreamer(
                self.model,
                self.plan.stream,
                self.memory.device,
                self.memory.ram_budget,
                extra=factors,
                exclude=hoisted_globs(self.model) if self.hoisted else (),
            )
        )
        try:
            self.move_outside(self.memory.place)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.streamer.detach()
        self.move_outside("cpu")

    def move_outside(self, device: torch.device | str) -> None:
        for path in self.outside:
            path.move_(lambda tensor: tensor.to(device))

    def pause(self) -> None:
        """Nothing on the device until the next `run` or `step`; pinned memory stays."""
        self.streamer.pause()
        self.move_outside("cpu")

    def run(self, work: Callable[[], T]) -> T:
        """work(), from the beginning again with a smaller plan each time that memory runs out."""

        def attempt() -> T:
            self.step_seconds.clear()
            return self.begin(work)

        return self.climb(attempt)

    def step(self, work: Callable[[], T]) -> T:
        """One pass of many that others ask for; as `run`, and then the plan is revised."""
        result = self.climb(lambda: self.begin(work))
        self.after_step()
        return result

    def begin(self, work: Callable[[], T]) -> T:
        self.streamer.replan(self.plan.stream)
        self.move_outside(self.memory.place)
        self.last = time.perf_counter()
        return work()

    def climb(self, attempt: Callable[[], T]) -> T:
        for rung in range(RUNGS):
            try:
                return attempt()
            except torch.OutOfMemoryError:
                share = min(MOST_GIVEN_UP, GIVEN_UP * 2**rung)
                nbytes = int(share * self.plan.stream.device_bytes) + 1
                smaller, reasons = planner.shed(self.plan, nbytes, "out of memory")
                if smaller.stream == self.plan.stream:
                    break
            self.memory.readings.forget()
            self.follow(smaller, reasons)
        least = self.plan.model.largest
        raise UserError(
            f"out of GPU memory with {amount(self.plan.stream.device_bytes)} of blocks on the device (one block is "
            f"{amount(least)}); a smaller picture, a smaller batch or a format of fewer bits needs less"
        )

    def after_step(self, state: object = None) -> None:
        """Between two steps: the plan is changed if the last one waited for copies, or memory is short."""
        now = time.perf_counter()
        self.step_seconds.append(now - self.last)
        metrics = self.streamer.metrics()
        seen = Seen(
            step=self.step_seconds[-1],
            stall=metrics.stall if metrics.passes else 0.0,
            free=self.memory.readings.free(),
            peak=self.memory.readings.held(),
            usual=statistics.median(self.step_seconds),
        )
        changed, reasons = planner.replan(self.plan, seen)
        if changed.stream != self.plan.stream:
            self.streamer.replan(changed.stream)
            self.memory.readings.forget()
        self.follow(changed, reasons)
        self.last = time.perf_counter()

    def follow(self, plan: Plan, reasons: tuple[str, ...]) -> None:
        self.plan = plan
        for reason in reasons:
            if reason not in self.changes:
                self.changes.append(reason)
                self.memory.log(reason)

    def metrics(self) -> dict[str, object]:
        """What streaming cost, what was predicted, and what was changed on the way."""
        seen = self.streamer.metrics()
        return asdict(seen) | {
            "stall": seen.stall,
            "bytes_per_second": seen.bytes_per_second,
            "predicted_step_seconds": self.plan.step,
            "predicted_seconds": self.plan.seconds,
            "predicted_peak": self.plan.peak,
            "step_seconds": list(self.step_seconds),
            "held": self.memory.readings.held(),
            "changes": list(self.changes),
        }


def prepare(model: nn.Module, device: torch.device | str, compute: str, pinnable: float = inf) -> None:
    """Bring packed layers into the form in which the device uses them: planar rows, formats for 8-bit compute.

    Both are copies in RAM. Planar rows are left out where more than `pinnable` bytes of RAM would be needed: native
    blocks can stay in the mapped file.
    """
    device = torch.device(device)
    packed = sum(part.nbytes for layer in model.modules() if isinstance(layer, QuantLinear) for part in layer.parts)
    if fallback.triton_for(device) is None and packed <= pinnable:
        repack_(model)
    if compute != "16-bit":
        set_compute_(model, compute, device=device)


def fitted(plan: Plan, model: nn.Module, hoisted: bool = True) -> Plan:
    """The plan with the blocks' sizes as they are to the byte, and slots that hold them."""
    stream = plan.stream
    left, globs = (hoisted_modules(model), hoisted_globs(model)) if hoisted else ((), ())
    factors, _ = tensors_by_block(model, stream.names, left)
    sizes, _ = block_bytes(model, stream.names, factors, exclude=globs)
    if sizes == stream.sizes:
        return plan
    rings = (
        replace(ring, slot_bytes=max(sizes[i] for i in stream.blocks_of(number)))
        for number, ring in enumerate(stream.rings)
    )
    return replace(plan, stream=replace(stream, sizes=sizes, rings=tuple(rings)))


def hoisted_globs(model: nn.Module) -> list[str]:
    """Names of the tensors that are needed before the first step only, as `BlockStreamer` leaves them out."""
    hoisted = {id(module) for module in hoisted_modules(model)}
    return [f"{name}.*" for name, module in model.named_modules() if id(module) in hoisted]


def sizes_of(model: nn.Module) -> Model:
    """What a plan needs to know of an engine as it is now."""
    return Model.of(tensors_of(model))


def tensors_of(model: nn.Module) -> Tensors:
    """Shapes and formats of an engine or a ControlNet: repacked, in formats for 8-bit compute, with its LoRAs."""
    tensors = {}
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            tensors[f"{path}.weight"] = (layer.out_features, layer.in_features), layer.fmt.name
        for name, tensor in layer.named_parameters(recurse=False):
            tensors[f"{path}.{name}" if path else name] = tuple(tensor.shape), PLAIN[tensor.dtype]
    for path, factors in tensors_by_module(model).items():
        for i, tensor in enumerate(factors):
            tensors[f"{path}.adapter.{i}"] = tuple(tensor.shape), PLAIN[tensor.dtype]
    return tensors


PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
