"""What an adapter is, once its file is read: changes of rows of modules, each by a formula with its factors.

A record says by how much rows of one weight change (`scale` times the formula of its kind), optionally with new
lengths of the rows or columns (`magnitude`, which makes it a DoRA), and by how much a bias changes. It knows nothing
of files, and nothing of what is done with it: fusing into a weight (lora_math) or computing beside it.

Factors keep the type of the file and may be views of it: never write into them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A formula. `rows(factors, first, last)` gives these rows of the change, unscaled, float32 for float32 factors."""

    shape: Callable[[Factors], tuple[int, int]]  # (rows, columns) of the change
    rows: Callable[[Factors, int, int], Tensor]


def lora_rows(factors: Factors, first: int, last: int) -> Tensor:
    """up (N, r) @ down (r, K)"""
    return factors["up"][first:last] @ factors["down"]


def loha_rows(factors: Factors, first: int, last: int) -> Tensor:
    """(w1_a (N, r) @ w1_b (r, K)) * (w2_a (N, r) @ w2_b (r, K))"""
    one = factors["w1_a"][first:last] @ factors["w1_b"]
    return one * (factors["w2_a"][first:last] @ factors["w2_b"])


def lokr_rows(factors: Factors, first: int, last: int) -> Tensor:
    """kron(w1 (a, b), w2 (p, q)): row i * p + j is the outer product of row i of w1 and row j of w2."""
    index = torch.arange(first, last, device=next(iter(factors.values())).device)
    count = len(factors["w2_a" if "w2_a" in factors else "w2"])
    one, two = index.div(count, rounding_mode="floor"), index % count
    one = factors["w1"][one] if "w1" in factors else factors["w1_a"][one] @ factors["w1_b"]
    two = factors["w2"][two] if "w2" in factors else factors["w2_a"][two] @ factors["w2_b"]
    return (one[:, :, None] * two[:, None, :]).flatten(1)


def lokr_shape(factors: Factors) -> tuple[int, int]:
    rows = columns = 1
    for part in ("w1", "w2"):
        rows *= len(factors[part if part in factors else f"{part}_a"])
        columns *= factors[part if part in factors else f"{part}_b"].shape[1]
    return rows, columns


def value_rows(factors: Factors, first: int, last: int) -> Tensor:
    return factors["value"][first:last]


def value_shape(factors: Factors) -> tuple[int, int]:
    """A vector counts as one column."""
    return tuple(factors["value"].shape)


KINDS: dict[str, Kind] = {
    "lora": Kind(lambda factors: (len(factors["up"]), factors["down"].shape[1]), lora_rows),
    "lokr": Kind(lokr_shape, lokr_rows),
    "loha": Kind(lambda factors: (len(factors["w1_a"]), factors["w1_b"].shape[1]), loha_rows),
    "diff": Kind(value_shape, value_rows),  # the change itself
    "set": Kind(value_shape, value_rows),  # the new value: no scale, no strength
}
BIAS_ONLY = "bias"  # the kind of a record without a change of the weight


@dataclass(frozen=True)
class Record:
    """One change of rows of one module."""

    component: str  # "transformer", "t5" or "clip_l"
    module: str  # BFL names, or Hugging Face's in text encoders; without `.weight`
    kind: str  # of KINDS, or BIAS_ONLY
    row_start: int
    row_len: int
    factors: Factors  # of the kind; in the order of rows that the module has
    scale: float  # alpha / rank, or what the kind has instead
    magnitude: Tensor | None  # DoRA: lengths of the changed rows (N, 1), or of the changed columns (1, K)
    bias: Tensor | None  # (N,) float32, change of the bias at strength 1: `scale` is in it
    sources: tuple[str, ...]  # keys of the file

    @property
    def columns(self) -> int:
        return 0 if self.kind == BIAS_ONLY else KINDS[self.kind].shape(self.factors)[1]

    @property
    def rows(self) -> slice:
        return slice(self.row_start, self.row_start + self.row_len)

    def changes(self, kind: str) -> bool:
        """Whether `kind` of the module ("weight", "scale", "bias") is changed."""
        return self.bias is not None if kind == "bias" else self.kind != BIAS_ONLY


@dataclass(frozen=True)
class Lora:
    """Everything one file changes, and what of it is not understood."""

    path: Path
    records: tuple[Record, ...]
    unused: list[str]  # keys that found no place
    widths: Mapping[str, int]  # module -> columns, where the file needs more than the model has
    metadata: Mapping[str, object]

    @cached_property
    def by_module(self) -> dict[str, list[Record]]:
        table: dict[str, list[Record]] = {}
        for record in self.records:
            table.setdefault(record.module, []).append(record)
        return table

    def changing(self, name: str) -> list[Record]:
        """The records that change a tensor (`double_blocks.7.img_attn.qkv.weight`)."""
        module, _, kind = name.rpartition(".")
        return [record for record in self.by_module.get(module, ()) if record.changes(kind)]

    def touches(self, name: str) -> bool:
        return bool(self.changing(name))

    def unapplied(self, names: Iterable[str]) -> list[str]:
        """The keys whose tensor is not among `names`: what is lost when only these are fused."""
        touched = {(module, kind == "bias") for module, _, kind in (name.rpartition(".") for name in names)}
        lost = []
        for record in self.records:
            needed = {(record.module, kind == "bias") for kind in ("weight", "bias") if record.changes(kind)}
            lost += record.sources if needed - touched else ()
        return lost
