"""Which model lies at a path, told without reading all of it.

A file is its size and 256 samples of 16 kB, evenly spread from the first byte to the last: 4 MB, which every block of a
T5-XXL and the header with its types are part of. Neither name nor place count, so that a moved or copied file is the
same model. What was found is remembered by path, size and time of change; then a look at the directory is enough. A
file that is gone is taken for what lay there last.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from flux_quant.converters.folders import resolve
from flux_quant.errors import UserError

SAMPLES, SAMPLE = 256, 16 << 10  # how many, bytes of each
REMEMBERED = 256  # paths

Stamp = list[list[object]]  # path, size, time of change in nanoseconds, of every file


def identity(path: Path, memory: Path | None = None) -> str:
    """64 hexadecimal digits. `memory`: a JSON file that keeps them. UserError, OSError if there is nothing to read."""
    key, known = str(path.resolve()), recall(memory)
    try:
        stamp = stamp_of(path)
    except (FileNotFoundError, UserError):
        if key not in known:
            raise
        return known[key]["identity"]
    if key in known and known[key]["files"] == stamp:
        return known[key]["identity"]
    digest = hashlib.sha256()
    for file, *_ in stamp:
        digest.update(sampled(Path(file)))
    found = {"files": stamp, "identity": digest.hexdigest()}
    remember(memory, {name: known[name] for name in known if name != key} | {key: found})
    return found["identity"]


def stamp_of(path: Path) -> Stamp:
    """FileNotFoundError, UserError if a file is missing or the choice is not clear."""
    files = [file.resolve() for _, file in resolve(path).files]
    return [[str(file), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]


def sampled(path: Path) -> bytes:
    """SHA-256 of the file's size and samples."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        for i in range(SAMPLES):
            file.seek(max(0, size - SAMPLE) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.digest()


def content(folder: Path, suffixes: tuple[str, ...] = (".json", ".txt", ".model")) -> str:
    """SHA-256 of the small files in a folder that make up a tokenizer, with their names."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in suffixes):
        for part in (file.name.encode(), file.read_bytes()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def recall(memory: Path | None) -> dict[str, dict[str, object]]:
    """What is remembered; nothing if the file is missing or damaged."""
    if memory is None:
        return {}
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        return {path: {"files": entry["files"], "identity": str(entry["identity"])} for path, entry in known.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def remember(memory: Path | None, known: dict[str, dict[str, object]]) -> None:
    """The newest come last and stay longest. Where nothing can be written, files are sampled again next time."""
    if memory is None:
        return
    temporary = memory.with_suffix(f".{os.getpid()}.tmp")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(dict(list(known.items())[-REMEMBERED:]), indent=1), encoding="utf-8")
        temporary.replace(memory)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
