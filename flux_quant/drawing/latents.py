"""Latents on the disk: what a drawing left before it was decoded, so that the minutes of denoising are not lost.

An ordinary safetensors file: `latents` (B, 16, h, w) float32 as the transformer made them; where a mask was used also
the given `picture` (1, 3, H, W) and the `mask` (1, 1, H, W) in float16, which holds all 256 values of a pixel. The
settings lie in the metadata as JSON under the key `flux_quant`, as in our pictures.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

KEY = "flux_quant"
FORMAT = {"latents": "f32", "picture": "f16", "mask": "f16"}  # of each tensor in the file
CHANNELS = {"latents": 16, "picture": 3, "mask": 1}


@dataclass(frozen=True)
class Latents:
    """Everything that decoding needs beside the VAE."""

    latents: Tensor  # (B, 16, h, w)
    picture: Tensor | None = None  # (1, 3, H, W) in 0-1, kept where the mask is 0
    mask: Tensor | None = None  # (1, 1, H, W) in 0-1
    settings: dict[str, object] = field(default_factory=dict)


def save_latents(path: Path, saved: Latents, force: bool = False) -> None:
    """Complete or not at all."""
    tensors = {name: value for name in FORMAT if (value := getattr(saved, name)) is not None}
    infos = [TensorInfo(name, tuple(value.shape), FORMAT[name]) for name, value in tensors.items()]
    with create_checkpoint(path, infos, {"format": "pt", KEY: json.dumps(saved.settings)}, force) as writer:
        for info in infos:
            writer.write(info.name, FORMATS[info.format].pack(tensors[info.name].detach().float().cpu()))


def load_latents(path: Path) -> Latents:
    """UserError for a file that is not of `save_latents`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open_checkpoint(path) as reader:
        if "latents" not in reader.tensors or not set(reader.tensors) <= set(FORMAT):
            raise UserError(f"{path} holds no saved latents, but {', '.join([*reader.tensors][:3]) or 'nothing'}")
        tensors = {name: load(reader, name) for name in reader.tensors}
        try:
            settings = json.loads(str(reader.metadata.get(KEY, "{}")))
        except ValueError:
            settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: the settings in its metadata are damaged")
    check(path, tensors)
    return Latents(**tensors, settings=settings)


@dataclass(frozen=True)
class LatentFiles:
    """Where latents go before they are decoded."""

    keep: Path | None = None  # they stay there
    rescue: Path | None = None  # they lie there while they are decoded, and stay only if that fails
    force: bool = False  # replace `keep` if it exists


NOWHERE = LatentFiles()


@contextmanager
def on_disk(saved: Latents, files: LatentFiles) -> Iterator[None]:
    """While the latents are decoded they lie in a file; UserError that names it if that fails."""
    path = files.keep or (free_name(files.rescue) if files.rescue else None)
    if path is None:
        yield
        return
    try:
        save_latents(path, saved, files.force and path == files.keep)
    except (UserError, OSError) as error:  # no reason to lose the picture as well
        warnings.warn(f"the latents were not saved: {error}", stacklevel=2)
        yield
        return
    try:
        yield
    except (UserError, RuntimeError, MemoryError) as error:
        raise UserError(f"decoding failed: {error}; the latents are in {path}: flux-quant decode {path}") from error
    except BaseException:
        discard(path, files)
        raise
    discard(path, files)


def discard(path: Path, files: LatentFiles) -> None:
    if path != files.keep:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 ... that does not exist."""
    names = (path.with_name(f"{path.stem}-{i}{path.suffix}") if i > 1 else path for i in range(1, 1000))
    return next(name for name in names if not name.exists())


def check(path: Path, tensors: dict[str, Tensor]) -> None:
    """Shapes that belong together, values that are numbers."""
    batch, _, height, width = tensors["latents"].shape if tensors["latents"].ndim == 4 else (0, 0, 0, 0)
    for name, value in tensors.items():
        lead, unit = (batch, 1) if name == "latents" else (1, 8)
        wanted = (lead, CHANNELS[name], unit * height, unit * width)
        if tuple(value.shape) != wanted or not value.numel():
            raise UserError(f"{path}: {name} {list(value.shape)} is not of a saved drawing")
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {name} has values that are not finite")
    if ("picture" in tensors) != ("mask" in tensors):
        raise UserError(f"{path}: picture and mask belong together, one is missing")
