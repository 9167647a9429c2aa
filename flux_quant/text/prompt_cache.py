"""Encodings of prompts on the disk, so that a repeated prompt opens no text encoder.

An entry is a safetensors file that is named after the SHA-256 of its key and holds the key, what an encoder returned as
it was computed, and the checksums of that. It appears complete or not at all. What cannot be read, is of another key or
does not agree with its checksums is no entry, and the next encoding takes its place. Reading an entry sets its time;
when all of them take more than the limit, those go first that were not read for longest. Any number of processes may
share the folder: a file that another one removes is a miss, and one that it writes at this moment is not written twice.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.converters import safetensors_io
from flux_quant.converters.checkpoint import FileReader
from flux_quant.converters.checksums import checksum, recorded
from flux_quant.converters.container import MappedFile, TensorInfo
from flux_quant.converters.writer import CheckpointWriter, FilePlan
from flux_quant.errors import UserError
from flux_quant.kernels.tables import cache_folder

LIMIT = 1_000_000_000  # bytes: 119 prompts of 512 tokens of T5-XXL in float32
KEY, NOTES = "flux_quant.key", "flux_quant.notes"
STORED = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
ABANDONED = 86_400  # seconds after which a file that was never finished is removed

Key = Mapping[str, object]  # whatever decides about the tensors; JSON


@dataclass(frozen=True)
class Entry:
    """Tensors by name, and what else is to be known of them (JSON)."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptCache:
    """A folder with at most `limit` bytes of entries."""

    folder: Path
    limit: int = LIMIT

    @classmethod
    def default(cls, limit: int = LIMIT) -> "PromptCache":
        """Where this system keeps caches; FLUX_QUANT_CACHE names another place."""
        return cls(cache_folder() / "prompts", limit)

    @property
    def models(self) -> Path:
        """What `identity` remembers of encoders."""
        return self.folder / "models.json"

    def get(self, key: Key) -> Entry | None:
        path = self.path(key)
        try:
            entry = read(path, as_text(key))
        except (OSError, UserError, ValueError, KeyError, TypeError):
            return None
        with suppress(OSError):
            os.utime(path)
        return entry

    def put(self, key: Key, entry: Entry) -> None:
        """A cache that cannot be written is a warning, never an error."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(self.path(key), as_text(key), entry)
        except (OSError, UserError) as error:
            warnings.warn(f"this prompt is not kept for the next time: {error}", stacklevel=2)
        self.shrink()

    def path(self, key: Key) -> Path:
        return self.folder / f"{hashlib.sha256(as_text(key).encode()).hexdigest()}.safetensors"

    def shrink(self) -> None:
        """Bring the entries down to the limit."""
        files = [(path, stat) for path in self.folder.glob("*.safetensors") if (stat := status(path))]
        total = 0
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns, reverse=True):
            total += stat.st_size
            if total > self.limit:
                remove(path)
        for path in self.folder.glob(".*.part"):
            if (stat := status(path)) and stat.st_mtime < time.time() - ABANDONED:
                remove(path)


def as_text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)


def read(path: Path, key: str) -> Entry:
    """UserError, OSError, ValueError for what is not the entry of this key."""
    mapped = MappedFile(path)
    reader = FileReader(mapped, safetensors_io.parse(mapped))
    if reader.metadata.get(KEY) != key:
        raise UserError(f"{path} holds another prompt")
    stored = {name: reader.read(name) for name in reader.tensors}
    if {name: checksum(parts) for name, parts in stored.items()} != recorded(reader.metadata):
        raise UserError(f"{path} is damaged")
    return Entry({name: parts[0].clone() for name, parts in stored.items()}, json.loads(reader.metadata[NOTES]))


def write(path: Path, key: str, entry: Entry) -> None:
    infos = tuple(TensorInfo(name, tuple(t.shape), STORED[t.dtype]) for name, t in entry.tensors.items())
    metadata = {KEY: key, NOTES: json.dumps(entry.notes)}
    with CheckpointWriter([FilePlan(path, infos, metadata)], force=True, checksums=True) as writer:
        for name, tensor in entry.tensors.items():
            writer.write(name, (tensor.contiguous(),))


def status(path: Path) -> os.stat_result | None:
    """None if another process was faster."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def remove(path: Path) -> None:
    with suppress(FileNotFoundError, PermissionError):  # somebody reads it, on a system that does not like that
        path.unlink()
