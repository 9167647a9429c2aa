"""From a layout's tensor names to a model's canonical ones and back, by the tables in `layouts`.

`from_stored` and `to_stored` read the same rows, so they are inverse to each other. Both know names and shapes only;
`Stored` says what has to be done with the values, and the functions at the end do it for tensors in memory.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from flux_quant.errors import UserError
from flux_quant.layouts import Row, rows_for

Shape = tuple[int, ...]
EMBEDDING_COPY = "encoder.embed_tokens.weight"  # Hugging Face's second name for T5's shared.weight


@dataclass(frozen=True)
class Stored:
    """Where a canonical tensor lies: below each other the rows of `names`, or some rows of the only one."""

    names: tuple[str, ...]
    rows: tuple[int, ...]  # of the canonical tensor, in each of them
    full: Shape  # of the canonical tensor
    shape: Shape | None = None  # of the only stored one, where it is another
    swapped: bool = False  # the two halves of the rows have changed places
    start: int = 0  # the first of our rows in a stored tensor that has more
    transposed: bool = False

    @property
    def is_plain(self) -> bool:
        """One stored tensor, as it is."""
        return len(self.names) == 1 and self.shape is None and not self.swapped


def from_stored(family: str, naming: str, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """Stored names and shapes -> canonical names and where they lie; names without a place in the model are left out.

    UserError if a tensor that consists of several is incomplete, or if two claim the same place.
    """
    rows = rows_for(family, naming, shapes)
    translator = Translator((pattern, (row, i)) for row in rows for i, pattern in enumerate(row.stored))
    pieces: dict[str, tuple[Row, tuple[str, ...], dict[int, str]]] = {}  # row, values of placeholders, position -> name
    for name in shapes:
        answers, values = translator.find(name)
        for row, i in answers:
            canonical = filled(row.canonical, values)
            *_, found = pieces.setdefault(canonical, (row, values, {}))
            if i in found:
                raise UserError(f"{name} and {found[i]} are the same tensor of a {family}; one of them has to go")
            found[i] = name
    if family == "T5 encoder" and EMBEDDING_COPY in shapes and "shared.weight" not in pieces:
        pieces["shared.weight"] = Row("shared.weight", (EMBEDDING_COPY,)), (), {0: EMBEDDING_COPY}
    for row, values, found in pieces.values():
        for i, pattern in enumerate(row.stored):
            if i not in found:
                missing = filled(pattern, values)
                raise UserError(f"the model is incomplete: {missing} is missing beside {min(found.values())}")
    return {
        canonical: assembled(row, tuple(found[i] for i in range(len(found))), shapes)
        for canonical, (row, _, found) in pieces.items()
    }


def assembled(row: Row, names: tuple[str, ...], shapes: Mapping[str, Shape]) -> Stored:
    first = shapes[names[0]]
    if len(names) > 1:
        if any(shapes[name][1:] != first[1:] or not shapes[name] for name in names):
            raise UserError(f"{', '.join(names)} do not fit below each other: {[list(shapes[name]) for name in names]}")
        rows = tuple(shapes[name][0] for name in names)
        return Stored(names, rows, (sum(rows), *first[1:]))
    rows = first[:1] or (1,)
    if row.swapped and rows[0] % 2:
        raise UserError(f"{names[0]} {list(first)} has no two halves of rows")
    if row.third is not None:
        third = rows[0] // 3
        if third * 3 != rows[0]:
            raise UserError(f"{names[0]} {list(first)} does not hold three equal parts")
        return Stored(names, (third,), (third, *first[1:]), first, start=row.third * third)
    if row.transposed and len(first) == 2:
        return Stored(names, first[1:], first[::-1], first, transposed=True)
    if row.pointwise and len(first) == 2:
        return Stored(names, rows, (*first, 1, 1), first)
    return Stored(names, rows, first, swapped=row.swapped)


def to_stored(family: str, naming: str, shapes: Mapping[str, Shape]) -> dict[str, Stored]:
    """Canonical names and shapes -> where each tensor lies in another layout. UserError for a name that it lacks.

    Several canonical tensors may be rows of one stored tensor: then `start` tells them apart.
    """
    translator = Translator((row.canonical, row) for row in rows_for(family, naming, shapes))
    out = {}
    for name, shape in shapes.items():
        answers, values = translator.find(name)
        if not answers:
            raise UserError(f"{name} has no place in a {family} in {naming} names")
        out[name] = placed(answers[0], values, shape, shapes)
    return out


def placed(row: Row, values: tuple[str, ...], shape: Shape, shapes: Mapping[str, Shape]) -> Stored:
    names = tuple(filled(pattern, values) for pattern in row.stored)
    rows = shape[:1] or (1,)
    if len(names) > 1:  # FLUX.1 in diffusers: q, k, v of the model's width, and what remains
        width = shapes["img_in.weight"][0]
        return Stored(names, (*[width] * (len(names) - 1), rows[0] - width * (len(names) - 1)), shape)
    if row.third is not None:
        return Stored(names, rows, shape, (rows[0] * 3, *shape[1:]), start=row.third * rows[0])
    if row.transposed and len(shape) == 2:
        return Stored(names, rows, shape, shape[::-1], transposed=True)
    if row.pointwise and shape[2:] == (1, 1):
        return Stored(names, rows, shape, shape[:2])
    return Stored(names, rows, shape, swapped=row.swapped)


class Translator:
    """Finds what belongs to the first pattern that matches a name; only those with its first word are tried."""

    def __init__(self, patterns: Iterable[tuple[str, object]]) -> None:
        self.by_word: dict[str, dict[str, list]] = {}
        for pattern, answer in patterns:
            self.by_word.setdefault(pattern.split(".", 1)[0], {}).setdefault(pattern, []).append(answer)

    def find(self, name: str) -> tuple[list, tuple[str, ...]]:
        """The answers, and what the pattern's placeholders stand for; nothing if no pattern matches."""
        for pattern, answers in self.by_word.get(name.split(".", 1)[0], {}).items():
            if found := matcher(pattern).fullmatch(name):
                return answers, found.groups()
        return [], ()


@cache
def matcher(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\{\}", r"(\w+)")
    return re.compile(text.removesuffix(r"\*") + "(.+)" if text.endswith(r"\*") else text, re.ASCII)


def filled(pattern: str, values: Iterable[str]) -> str:
    """The pattern with its placeholders replaced, from left to right."""
    for value in values:
        pattern = pattern.replace("{}", value, 1) if "{}" in pattern else pattern.removesuffix("*") + value
    return pattern


# --- Tensors in memory ------------------------------------------------------------------------------------------------


def gather(stored: Stored, tensors: Mapping[str, Tensor]) -> Tensor:
    """The canonical tensor out of the stored ones: a view where nothing has to be put together."""
    tensor = tensors[stored.names[0]] if len(stored.names) == 1 else torch.cat([tensors[n] for n in stored.names])
    if stored.transposed:
        return tensor.t()
    if tensor.ndim and len(tensor) != sum(stored.rows):
        tensor = tensor[stored.start : stored.start + stored.rows[0]]
    return (swap_halves(tensor) if stored.swapped else tensor).reshape(stored.full)


def spread(stored: Stored, tensor: Tensor) -> dict[str, Tensor]:
    """The stored tensors of a canonical one, by name; not for those that share a stored tensor with others."""
    if stored.transposed:
        return {stored.names[0]: tensor.t()}
    if stored.swapped:
        tensor = swap_halves(tensor)
    pieces = tensor.split(stored.rows) if tensor.ndim else (tensor,)
    return {n: p.reshape(stored.shape) if stored.shape else p for n, p in zip(stored.names, pieces, strict=True)}


def swap_halves(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FLUX.1 tensors in BFL names -> diffusers names: rows are cut, the final modulation's halves change places."""
    return translated("FLUX.1", tensors)


def vae_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VAE tensors in BFL names -> names and shapes of diffusers' AutoencoderKL (1 x 1 convolutions become linears)."""
    return translated("VAE", tensors)


def translated(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, stored in to_stored(family, "diffusers", shapes_of(tensors)).items():
        out |= spread(stored, tensors[name])
    return out


def vae_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `vae_to_diffusers`."""
    places = from_stored("VAE", "diffusers", shapes_of(tensors))
    return {name: gather(stored, tensors) for name, stored in places.items()}
