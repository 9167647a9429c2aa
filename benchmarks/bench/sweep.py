"""The lists of `flux-quant bench`: what is written between commas, checked before anything is measured."""

import re

from flux_quant.converters.mixes import ALIASES
from flux_quant.converters.recipe import KEEP, OFFERED
from flux_quant.errors import UserError
from flux_quant.planner.footprint import PATCH
from flux_quant.planner.memory import parse_amount


def parts(text: str | None, option: str) -> list[str]:
    """Those of "a,b", each once; none for no text. UserError for an empty one."""
    if text is None:
        return []
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise UserError(f"{option} {text!r}: write values with commas between them, none of them empty")
    return list(dict.fromkeys(found))


def formats(text: str | None) -> tuple[str, ...]:
    """Recipes of `convert`, in lower case."""
    known = [*dict.fromkeys(one for offered in OFFERED.values() for one in offered if one != KEEP), *ALIASES]
    names = parts(text and text.lower(), "--formats")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--formats {unknown[0]}: unknown; choose from {', '.join(known)}")
    return tuple(names)


def budgets(text: str | None) -> tuple[int, ...]:
    """Bytes."""
    return tuple(parse_amount(part, "--vram") for part in parts(text, "--vram"))


def sizes(text: str | None) -> tuple[tuple[int, int], ...]:
    """Width and height from "1024x768", or from "512" for a square."""
    return tuple(map(size, parts(text, "--size")))


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.lower())
    if not found:
        raise UserError(f"--size {text}: write it as WIDTHxHEIGHT, for example 512,1024x768")
    width, height = int(found[1]), int(found[2] or found[1])
    if not width or not height or width % PATCH or height % PATCH:
        raise UserError(f"--size {text}: both sides must be multiples of {PATCH}")
    return width, height


def counts(text: str | None, option: str = "--steps") -> tuple[int, ...]:
    found = parts(text, option)
    if wrong := [part for part in found if not part.isdecimal() or not int(part)]:
        raise UserError(f"{option} {wrong[0]}: write whole numbers from 1 on, for example 4,20")
    return tuple(map(int, found))


def named_size(pixels: tuple[int, int]) -> str:
    return f"{pixels[0]}x{pixels[1]}"


def named_budget(nbytes: int) -> str:
    """8000000000 -> 8GB, as it is written after --vram."""
    return f"{nbytes / 1e9:g}GB"
