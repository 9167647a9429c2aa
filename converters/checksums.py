"""SHA-256 of tensors, kept in the file's own metadata.

One entry `flux_quant.sha256`: a JSON table from a tensor's name in the file to 64 hexadecimal digits, of the bytes of
its stored parts in the order of its format (data, then scale). One string is what every reader of safetensors and GGUF
tolerates; a key per tensor would double the header of a GGUF. A file in several parts has it in the first, for all.

The length of the entry follows from the names. A writer that must know its header before it has the sums lays the file
out with `entry(dict.fromkeys(names, PENDING))` and replaces the header, which has the same length, in the end.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from flux_quant.converters.container import as_bytes
from flux_quant.errors import UserError

KEY = "flux_quant.sha256"
PENDING = "0" * 64


def checksum(parts: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(as_bytes(part.cpu()).numpy().data)
    return digest.hexdigest()


def entry(sums: Mapping[str, str]) -> dict[str, str]:
    """The metadata that hold these sums."""
    return {KEY: json.dumps(dict(sums), separators=(",", ":"))}


def recorded(metadata: Mapping[str, object]) -> dict[str, str]:
    """The sums that a file holds, none if it has no entry. UserError if the entry is damaged."""
    try:
        sums = json.loads(str(metadata.get(KEY, "{}")))
        if not all(re.fullmatch("[0-9a-f]{64}", digits) for digits in sums.values()):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"the metadata entry {KEY} is damaged: not a table of checksums") from None
    return sums
