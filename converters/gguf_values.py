"""Numbers, strings and arrays of a GGUF header: from bytes to Python and back, keeping every type.

read   uint32, bool and string become Python's int, bool and str; every other number a numpy scalar of its own type;
       an array of numbers a numpy array of its type, an array of strings a list
write  the same way back. A Python int is uint32, or int32 if negative, or 64 bits if it does not fit; a Python float
       is float32; a list is an array of strings, of int32 (int64 if they do not fit), of float32 or of bools
An array is read in one piece, so the vocabulary of a language model costs milliseconds and not, as with
`gguf.GGUFReader`, one Python object per field of every element. Format: ggml-org/ggml docs/gguf.md.
"""

import struct
from collections.abc import Sequence

import numpy as np

from flux_quant.converters.container import MappedFile
from flux_quant.errors import UserError
from flux_quant.formats import Shape

DTYPES = {
    0: np.dtype(np.uint8),
    1: np.dtype(np.int8),
    2: np.dtype(np.uint16),
    3: np.dtype(np.int16),
    4: np.dtype(np.uint32),
    5: np.dtype(np.int32),
    6: np.dtype(np.float32),
    7: np.dtype(np.bool_),
    10: np.dtype(np.uint64),
    11: np.dtype(np.int64),
    12: np.dtype(np.float64),
}
KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

LONGEST_KEY = 65535  # bytes
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
LARGEST_HEADER = 48_000_000  # bytes; that of a language model with 250,000 tokens has 10,000,000
MOST_ENTRIES = 65_536  # tensors, and pairs
MOST_STRINGS = 1_000_000  # in all arrays together


class Cursor:
    """Reads a header from front to back, never beyond the end of the file."""

    def __init__(self, mapped: MappedFile, offset: int) -> None:
        self.mapped, self.offset, self.strings = mapped, offset, 0

    def take(self, count: int) -> bytes:
        if self.offset + count > self.mapped.size:
            path, size = self.mapped.path, self.mapped.size
            raise UserError(f"{path} is truncated or damaged: its header goes beyond the {size:,} bytes of the file")
        if self.offset + count > LARGEST_HEADER:
            raise UserError(f"{self.mapped.path}: a header of more than {LARGEST_HEADER:,} bytes is absurd")
        data = self.mapped.bytes(self.offset, count)
        self.offset += count
        return data

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def entries(self, smallest: int) -> int:
        """A number of tensors or pairs that take at least `smallest` bytes each."""
        count = self.count(smallest)
        if count > MOST_ENTRIES:
            raise UserError(f"{self.mapped.path}: {count:,} entries in the header are absurd; up to {MOST_ENTRIES:,}")
        return count

    def count(self, smallest: int) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count = self.uint64()
        if count * smallest > self.mapped.size:
            raise UserError(f"{self.mapped.path} is damaged: {count:,} entries in {self.mapped.size:,} bytes")
        return count

    def string(self) -> str:
        return self.take(self.uint64()).decode(errors="replace")

    def shape(self) -> Shape:
        """In torch's order; the file has the innermost dimension first."""
        ndim = self.uint32()
        if ndim > MOST_DIMENSIONS:
            path = self.mapped.path
            raise UserError(f"{path} is damaged: a tensor of {ndim:,} dimensions; GGUF allows {MOST_DIMENSIONS}")
        return tuple(self.uint64() for _ in range(ndim))[::-1]

    def value(self) -> object:
        """A type, and a value of it."""
        kind = self.uint32()
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            number = self.numbers(kind, 1)[0]
            return number.item() if kind in (UINT32, BOOL) else number
        kind, count = self.uint32(), self.count(1)
        if kind == ARRAY:
            raise UserError(f"{self.mapped.path}: an array of arrays, which GGUF readers refuse")
        if kind != STRING:
            return self.numbers(kind, count)
        self.strings += count
        if self.strings > MOST_STRINGS:
            raise UserError(f"{self.mapped.path}: {self.strings:,} strings in the header are absurd")
        return [self.string() for _ in range(count)]

    def numbers(self, kind: int, count: int) -> np.ndarray:
        """Read-only."""
        if kind not in DTYPES:
            raise UserError(f"{self.mapped.path} is damaged: a value of type {kind}")
        dtype = DTYPES[kind]
        data = self.take(count * dtype.itemsize)
        if kind == BOOL:
            return np.frombuffer(data, np.uint8) != 0
        return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False)


def key_value(key: str, content: object) -> bytes:
    """A pair of the header. ValueError or TypeError for what GGUF cannot hold."""
    if not 0 < len(key.encode()) <= LONGEST_KEY:
        raise ValueError(f"a key of {len(key.encode()):,} bytes; GGUF allows 1 to {LONGEST_KEY:,}")
    try:
        return string(key) + typed(content)
    except TypeError as error:
        raise TypeError(f"{key}: {error}") from None


def typed(content: object) -> bytes:
    """The type, and the value."""
    if isinstance(content, str):
        return struct.pack("<I", STRING) + string(content)
    if isinstance(content, Sequence) and content and all(isinstance(entry, str) for entry in content):
        return struct.pack("<IIQ", ARRAY, STRING, len(content)) + b"".join(map(string, content))
    array = as_numbers(content)
    if array.dtype not in KINDS or array.ndim > 1:
        raise TypeError(f"{type(content).__name__} of {array.dtype}, {array.ndim} dimensions: not a type of GGUF")
    kind, data = KINDS[array.dtype], array.astype(array.dtype.newbyteorder("<")).tobytes()
    return (struct.pack("<IIQ", ARRAY, kind, len(array)) if array.ndim else struct.pack("<I", kind)) + data


def as_numbers(content: object) -> np.ndarray:
    """A number (0 dimensions) or a list of them, in the type in which it is stored."""
    array = np.asarray(content)
    if isinstance(content, np.generic | np.ndarray) or array.dtype == object:
        return array.astype(array.dtype.newbyteorder("="))
    if array.size == 0:
        raise TypeError("an empty list does not tell its type; give an empty numpy array")
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind in "iu":
        wanted = ("int32", "int64") if array.ndim or array < 0 else ("uint32", "uint64")
        fits = [dtype for dtype in wanted if np.iinfo(dtype).min <= array.min() and array.max() <= np.iinfo(dtype).max]
        return array.astype(fits[0]) if fits else array
    return array


def string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
