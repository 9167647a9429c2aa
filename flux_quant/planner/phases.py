"""The phases of making a picture, one after the other: what each needs on the device at its worst moment, and its time.

Each phase has its own weights: text encoder, modulation, blocks, VAE are never on the device together.
"""

from dataclasses import dataclass, replace
from math import ceil

from flux_quant.drawing import vae
from flux_quant.errors import UserError
from flux_quant.planner import footprint
from flux_quant.planner.footprint import BYTES, CONTEXT, FRAGMENTS, Model, TextEncoder, Work
from flux_quant.planner.gpus import Machine
from flux_quant.planner.memory import Budget, amount
from flux_quant.planner.steptime import Host, text_seconds
from flux_quant.streaming import StreamPlan

VAE_WEIGHTS = 83_819_683  # values
VAE_FLOPS = 0.64e9  # of decoding a position of the latent, counted from the layers

MARGIN = 0.02  # of the budget that plans leave: CUDA's own part and torch's allocator are known no better

Parts = tuple[tuple[str, int], ...]  # what it is, bytes


@dataclass(frozen=True)
class Phase:
    """What lives on the device at the worst moment of a phase, by what it is; seconds predicted."""

    name: str
    how: str
    parts: Parts
    seconds: float

    @property
    def peak(self) -> int:
        return sum(nbytes for _, nbytes in self.parts)


def usable(budget: Budget) -> int:
    return int((1 - MARGIN) * budget.nbytes)


def fixed_parts(machine: Machine) -> tuple[tuple[str, int], ...]:
    return ("CUDA context", CONTEXT), ("cuBLAS workspace", footprint.workspace_bytes(machine.capability))


def scratch_for(model: Model, machine: Machine) -> int:
    packed = any(block.unpacked(machine.dtype)[0] for block in model.blocks)
    return footprint.scratch_bytes(machine.total, machine.triton, packed)


def denoising_parts(model: Model, work: Work, machine: Machine) -> tuple[tuple[str, int], ...]:
    """Everything but the blocks."""
    activations = footprint.activation_bytes(model.config, work, machine.dtype, machine.triton)
    parts = (
        *fixed_parts(machine),
        ("scratch of unpacked weights", scratch_for(model, machine)),
        ("embedders, last layer", model.outside),
        ("ControlNets", work.controlnets),
        ("text, latents, modulation", footprint.state_bytes(model.config, work, machine.dtype)),
        ("activations", activations),
        ("allocator's fragments", int(FRAGMENTS * activations)),
    )
    return tuple((name, nbytes) for name, nbytes in parts if nbytes)


def text(encoder: TextEncoder, work: Work, machine: Machine, budget: Budget, host: Host) -> Phase:
    """T5 streamed through the GPU, if that fits and is faster, or on the processor. CLIP is always there."""
    streamed, on_cpu = text_seconds(encoder, work, machine, host)
    activations = encoder.activation_bytes(work)
    phase = Phase(
        "text",
        f"T5 streamed through the GPU ({on_cpu:.0f} s on the processor)",
        (
            *fixed_parts(machine),
            ("scratch of unpacked weights", footprint.scratch_bytes(machine.total, machine.triton)),
            ("slots", 2 * max(encoder.blocks)),
            ("activations", int((1 + FRAGMENTS) * activations)),
        ),
        streamed,
    )
    if phase.peak > usable(budget):
        return Phase("text", f"T5 on the processor: on the GPU it needs {amount(phase.peak)}", (), on_cpu)
    if on_cpu <= streamed:
        return Phase("text", f"T5 on the processor: {streamed:.1f} s on the GPU", (), on_cpu)
    return phase


def modulation(model: Model, work: Work, machine: Machine, host: Host) -> Phase:
    seconds = model.modulation / host.rate(model.modulation, machine)
    parts = modulation_parts(model, work, machine)
    return Phase("modulation", f"{amount(model.modulation)}, once for all steps", parts, seconds)


def modulation_parts(model: Model, work: Work, machine: Machine) -> Parts:
    """One part of a block comes after the other: a double block has two."""
    return (
        *fixed_parts(machine),
        ("scratch of unpacked weights", scratch_for(model, machine)),
        ("weights on their way", max(block.modulation for block in model.blocks)),
        ("text, latents, modulation", footprint.state_bytes(model.config, work, machine.dtype)),
    )


def modulation_peak(model: Model, work: Work, machine: Machine) -> int:
    return sum(nbytes for _, nbytes in modulation_parts(model, work, machine))


def denoise(fixed: Parts, stream: StreamPlan, work: Work, step: float) -> Phase:
    blocks = ("resident blocks", stream.resident_bytes), ("slots", stream.slot_bytes)
    parts = (*fixed, *(part for part in blocks if part[1]))
    return Phase("denoise", f"{work.steps} steps of {step:.2f} s", parts, work.steps * step)


def vae_dtype(machine: Machine) -> str:
    """As `vae.vae_dtype`: in float16 the values overflow."""
    return "bf16" if machine.dtype == "bf16" else "fp32"


def decode(work: Work, machine: Machine, budget: Budget) -> Phase:
    """In one piece, or in the fewest tiles that fit: what `vae.decode` does with that much memory."""
    dtype = vae_dtype(machine)
    tiling = decode_tiling(work, machine, usable(budget))
    assert tiling is not None, "check_minimum lets nothing through that the smallest tile does not fit"
    positions = tiling.count * tiling.height * tiling.width * work.batch
    seconds = VAE_FLOPS * positions / machine.flops.get(dtype, machine.flops[machine.dtype])
    return Phase("decode", f"{tiling}, {dtype}", decode_parts(machine, tiling), seconds)


def decode_tiling(work: Work, machine: Machine, budget: int) -> vae.Tiling | None:
    room = (1 - vae.RESERVE) * (budget - sum(nbytes for _, nbytes in decode_parts(machine, None)))
    memory, latent = vae_memory(machine), work.latent
    if memory.nbytes(*latent) <= room:
        return vae.Tiling(1, 1, *latent)
    return vae.tiles_that_fit(*latent, room, memory)


def vae_memory(machine: Machine) -> vae.Memory:
    return vae.Memory(vae.DECODE * BYTES[vae_dtype(machine)])


def decode_parts(machine: Machine, tiling: vae.Tiling | None) -> Parts:
    """One picture at a time; the picture itself is put together in RAM."""
    weights = VAE_WEIGHTS * BYTES[vae_dtype(machine)]
    maps = int(vae_memory(machine).nbytes(tiling.height, tiling.width)) if tiling else 0
    return (*fixed_parts(machine), ("VAE's weights", weights), ("feature maps", maps))


def minimum(model: Model, work: Work, machine: Machine) -> tuple[int, str]:
    """The least budget for this work, and the phase that needs it: one slot, T5 on the processor, small tiles."""
    smallest = (vae.tile_length(side, vae.MOST_TILES) for side in work.latent)
    maps = vae_memory(machine).nbytes(*smallest) / (1 - vae.RESERVE)
    needs = {
        "denoising": sum(nbytes for _, nbytes in denoising_parts(model, work, machine)) + model.largest,
        "the modulation": modulation_peak(model, work, machine),
        "decoding": sum(nbytes for _, nbytes in decode_parts(machine, None)) + ceil(maps),
    }
    phase = max(needs, key=needs.__getitem__)
    return ceil(needs[phase] / (1 - MARGIN)) + 1, phase


def check_minimum(model: Model, work: Work, machine: Machine, budget: Budget) -> None:
    """UserError with the minimum, and with what would lower it to how much."""
    needed, phase = minimum(model, work, machine)
    if needed <= budget.nbytes:
        return
    width, height = work.size
    half = (max(1, width // 32) * 16, max(1, height // 32) * 16)
    changes = {
        f"--size {half[0]}x{half[1]}": replace(work, size=half),
        "--batch 1": replace(work, batch=1),
        "without ControlNets": replace(work, controlnets=0, nets=()),
    }
    least = {name: minimum(model, other, machine)[0] for name, other in changes.items()}
    lower = [f"{name}: {amount(nbytes)}" for name, nbytes in least.items() if nbytes < needed]
    if phase == "denoising":
        lower.append(f"a format of fewer bits: its largest block has {amount(model.largest)}")
    raise UserError(
        f"a budget of {amount(budget.nbytes)} ({budget.why}) is below the {amount(needed)} (predicted) that {phase} of "
        f"{width}x{height}, batch {work.batch}, needs at least{'; less: ' if lower else ''}{', '.join(lower)}"
    )


def check_rates(work: Work, machine: Machine) -> None:
    if work.compute != "float" and work.compute not in machine.flops:
        offered = [name for name in footprint.COMPUTE[1:] if name in machine.flops]
        raise UserError(f"{machine.name} has no {work.compute} products; compute: {', '.join(['float', *offered])}")
