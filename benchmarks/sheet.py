"""A contact sheet: pictures in a grid with a name over every column and a caption beside every row."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, FONT_SIZE = 12, 6, 15


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    columns: Sequence[str],
    cell: int = 144,
    caption_width: int = 190,
) -> Image.Image:
    """rows: (caption, pictures); every picture is scaled to `cell` pixels. Column names may have several lines."""
    font = ImageFont.load_default(FONT_SIZE)
    line = FONT_SIZE + 4
    head = MARGIN + line * max((name.count("\n") + 1 for name in columns), default=0)
    width = 2 * MARGIN + caption_width + len(columns) * (cell + GAP)
    sheet = Image.new("RGB", (width, head + len(rows) * (cell + GAP) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    left = MARGIN + caption_width
    for x, name in enumerate(columns):
        draw.multiline_text((left + x * (cell + GAP), MARGIN // 2), name, "black", font, spacing=3)
    characters = int(caption_width / (0.5 * FONT_SIZE))
    for y, (caption, pictures) in enumerate(rows):
        top = head + y * (cell + GAP)
        draw.multiline_text((MARGIN, top + 4), textwrap.fill(caption, characters), "black", font, spacing=3)
        for x, picture in enumerate(pictures):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (left + x * (cell + GAP), top))
    return sheet
