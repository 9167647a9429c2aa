"""The verbs `plan`, `doctor` and `tune`: what would fit where, what this machine can do. `cli` registers them."""

import json as json_format
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flux_quant.errors import UserError
from flux_quant.verbs import options as opt

if TYPE_CHECKING:
    from flux_quant.planner.footprint import Model, Tensors, TextEncoder, Work
    from flux_quant.planner.gpus import Machine
    from flux_quant.planner.plan import Plan

PlanFile = Annotated[Path, typer.Argument(metavar="FILE", help="a FLUX.1 transformer: file, shard or folder")]
GpuName = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="a card of the table [default: this one]")]
Vram = Annotated[str | None, typer.Option("--vram", metavar="SIZE", help="GPU memory to keep to: 8GB, 7.5GiB ...")]
Ram = Annotated[str | None, typer.Option("--ram", metavar="SIZE", help="RAM of the machine [default: this one's]")]
Pixels = Annotated[str | None, typer.Option("--size", metavar="WxH", help="pixels [default: the model's]")]
Batch = Annotated[int, typer.Option("--batch", help="pictures at once")]
StepCount = Annotated[int | None, typer.Option("--steps", help="denoising [default: 20, of [schnell] 4]")]
Words = Annotated[int | None, typer.Option("--words", help="tokens of T5 [default: 512, of [schnell] 256]")]
Negative = Annotated[bool, typer.Option("--negative", help="a negative prompt: two passes a step")]
Compute = Annotated[str, typer.Option("--compute", help="dtype of the products: float, int8, fp8")]
LoraFiles = Annotated[list[Path] | None, typer.Option("--lora", metavar="FILE", help="that stays beside; repeatable")]
ControlNets = Annotated[list[Path] | None, typer.Option("--controlnet", metavar="FILE", help="repeatable")]
T5File = Annotated[Path | None, typer.Option("--t5", metavar="FILE", help="[default: beside FILE, or a Q8_0 of XXL]")]
Formats = Annotated[str, typer.Option(metavar="LIST", help="q8_0,q4_k ... [default: all]")]
Refresh = Annotated[bool, typer.Option("--refresh", help="measure again what was measured before")]


def register(app: typer.Typer) -> None:
    app.command()(plan)
    app.command()(doctor)
    app.command()(tune)


def plan(
    file: PlanFile,
    gpu: GpuName = None,
    vram: Vram = None,
    ram: Ram = None,
    size: Pixels = None,
    batch: Batch = 1,
    steps: StepCount = None,
    words: Words = None,
    negative: Negative = False,
    compute: Compute = "float",
    lora: LoraFiles = None,
    controlnet: ControlNets = None,
    t5: T5File = None,
    json: opt.Json = False,
) -> None:
    """Predict what fits a graphics card: which blocks stay, peaks of memory, seconds of a step. Reads headers only."""
    from flux_quant.components import picture_size
    from flux_quant.converters.component import open_component
    from flux_quant.planner import plan as planner
    from flux_quant.planner.footprint import FORMAT_OF, Model, Work
    from flux_quant.planner.surroundings import surroundings

    machine, budget, host, notes = surroundings(gpu, vram, ram)
    reader = open_component(file, "FLUX.1")
    tensors = {name: (info.shape, info.format) for name, info in reader.tensors.items()}
    factors, apart = factors_of(lora or (), tensors, FORMAT_OF[machine.dtype])
    model = Model.of(tensors | factors)
    guided = model.config.guidance
    work = Work(
        size=picture_size(size, file),
        batch=batch,
        words=(512 if guided else 256) if words is None else words,
        steps=(20 if guided else 4) if steps is None else steps,
        passes=2 if negative else 1,
        compute=compute,
        adapters=apart,
    )
    work = with_nets(work, controlnet or (), model, machine)
    encoder, assumed = text_encoder(file, t5)
    made = planner.plan(model, work, machine, budget, encoder, host)
    notes += assumed
    if json:
        print(json_format.dumps(as_json(file, made, notes), indent=2))
    else:
        show(file, made, notes)


def doctor(json: opt.Json = False, refresh: Refresh = False) -> None:
    """Measure this machine once: copies to the GPU, matrix products, the drive; and say what is missing."""
    from dataclasses import asdict

    from flux_quant import console
    from flux_quant.kernels.tables import cache_folder
    from flux_quant.planner import doctor as checks

    place = checks.report_file(cache_folder())
    if not place.exists() or refresh:
        console.say("measuring, this takes some seconds ...")
    report = checks.diagnose(refresh=refresh)
    if json:
        print(json_format.dumps(asdict(report), indent=2))
        return
    out = console.table("what", "value", left=2)
    for row in checks.lines_of(report):
        out.add_row(*row)
    screen = console.stdout()
    screen.print(out)
    for line in report.missing:
        screen.print(f"missing: {line}", soft_wrap=True)
    screen.print(f"rates measured {report.date}, kept in {place}", soft_wrap=True)


def tune(formats: Formats = "") -> None:
    """Measure which way linear layers are fastest on this GPU, by format and rows of input. Takes about a minute."""
    from flux_quant.benchmarks.tune import tune_device

    tune_device([name for name in formats.split(",") if name])


def text_encoder(file: Path, t5: Path | None) -> tuple["TextEncoder", list[str]]:
    """That of the file, or of the one beside the model, or FLUX.1's own in Q8_0, and what was assumed."""
    from flux_quant.components import choose
    from flux_quant.converters.component import open_component
    from flux_quant.planner.footprint import TextEncoder, t5_xxl

    if t5 is None:
        try:
            t5 = choose("t5", [file] if file.is_dir() else [file.parent, file.parent.parent], "--t5")
        except UserError:
            return t5_xxl("q8_0"), ["T5 is taken to be FLUX.1's in Q8_0; give another with --t5"]
    reader = open_component(t5, "T5 encoder")
    return TextEncoder.of({name: (info.shape, info.format) for name, info in reader.tensors.items()}), []


def factors_of(files: Sequence[Path], model: "Tensors", fmt: str) -> tuple["Tensors", bool]:
    """Factors of LoRAs as tensors of the layers that they are beside; whether some need an output of their own."""
    from flux_quant.converters.lora_io import read_lora

    shapes = {name: shape for name, (shape, _) in model.items()}
    records = [
        record for path in files for record in read_lora(path, shapes).records if f"{record.module}.weight" in shapes
    ]
    factors = {
        f"{record.module}.adapter.{i}.{name}": (tuple(factor.shape), fmt)
        for i, record in enumerate(records)
        for name, factor in record.factors.items()
    }
    return factors, any(record.kind not in ("lora", "bias") or record.magnitude is not None for record in records)


def with_nets(work: "Work", files: Sequence[Path], model: "Model", machine: "Machine") -> "Work":
    """The work with ControlNets that stay on the device and act in every step."""
    from dataclasses import replace

    from flux_quant.controlnet import device_bytes
    from flux_quant.loading import load_controlnet
    from flux_quant.planner.footprint import BYTES, Net
    from flux_quant.runtime import tensors_of

    nets = [load_controlnet(path, model.config) for path in files]
    held = device_bytes(nets, model.config, work.batch * work.image_tokens, BYTES[machine.dtype])
    return replace(work, controlnets=held, nets=tuple(Net.of(tensors_of(net)) for net in nets))


def show(file: Path, made: "Plan", notes: list[str]) -> None:
    from flux_quant import console
    from flux_quant.planner.memory import amount

    screen = console.stdout()
    work, stream = made.work, made.stream
    what = f"{work.size[0]} x {work.size[1]}, batch {work.batch}, {work.words} words, {work.compute} products"
    screen.print(f"{file}: {what}; all numbers are predicted", soft_wrap=True)
    screen.print(blocks_table(made.model, stream))
    phases = console.table("phase", "how", "peak memory", "seconds", left=2)
    for phase in made.phases:
        phases.add_row(phase.name, phase.how, amount(phase.peak), f"{phase.seconds:.1f}")
    screen.print(phases)
    parts = console.table("while denoising", "bytes")
    denoise = next(phase for phase in made.phases if phase.name == "denoise")
    for name, nbytes in denoise.parts:
        parts.add_row(name, amount(nbytes))
    parts.add_row("together", f"{amount(denoise.peak)} of {amount(made.budget.nbytes)}")
    screen.print(parts)
    for line in (*stream.why, *notes):
        screen.print(f"- {line}", soft_wrap=True)
    total = f"{made.seconds:.0f} s for {work.steps} steps with everything around them"
    screen.print(f"{made.step:.2f} s a step, {total}; peak {amount(made.peak)} (predicted)", soft_wrap=True)


def blocks_table(model: "Model", stream: object) -> object:
    from flux_quant import console
    from flux_quant.planner.memory import amount

    out = console.table("blocks", "each", "stay", "stream", "through")
    for kind in (True, False):
        blocks = [i for i, block in enumerate(model.blocks) if block.is_double == kind]
        kept = [i for i in blocks if i in stream.resident]
        rings = {stream.ring_of(i) for i in blocks if i not in stream.resident}
        slots = ", ".join(f"{stream.rings[r].slots} slots of {amount(stream.rings[r].slot_bytes)}" for r in rings)
        label = f"{len(blocks)} {'double' if kind else 'single'}"
        each = amount(max((stream.sizes[i] for i in blocks), default=0))
        out.add_row(label, each, str(len(kept)), str(len(blocks) - len(kept)), slots or "-")
    return out


def as_json(file: Path, made: "Plan", notes: list[str]) -> dict[str, object]:
    """Bytes and seconds, all of them predicted."""
    from dataclasses import asdict

    stream = made.stream
    return {
        "file": str(file),
        "predicted": True,
        "machine": {"name": made.machine.name, "source": made.machine.source},
        "budget": asdict(made.budget),
        "work": asdict(made.work),
        "resident": [stream.names[i] for i in sorted(stream.resident)],
        "rings": [asdict(ring) for ring in stream.rings],
        "resident_bytes": stream.resident_bytes,
        "slot_bytes": stream.slot_bytes,
        "streamed_bytes": stream.streamed_bytes,
        "peak_bytes": made.peak,
        "phases": [
            {"name": p.name, "how": p.how, "peak_bytes": p.peak, "seconds": p.seconds, "parts": dict(p.parts)}
            for p in made.phases
        ],
        "step_seconds": made.step,
        "compute_seconds": made.compute,
        "seconds": made.seconds,
        "reasons": [*stream.why, *notes],
    }
