"""How a model is divided into several files: by size, or one file per block.

No tensor is cut, and no block that fits into a file. GGUF parts are named as llama.cpp's gguf-split names them,
safetensors parts as Hugging Face libraries do, with an index beside them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from flux_quant.arch import block_of
from flux_quant.converters import gguf_io
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import FilePlan
from flux_quant.errors import UserError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MOST_PARTS = 99_999


@dataclass(frozen=True)
class Sharding:
    """At most `nbytes` of tensors in a file (a larger tensor has a file of its own), or a file per block."""

    nbytes: int | None = None
    by_block: bool = False


def parse_size(text: str) -> int:
    """`2GB`, `500 MiB`, `4096` -> bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].upper() not in UNITS:
        raise UserError(f"{text} is no size; write it as 2GB or 500MB")
    nbytes = int(float(found[1]) * UNITS[found[2].upper()])
    if nbytes < 1:
        raise UserError(f"a size of {text} is too small")
    return nbytes


def sharding(size: str | None, by: str | None) -> Sharding | None:
    """From the options of the command line; None for one file."""
    if size and by:
        raise UserError("--shard-size and --shard-by exclude each other")
    if by not in (None, "block"):
        raise UserError(f"--shard-by {by}: only block is known")
    return Sharding(parse_size(size)) if size else Sharding(by_block=True) if by else None


def divide(infos: Sequence[TensorInfo], sharding: Sharding) -> list[tuple[TensorInfo, ...]]:
    """Consecutive tensors that share a file."""
    blocks = [tuple(group) for _, group in groupby(infos, lambda info: block_of(info.name))]
    if sharding.by_block:
        return blocks
    parts: list[list[TensorInfo]] = [[]]
    for block in blocks:
        if parts[-1] and total(parts[-1]) + total(block) > sharding.nbytes:
            parts.append([])
        for info in block:
            if parts[-1] and total(parts[-1]) + info.nbytes > sharding.nbytes:
                parts.append([])
            parts[-1].append(info)
    return [tuple(part) for part in parts if part]


def total(infos: Sequence[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)


def split_files(
    path: Path,
    infos: Sequence[TensorInfo],
    metadata: Mapping[str, object],
    sharding: Sharding | None,
    options: Mapping[str, object] = MappingProxyType({}),
) -> tuple[list[FilePlan], dict[Path, bytes]]:
    """The files that hold these tensors, and further small files (an index) with their content."""
    parts = divide(infos, sharding) if sharding else [tuple(infos)]
    if len(parts) > MOST_PARTS:
        raise UserError(f"{len(parts):,} files would be needed; choose a larger size")
    if len(parts) == 1:
        return [FilePlan(path, parts[0], metadata, options)], {}
    gguf = path.suffix.lower() == ".gguf"
    prefix = str(path.with_suffix(""))
    files, places = [], {}
    for i, part in enumerate(parts):
        own = dict(metadata) if i == 0 or not gguf else {}
        if gguf:
            own |= gguf_io.split_metadata(i, len(parts), len(infos))
        name = (
            gguf_io.split_name(prefix, i, len(parts))
            if gguf
            else f"{prefix}-{i + 1:05}-of-{len(parts):05}{path.suffix}"
        )
        files.append(FilePlan(Path(name), part, own))
        places |= {info.name: Path(name).name for info in part}
    if gguf:
        return files, {}
    index = {"metadata": {"total_size": total(infos)}, "weight_map": places}
    return files, {path.with_name(f"{path.name}.index.json"): (json.dumps(index, indent=2) + "\n").encode()}
