"""Which tensor gets which format: ordered rows (glob, format), the first match wins.

GGUF rows follow the layout that every reader takes (ComfyUI-GGUF, diffusers, stable-diffusion.cpp, Forge): vectors F32,
the embedders and the final layer never quantized and never BF16. FP8 rows follow ComfyUI: linears of the blocks FP8,
the rest BF16, norms as they come.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from flux_quant.errors import UserError
from flux_quant.formats import FORMATS, Shape

KEEP = "keep"  # the source's own format, if it is a plain one

Rows = tuple[tuple[str, str], ...]

GGUF_ROWS: Rows = (
    ("*.bias", "f32"),
    ("*.scale", "f32"),
    ("img_in.*", "f32"),
    ("*_in.in_layer.*", "f32"),
    ("final_layer.linear.*", "f32"),
    ("txt_in.*", "f16"),
    ("*_in.out_layer.*", "f16"),
    ("final_layer.adaLN_modulation.1.*", "f16"),
)
FP8_ROWS: Rows = (
    ("*.scale", KEEP),
    ("double_blocks.*.weight", "fp8"),
    ("single_blocks.*.weight", "fp8"),
)


@dataclass(frozen=True)
class Recipe:
    """`rows` decide; a tensor that its row's format cannot hold takes the first of `fallbacks` that can."""

    format: str  # of the bulk of the weights, which gives the recipe its name
    rows: Rows
    fallbacks: tuple[str, ...]

    def choose(self, name: str, shape: Shape, source: str, in_range: Callable[[], bool]) -> tuple[str, str]:
        """The format for a tensor, and the reason where it is not the row's.

        `in_range` tells whether the values survive float16; it may read them, so it is asked only if that matters.
        """
        wanted = next(format_name for glob, format_name in self.rows if fnmatchcase(name, glob))
        if wanted == KEEP:
            wanted = source if FORMATS[source].is_plain else self.fallbacks[0]
        reasons = []
        for candidate in dict.fromkeys((wanted, *self.fallbacks)):
            fmt = FORMATS[candidate]
            if not fmt.fits(shape):
                reasons.append(f"{candidate} needs rows of a multiple of {fmt.block}, the shape is {list(shape)}")
            elif candidate == "f16" and source != "f16" and not in_range():
                reasons.append("values do not survive float16")
            else:
                return candidate, "; ".join(reasons)
        raise UserError(f"{name} {list(shape)} cannot be stored: {'; '.join(reasons)}")


def gguf(name: str) -> Recipe:
    return Recipe(name, (*GGUF_ROWS, ("*", name)), ("f16", "f32"))


RECIPES: dict[tuple[str, str], Recipe] = {  # (format, suffix of the file)
    **{(name, ".gguf"): gguf(name) for name in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "f16", "bf16")},
    ("fp8", ".safetensors"): Recipe("fp8", (*FP8_ROWS, ("*", "bf16")), ("bf16",)),
    ("bf16", ".safetensors"): Recipe("bf16", (("*", "bf16"),), ("bf16",)),
    ("f16", ".safetensors"): Recipe("f16", (("*", "f16"),), ("f32",)),
}


def recipe_for(format_name: str, path: Path) -> Recipe:
    """UserError if there is no such format, or files of that name do not hold it."""
    names = dict.fromkeys(name for name, _ in RECIPES)
    if format_name not in names:
        raise UserError(f"unknown format {format_name}; choose one of {', '.join(names)}")
    suffix = path.suffix.lower()
    if (format_name, suffix) not in RECIPES:
        suffixes = " or ".join(suffix for name, suffix in RECIPES if name == format_name)
        raise UserError(f"{path}: {format_name} is stored in a {suffixes} file; give the output such a name")
    return RECIPES[format_name, suffix]
