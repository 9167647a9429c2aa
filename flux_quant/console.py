"""What the verbs print: tables on stdout that stay readable at 80 columns and in a pipe, progress on stderr."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite, isinf
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from flux_quant.arch import block_of
from flux_quant.converters.conversion import Row
from flux_quant.converters.convert import Result, Usage
from flux_quant.converters.plan import Plan
from flux_quant.converters.quantize import Deviation
from flux_quant.converters.summary import Summary, shorten

if TYPE_CHECKING:
    from flux_quant.converters.bundle import Written
    from flux_quant.converters.verify import Report
    from flux_quant.generation import Result as Generation

WIDTH = 100  # where no terminal tells its own


def stdout() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, emoji=False)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def table(*columns: str, left: int = 1) -> Table:
    """Plain columns; all but the first `left` hold numbers."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i < left else "right", overflow="fold" if i < left else "ellipsis")
    return out


def size(nbytes: int) -> str:
    """1234567 -> 1.23 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"


def as_json(summary: Summary) -> dict[str, object]:
    fields = asdict(summary) | {"lora": summary.lora and asdict(summary.lora) | {"path": str(summary.path)}}
    fields |= {"path": str(summary.path), "family": summary.family, "naming": summary.naming}
    fields["components"] = [{"prefix": prefix, **family} for prefix, family in fields.pop("families").items()]
    return fields


def print_summary(summary: Summary, machine_readable: bool) -> None:
    if machine_readable:
        print(json.dumps(as_json(summary), indent=2))
        return
    console = stdout()
    console.print(f"{summary.path}", soft_wrap=True)
    console.print(f"  {summary.family}, {summary.naming} names, {summary.container}")
    counts = f"{summary.tensors:,} tensors, {summary.parameters:,} parameters"
    console.print(f"  {counts}, {size(summary.bytes)} ({summary.bytes:,} bytes)")
    for key, value in summary.metadata.items():
        console.print(f"  {key}: {value}")
    for name, text in summary.lora.lines() if summary.lora else ():
        console.print(f"  {name}: {text}", soft_wrap=True)
    formats = table("format", "tensors", "parameters", "bytes", "bits/weight")
    for name, use in summary.formats.items():
        formats.add_row(name, f"{use.tensors:,}", f"{use.parameters:,}", size(use.bytes), f"{use.bits:.2f}")
    blocks = table("blocks", "each", "in all")
    for label, sizes in alike(summary.blocks):
        spread = size(sizes[0]) if len(set(sizes)) == 1 else f"{size(min(sizes))} to {size(max(sizes))}"
        blocks.add_row(label, spread, size(sum(sizes)))
    for out in (formats, blocks):
        console.print()
        console.print(out)


def alike(blocks: dict[str, int]) -> list[tuple[str, list[int]]]:
    """Blocks of one kind together: `19 x double_blocks` and their sizes."""
    kinds: dict[str, list[int]] = {}
    for name, nbytes in blocks.items():
        kind, _, number = name.rpartition(".")
        kinds.setdefault(kind if number.isdigit() else name, []).append(nbytes)
    return [(f"{len(sizes)} x {kind}" if len(sizes) > 1 else kind, sizes) for kind, sizes in kinds.items()]


def print_summaries(folder: Path, summaries: list[Summary], machine_readable: bool) -> None:
    if machine_readable:
        print(json.dumps([as_json(summary) for summary in summaries], indent=2))
        return
    out = table("file", "model", "names", "formats", "parameters", "bytes", left=4)
    for summary in summaries:
        formats = " ".join(summary.formats)
        name = str(summary.path.relative_to(folder))
        out.add_row(name, summary.family, summary.naming, formats, f"{summary.parameters:,}", size(summary.bytes))
    stdout().print(out)


def print_plan(plan: Plan) -> None:
    """Tensors that get the same treatment are one line each, numbers of blocks taken together."""
    console = stdout()
    console.print(f"{plan.source} -> {plan.target}", soft_wrap=True)
    out = table("tensors", "count", "shape", "from", "to", "bytes")
    for label, rows in together(plan.rows):
        first = rows[0]
        shape = " x ".join(map(str, first.packed.shape))
        nbytes = sum(row.packed.nbytes for row in rows)
        out.add_row(label, str(len(rows)), shape, first.source.format, first.format, size(nbytes))
    console.print(out)
    print_exceptions(console, plan.rows)
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print(f"{len(plan.rows)} tensors, {size(plan.nbytes)} ({plan.nbytes:,} bytes of data); nothing was written")


def together(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    def key(row: Row) -> tuple:
        block = block_of(row.name)
        name = row.name.replace(block, block.split(".")[0] + ".*", 1)
        return name, row.packed.shape, row.source.format, row.format

    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return ((name, group) for (name, *_), group in groups.items())


def print_exceptions(console: Console, rows: Iterable[Row]) -> None:
    """Every tensor that could not take the format it was to get, what it got, and why."""
    for label, alike_rows in together(row for row in rows if row.reason):
        first = alike_rows[0]
        count = f"{len(alike_rows)} x " if len(alike_rows) > 1 else ""
        console.print(f"{count}{label}: {first.format}, because {first.reason}", soft_wrap=True)


def print_result(result: Result) -> None:
    console = stdout()
    out = table("format", "tensors", "parameters", "bytes", "bits/weight", "SNR dB", "relative error")
    for name, usage in result.formats.items():
        out.add_row(name, *usage_cells(usage))
    out.add_row("all", *usage_cells(result.total))
    console.print(out)
    share = result.file_bytes / result.source_bytes
    where = f"{result.path}" + (f" ({result.files} files)" if result.files > 1 else "")
    console.print(
        f"{where}: {size(result.file_bytes)}, {share:.1%} of the source's {size(result.source_bytes)}; verified",
        soft_wrap=True,
    )
    if result.resumed:
        console.print(f"{result.resumed:,} tensors had been finished by an interrupted run")
    print_exceptions(console, result.exceptions)


def usage_cells(usage: Usage) -> list[str]:
    counts = [f"{usage.tensors:,}", f"{usage.parameters:,}", size(usage.bytes), f"{usage.bits:.2f}"]
    return counts + deviation_cells(usage.deviation)


def deviation_cells(deviation: Deviation) -> list[str]:
    return ["exact", "0"] if isinf(deviation.snr) else [f"{deviation.snr:.1f}", f"{deviation.relative:.2e}"]


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, one line per phase; nothing where stderr is no terminal."""
    columns = (TextColumn("{task.description:12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        tasks: dict[str, int] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        yield report


@contextmanager
def steps_progress() -> Iterator[Callable[[Iterable[int]], Iterable[int]]]:
    """A bar over denoising steps with seconds per step, on stderr; nothing where stderr is no terminal."""
    columns = (TextColumn("denoising"), BarColumn(), TextColumn("{task.completed}/{task.total}"), SecondsPerStep())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        yield bar.track


class SecondsPerStep(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.elapsed / task.completed:.2f} s/it" if task.completed and task.elapsed else "")


def print_written(written: Iterable["Written"]) -> None:
    for file in written:
        print(f"{file.path}: {file.family}, {file.tensors:,} tensors, {size(file.bytes)}")


WORST = 5  # tensors named in a report


def print_report(report: "Report", machine_readable: bool) -> None:
    """Of `verify` and `diff`. Problems are results, so they go to stdout."""
    if machine_readable:
        print(json.dumps(report_as_json(report), indent=2))
        return
    console = stdout()
    what = " + ".join(f"{family.name} {family.variant}".strip() for family in report.families) or "no model known here"
    beside = f", compared with {report.against}" if report.against else ""
    console.print(f"{report.path}: {what}, {len(report.rows):,} tensors{beside}", soft_wrap=True)
    if report.against:
        print_errors(console, report)
    if report.checksums:
        console.print(f"{report.checksums:,} checksums are right")
    for key, here, there in report.metadata:
        console.print(f"metadata {key}: {brief(there)} -> {brief(here)}", soft_wrap=True)
    for warning in report.warnings:
        warn(warning)
    for problem in report.problems:
        console.print(f"problem: {problem}", soft_wrap=True)
    console.print(f"{len(report.problems)} problems" if report.problems else "no problems")


def print_errors(console: Console, report: "Report") -> None:
    """Per format, and the tensors that are furthest from the source."""
    compared = [row for row in report.rows if row.deviation is not None]
    out = table("format", "was", "tensors", "identical", "SNR dB", "relative error", left=2)
    for kind in dict.fromkeys((row.format, row.source_format) for row in compared):
        rows = [row for row in compared if (row.format, row.source_format) == kind]
        deviation = sum((row.deviation for row in rows), Deviation())
        same = sum(row.identical for row in rows)
        out.add_row(*kind, f"{len(rows):,}", f"{same:,}", *deviation_cells(deviation))
    console.print(out)
    worst = sorted(compared, key=lambda row: -row.deviation.relative)[:WORST]
    for row in worst:
        if row.deviation.noise:
            console.print(f"  {row.name} ({row.format}): {row.deviation.snr:.1f} dB")


def brief(value: object) -> str:
    return "absent" if value is None else shorten(value)


def differs(report: "Report") -> bool:
    return bool(report.problems or report.metadata) or not all(row.identical for row in report.rows)


def report_as_json(report: "Report") -> dict[str, object]:
    rows = [
        {"name": row.name, "shape": list(row.shape), "format": row.format, "bytes": row.nbytes}
        | (
            {"was": row.source_format, "identical": row.identical, **errors_as_json(row.deviation)}
            if row.deviation
            else {}
        )
        for row in report.rows
    ]
    return {
        "path": str(report.path),
        "against": str(report.against) if report.against else None,
        "families": [asdict(family) for family in report.families],
        "problems": report.problems,
        "warnings": report.warnings,
        "checksums": report.checksums,
        "metadata": [[key, brief(there), brief(here)] for key, here, there in report.metadata],
        "tensors": rows,
    }


def errors_as_json(deviation: Deviation) -> dict[str, float | None]:
    """JSON has no infinity: an exact tensor has no SNR."""
    return {
        "snr_db": round(deviation.snr, 3) if isfinite(deviation.snr) else None,
        "relative_error": deviation.relative,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_generation(paths: Iterable[Path], result: "Generation") -> None:
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in result.seconds.items())
    memory = f"peak RAM {size(result.peak_ram)}"
    if result.peak_vram:
        memory += f", peak VRAM {size(result.peak_vram)}"
    done = f"{result.image.width} x {result.image.height}"
    if result.steps:
        done += f", {result.steps} steps at {result.seconds['denoise'] / result.steps:.2f} s/it"
    for path in paths:
        print(f"{path}: {done}")
    print(f"{phases}; {memory}")
    if moved := result.metrics:
        rate = f"{moved['bytes_per_second'] / 1e9:.1f} GB/s" if moved["bytes_per_second"] else "no copies"
        print(f"streamed {size(moved['total_bytes'])}, {rate}, waited {moved['stall']:.2f} s in the last pass")
