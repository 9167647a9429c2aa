"""A training step that a GPU need not wait for: everything on the device, recorded once, replayed.

The tiny model's step is some three thousand launches of a few microseconds each. On CUDA it is recorded as a graph
(`torch.cuda.CUDAGraph`), forward, backward and update in one, with compiled blocks inside if the compiler works. Each
way that fails is reported and the next one tried; on a CPU the step just runs.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from flux_quant.benchmarks.tiny_flux.muon import BatchedMuon

Clock = Callable[[], float]  # seconds
WAYS = ("compiled and recorded", "recorded", "plain")
WARM_UP = 3  # steps before a recording: they fill caches and find the kernels
CATCH_UP = 20  # steps after which the host waits for the device, so that the clock is right
COMPILING = 0.35  # of a task's time, at most
LEAST_COMPILING = 15.0  # seconds: with less the compiler is not begun
MUON_RATE = 2.0  # in units of Adam's


class Deadline:
    """So many seconds from now."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.clock, self.begin, self.seconds = clock, clock(), seconds

    @property
    def spent(self) -> float:
        return self.clock() - self.begin

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def within(self, seconds: float) -> "Deadline":
        """An earlier one, or this one's end."""
        return Deadline(min(seconds, self.left), self.clock)


@dataclass(frozen=True)
class Rates:
    """Warm-up over some steps, constant for a share of the time, then a straight line to 2 %."""

    highest: float
    warm_up: int = 100
    constant: float = 0.4

    def at(self, done: float, step: int) -> float:
        falling = max(0.0, (min(done, 1.0) - self.constant) / (1 - self.constant))
        return self.highest * min(1.0, (step + 1) / self.warm_up) * (1 - 0.98 * falling)


class Task(Protocol):
    """What is learned."""

    def loss(self) -> Tensor:
        """A scalar, of what is drawn anew at each call. Nothing in it may wait for the device."""

    def compile_(self, on: bool) -> None:
        """Whether the blocks are compiled from now on."""


@dataclass
class Learned:
    """The parameters of a task, and how they follow its gradient."""

    adam: Sequence[nn.Parameter | Tensor]
    muon: Sequence[nn.Parameter] = ()
    averages: Sequence[Tensor] = ()  # running ones of `muon` and `adam`, in that order; or none
    ema: float = 0.998
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.muon, *self.adam]


class Stepper:
    """Takes steps of a task, in the fastest of WAYS that works."""

    def __init__(self, task: Task, learned: Learned, device: torch.device) -> None:
        self.task, self.learned, self.device = task, learned, device
        on_gpu = device.type == "cuda"
        self.rate = torch.zeros((), device=device)
        settings = dict(betas=learned.betas, weight_decay=learned.weight_decay, foreach=True, capturable=on_gpu)
        self.adam = torch.optim.AdamW(learned.adam, lr=self.rate if on_gpu else 0.0, **settings)
        dtype = torch.bfloat16 if on_gpu else None
        self.muon = BatchedMuon(learned.muon, weight_decay=learned.weight_decay, dtype=dtype)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.out: Tensor | None = None
        self.way = "plain"

    def work(self) -> Tensor:
        """One step -> the loss."""
        for p in self.learned.parameters:
            p.grad = None
        loss = self.task.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learned.parameters, 1.0, foreach=True)
        self.adam.step()
        self.muon.step(self.rate * MUON_RATE)
        if self.learned.averages:
            with torch.no_grad():
                torch._foreach_lerp_(list(self.learned.averages), self.learned.parameters, 1 - self.learned.ema)
        return loss.detach()

    def __call__(self, rate: float) -> Tensor:
        self.rate.fill_(rate)
        if self.device.type != "cuda":
            self.adam.param_groups[0]["lr"] = rate
        if self.graph is None:
            return self.work()
        self.graph.replay()
        return self.out.clone()

    def prepare(self, seconds: float, rate: float, ways: Sequence[str] = WAYS) -> str:
        """Find the way, in about so many seconds; the steps on the way are taken at that rate -> its name."""
        for way in ways if self.device.type == "cuda" else ("plain",):
            if way.startswith("compiled") and seconds < LEAST_COMPILING:
                continue
            try:
                with interrupted_after(seconds if way.startswith("compiled") else math.inf):
                    self.set_up(way, rate)
                self.way = way
                return way
            except Exception as error:  # whatever a compiler, a driver or the clock ends it with: the next way is left
                if way == ways[-1]:
                    raise
                print(f"steps are not {way}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)
        raise ValueError("no way is left")

    def set_up(self, way: str, rate: float) -> None:
        self.graph = self.out = None
        self.task.compile_(way.startswith("compiled"))
        if self.device.type != "cuda":
            return
        self.rate.fill_(rate)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self.work()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        if way.endswith("recorded"):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.work()
            self.graph, self.out = graph, out


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """TimeoutError in Python code that takes longer; in the main thread, where there are signals, else nothing."""
    here = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not here or math.isinf(seconds):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Course:
    """How learning went."""

    way: str
    steps: int = 0
    seconds: float = 0.0
    set_up: float = 0.0  # seconds before the first of these steps
    losses: list[float] = field(default_factory=list)  # means over equal parts of the time

    def figures(self) -> dict[str, object]:
        speed = self.steps / self.seconds if self.seconds else 0.0
        return dict(
            way=self.way,
            steps=self.steps,
            seconds=round(self.seconds, 1),
            set_up_seconds=round(self.set_up, 1),
            steps_per_second=round(speed, 2),
            losses=[round(loss, 5) for loss in self.losses],
        )


def learn(
    stepper: Stepper,
    rates: Rates,
    deadline: Deadline,
    least: int = 0,
    keep: Callable[[], None] | None = None,
    parts: int = 10,
) -> Course:
    """Steps until the deadline, `least` of them whatever the clock says; ends early where the loss is lost.

    keep: called after each of `parts` of the time.
    """
    way = stepper.prepare(COMPILING * deadline.left, rates.at(0, 0))
    course, recent = Course(way, set_up=deadline.spent), []
    begin, seconds = deadline.spent, max(deadline.left, 1e-9)
    while (done := (deadline.spent - begin) / seconds) < 1 or course.steps < least:
        recent.append(stepper(rates.at(done, course.steps)))
        course.steps += 1
        if course.steps % CATCH_UP == 0:
            recent[-1].item()
        if done >= (len(course.losses) + 1) / parts:
            course.losses.append(torch.stack(recent).mean().item())
            print(
                f"  {min(done, 1):4.0%} {course.steps} steps, loss {course.losses[-1]:.5f}", file=sys.stderr, flush=True
            )
            recent = []
            if not math.isfinite(course.losses[-1]):
                break
            if keep is not None:
                keep()
    if recent:
        course.losses.append(torch.stack(recent).mean().item())
    course.seconds = deadline.spent - begin
    return course
