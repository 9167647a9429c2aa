"""The verb `bench`. `cli` registers it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flux_quant.errors import UserError
from flux_quant.verbs import options as opt

if TYPE_CHECKING:
    from flux_quant.benchmarks.bench.suite import Asked, Suite

Suites = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SUITE]...", help="tiers kernels step image quality convert text peers [default: all]"),
]
ModelFile = Annotated[
    Path | None, typer.Option("--model", "-m", metavar="FILE", help="your weights [default: the shipped model]")
]
Random = Annotated[bool, typer.Option("--random", help="random weights of FLUX.1's full size")]
Formats = Annotated[str | None, typer.Option(metavar="LIST", help="q4_k_s,q8_0 ...")]
Budgets = Annotated[str | None, typer.Option("--vram", metavar="LIST", help="6GB,8GB,12GB: of a CUDA GPU")]
Sizes = Annotated[str | None, typer.Option("--size", metavar="LIST", help="512,1024x768 pixels")]
StepCounts = Annotated[str | None, typer.Option("--steps", metavar="LIST", help="4,20")]
Repeats = Annotated[int, typer.Option(min=1, metavar="N", help="samples of each time")]
Quick = Annotated[bool, typer.Option("--quick", help="small sizes, few cases: to see that everything runs")]
Minutes = Annotated[float | None, typer.Option(metavar="M", help="cases that would end later are left out")]
Resume = Annotated[bool, typer.Option("--resume", help="keep today's rows of this machine, commit and weights")]
Results = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="gets MACHINE/DATE-SUITE.json")]
List = Annotated[bool, typer.Option("--list", help="print the cases and stop")]
Note = Annotated[str, typer.Option(help="kept in the results: what else ran, what was changed")]


def register(app: typer.Typer) -> None:
    app.command()(bench)


def bench(
    suites: Suites = None,
    model: ModelFile = None,
    random: Random = False,
    formats: Formats = None,
    vram: Budgets = None,
    size: Sizes = None,
    steps: StepCounts = None,
    repeats: Repeats = 5,
    quick: Quick = False,
    minutes: Minutes = None,
    resume: Resume = False,
    output: Results = Path("results"),
    show_cases: List = False,
    note: Note = "",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
) -> None:
    """Measure conversion, kernels, steps, pictures, text encoders, quality, other programs; predict GPU tiers.

    Lists are swept: every format with every budget, size and number of steps. `report` makes a page of the results.
    """
    from math import inf

    from flux_quant import console
    from flux_quant.benchmarks.bench import show
    from flux_quant.benchmarks.bench.session import SUITES, Session, suite_named
    from flux_quant.verbs.generate import use_threads

    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g}: should be more than nothing")
    use_threads(threads)
    asked = asked_of(model, random, formats, vram, size, steps, repeats, quick, device)
    chosen: list[Suite] = [suite_named(name) for name in dict.fromkeys(suites or SUITES)]
    screen = console.stdout()
    if show_cases:
        for suite in chosen:
            screen.print(show.listing(f"{suite.name}: {suite.about}", suite.cases(asked)))
        return
    with show.Progressing() as watcher:
        session = Session(asked, output, inf if minutes is None else 60 * minutes, resume, note, watcher)
        for run, path in session.run(chosen):
            screen.print(f"{run.suite}, {run.weights['name']}, on {run.machine['device']}", soft_wrap=True)
            for part in show.tables(run):
                screen.print(part, soft_wrap=True)
            screen.print(f"written: {path}\n", soft_wrap=True)


def asked_of(
    model: Path | None,
    random: bool,
    formats: str | None,
    vram: str | None,
    size: str | None,
    steps: str | None,
    repeats: int,
    quick: bool,
    device: str,
) -> "Asked":
    from flux_quant.benchmarks.bench import models, sweep
    from flux_quant.benchmarks.bench.suite import Asked
    from flux_quant.generation import choose_device

    if model is not None and random:
        raise UserError("--model and --random exclude each other")
    place, _ = choose_device(device)
    if vram and place.type != "cuda":
        raise UserError(f"--vram {vram} is about a CUDA GPU; these are measured on {place.type}")
    asked = Asked(
        model=model,
        random=random,
        formats=sweep.formats(formats),
        vram=sweep.budgets(vram),
        sizes=sweep.sizes(size),
        steps=sweep.counts(steps),
        device=str(place),
        quick=quick,
        repeats=min(repeats, 2) if quick else repeats,
    )
    models.transformer(asked)
    return asked
