"""Fill the tables of README.md from the committed results, so that every number in it was measured.

    python -I -m flux_quant.benchmarks.readme              # from benchmarks/results
    python -I -m flux_quant.benchmarks.readme --take demo  # first take over a new run of the demo

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what lies between them is replaced.
"""

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

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


TABLES: dict[str, tuple[str, Callable[[dict], str]]] = {  # name -> result file, table
    "demo": ("demo.json", demo_table),
    "tiny_flux": ("tiny_flux.json", tiny_table),
}


def filled(text: str) -> str:
    """The text with every table made anew. ValueError for a name that is not in TABLES."""

    def fill(found: re.Match) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"README.md asks for the table {found[1]}, there are {', '.join(TABLES)}")
        file, table = TABLES[found[1]]
        return f"<!-- table: {found[1]} -->\n{table(json.loads((RESULTS / file).read_text()))}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--take", type=Path, help="folder of a finished demo: its report and contact sheet")
    args = parser.parse_args()
    if args.take:
        shutil.copy(args.take / "report.json", RESULTS / "demo.json")
        shutil.copy(args.take / "contact-sheet.png", ROOT / "docs/contact-sheet.png")
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))


if __name__ == "__main__":
    main()
