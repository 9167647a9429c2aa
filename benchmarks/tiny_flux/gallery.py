"""One picture of what the bundled model draws with its Turbo LoRA and its ControlNet for inpainting.

    python -m flux_quant.benchmarks.tiny_flux.gallery        # docs/gallery.png

Above: captions, drawn in 20 and in 8 steps by the model alone, and in 8 with the LoRA. Below: a picture, what is drawn
anew of it (grey), and what the net, the net with the LoRA, and the model without a net paint there. Examples are the
first that a generator with a fixed seed gives.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from flux_quant.benchmarks.sheet import FONT_SIZE, MARGIN, contact_sheet
from flux_quant.benchmarks.tiny_flux.emoji import SIZE, EmojiWorld
from flux_quant.benchmarks.tiny_flux.evaluate_inpainting import (
    SWAPS,
    TURBO,
    Case,
    Way,
    painted,
    part_cases,
    swap_cases,
    uint8,
)
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing.request import Request
from flux_quant.generation import generate

SEED = 0
DRAWN, RESTORED, EXCHANGED = 4, 2, 1  # captions; pictures of each kind of part, and of each kind of exchange
CELL = 112
DRAWINGS = {  # column -> steps, whether with the LoRA
    "20 steps": (20, False),
    "8 steps": (8, False),
    "8 steps\nTurbo LoRA": (8, True),
}
PAINTINGS = {
    "net\n20 steps": Way(),
    "net + Turbo\n8 steps": Way(8, lora=TURBO),
    "no net\n20 steps": Way(net=None),
}
GREY = 128


def drawings(world: EmojiWorld) -> Image.Image:
    components, rng, rows = find_components(BUNDLED), np.random.default_rng(SEED), []
    for seed in range(DRAWN):
        caption, pictures = world.caption(world.sample(rng)), []
        for steps, turbo in DRAWINGS.values():
            loras = ((TURBO, 1.0),) if turbo else ()
            request = Request(caption, steps=steps, seed=seed, size=(SIZE, SIZE), loras=loras)
            pictures.append(generate(components, request).image)
        rows.append((caption, pictures))
    return contact_sheet(rows, list(DRAWINGS), CELL)


def paintings(world: EmojiWorld, cases: Sequence[Case]) -> Image.Image:
    rows = []
    for case in cases:
        before = uint8(world, case.before)
        covered = np.where(case.mask[..., None], np.uint8(GREY), before)
        with tempfile.TemporaryDirectory() as folder:
            found = [painted(world, case, way, Path(folder)) for way in PAINTINGS.values()]
        rows.append((case.caption, [Image.fromarray(picture) for picture in (before, covered, *found)]))
    return contact_sheet(rows, ["given", "drawn anew", *PAINTINGS], CELL)


def below_each_other(parts: dict[str, Image.Image]) -> Image.Image:
    """With a headline over each."""
    font, line = ImageFont.load_default(FONT_SIZE + 4), FONT_SIZE + 4 + MARGIN
    sheet = Image.new(
        "RGB", (max(p.width for p in parts.values()), sum(p.height + line for p in parts.values())), "white"
    )
    draw, top = ImageDraw.Draw(sheet), 0
    for headline, part in parts.items():
        draw.text((MARGIN, top + MARGIN // 2), headline, "black", font)
        sheet.paste(part, (0, top + line))
        top += line + part.height
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/gallery.png"))
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    world = EmojiWorld()
    restored, exchanged = part_cases(world, RESTORED, SEED), swap_cases(world, EXCHANGED, SEED)
    sheet = below_each_other(
        {
            "Drawn": drawings(world),
            "A part restored": paintings(world, restored),
            "An emoji exchanged": paintings(world, exchanged[: len(SWAPS)]),
        }
    )
    sheet.quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)
    print(f"{args.out}: {sheet.width} x {sheet.height}, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
