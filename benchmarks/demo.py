"""The main job on the bundled model: convert it to every format, draw the same pictures with each, compare.

Activations are float32 everywhere and the noise is the same, so a picture differs from that of the BF16 file by the
errors of the weights alone.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flux_quant.benchmarks.machine import fingerprint
from flux_quant.benchmarks.metrics import psnr
from flux_quant.benchmarks.sheet import contact_sheet
from flux_quant.components import Components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.plan import make_plan
from flux_quant.drawing.vae import decode
from flux_quant.generation import Request, denoise_batch, encode, to_images
from flux_quant.loading import load_flux, load_vae

TARGETS = {"fp8": "FP8.safetensors", "q8_0": "Q8_0.gguf", "q5_0": "Q5_0.gguf", "q4_0": "Q4_0.gguf"}
PROMPTS = (
    "large mushroom on a white background",
    "large cactus on a blue background",
    "large tiger face on a white background",
    "large fox face on a green background",
    "large tangerine on a purple background",
    "small tomato on the left on a yellow background",
    "panda face",
    "watermelon",
)
SIZE, STEPS, GUIDANCE = (96, 96), 20, 3.5

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Column:
    """One format: its file and what it does to the pictures."""

    format: str
    file: str
    bytes: int
    bits_per_weight: float  # of the whole file
    weight_snr: float | None  # dB, over the tensors that were quantized; None for the source
    psnr_mean: float | None  # dB against the pictures of the source
    psnr_worst: float | None
    convert_seconds: float | None
    denoise_seconds: float  # for all pictures together


def run_demo(components: Components, folder: Path, say: Progress = lambda text: None) -> list[Column]:
    """Writes `folder`/contact-sheet.png, report.md, report.json and the converted models."""
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    requests = [Request(p, steps=STEPS, guidance=GUIDANCE, seed=i, size=SIZE) for i, p in enumerate(PROMPTS)]
    say("encoding 8 prompts")
    features = encode(components, requests, guided=True)
    vae = load_vae(components.vae)

    def draw(path: Path) -> tuple[Tensor, float]:
        start = time.perf_counter()
        latents = denoise_batch(load_flux(path), features, requests)
        seconds = time.perf_counter() - start
        return decode(vae, latents), seconds

    source = components.transformer
    say(f"drawing with {source.name}")
    reference, seconds = draw(source)
    columns, pictures = [source_column(source, seconds)], [reference]
    for name, suffix in TARGETS.items():
        target = models / f"{source.stem}-{suffix}"
        say(f"converting to {target.name}")
        start = time.perf_counter()
        result = run(make_plan(Conversion(source, target, name, force=True)))
        converting = time.perf_counter() - start
        say(f"drawing with {target.name}")
        drawn, seconds = draw(target)
        distance = psnr(drawn, reference)
        pictures.append(drawn)
        columns.append(
            Column(
                format=name,
                file=target.name,
                bytes=result.file_bytes,
                bits_per_weight=8 * result.file_bytes / result.total.parameters,
                weight_snr=result.formats[name].deviation.snr,
                psnr_mean=distance.mean().item(),
                psnr_worst=distance.min().item(),
                convert_seconds=converting,
                denoise_seconds=seconds,
            )
        )
    sheet_of(columns, pictures).save(folder / "contact-sheet.png")
    (folder / "report.md").write_text(report(columns))
    data = {"machine": fingerprint(), "prompts": PROMPTS, "steps": STEPS, "guidance": GUIDANCE}
    data["formats"] = [asdict(column) for column in columns]
    (folder / "report.json").write_text(json.dumps(data, indent=2) + "\n")
    return columns


def source_column(path: Path, seconds: float) -> Column:
    from flux_quant.converters.summary import summarize

    summary = summarize(path)
    bits = 8 * summary.bytes / summary.parameters
    return Column("bf16", path.name, summary.bytes, bits, None, None, None, None, seconds)


def sheet_of(columns: Sequence[Column], pictures: Sequence[Tensor]) -> Image.Image:
    images = [to_images(drawn) for drawn in pictures]
    heads = [f"{c.format.upper()}\n{c.bytes / 1e6:.1f} MB\n{decibels(c.psnr_mean, 'reference')}" for c in columns]
    return contact_sheet([(prompt, [row[i] for row in images]) for i, prompt in enumerate(PROMPTS)], heads)


def decibels(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else f"{value:.1f} dB"


def report(columns: Sequence[Column]) -> str:
    """The table as Markdown."""
    lines = [
        "# The same pictures from every format",
        "",
        f"{len(PROMPTS)} prompts, {SIZE[0]} x {SIZE[1]} pixels, {STEPS} steps, guidance {GUIDANCE}, activations in "
        f"float32, {torch.get_num_threads()} threads.",
        "PSNR compares a picture with that of the BF16 file from the same noise; weight SNR covers the tensors that "
        "were quantized.",
        "",
        "| format | file | bytes | bits/weight | weight SNR | image PSNR mean | worst | convert | draw |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for c in columns:
        convert = "-" if c.convert_seconds is None else f"{c.convert_seconds:.1f} s"
        figures = (decibels(value, "-") for value in (c.weight_snr, c.psnr_mean, c.psnr_worst))
        lines.append(
            f"| {c.format} | {c.file} | {c.bytes:,} | {c.bits_per_weight:.2f} | {' | '.join(figures)} "
            f"| {convert} | {c.denoise_seconds:.1f} s |"
        )
    return "\n".join([*lines, "", "![contact sheet](contact-sheet.png)", ""])
