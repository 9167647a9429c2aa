"""Drawn stand-ins for emoji, for tests of what is trained on them: no font is needed."""

from PIL import Image, ImageDraw

from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld


def figure_world(count: int) -> EmojiWorld:
    """Unsymmetric figures: a bar and a disc in varying colours and places."""
    world = EmojiWorld.__new__(EmojiWorld)
    world.names = [f"figure {i}" for i in range(count)]
    world.bitmaps = []
    for i in range(count):
        bitmap = Image.new("RGBA", (136, 128))
        draw = ImageDraw.Draw(bitmap)
        shade, place = 25 * i % 256, 8 * (i % 9)
        draw.rectangle((10 + place, 20, 40 + place, 110), fill=(shade, 200 - shade // 2, 90, 255))
        draw.ellipse((70, 5 + place, 120, 55 + place), fill=(200, shade // 2, 255 - shade, 255))
        world.bitmaps.append(bitmap)
    return world
