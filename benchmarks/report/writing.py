"""Where a report goes: one HTML page, or Markdown with a folder beside it. Complete or not at all."""

import shutil
from pathlib import Path

from flux_quant.benchmarks.report.drawing import need_matplotlib
from flux_quant.benchmarks.report.model import Report
from flux_quant.benchmarks.report.rendering import folder_of, html, markdown, plots
from flux_quant.errors import UserError

PAGE, MARKDOWN = (".html", ".htm"), (".md", ".markdown")


def check_output(path: Path, force: bool) -> None:
    """UserError for another suffix, and for what is there unless `force`."""
    if path.suffix.lower() not in (*PAGE, *MARKDOWN):
        raise UserError(f"{path}: a report is .html or .md")
    taken = [place for place in (path, *([folder_of(path)] if is_markdown(path) else [])) if place.exists()]
    if taken and not force:
        raise UserError(f"{taken[0]} exists; --force replaces it")


def is_markdown(path: Path) -> bool:
    return path.suffix.lower() in MARKDOWN


def write(report: Report, path: Path, with_plots: bool = True, force: bool = False) -> list[Path]:
    """What was written. UserError as `check_output`, and without Jinja2 or, for plots, matplotlib."""
    check_output(path, force)
    if with_plots and any(section.plots for section in report.sections):
        need_matplotlib()
    if not is_markdown(path):
        publish(path, html(report, with_plots))
        return [path]
    drawn = plots(report) if with_plots else {}
    text = markdown(report, path if with_plots else None)
    replace_folder(folder_of(path), drawn)
    publish(path, text)
    return [path, folder_of(path)] if drawn else [path]


def publish(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text.rstrip() + "\n", encoding="utf-8")
    temporary.replace(path)


def replace_folder(folder: Path, content: dict[str, bytes]) -> None:
    """The folder holds `content` and nothing else. UserError if it holds what is no plot or picture."""
    kept = list(folder.iterdir()) if folder.exists() else []
    if strange := [path for path in kept if path.is_dir() or path.suffix != ".svg"]:
        raise UserError(f"{strange[0]} is no plot of a report: move it, or choose another name for the report")
    if content:
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in content.items():
            (temporary / name).write_bytes(data)
    if folder.exists():
        shutil.rmtree(folder)
    if content:
        temporary.rename(folder)
