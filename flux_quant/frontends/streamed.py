"""A transformer on a device that is too small for it, called by a loop that is not ours.

What is to be made shows at the first call: its sizes are planned for, and again when a later call is larger. Between
calls the blocks stay where they are; `pause` gives the device's memory back and keeps what is pinned, `leave` makes the
engine what it was. Of the budget, what others hold of it when a plan is made is not used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt

from torch import Tensor

from flux_quant.model import Flux
from flux_quant.planner.footprint import CONTEXT, PATCH, Work
from flux_quant.planner.memory import amount
from flux_quant.planner.plan import Plan
from flux_quant.runtime import Memory, Residence, fitted, sizes_of


@dataclass(eq=False)
class Streamed:
    """How the engine's blocks come to the device of `memory`."""

    engine: Flux
    memory: Memory
    compute: str = "16-bit"
    residence: Residence | None = None
    work: Work | None = None  # what the plan is for

    def step(self, image: int, words: int, batch: int, steps: int, forward: Callable[[], Tensor]) -> Tensor:
        """One pass, with so many tokens of picture and text for each of `batch`; forward() again if memory ran out.

        UserError with the minimum if the budget does not hold it.
        """
        compute = "float" if self.compute == "16-bit" else self.compute
        work = Work(near_square(image), batch, words, max(1, steps), compute=compute)
        if self.residence is None:
            self.residence, self.work = Residence(self.engine, self.planned(work), self.memory), work
            try:
                self.residence.__enter__()
            except BaseException:
                self.residence = None
                raise
        elif larger(work, self.work):
            self.residence.pause()
            self.residence.plan, self.work = fitted(self.planned(work), self.engine), work
        return self.residence.step(forward)

    def planned(self, work: Work) -> Plan:
        memory = self.memory
        memory.readings.forget()
        others = max(0, memory.readings.now() - CONTEXT)
        why = f"{memory.budget.why}, less {amount(others)} held by others" if others else memory.budget.why
        budget = replace(memory.budget, nbytes=max(1, memory.budget.nbytes - others), why=why)
        plan = replace(memory, budget=budget).plan(sizes_of(self.engine), work, None)
        memory.log(f"{plan.stream}\npredicted: {plan.step:.2f} s a step")
        return replace(plan, budget=memory.budget)

    def pause(self) -> None:
        """The device's memory is free until the next step."""
        if self.residence is not None:
            self.residence.pause()

    def leave(self) -> None:
        """Everything as it was before the first step."""
        if self.residence is not None:
            self.residence.__exit__(None, None, None)
            self.residence = None


def larger(work: Work, planned: Work) -> bool:
    """Whether a plan for the other is none for this."""
    return any(
        work.batch * getattr(work, what) > planned.batch * getattr(planned, what) for what in ("image_tokens", "words")
    )


def near_square(tokens: int) -> tuple[int, int]:
    """(width, height) in pixels of a picture with so many tokens, as square as their number allows."""
    rows = next(n for n in range(isqrt(tokens), 0, -1) if tokens % n == 0)
    return tokens // rows * PATCH, rows * PATCH
