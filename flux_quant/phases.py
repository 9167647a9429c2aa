"""The phases of making a picture, one after the other: what each needs on the device at its worst moment, and its time.

Each phase has its own weights: text encoder, modulation, blocks, VAE are never on the device together.
"""

from dataclasses import dataclass, replace

from flux_quant import footprint
from flux_quant.errors import UserError
from flux_quant.footprint import BYTES, CONTEXT, FRAGMENTS, VAE_WEIGHTS, Model, TextEncoder, Work
from flux_quant.gpus import Machine
from flux_quant.memory import Budget, amount
from flux_quant.steptime import Host, text_seconds
from flux_quant.streaming import StreamPlan

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


def fixed_parts(machine: Machine) -> tuple[tuple[str, int], ...]:
    return ("CUDA context", CONTEXT), ("cuBLAS workspace", footprint.workspace_bytes(machine.capability))


def scratch_for(model: Model, machine: Machine) -> int:
    packed = any(block.unpacked(machine.dtype)[0] for block in model.blocks)
    return footprint.scratch_bytes(machine.total, machine.capability, packed)


def denoising_parts(model: Model, work: Work, machine: Machine) -> tuple[tuple[str, int], ...]:
    """Everything but the blocks."""
    fused = machine.capability >= footprint.TRITON
    activations = footprint.activation_bytes(model.config, work, machine.dtype, fused)
    parts = (
        *fixed_parts(machine),
        ("scratch of unpacked weights", scratch_for(model, machine)),
        ("embedders, last layer", model.outside),
        ("adapters", work.adapters),
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
            ("scratch of unpacked weights", footprint.scratch_bytes(machine.total, machine.capability, True)),
            ("slots", 2 * max(encoder.blocks)),
            ("activations", int((1 + FRAGMENTS) * activations)),
        ),
        streamed,
    )
    if phase.peak > budget.nbytes:
        return Phase("text", f"T5 on the processor: on the GPU it needs {amount(phase.peak)}", (), on_cpu)
    if on_cpu <= streamed:
        return Phase("text", f"T5 on the processor: {streamed:.1f} s on the GPU", (), on_cpu)
    return phase


def modulation(model: Model, work: Work, machine: Machine, host: Host) -> Phase:
    parts = (
        *fixed_parts(machine),
        ("scratch of unpacked weights", scratch_for(model, machine)),
        ("weights on their way", 2 * max(block.modulation for block in model.blocks)),
        ("text, latents, modulation", footprint.state_bytes(model.config, work, machine.dtype)),
    )
    seconds = model.modulation / host.rate(model.modulation, machine)
    return Phase("modulation", f"{amount(model.modulation)}, once for all steps", parts, seconds)


def denoise(fixed: Parts, stream: StreamPlan, work: Work, step: float) -> Phase:
    blocks = ("resident blocks", stream.resident_bytes), ("slots", stream.slot_bytes)
    parts = (*fixed, *(part for part in blocks if part[1]))
    return Phase("denoise", f"{work.steps} steps of {step:.2f} s", parts, work.steps * step)


def vae_dtype(machine: Machine) -> str:
    """float16 overflows in FLUX.1's VAE."""
    return "bf16" if machine.dtype == "bf16" else "fp32"


def decode(work: Work, machine: Machine, budget: Budget) -> Phase:
    """In one piece, or in the largest tiles that fit."""
    dtype = vae_dtype(machine)
    whole = decode_parts(work, machine, 0)
    room = budget.nbytes - sum(nbytes for name, nbytes in whole if name != DECODING)
    tile = footprint.largest_tile(work, dtype, room)
    assert tile is not None, "check_minimum lets nothing through that the smallest tile does not fit"
    rows, columns = work.latent
    seconds = footprint.VAE_FLOPS * rows * columns * work.batch / machine.flops.get(dtype, machine.flops[machine.dtype])
    if not tile:
        return Phase("decode", f"in one piece, {dtype}", whole, seconds)
    repeated = 1 / (1 - footprint.TILE_OVERLAP) ** 2
    how = f"in tiles of {8 * tile} pixels, {dtype}: the whole needs {amount(sum(nbytes for _, nbytes in whole))}"
    return Phase("decode", how, decode_parts(work, machine, tile), seconds * repeated)


DECODING = "feature maps"


def decode_parts(work: Work, machine: Machine, tile: int) -> Parts:
    """tile: its side, positions of the latent; 0 for the whole."""
    dtype = vae_dtype(machine)
    if tile:
        picture = 12 * work.size[0] * work.size[1] * work.batch
        maps = footprint.vae_bytes(tile, tile, dtype) + picture
    else:
        maps = footprint.vae_bytes(*work.latent, dtype, work.batch)
    return (*fixed_parts(machine), ("VAE's weights", VAE_WEIGHTS * BYTES[dtype]), (DECODING, maps))


def minimum(model: Model, work: Work, machine: Machine) -> int:
    """The least budget that can do this work: one slot, text on the processor, the smallest tiles."""
    denoising = sum(nbytes for _, nbytes in denoising_parts(model, work, machine)) + model.largest
    return max(denoising, sum(nbytes for _, nbytes in decode_parts(work, machine, footprint.TILES[-1])))


def check_minimum(model: Model, work: Work, machine: Machine, budget: Budget) -> None:
    needed = minimum(model, work, machine)
    if needed <= budget.nbytes:
        return
    width, height = work.size
    half = (width // 32 * 16 or 16, height // 32 * 16 or 16)
    changes = {f"--size {half[0]}x{half[1]}": replace(work, size=half)}
    if work.batch > 1:
        changes["--batch 1"] = replace(work, batch=1)
    if work.adapters:
        changes["no adapters"] = replace(work, adapters=0)
    if work.controlnets:
        changes["no ControlNet"] = replace(work, controlnets=0)
    lower = [f"{name} needs {amount(minimum(model, other, machine))}" for name, other in changes.items()]
    blocks = f"; its largest block has {amount(model.largest)}, in fewer bits it is smaller"
    raise UserError(
        f"a budget of {amount(budget.nbytes)} ({budget.why}) is below the {amount(needed)} that {width}x{height}, "
        f"batch {work.batch} needs at least (predicted); {', '.join(lower)}{blocks}"
    )


def check_rates(work: Work, machine: Machine) -> None:
    if work.compute != "float" and work.compute not in machine.flops:
        offered = [name for name in footprint.COMPUTE[1:] if name in machine.flops]
        raise UserError(f"{machine.name} has no {work.compute} products; compute: {', '.join(['float', *offered])}")
