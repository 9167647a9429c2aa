"""Importance matrices: for every weight, the mean square of each of its input columns over some generated pictures.

read    llama.cpp's and stable-diffusion.cpp's older binary form (.dat): counts and length-prefixed entries
        llama.cpp's newer form: a GGUF with `<name>.in_sum2` (sums of squares) and `<name>.counts`
        our own form: safetensors of F32 (K,) vectors named like the weights, metadata {"format": "imatrix"}; beside
        `X.weight` there may be `X.input_amax` (), the largest magnitude of the layer's input
write   our own form

The older form holds no mark by which it could be recognised: a file that is neither of the others is taken for one if
all its numbers agree with its size. Names lose the prefixes of all-in-one files, which stable-diffusion.cpp keeps.
Source: llama.cpp tools/imatrix/imatrix.cpp and `load_imatrix` in tools/quantize/quantize.cpp.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from flux_quant.converters.checkpoint import CheckpointReader, load, open_checkpoint
from flux_quant.converters.container import MappedFile, TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import Shape

FORMAT = "imatrix"
MAXIMUM = ".input_amax"
SUMS, COUNTS = ".in_sum2", ".counts"
LONGEST_NAME = 512  # bytes; ggml itself allows 63
PREFIXES = ("model.diffusion_model.", "text_encoders.t5xxl.transformer.", "text_encoders.clip_l.transformer.")
SMALLEST_ENTRY = 4 + 1 + 4 + 4 + 4  # a name of one byte, the number of calls, one value


def read_imatrix(path: str | Path) -> dict[str, Tensor]:
    """Weight name -> mean squares (K,) float32, finite and not negative. UserError if the file is anything else."""
    path = Path(path)
    mapped = MappedFile(path)
    if mapped.bytes(0, 4) == b"GGUF" or mapped.bytes(8, 1) == b"{":
        with open_checkpoint(path) as reader:
            means = from_sums(reader) if reader.container == "GGUF" else from_vectors(reader)
    else:
        means = from_dat(mapped)
    if not means:
        raise UserError(f"{path} is an imatrix without entries")
    found: dict[str, Tensor] = {}
    for name, mean in means.items():
        if not torch.isfinite(mean).all() or (mean < 0).any():
            raise UserError(f"{path}: the entry {name} holds values that are no mean squares (negative or not finite)")
        if found.setdefault(bare_name(name), mean) is not mean:
            raise UserError(f"{path}: two entries for {bare_name(name)}")
    return found


def bare_name(name: str) -> str:
    return next((name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)), name)


def from_vectors(reader: CheckpointReader) -> dict[str, Tensor]:
    """Our own form."""
    if reader.metadata.get("format") != FORMAT:
        raise UserError(f'{reader.path} is no imatrix: its metadata have no "format": "{FORMAT}"')
    for info in (*reader.tensors.values(), *reader.foreign.values()):
        if info.format != "f32" or len(info.shape) != (0 if info.name.endswith(MAXIMUM) else 1):
            raise UserError(f"{reader.path}: {info.name} is {info.format} {list(info.shape)}, not an F32 vector")
    return {name: load(reader, name) for name in reader.tensors if not name.endswith(MAXIMUM)}


def read_maxima(path: str | Path) -> dict[str, float]:
    """Weight name -> largest magnitude of its layer's input, from our own form. UserError if there are none."""
    with open_checkpoint(path) as reader:
        if reader.metadata.get("format") != FORMAT:
            raise UserError(f"{path} is no file of `flux-quant calibrate`")
        found = {name: float(load(reader, name)) for name in reader.tensors if name.endswith(MAXIMUM)}
    if not found:
        raise UserError(f"{path} holds no largest magnitudes (*{MAXIMUM})")
    if wrong := next((name for name, value in found.items() if not 0 <= value < float("inf")), None):
        raise UserError(f"{path}: {wrong} is {found[wrong]}, not a magnitude")
    return {f"{name.removesuffix(MAXIMUM)}.weight": value for name, value in found.items()}


def from_sums(reader: CheckpointReader) -> dict[str, Tensor]:
    """llama.cpp's GGUF form: sums (n, K) and counts (n, 1), n > 1 for n experts, which are averaged over all calls."""
    tensors = reader.tensors
    if reader.foreign or not any(name.endswith(SUMS) for name in tensors):
        raise UserError(f"{reader.path} is no imatrix: it is a GGUF without entries *{SUMS}")
    means = {}
    for name, info in tensors.items():
        if name.endswith(COUNTS) and name.removesuffix(COUNTS) + SUMS in tensors:
            continue
        weight = name.removesuffix(SUMS)
        if weight == name or weight + COUNTS not in tensors:
            raise UserError(f"{reader.path}: {name} has no entry {weight}{COUNTS if weight != name else SUMS}")
        sums = load(reader, name).reshape(-1, info.shape[-1] if info.shape else 1).double()
        counts = load(reader, weight + COUNTS).double().flatten()
        if len(counts) != len(sums):
            raise UserError(f"{reader.path}: {name} {list(info.shape)} needs {len(sums)} counts, not {len(counts)}")
        if not torch.isfinite(counts).all() or (counts < 0).any():
            raise UserError(f"{reader.path}: {weight}{COUNTS} holds values that are no counts")
        if counts.sum() > 0:  # else the layer never ran while the file was made: no entry is the honest answer
            means[weight] = (sums.sum(0) / counts.sum()).float()
    return means


class DatCursor:
    """Reads the older form from front to back, never beyond its end."""

    def __init__(self, mapped: MappedFile) -> None:
        self.mapped, self.offset = mapped, 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.mapped.size - self.offset:
            left = self.mapped.size - self.offset
            raise UserError(
                f"{self.mapped.path} is no imatrix, or truncated: {what} takes {count:,} bytes, {left:,} are left"
            )
        data = self.mapped.bytes(self.offset, count)
        self.offset += count
        return data

    def number(self, what: str, smallest: int, largest: int) -> int:
        (number,) = struct.unpack("<i", self.take(4, what))
        if not smallest <= number <= largest:
            raise UserError(f"{self.mapped.path} is no imatrix, or damaged: {what} is {number:,}")
        return number

    def entry(self, position: int) -> tuple[str, Tensor]:
        length = self.number(f"the length of name {position}", 1, LONGEST_NAME)
        try:
            name = self.take(length, f"name {position}").decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.mapped.path} is no imatrix, or damaged: name {position} is no text") from None
        calls = self.number(f"the number of calls of {name}", 0, 2**31 - 1)
        count = self.number(f"the length of {name}", 1, self.mapped.size // 4)
        values = torch.frombuffer(bytearray(self.take(4 * count, name)), dtype=torch.float32)
        return name, values / max(calls, 1)


def from_dat(mapped: MappedFile) -> dict[str, Tensor]:
    """int32 entries; each: int32 length, name, int32 calls, int32 K, K x float32 mean squares times calls.

    What follows the entries (calls in all, the name of the data set) differs between versions and is not needed.
    """
    cursor = DatCursor(mapped)
    means: dict[str, Tensor] = {}
    for position in range(cursor.number("the number of entries", 1, mapped.size // SMALLEST_ENTRY)):
        name, mean = cursor.entry(position)
        if means.setdefault(name, mean) is not mean:
            raise UserError(f"{mapped.path}: two entries for {name}")
    return means


def write_imatrix(
    path: str | Path,
    means: Mapping[str, Tensor],
    metadata: Mapping[str, object],
    force: bool = False,
    maxima: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Our own form. `metadata` tells how it came about: {"count": tokens seen, ...}; maxima by weight name."""
    for name, mean in means.items():
        if mean.ndim != 1:
            raise ValueError(f"{name}: mean squares of shape {tuple(mean.shape)}, a vector was expected")
    infos = [TensorInfo(name, tuple(mean.shape), "f32") for name, mean in means.items()]
    scalars = {name.removesuffix(".weight") + MAXIMUM: torch.tensor(value) for name, value in maxima.items()}
    infos += [TensorInfo(name, (), "f32") for name in scalars]
    with create_checkpoint(path, infos, {**metadata, "format": FORMAT}, force) as writer:
        for name, values in {**means, **scalars}.items():
            writer.write(name, (values.float(),))


def check_imatrix(imatrix: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> list[str]:
    """The weights (2-D) of a model that have no entry. UserError if a length differs from K, or nothing matches."""
    weights = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    for name, mean in imatrix.items():
        if name in weights and len(mean) != weights[name][1]:
            raise UserError(
                f"the imatrix has {len(mean):,} values for {name}, which has {weights[name][1]:,} input columns: "
                "it was made with another model"
            )
    if not weights.keys() & imatrix.keys():
        example = next(iter(imatrix), "none")
        raise UserError(f"the imatrix has no entry for any of the {len(weights)} weights; its first entry is {example}")
    return [name for name in weights if name not in imatrix]
