"""What a configuration's number in a table of ways stands for, so that a table outlives changes of the kernels.

In memory a step names a configuration by its number in its kernel's table. In a file it has the configuration's
content: a number that means another tile today would be followed without a word, a content that is gone is seen.
"""

from collections.abc import Sequence
from dataclasses import fields

from flux_quant.kernels.tables import FUSED, VECTOR

Content = dict[str, int]


def configurations(path: str, capability: tuple[int, int]) -> Sequence[object]:
    """All of a way, by number; none for a way that has no choice."""
    from flux_quant.kernels import int8, int8_tma, matmul, vector

    found = {VECTOR: vector.CONFIGS, FUSED: matmul.CONFIGS, "tma": int8_tma.CONFIGS}
    return int8.table_for(capability) if path == "triton" else found.get(path, ())


def content(path: str, number: int | None, capability: tuple[int, int]) -> Content | None:
    """Sizes and counts of configuration `number`; None for a kernel's own choice."""
    return None if number is None else contents(configurations(path, capability)[number])


def contents(config: object) -> Content:
    """What runs: for which formats and cards it is tried is left out."""
    return {one.name: value for one in fields(config) if isinstance(value := getattr(config, one.name), int)}


def number_of(path: str, wanted: Content | None, capability: tuple[int, int]) -> int | None:
    """The number that this content has today. LookupError if there is none."""
    if wanted is None:
        return None
    for number, config in enumerate(configurations(path, capability)):
        if contents(config) == wanted:
            return number
    raise LookupError(f"{path} has no configuration {wanted}")
