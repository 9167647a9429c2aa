"""Fill the tables of README.md and of pages in docs/ from the committed results, so that every number was measured.

    python -I -m flux_quant.benchmarks.readme              # from benchmarks/results
    python -I -m flux_quant.benchmarks.readme --take demo  # first take over a new run of the demo

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what lies between them is replaced.
Pages take the newest results, docs/quality.md the file that it names: its sentences are about that one.
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from flux_quant.benchmarks.aims import AIMS
from flux_quant.benchmarks.bench.earlier import load
from flux_quant.benchmarks.bench.record import MEASURED, Row, Run, read_run
from flux_quant.benchmarks.machine import suite_in
from flux_quant.benchmarks.make_full_size import infos
from flux_quant.benchmarks.quality import table as quality
from flux_quant.converters.mixes import BASES
from flux_quant.converters.recipe import build
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def demo_table(results: dict) -> str:
    rows = [
        "| format | file | bits/weight | weight SNR | picture PSNR, mean | worst | convert | 8 pictures |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in results["formats"]:
        quality = [f"{row[key]:.1f} dB" if row[key] else "-" for key in ("weight_snr", "psnr_mean", "psnr_worst")]
        convert = f"{row['convert_seconds']:.1f} s" if row["convert_seconds"] else "-"
        cells = [row["format"].upper(), f"{row['bytes'] / 1e6:.2f} MB", f"{row['bits_per_weight']:.2f}", *quality]
        rows.append("| " + " | ".join([*cells, convert, f"{row['denoise_seconds']:.1f} s"]) + " |")
    machine = results["machine"]
    place = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    return "\n".join([*rows, "", f"Measured on {place}, {machine['date'][:10]}."])


def tiny_table(results: dict) -> str:
    def percent(name: str) -> str:
        return f"{results[name]['accuracy']:.1%} of {results[name]['pictures']}"

    steps = results["steps"]
    rows = {
        "right emoji, captions that name everything": percent("trained_captions"),
        "right emoji, combinations never shown in training": percent("held_out_combinations"),
        "right emoji, nothing but the emoji named": percent("emoji_named_only"),
        "VAE reconstruction": f"{results['vae_psnr']:.1f} dB",
        "PSNR between two seeds": f"{results['psnr_between_seeds']:.1f} dB",
        "PSNR between guidance 1 and 6": f"{results['psnr_between_guidance_1_and_6']:.1f} dB",
        "PSNR between 4 and 20 steps": f"{results['psnr_between_4_and_20_steps']:.1f} dB",
        f"right emoji, 4 / 20 steps ({steps['20']['pictures']} captions)": " / ".join(
            f"{steps[n]['accuracy']:.1%}" for n in ("4", "20")
        ),
        "PSNR to the nearest allowed picture, 4 / 20 steps": " / ".join(
            f"{steps[n]['psnr_to_nearest']:.2f} dB" for n in ("4", "20")
        ),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| figure | measured |", "|---|---:|", *lines])


ADVICE = {  # recipe -> who takes it
    "q8_0": "hardly to be told from BF16",
    "q6_k": "",
    "q5_k_m": "",
    "q5_k_s": "",
    "q4_k_m": "",
    "q4_k_s": "the best of its size",
    "iq4_xs": "a little smaller, a little worse",
    "q3_k_m": "",
    "q2_k": "if nothing else fits",
    "q5_1": "for readers without K-quants, as those below",
    "q5_0": "",
    "q4_1": "",
    "q4_0": "",
}


def formats_table(results: dict) -> str:
    """Errors on the bundled model's weights; bytes of FLUX.1 [dev] by its shapes."""
    measured = {row["type"]: row for row in results["results"] if row["family"] == "trained"}
    lines = [
        "| recipe | FLUX.1 [dev] | error | ggml's, plain / weighted | Mweights/s | times ggml's speed | |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, advice in ADVICE.items():
        row = measured[BASES[name]]
        errors = f"{row['ggml_plain_error']:.2f} / {row['ggml_weighted_error']:.2f} %"
        ours, plain, weighted = (row[f"{who}_mweights"] for who in ("ours", "ggml_plain", "ggml_weighted"))
        speed = f"{ours / plain:.1f} plain, {ours / weighted:.0f} weighted"
        cells = [name, f"{flux_bytes(name) / 1e9:.2f} GB", f"{row['ours_error']:.2f} %", errors, f"{ours:.0f}", speed]
        lines.append("| " + " | ".join([*cells, advice]) + " |")
    machine = results["machine"]
    place = f"threads: {results['threads']}, {machine['processor']}, {machine['date'][:10]}"
    return "\n".join([*lines, "", f"Bulk of the weights, {place}. Mixes: the error of most of their tensors."])


def flux_bytes(recipe: str) -> int:
    """Data of FLUX.1 [dev] in a GGUF."""
    tensors = infos(1.0)
    chooser = build(recipe, "FLUX.1", ".gguf", [info.name for info in tensors])
    chosen = [(chooser.choose(info.name, info.shape, "bf16", lambda: True)[0], info.shape) for info in tensors]
    return sum(FORMATS[name].nbytes(shape) for name, shape in chosen)


LARGE = 5e9  # bytes: smaller sources tell little of conversion


def conversion_table(run: Run) -> str:
    """Formats by sources, the largest first; medians."""
    cells = {(row.what["format"], row.values["source_bytes"]): row for row in large_sources(run)}
    sources = sorted({nbytes for _, nbytes in cells}, reverse=True)
    heads = [f"{nbytes / 1e9:.1f} GB: seconds | times `cp` | memory" for nbytes in sources]
    lines = ["| format | " + " | ".join(heads) + " |", "|---|" + "---:|---:|---:|" * len(sources)]
    for name in dict.fromkeys(name for name, _ in cells):
        found = (cells.get((name, nbytes)) for nbytes in sources)
        lines.append(f"| {name} | " + " | ".join(map(conversion_cells, found)) + " |")
    copies: dict[int, list[float]] = {nbytes: [] for nbytes in sources}
    for (_, nbytes), row in cells.items():
        copies[nbytes] += row.samples["cp_seconds"]
    times = " and ".join(f"{median(seconds):.0f} s" for seconds in copies.values())
    place = f"{run.machine['threads']} threads of {run.machine['processor']}"
    return "\n".join([*lines, "", f"`cp` took {times}; {place}, {run.machine['date'][:10]}."])


def conversion_cells(row: Row | None) -> str:
    if row is None:
        return " | | "
    return f"{row.seconds():.0f} | {row.seconds('times_cp'):.2f} | {row.memory['host_rss'] / 1e9:.2f} GB"


def large_sources(run: Run) -> list[Row]:
    return [row for row in run.rows if row.status == MEASURED and row.values["source_bytes"] >= LARGE]


def aims_table(results: list[dict]) -> str:
    """What a GPU is held to, and what every one that was measured said: the worst of so many cases."""
    devices = [f"{result['machine']['device']}, {result['machine']['date'][:10]}" for result in results]
    judged = [{row["aim"]: row for row in result["aims"]} for result in results]
    lines = [f"| aim | | {' | '.join(devices) or 'no GPU yet'} |", "|---|---:|" + "---:|" * max(1, len(devices))]
    for aim in AIMS:
        cells = [aim_cell(rows.get(aim.text)) for rows in judged] or ["not measured"]
        sign = "at most" if aim.at_most else "at least"
        lines.append(f"| {aim.text} | {sign} {aim.bound:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def aim_cell(row: dict | None) -> str:
    if row is None or not row["measured"]:
        return "not measured"
    missed = f"missed by {len(row['missed'])} of {row['measured']}" if row["missed"] else f"met by {row['measured']}"
    return f"{row['worst']:.3f}, {missed}"


def newest_by_machine(suite: str) -> list[dict]:
    found = {path.parent: path for path in sorted(RESULTS.glob(f"*/*-{suite}.json")) if suite_in(path) == suite}
    return [json.loads(path.read_text()) for path in found.values()]


def newest(pattern: str) -> dict:
    """The last of the results whose names fit."""
    return max(map(json.loads, (path.read_text() for path in RESULTS.glob(pattern))), key=date_of)


def newest_conversion() -> Run:
    """The last one of sources that are large."""
    runs = (load(path) for path in RESULTS.glob("cpu-*/*-conver*.json"))
    return max((run for run in runs if large_sources(run)), key=lambda run: run.date)


TABLES: dict[str, Callable[[], str]] = {
    "demo": lambda: demo_table(newest("demo.json")),
    "tiny_flux": lambda: tiny_table(newest("tiny_flux.json")),
    "formats": lambda: formats_table(newest("cpu-*/*-quantizers.json")),
    "conversion": lambda: conversion_table(newest_conversion()),
}


def quality_tables(text: str) -> dict[str, Callable[[], str]]:
    """Of the result whose path stands in the text. UserError if none does, or it is not there."""
    named = re.search(r"benchmarks/results/[^`\s]+-quality\.json", text)
    if not named:
        raise UserError("docs/quality.md names no result of the quality suite")
    made = quality.tables(read_run(ROOT / named[0]))
    return {name: lambda lines=lines: "\n".join(lines) for name, lines in made.items()}


PAGES: dict[str, Callable[[str], Mapping[str, Callable[[], str]]]] = {  # page -> its tables, by its text
    "README.md": lambda text: TABLES,
    "docs/quality.md": quality_tables,
    "docs/benchmarks.md": lambda text: {"aims": lambda: aims_table(newest_by_machine("aims"))},
}


def filled(page: str, text: str) -> str:
    """The text of one of PAGES with every table made anew. UserError for a table that there is not."""
    tables = PAGES[page](text)

    def fill(found: re.Match) -> str:
        if found[1] not in tables:
            raise UserError(f"{page} asks for the table {found[1]}, there are {', '.join(tables)}")
        return f"<!-- table: {found[1]} -->\n{tables[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def date_of(result: dict) -> str:
    return result.get("machine", {}).get("date", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--take", type=Path, help="folder of a finished demo: its report and contact sheet")
    args = parser.parse_args()
    if args.take:
        shutil.copy(args.take / "report.json", RESULTS / "demo.json")
        shutil.copy(args.take / "contact-sheet.png", ROOT / "docs/contact-sheet.png")
    made = {ROOT / page: filled(page, (ROOT / page).read_text()) for page in PAGES}
    for path, text in made.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
