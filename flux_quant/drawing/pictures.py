"""Given pictures and masks, read as the drawing needs them; and pictures written as PNG with their settings inside.

Tensors are (1, channels, height, width) float32 in 0-1. As in diffusers, a picture is resized to the size of the
drawing without regard to its shape (Lanczos), and a mask is 1 (white) where the picture is drawn anew.
"""

import json
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flux_quant import __version__
from flux_quant.converters.output import OutputFile
from flux_quant.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

KEPT_BELOW = 0.5  # of a mask: what is darker is kept
SAME_SHAPE = 0.02  # relative difference of width / height that nobody sees


def read_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """(1, 3, height, width) of the file, upright as its EXIF says; what is transparent becomes white."""
    picture = opened(path)
    wanted, found = size[0] / size[1], picture.width / picture.height
    if abs(found / wanted - 1) > SAME_SHAPE:
        shapes = f"{picture.width} x {picture.height} and is distorted to {size[0]} x {size[1]}"
        warnings.warn(f"{path} is {shapes}", stacklevel=2)
    return as_tensor(resized(flattened(picture), size))


def flattened(picture: "Image.Image") -> "Image.Image":
    """In RGB; what is transparent becomes white."""
    from PIL import Image

    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """(1, 1, height, width): 1 is drawn anew. UserError where it keeps everything."""
    mask = as_tensor(resized(opened(path).convert("L"), size))
    if (mask < KEPT_BELOW).all():
        raise UserError(f"{path}: the mask is black everywhere: nothing would be drawn anew")
    return mask


def check_same_size(picture: Path, mask: Path) -> None:
    """UserError if a mask is of another size than its picture."""
    sizes = opened(picture).size, opened(mask).size
    if sizes[0] != sizes[1]:
        (w, h), (w2, h2) = sizes
        raise UserError(f"{mask} is {w2} x {h2}, {picture} is {w} x {h}: a mask has the size of its picture")


def painted_size(picture: Path, recommended: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a picture, made smaller where it has more than twice the area that a model was made for."""
    size = opened(picture).size
    shrink = min(1.0, (2 * recommended[0] * recommended[1] / (size[0] * size[1])) ** 0.5)
    return tuple(max(1, int(side * shrink)) for side in size)


def opened(path: Path) -> "Image.Image":
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        picture = Image.open(path)
        picture.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        reason = "not a picture that Pillow reads" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{path}: {reason}") from None
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would cut off at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8))
    return picture


def resized(picture: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    from PIL.Image import Resampling

    return picture if picture.size == size else picture.resize(size, Resampling.LANCZOS)


def as_tensor(picture: "Image.Image") -> Tensor:
    values = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(values.reshape(picture.height, picture.width, -1)).permute(2, 0, 1)[None].contiguous()


def latent_mask(mask: Tensor) -> Tensor:
    """(1, 1, H, W) -> (1, 1, H / 8, W / 8) of 0 and 1: the nearest pixel of each position, as in diffusers."""
    height, width = mask.shape[-2] // 8, mask.shape[-1] // 8
    return torch.nn.functional.interpolate((mask >= KEPT_BELOW).float(), size=(height, width))


def composite(drawn: Tensor, picture: Tensor, mask: Tensor) -> Tensor:
    """The given picture, untouched where the mask is black; greys of the mask mix both."""
    return mask * drawn + (1 - mask) * picture


def to_images(pictures: Tensor) -> list["Image.Image"]:
    """(B, 3, H, W) in 0-1."""
    from PIL import Image

    return [Image.fromarray((p.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for p in pictures]


def save_png(image: "Image.Image", path: Path, settings: dict[str, object], force: bool = False) -> None:
    """Complete or not at all. The settings lie in the PNG as JSON under the key `flux_quant`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", f"flux_quant {__version__}")
    info.add_text("flux_quant", json.dumps(settings))
    encoded = BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    with OutputFile(path, len(encoded.getvalue()), force) as file:
        file.write(0, encoded.getvalue())
