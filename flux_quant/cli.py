"""flux-quant VERB. Results go to stdout, progress and warnings to stderr; a mistake is one line and exit code 2.

Every verb imports what it needs when it runs, so that `--help` and mistakes in the options are answered at once.
"""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flux_quant.errors import UserError
from flux_quant.verbs import bench as cli_bench
from flux_quant.verbs import comfyui as cli_comfyui
from flux_quant.verbs import generate as cli_generate
from flux_quant.verbs import inpaint as cli_inpaint
from flux_quant.verbs import lora as cli_lora
from flux_quant.verbs import options as opt
from flux_quant.verbs import report as cli_report
from flux_quant.verbs import runtime as cli_runtime
from flux_quant.verbs.generate import use_threads

app = typer.Typer(
    help="Quantization and low-VRAM toolkit for FLUX.1.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError = typer.BadParameter.__base__  # of typer's click, which older versions import and newer ones contain


@app.callback()
def verbs() -> None:
    """Its presence makes typer expect a verb even when there is only one."""


@app.command()
def inspect(path: Annotated[Path, typer.Argument(metavar="FILE|DIR")], json: opt.Json = False) -> None:
    """Say what a model file is, or every model file in a directory. Reads headers only."""
    from flux_quant import console
    from flux_quant.converters.summary import find_checkpoints, summarize

    if not path.is_dir():
        console.print_summary(summarize(path), json)
        return
    summaries, problems = [], []
    for file in find_checkpoints(path):
        try:
            summaries.append(summarize(file))
        except UserError as error:
            problems.append(str(error))
    console.print_summaries(path, summaries, json)
    if problems:
        more = f" (and {len(problems) - 1} more unreadable files)" if len(problems) > 1 else ""
        raise UserError(problems[0] + more)


@app.command()
def convert(
    source: opt.Source,
    output: opt.Output,
    format_name: opt.FormatName,
    dry_run: opt.DryRun = False,
    force: opt.Force = False,
    own_rows: opt.Sets = None,
    keep: opt.Keeps = None,
    recipe: opt.RecipeFile = None,
    components: opt.Components = None,
    lora: opt.Loras = None,
    search: opt.SearchMode = "full",
    imatrix: opt.Imatrix = None,
    calibration: opt.Calibration = None,
    legacy: opt.Legacy = False,
    diffusers: opt.AsFolder = False,
    shard_size: opt.ShardSize = None,
    shard_by: opt.ShardBy = None,
    tokenizer: opt.Tokenizer = None,
    device: opt.QuantizeOn = "cpu",
    resume: opt.Resume = False,
    checksums: opt.Checksums = False,
    threads: opt.Threads = None,
) -> None:
    """Convert a model to GGUF, FP8 or 16 bits, a few tensors in memory at a time."""
    from flux_quant import console
    from flux_quant.converters.conversion import Conversion
    from flux_quant.converters.convert import run
    from flux_quant.converters.lora_io import parse_lora_option
    from flux_quant.converters.plan import make_plan
    from flux_quant.converters.recipe import KEEP, parse_row, read_rows
    from flux_quant.converters.shards import sharding

    use_threads(threads)
    if search not in ("full", "none"):
        raise UserError(f"--search {search}: choose full or none")
    rows = [*map(parse_row, own_rows or ()), *((glob, KEEP) for glob in keep or ())]
    asked = Conversion(
        source,
        output,
        format_name.lower(),
        force,
        tuple(components.split(",")) if components else (),
        own_rows=(*rows, *(read_rows(recipe) if recipe else ())),
        search=search == "full",
        legacy_fp8=legacy,
        imatrix=imatrix,
        calibration=calibration,
        loras=tuple(map(parse_lora_option, lora or ())),
        tokenizer=tokenizer,
        sharding=sharding(shard_size, shard_by),
        device=device,
        resume=resume,
        checksums=checksums,
        folder=diffusers,
    )
    plan = make_plan(asked)
    if dry_run:
        console.print_plan(plan)
        return
    for note in plan.notes:
        console.warn(note)
    with console.progress() as report:
        result = run(plan, report)
    console.print_result(result)


@app.command()
def calibrate(
    model: opt.GenerateModel,
    output: opt.Importance,
    prompts: opt.PromptFile,
    steps: opt.Steps = 8,
    guidance: opt.Guidance = 3.5,
    seed: opt.Seed = 0,
    size: opt.PictureSize = None,
    t5: opt.Component = None,
    clip: opt.Component = None,
    tokenizers: opt.Tokenizers = None,
    device: opt.Device = "auto",
    force: opt.Force = False,
    threads: opt.Threads = None,
) -> None:
    """Watch the inputs of every layer while pictures are drawn: for `convert --imatrix` and `--calibration`."""
    from flux_quant import console
    from flux_quant.calibration import calibrate as watch
    from flux_quant.calibration import read_prompts
    from flux_quant.components import find_components, picture_size
    from flux_quant.converters.imatrix import write_imatrix
    from flux_quant.converters.output import check_target
    from flux_quant.generation import Request, choose_device

    check_target(output, force)
    use_threads(threads)
    place, dtype = choose_device(device)
    components = find_components(model, t5, clip, None, tokenizers)
    pixels = picture_size(size, components.transformer)
    requests = [
        Request(prompt, None, steps, guidance, seed + i, pixels) for i, prompt in enumerate(read_prompts(prompts))
    ]
    with console.progress() as report:
        seen = watch(components, requests, place, dtype, report)
    write_imatrix(output, seen.mean_squares(), seen.metadata(), force, seen.maxima)
    print(f"{output}: inputs of {len(seen.maxima)} layers over {len(requests)} pictures of {steps} steps")


@app.command()
def split(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="all-in-one file or pipeline folder")],
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="where the parts go")],
    force: opt.Force = False,
) -> None:
    """Take an all-in-one file or a pipeline apart: one file per model."""
    from flux_quant import console
    from flux_quant.converters.bundle import split as take_apart

    with console.progress() as report:
        written = take_apart(source, folder, force, report)
    console.print_written(written)


@app.command()
def merge_components(
    sources: Annotated[list[Path], typer.Argument(metavar="PART...", help="files or folders that hold the models")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="a .safetensors file, or a folder")],
    diffusers: Annotated[bool, typer.Option("--diffusers", help="DST is a diffusers pipeline folder")] = False,
    tokenizers: Annotated[Path | None, typer.Option(metavar="DIR", help="with both tokenizers, for a folder")] = None,
    force: opt.Force = False,
) -> None:
    """Put models together: into one file for ComfyUI, or into a diffusers pipeline."""
    from flux_quant import console
    from flux_quant.converters.bundle import merge, merge_folder

    with console.progress() as report:
        if diffusers:
            written = merge_folder(sources, output, tokenizers, force, report)
        else:
            written = merge(sources, output, force, report)
    console.print_written([written])


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE")],
    against: Annotated[Path | None, typer.Option(metavar="SRC", help="measure the error of every tensor")] = None,
    json: opt.Json = False,
) -> int:
    """Check a model file: its structure, its numbers, and its error against a source. Exit code 1 if it is damaged."""
    from flux_quant import console
    from flux_quant.converters import verify as checks

    with console.progress() as report:
        found = checks.verify(path, against, report)
    console.print_report(found, json)
    return 1 if found.problems else 0


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(metavar="A")],
    b: Annotated[Path, typer.Argument(metavar="B")],
    json: opt.Json = False,
) -> int:
    """Compare two model files, tensor by tensor, whatever their containers and names. Exit code 1 if they differ."""
    from flux_quant import console
    from flux_quant.converters import verify as checks

    with console.progress() as report:
        found = checks.diff(a, b, report)
    console.print_report(found, json)
    differ = console.differs(found)
    if not json:
        print("the files differ" if differ else "the same tensors and metadata")
    return 1 if differ else 0


@app.command()
def demo(
    output: opt.Folder = Path("demo"),
    model: opt.Model = None,
    threads: opt.Threads = None,
) -> None:
    """Convert the bundled model to FP8, Q8_0, Q5_0 and Q4_0, draw the same pictures with each, compare them."""
    from flux_quant import console
    from flux_quant.benchmarks.demo import report, run_demo
    from flux_quant.components import BUNDLED, find_components

    use_threads(threads)
    columns = run_demo(find_components(model or BUNDLED), output, console.say)
    print(report(columns))
    print(f"written: {output / 'contact-sheet.png'}, {output / 'report.md'}, {output / 'models'}")


cli_generate.register(app)
cli_inpaint.register(app)
cli_runtime.register(app)
cli_lora.register(app)
cli_comfyui.register(app)
cli_report.register(app)
cli_bench.register(app)


def main(arguments: list[str] | None = None) -> int:
    """The console entry: runs a verb and returns the exit code."""
    with terminable(), plain_warnings():
        try:
            code = app(arguments or sys.argv[1:] or ["--help"], prog_name="flux-quant", standalone_mode=False) or 0
        except UserError as error:
            return fail(str(error))
        except UsageError as error:
            return fail(f"{error.format_message().strip()} Try flux-quant --help.")
        except (KeyboardInterrupt, typer.Abort):
            code = 130
        except BrokenPipeError:
            sys.stdout = None  # the reader is gone: nothing is left to flush
            return 141
        except OSError as error:
            return fail(f"{error.filename or 'file access'}: {error.strerror or error}")
    if code == 130:
        return fail("interrupted", code, prefix="")
    return code


def fail(message: str, code: int = 2, prefix: str = "error: ") -> int:
    print(prefix + " ".join(message.split()), file=sys.stderr)
    return code


@contextmanager
def plain_warnings() -> Iterator[None]:
    """What we warn of is a line, without the place in the code."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning, category: type[Warning], *place: object, **options: object) -> None:
            if category is UserWarning:
                print("warning: " + " ".join(str(message).split()), file=sys.stderr)
            else:
                others(message, category, *place, **options)

        warnings.showwarning = show
        yield


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that a half-written file goes; exit code 143 as usual."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
