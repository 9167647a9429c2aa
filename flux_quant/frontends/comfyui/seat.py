"""Where an engine's weights are while ComfyUI manages memory. Knows nothing of ComfyUI.

ComfyUI says how many bytes of weights a model may have on the device, and asks for some of them back. A `Seat` answers
with a plan for that many: blocks that stay, slots for the others, carried out by a `Residence`. What does not stay
passes through at every step from where it lies in RAM, so giving memory back copies nothing.

All clones of a MODEL share one seat, as they share one engine. On the processor weights are used as they lie in the
file, and there is nothing to place.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flux_quant.converters.lora_records import Lora
from flux_quant.errors import UserError
from flux_quant.lora import apply_, makes_outputs
from flux_quant.model import Attention, Flux, Residuals, torch_attention
from flux_quant.modulation import Call, HoistedModulation
from flux_quant.planner import plan as planner
from flux_quant.planner.doctor import diagnose, machine_of
from flux_quant.planner.footprint import Model, Work
from flux_quant.planner.memory import Budget, amount, parse_amount
from flux_quant.planner.phases import check_rates, denoising_parts, usable
from flux_quant.planner.plan import Plan
from flux_quant.planner.steptime import block_seconds
from flux_quant.runtime import CudaReadings, Memory, Residence, fitted, host_for, prepare, sizes_of

AUTO = "auto"  # of a budget: what ComfyUI allows
COMPUTES = (AUTO, "16-bit", "int8", "fp8")  # auto is 16-bit: 8-bit products change pictures, so they are asked for
PASSING = ("CUDA context", "embedders, last layer")  # parts of a plan that are not activations

Loras = tuple[tuple[Lora, float], ...]


def same(some: Loras, others: Loras) -> bool:
    """Files are compared by identity: a file that is read again is another one."""
    pairs = zip(some, others, strict=False)
    return len(some) == len(others) and all(a is b and x == y for (a, x), (b, y) in pairs)


def memory_for(device: torch.device, vram: str, ram: str, log: Callable[[str], None]) -> Memory | None:
    """A CUDA device as plans see it; None for a processor. UserError for other devices, and for no amounts."""
    budget = None if vram in ("", AUTO) else parse_amount(vram, "VRAM budget")
    ram_budget = None if ram in ("", AUTO) else parse_amount(ram, "RAM budget")
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise UserError(
            f"flux_quant draws on CUDA devices and on processors, not on {device}: start ComfyUI with --cpu"
        )
    with torch.inference_mode(False):
        report = diagnose()
    machine = machine_of(report)
    pinned, host = host_for(report, ram_budget)
    why = f"VRAM budget {vram}" if budget else "what ComfyUI allows"
    return Memory(device, machine, Budget(budget or machine.total, why), host, CudaReadings(device), pinned, log)


@dataclass(eq=False)
class Seat:
    """An engine, and where its weights are."""

    engine: Flux
    memory: Memory | None = None  # None: the processor
    compute: str = AUTO
    hoisted: bool = True  # modulation is evaluated for all steps beforehand, its weights never stay on the device
    limited: bool = False  # by a budget of the user's own, beside what ComfyUI allows
    others: Callable[[], int] = lambda: 0  # bytes of other models on the device, which count in that budget
    work: Work = field(default_factory=Work)
    loras: Loras = ()
    present: bool = False
    residence: Residence | None = None

    def __post_init__(self) -> None:
        """Packed layers in the form in which the device uses them. UserError for products that it does not have."""
        compute = "16-bit" if self.compute == AUTO else self.compute
        self.products = "float" if compute == "16-bit" else compute
        if self.memory is not None:
            check_rates(Work(compute=self.products), self.memory.machine)
        with torch.inference_mode(False), torch.no_grad():
            if self.memory is None:
                prepare(self.engine, "cpu", compute)
            else:
                prepare(self.engine, self.memory.place, compute, self.memory.host.pinned)
        self.modulation = HoistedModulation(self.engine)
        self.sizes = self.measured()

    def measured(self) -> Model:
        """Sizes of the engine as it is now, with its LoRAs; modulation is one of the blocks' parts unless hoisted."""
        sizes = sizes_of(self.engine)
        if self.hoisted:
            return sizes
        blocks = (replace(block, nbytes=block.nbytes + block.modulation, modulation=0) for block in sizes.blocks)
        return replace(sizes, blocks=tuple(blocks), outside=sizes.outside + sizes.hoisted, hoisted=0)

    @property
    def whole(self) -> int:
        """Bytes on the device at most: all that ever stays there, or as much as the user's own budget leaves."""
        everything = self.sizes.outside + sum(block.nbytes for block in self.sizes.blocks)
        return min(everything, self.sizes.outside + self.own_room()) if self.limited else everything

    @property
    def held(self) -> int:
        """Bytes on the device now."""
        if not self.present:
            return 0
        if self.residence is None:
            return self.whole
        return self.sizes.outside + self.residence.plan.stream.device_bytes

    def own_room(self) -> int:
        """Bytes for blocks that the user's budget leaves. UserError if they do not hold one block."""
        budget, machine = self.memory.budget, self.memory.machine
        fixed = sum(nbytes for _, nbytes in denoising_parts(self.sizes, self.work, machine)) + self.others()
        room, least = usable(budget) - fixed, self.sizes.largest
        if room < least:
            raise UserError(
                f"a VRAM budget of {amount(budget.nbytes)} leaves {amount(max(0, room))} for blocks beside "
                f"{amount(fixed)} for everything else (predicted), one block is {amount(least)}; give more, draw a "
                "smaller picture, or load a file of fewer bits"
            )
        return room

    def room(self, allowance: float) -> int:
        """Bytes for blocks: what is allowed, but at least two slots; within the user's own budget."""
        total = sum(block.nbytes for block in self.sizes.blocks)
        room = min(total, max(2 * self.sizes.largest, allowance - self.sizes.outside))
        return int(min(room, self.own_room()) if self.limited else room)

    def plan(self, allowance: float) -> Plan:
        memory = self.memory
        seconds = [block_seconds(block, self.sizes, self.work, memory.machine) for block in self.sizes.blocks]
        stream, step = planner.choose(self.sizes, seconds, self.room(allowance), memory.host, memory.machine)
        made = Plan(self.sizes, self.work, memory.machine, memory.budget, memory.host, stream, (), step, sum(seconds))
        return fitted(made, self.engine, self.hoisted)

    @torch.inference_mode(False)
    @torch.no_grad()
    def settle(self, loras: Loras, allowance: float, dtype: torch.dtype) -> None:
        """With these LoRAs, and at most `allowance` bytes on the device. UserError, and nobody there, if that fails."""
        if not same(loras, self.loras):
            self.leave()
            self.loras = ()
            apply_(self.engine, loras, dtype=dtype)
            self.loras, self.sizes = loras, self.measured()
        if self.memory is not None:
            try:
                self.carry_out(self.plan(allowance))
            except BaseException:
                self.leave()
                raise
        self.present = True

    def carry_out(self, plan: Plan) -> None:
        if self.residence is None:
            self.residence = Residence(self.engine, plan, self.memory, hoisted=self.hoisted).__enter__()
            self.memory.log(str(plan.stream))
            return
        residence = self.residence
        residence.plan = plan
        residence.climb(lambda: residence.streamer.replan(residence.plan.stream))

    @torch.inference_mode(False)
    def leave(self) -> None:
        """Nothing is left on the device; the engine's tensors are what the file gave them."""
        going, self.residence, self.present = self.residence, None, False
        self.modulation.forget()
        if going is not None:
            going.__exit__(None, None, None)

    def draw(
        self,
        img: Tensor,
        txt: Tensor,
        call: Call,
        ids: tuple[Tensor, Tensor],
        residuals: Residuals,
        ahead: Callable[[], list[Call]],
        attention: Attention = torch_attention,
    ) -> Tensor:
        """One pass: img (B, S, C), txt (B, T, context), ids (S, 3) and (T, 3) -> (B, S, C out). With a smaller plan
        again if memory runs out."""

        def once() -> Tensor:
            rows = self.modulation.rows([call], img.device, img.dtype, ahead)[0] if self.hoisted else None
            return self.engine(img, txt, call.pooled, call.timestep, *ids, call.guidance, rows, residuals, attention)

        return once() if self.residence is None else self.residence.run(once)

    def working_bytes(self, work: Work) -> int:
        """Everything but weights that a pass takes on the device, predicted; what is asked for is remembered."""
        self.work = replace(work, compute=self.products, adapters=makes_outputs(self.engine))
        parts = denoising_parts(self.sizes, self.work, self.memory.machine)
        return sum(nbytes for name, nbytes in parts if name not in PASSING)
