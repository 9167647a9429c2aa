"""The verb `report`. `cli` registers it."""

from pathlib import Path
from typing import Annotated

import typer

from flux_quant.errors import UserError
from flux_quant.verbs import options as opt

Results = Annotated[
    list[Path] | None,
    typer.Argument(metavar="RESULTS...", help="of flux-quant bench: files, folders; pictures [default: ours]"),
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help=".html or .md [default: Markdown to the screen]"),
]
Compare = Annotated[
    tuple[Path, Path] | None, typer.Option(metavar="A B", help="instead: what changed from results A to results B")
]
AcrossMachines = Annotated[bool, typer.Option("--across-machines", help="--compare results of different machines")]
NoPlots = Annotated[bool, typer.Option("--no-plots", help="tables alone; needs no matplotlib")]


def register(main: typer.Typer) -> None:
    main.command()(report)


def report(
    results: Results = None,
    output: ReportFile = None,
    compare: Compare = None,
    across_machines: AcrossMachines = False,
    no_plots: NoPlots = False,
    force: opt.Force = False,
) -> None:
    """Make one page, or Markdown with plots beside it, of what flux-quant bench measured."""
    from flux_quant.benchmarks.report import compare as comparing
    from flux_quant.benchmarks.report.inputs import RESULTS, gather
    from flux_quant.benchmarks.report.rendering import markdown
    from flux_quant.benchmarks.report.sections import report as assemble
    from flux_quant.benchmarks.report.writing import check_output, write

    if compare and results:
        raise UserError("--compare takes two results, and no others can be given with it")
    if across_machines and not compare:
        raise UserError("--across-machines goes with --compare")
    if output:
        check_output(output, force)
    if compare:
        content = comparing.compare(gather([compare[0]]), gather([compare[1]]), across_machines)
    else:
        found = gather(results or [RESULTS])
        if not found.sources:
            raise UserError(f"no results of flux-quant bench in {', '.join(map(str, results or [RESULTS]))}")
        content = assemble(found)
    if output is None:
        print(markdown(content).rstrip())
        return
    for path in write(content, output, not no_plots, force):
        print(f"written: {path}")
