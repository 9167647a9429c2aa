"""The difference of two checkpoints as a LoRA: a fine-tune becomes a small file for any quantized base.

Each matrix by itself: the best change of rank r is the truncated singular value decomposition of b - a (Eckart and
Young). It is exact where that is cheap, else randomized with power iterations (Halko, Martinsson, Tropp 2011, as
torch.svd_lowrank). Memory: a few float32 copies of one matrix, and the factors that were found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.checkpoint import load
from flux_quant.converters.component import Component, open_component
from flux_quant.converters.lora_write import Factors, kohya, peft, write_lora
from flux_quant.converters.output import check_target
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

EXACT = 1024  # the shorter side of a matrix up to which its decomposition is exact
OVERSAMPLING, ITERATIONS = 16, 4
NAMINGS = ("kohya", "diffusers")

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LayerError:
    """How much of a change is not in the LoRA."""

    module: str
    rank: int
    change: float  # norm of the difference, relative to that of the weight
    error: float  # norm of what is missing, relative to that of the difference


@dataclass(frozen=True)
class Extraction:
    layers: tuple[LayerError, ...]
    extras: tuple[str, ...]  # biases and norms that are in the file as they are
    left_out: tuple[str, ...]  # those that the naming has no form for
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Of all layers together, relative."""
        missing = sum((layer.change * layer.error) ** 2 for layer in self.layers)
        return (missing / sum(layer.change**2 for layer in self.layers)) ** 0.5 if self.layers else 0.0


def extract(
    base: Path,
    tuned: Path,
    output: Path,
    rank: int = 32,
    naming: str = "kohya",
    dtype: str = "bf16",
    force: bool = False,
    report: Report = lambda phase, done, total: None,
) -> Extraction:
    """Write what has to be added to `base` to get `tuned`. UserError if they are not of one shape, or equal."""
    if naming not in NAMINGS:
        raise UserError(f"naming {naming}: choose {' or '.join(NAMINGS)}")
    if rank < 1:
        raise UserError(f"rank {rank}: at least 1 is needed")
    check_target(output, force)
    a, b = (open_component(path, "FLUX.1") for path in (base, tuned))
    check_alike(a, b)
    changes: dict[str, Factors] = {}
    layers, extras = [], {}
    for i, (name, info) in enumerate(a.tensors.items()):
        report("compare", i, len(a.tensors))
        own = load(a, name)
        change = load(b, name).sub_(own)
        a.forget(name)
        b.forget(name)
        if not change.isfinite().all():
            raise UserError(f"{name} of {base} or {tuned} holds values that are not finite")
        if not change.any():
            continue
        if len(info.shape) == 2:
            module = name.removesuffix(".weight")
            changes[module] = factors = truncated(change, rank)
            size = change.norm()
            error = (change - factors.up @ factors.down).norm() / size
            layers.append(LayerError(module, len(factors.down), float(size / own.norm()), float(error)))
        else:
            extras[name] = change
    report("compare", len(a.tensors), len(a.tensors))
    if not changes and not extras:
        raise UserError(f"{base} and {tuned} hold the same weights: there is nothing to extract")
    hidden = a.tensors["img_in.weight"].shape[0]
    tensors = kohya(changes, extras) if naming == "kohya" else peft(changes, hidden)
    metadata = {"flux_quant.extracted_from": f"{tuned.name} - {base.name}", "flux_quant.rank": str(rank)}
    write_lora(output, tensors, dtype, metadata, force)
    kept, lost = (tuple(extras), ()) if naming == "kohya" else ((), tuple(extras))
    return Extraction(tuple(layers), kept, lost, tuple(notes_of(a, b)))


def truncated(change: Tensor, rank: int) -> Factors:
    """The best factors of this rank for (N, K); each takes the root of the singular values."""
    rank = min(rank, *change.shape)
    if min(change.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(change, min(rank + OVERSAMPLING, *change.shape), ITERATIONS)
        vh = v.t()
    root = s[:rank].sqrt()
    return Factors((root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous())


def check_alike(a: Component, b: Component) -> None:
    for name in (*a.tensors, *b.tensors):
        shapes = [reader.tensors[name].shape if name in reader.tensors else None for reader in (a, b)]
        if shapes[0] != shapes[1]:
            found = " and ".join("nothing" if shape is None else str(list(shape)) for shape in shapes)
            raise UserError(f"{name} is {found} in {a.path} and {b.path}: these are not versions of one model")


def notes_of(a: Component, b: Component) -> list[str]:
    notes = []
    for reader in (a, b):
        kinds = {info.format for info in reader.tensors.values() if not FORMATS[info.format].is_plain}
        if kinds:
            notes.append(f"{reader.path} is quantized ({', '.join(sorted(kinds))}): its errors are part of the change")
    return notes
