"""PyTorch pickles (.pt, .pth, .ckpt, .bin): read only, and only tensors.

A pickle is a program. `torch.load(weights_only=True)` runs the part of it that builds tensors and plain containers and
refuses the rest, so nothing in the file is executed. The archive is checked before: nothing in it may be compressed
(a small file could fill the memory), and no tensor may be larger than what is stored for it. Values are mapped.
"""

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters.container import Contents, MappedFile, Place
from flux_quant.converters.fp8_reading import add_tensors
from flux_quant.errors import UserError

CONTAINER = "PyTorch"
NESTED = ("state_dict", "model", "module", "params_ema", "params")  # keys under which trainers keep the tensors
LARGEST_PROGRAM = 20_000_000  # bytes of the pickle itself, without tensors; that of FLUX.1 has 110,000
REMEDY = "open it where it was made and save its tensors as safetensors"


class LoadedFile:
    """Tensors in memory, looked at like a mapped file: the offset of a place is the number of its tensor."""

    def __init__(self, path: Path, tensors: list[Tensor]) -> None:
        self.path, self.tensors = path, tensors

    def tensor(self, place: Place) -> Tensor:
        return self.tensors[place.offset].contiguous().view(place.shape)

    def forget(self, place: Place) -> None:
        """The system takes back pages of the mapped file by itself."""


def recognises(mapped: MappedFile) -> bool:
    return mapped.bytes(0, 4) == b"PK\x03\x04" or mapped.bytes(0, 1) == b"\x80"


def load(path: Path, zipped: bool) -> tuple[LoadedFile, Contents]:
    """The tensors of a pickle, in its order. UserError for everything that is not a table of tensors."""
    if zipped:
        check_archive(path)
    elif path.stat().st_size > LARGEST_PROGRAM:
        raise UserError(f"{path} is a pickle in PyTorch's form of before 2020, too large to be read safely; {REMEDY}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch doubts unusual pickles that it reads well
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged program can raise anything
        reason = str(error).split("\n", 1)[0][:200] or type(error).__name__
        raise UserError(
            f"{path} is a pickle that holds more than tensors, or is damaged ({reason}); {REMEDY}"
        ) from None
    table = unwrapped(content)
    if table is None:
        raise UserError(f"{path} is a pickle without a table of tensors ({type(content).__name__}); {REMEDY}")
    found = dict(tensors_of(path, table))
    entries = {name: Place(i, tensor.dtype, tuple(tensor.shape)) for i, (name, tensor) in enumerate(found.items())}
    others = sorted(str(name) for name in table if name not in found)
    note = f"{path}: {len(others)} entries that are no tensors were left out ({', '.join(others[:3])})"
    contents = Contents(CONTAINER, {}, notes=(note,) if others else ())
    loaded = LoadedFile(path, list(found.values()))
    add_tensors(contents, loaded, entries, {})
    return loaded, contents


def check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise UserError(f"{path} is a damaged pickle ({error})") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"{path} is a compressed archive, as PyTorch does not write them; {REMEDY}")
    program = max((entry.file_size for entry in entries if entry.filename.endswith(".pkl")), default=0)
    if program > LARGEST_PROGRAM:
        raise UserError(f"{path} holds a pickle of {program:,} bytes beside its tensors, which is absurd")


def unwrapped(content: object) -> Mapping | None:
    """The innermost table: itself, or what lies under one of the names that trainers use."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content if any(isinstance(value, Tensor) for value in content.values()) else None
        content = inner
    return None


def tensors_of(path: Path, table: Mapping) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in table.items():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise UserError(f"{path}: {name} is no ordinary tensor ({tensor.layout}, {tensor.device}); {REMEDY}")
            if prod(tensor.shape) * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise UserError(f"{path}: {name} {list(tensor.shape)} is larger than what is stored for it")
            yield name, tensor.detach()
