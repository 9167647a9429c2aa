"""The verbs `lora info` and `lora extract`. `cli` registers them."""

import json as json_format
from pathlib import Path
from typing import Annotated

import typer

from flux_quant.errors import UserError
from flux_quant.verbs import options as opt

app = typer.Typer(help="LoRA files: what they are, and LoRAs from fine-tuned models.")

LoraFile = Annotated[Path, typer.Argument(metavar="FILE")]
Base = Annotated[Path, typer.Argument(metavar="A", help="a FLUX.1 transformer")]
Tuned = Annotated[Path, typer.Argument(metavar="B", help="the same one, fine-tuned")]
Target = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="a .safetensors file")]
Rank = Annotated[int, typer.Option(help="of every layer; FLUX.1 takes 10 MB for each")]
Naming = Annotated[str, typer.Option(help="kohya or diffusers; biases and norms have names in kohya's only")]


def register(main: typer.Typer) -> None:
    app.command()(info)
    app.command()(extract)
    main.add_typer(app, name="lora")


def info(file: LoraFile, json: opt.Json = False) -> None:
    """Say what a LoRA file is, what it changes, and which keys cannot be used. Needs no model."""
    from dataclasses import asdict

    from flux_quant import console
    from flux_quant.converters.lora_report import describe

    found = describe(file)
    if found is None:
        raise UserError(f"{file} is no LoRA for FLUX.1")
    if json:
        print(json_format.dumps(asdict(found) | {"path": str(file)}, indent=2))
        return
    out = console.table("what", "value", left=2)
    for row in found.lines():
        out.add_row(*row)
    console.stdout().print(out)


def extract(
    base: Base,
    tuned: Tuned,
    output: Target,
    rank: Rank = 32,
    naming: Naming = "kohya",
    force: opt.Force = False,
    json: opt.Json = False,
    threads: opt.Threads = None,
) -> None:
    """Write the difference of two checkpoints as a LoRA of low rank, and say what of it each layer lacks."""
    from dataclasses import asdict

    from flux_quant import console
    from flux_quant.converters.lora_extract import extract as compare
    from flux_quant.verbs.generate import use_threads

    use_threads(threads)
    with console.progress() as report:
        found = compare(base, tuned, output, rank, naming, force=force, report=report)
    for note in found.notes:
        console.warn(note)
    if found.left_out:
        console.warn(
            f"{len(found.left_out)} biases and norms have no name in {naming}'s, {found.left_out[0]} among them"
        )
    if json:
        print(json_format.dumps(asdict(found) | {"error": found.error}, indent=2))
        return
    out = console.table("module", "rank", "change", "missing")
    for layer in found.layers:
        out.add_row(layer.module, str(layer.rank), f"{layer.change:.2%}", f"{layer.error:.2%}")
    screen = console.stdout()
    screen.print(out)
    screen.print(f"{output}: {len(found.layers)} layers, {found.error:.2%} of the change is missing", soft_wrap=True)
