"""flux-quant VERB. Results go to stdout, progress and warnings to stderr; a mistake is one line and exit code 2.

Every verb imports what it needs when it runs, so that `--help` and mistakes in the options are answered at once.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flux_quant.errors import UserError

app = typer.Typer(
    help="Quantization and low-VRAM toolkit for FLUX.1.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError = typer.BadParameter.__base__  # of typer's click, which older versions import and newer ones contain

Source = Annotated[Path, typer.Argument(metavar="SRC", help="FLUX.1 transformer: .safetensors or .gguf")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DST", help="its suffix chooses the container")]
FormatName = Annotated[str, typer.Option("--format", "-f", help="q8_0 q5_1 q5_0 q4_1 q4_0 f16 bf16 fp8")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")]
Force = Annotated[bool, typer.Option("--force", help="replace DST if it exists")]
Threads = Annotated[int | None, typer.Option(min=1, help="processor threads [default: all cores]")]


@app.callback()
def verbs() -> None:
    """Its presence makes typer expect a verb even when there is only one."""


@app.command()
def inspect(path: Annotated[Path, typer.Argument(metavar="FILE|DIR")], json: Json = False) -> None:
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
    source: Source,
    output: Output,
    format_name: FormatName,
    dry_run: DryRun = False,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Convert a FLUX.1 transformer to GGUF or FP8, one tensor in memory at a time."""
    import torch

    from flux_quant import console
    from flux_quant.converters.convert import make_plan, run

    if threads:
        torch.set_num_threads(threads)
    plan = make_plan(source, output, format_name, force)
    if dry_run:
        console.print_plan(plan)
        return
    for note in plan.notes:
        console.warn(note)
    with console.progress() as report:
        result = run(plan, report)
    console.print_result(result)


def main(arguments: list[str] | None = None) -> int:
    """The console entry: runs a verb and returns the exit code."""
    with terminable():
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
