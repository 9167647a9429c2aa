"""Pictures that lie with results: taken as they are, if they are what their names say."""

from collections.abc import Mapping
from pathlib import Path

from flux_quant.benchmarks.report.model import Picture

MOST_BYTES = 8_000_000  # of one picture: it is part of the page
STARTS = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}


def read_pictures(files: Mapping[str, Path]) -> list[Picture]:
    """By name; a file that is too large or no picture is left out."""
    found = []
    for name, path in files.items():
        if path.stat().st_size > MOST_BYTES:
            continue
        data = path.read_bytes()
        kind = next((kind for kind, start in STARTS.items() if data.startswith(start)), "")
        if kind:
            found.append(Picture(name, path, kind, data))
    return found
