"""Damaged and hostile files: every one ends in a UserError or in a correct read, within 2 s and 200 MB.

Headers are mutated by seed: bytes flipped, cut, copied; every count, length, offset, dimension and type replaced by
extreme numbers; JSON values by others of the wrong kind. Seconds are those of the processor, not of the clock.
"""

import json
import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import components
from flux_quant.converters.fp8_layout import MARKER_CONTENT
from flux_quant.converters.summary import summarize
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

SECONDS, MEGABYTES = 2, 200
CASES = 1000  # of each container; many more in the slow run
EXTREMES = [0, 1, 2, 3, 7, 31, 32, 33, 255, 256, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53 + 1]
EXTREMES += [2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]


class Hang(BaseException):
    """Not to be caught by anything under test."""


@contextmanager
def limited() -> Iterator[None]:
    """Stops what takes more processor time than is allowed."""

    def stop(*_: object) -> None:
        raise Hang

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def status(key: str) -> int:
    """Megabytes of this process: VmRSS now, VmHWM at the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) // 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def read_all(path: Path) -> bool:
    """Everything a converter would do with a file. False if it was refused, as it should be."""
    try:
        with limited(), open_checkpoint(path) as reader:
            for name, info in reader.tensors.items():
                assert load(reader, name).shape == info.shape
                parts = FORMATS[info.format].parts
                assert [part.dtype for part in reader.read(name)] == [part.dtype for part in parts]
            assert all(reader.nbytes(name) >= 0 for name in (*reader.tensors, *reader.foreign))
            assert reader.input_scales is not None
            for component in components(reader):
                for name in component.tensors:
                    component.read(name)
            summarize(path)
        return True
    except UserError:
        return False


def survive(path: Path, good: bytes, mutated: Callable[[int], bytes], seeds: range) -> None:
    """All cases; what went wrong is said with the seed that does it again."""
    path.write_bytes(good)
    assert read_all(path)
    forget_peak()
    before, accepted = status("VmRSS"), 0
    for seed in seeds:
        path.write_bytes(mutated(seed))
        try:
            accepted += read_all(path)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert status("VmHWM") - before < MEGABYTES
    assert 0 < accepted < len(seeds)  # some mutations do no harm, most do


# --- Bytes ------------------------------------------------------------------------------------------------------------


def any_bytes(rng: random.Random, content: bytes, header: int) -> bytes:
    """One of the mutations that know nothing of the format; `header` is where the data begin."""
    data, kind = bytearray(content), rng.randrange(5)
    at = rng.randrange(header)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(header)] = rng.choice((0, 255, rng.randrange(256)))
    elif kind == 1:
        del data[at if rng.random() < 0.5 else rng.randrange(len(data)) :]
    elif kind == 2:
        data[at:at] = data[rng.randrange(at + 1) : at]  # a piece of what was before, once more
    elif kind == 3:
        del data[at : at + rng.randrange(1, 40)]
    else:
        data[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
    return bytes(data)


# --- Safetensors ------------------------------------------------------------------------------------------------------

FLUX_NAMES = ("img_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_attn.norm.key_norm.scale")
ODD_VALUES = [None, True, False, -1, 0, 1.5, 1e300, float("nan"), float("inf"), "", "F32", "4", [], {}, [[]], [0], [-1]]
ODD_VALUES += [
    10**30,
    -(10**30),
    10**4000,
    [4, 4.0],
    [True, 4],
    ["4"],
    {"dtype": "F32"},
    [0] * 50,
    [1] * 50,
    [0, 2**62],
]
ODD_NAMES = ["", ".", "weight", ".weight", "m.weight_scale", "m.input_scale", "scaled_fp8", "__metadata__", "\ud800"]
ODD_NAMES += ["x" * 70_000, "a\nb", "\0", "m.comfy_quant", "m.weight._data", "transformer_blocks.0.attn.to_q.weight"]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E8M0",
    "C64",
    5,
]


def safetensors_table() -> tuple[dict, bytes]:
    """A FLUX.1 of a few tensors, an FP8 weight with scale and marker, plain FP8 of both kinds, integers."""
    scaled = {"m.weight": ("F8_E4M3", [8, 4]), "m.weight_scale": ("F32", []), "m.input_scale": ("F32", [])}
    scaled |= {"m.comfy_quant": ("U8", [32]), "n.weight": ("F8_E5M2", [4, 4]), "n.scale_weight": ("F32", [4, 1])}
    tensors = {name: ("BF16", [8, 8]) for name in FLUX_NAMES[:2]} | {FLUX_NAMES[2]: ("F32", [8])} | scaled
    tensors |= {"p.weight": ("F8_E4M3", [4, 4]), "ids": ("I64", [3]), "empty": ("F16", [0, 7])}
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8}
    table: dict = {"__metadata__": {"format": "pt", "_quantization_metadata": LAYERS}}
    data = b""
    for name, (dtype, shape) in tensors.items():
        count = sizes.get(dtype, 1) * torch.Size(shape).numel()
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + count]}
        data += MARKER_CONTENT if name == "m.comfy_quant" else bytes(i % 120 for i in range(count))
    return table, data


LAYERS = json.dumps({"format_version": "1.0", "layers": {"m": {"format": "float8_e4m3fn"}}})


def packed(table: object, data: bytes) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def safetensors_case(seed: int) -> bytes:
    rng = random.Random(seed)
    table, data = safetensors_table()
    good = packed(table, data)
    if seed % 3 == 0:
        return any_bytes(rng, good, len(good) - len(data))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice([*table])
        entry, kind = table[name], rng.randrange(8)
        if name == "__metadata__":
            layers = rng.choice(
                [LAYERS.replace("float8_e4m3fn", "nvfp4"), "[" * 9999, "{}", LAYERS[:-3], "null", "1e999"]
            )
            table[name] = rng.choice([{"a": "b"}, {"_quantization_metadata": layers}, *ODD_VALUES])
        elif kind == 0:
            table[name] = rng.choice(ODD_VALUES)
        elif kind == 1:
            table[rng.choice(ODD_NAMES)] = table.pop(name)
        elif kind == 2:
            del table[name]
        elif isinstance(entry, dict) and entry:
            key = rng.choice([*entry])
            numbers = [rng.choice((rng.choice(EXTREMES), rng.randrange(64))) for _ in range(rng.randrange(5))]
            odd = {3: rng.choice(ODD_VALUES), 4: numbers, 5: rng.choice(DTYPES), 6: numbers[:2]}
            if kind == 7 or key not in ("dtype", "shape", "data_offsets"):
                entry.pop(key)
            else:
                entry[key] = odd[kind]
    text = json.dumps(table).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:  # one name twice, as no library writes it
        text = text[:-1] + b"," + text[text.index(b'"', 1) :]
    if rng.random() < 0.05:
        text = text.replace(b'"shape": [', b'"shape": [' + b"[" * rng.choice((1, 500, 100_000)), 1)
    return packed(text, data)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_file() -> tuple[bytes, list[tuple[int, int]], int]:
    """Every kind of value, several types of tensors; where its numbers lie (offset, bytes); where the data begin."""
    out, numbers = bytearray(b"GGUF"), []

    def number(value: int, size: int) -> None:
        numbers.append((len(out), size))
        out.extend(value.to_bytes(size, "little"))

    def string(text: str) -> None:
        number(len(text.encode()), 8)
        out.extend(text.encode())

    def key(name: str, kind: int) -> None:
        string(name)
        number(kind, 4)

    rows = [("img_in.weight", (8, 64), 30), ("vector_in.in_layer.weight", (8, 8), 0), ("q.weight", (4, 64), 8)]
    rows += [
        (FLUX_NAMES[2], (8,), 0),
        ("k.weight", (2, 256), 12),
        ("r.weight", (2, 256), 2),
        ("old.weight", (2, 256), 16),
    ]
    sizes = {30: (1, 2), 0: (1, 4), 8: (32, 34), 12: (256, 144), 2: (32, 18), 16: (256, 66)}
    number(3, 4)
    number(len(rows), 8)
    number(8, 8)
    key("general.architecture", 8)
    string("flux")
    key("general.file_type", 4)
    number(2, 4)
    key("tokenizer.ggml.tokens", 9)
    number(8, 4)
    number(3, 8)
    for text in ("a", "", "ä"):
        string(text)
    key("comfy.gguf.orig_shape.r.weight", 9)
    number(5, 4)
    number(3, 8)
    for size in (4, 4, 32):
        number(size, 4)
    key("general.alignment", 4)
    number(32, 4)
    key("split.count", 2)
    number(1, 2)
    key("flag", 7)
    number(1, 1)
    key("double", 12)
    number(0, 8)
    offset = 0
    for name, shape, kind in rows:
        string(name)
        number(len(shape), 4)
        for size in shape[::-1]:
            number(size, 8)
        number(kind, 4)
        number(offset, 8)
        block, nbytes = sizes[kind]
        offset += -(-torch.Size(shape).numel() // block * nbytes // 32) * 32
    out.extend(bytes(-len(out) % 32))
    return bytes(out) + bytes(i % 60 for i in range(offset)), numbers, len(out)


def gguf_case(seed: int) -> bytes:
    rng = random.Random(seed)
    content, numbers, header = gguf_file()
    if seed % 3 == 0:
        return any_bytes(rng, content, header)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, size = rng.choice(numbers)
        value = rng.choice(
            (*EXTREMES, rng.randrange(50), int.from_bytes(data[at : at + size], "little") + rng.choice((-1, 1)))
        )
        data[at : at + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(data)


CASE = {"safetensors": (packed(*safetensors_table()), safetensors_case), "gguf": (gguf_file()[0], gguf_case)}


@pytest.mark.parametrize(("good", "mutated"), CASE.values(), ids=CASE)
def test_mutations(tmp_path, good, mutated):
    survive(tmp_path / "x", good, mutated, range(CASES))


@pytest.mark.slow
@pytest.mark.parametrize(("good", "mutated"), CASE.values(), ids=CASE)
def test_many_mutations(tmp_path, good, mutated):
    survive(tmp_path / "x", good, mutated, range(CASES, 30 * CASES))


# --- Large headers that say little ------------------------------------------------------------------------------------


def repeated(piece: bytes) -> bytes:
    """As many as a header may hold."""
    return piece * (3_990_000 // len(piece))


def many_tensors(count: int) -> bytes:
    rows = (f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return packed(b"{" + ",".join(rows).encode() + b"}", b"")


def gguf_of(tensors: int, keys: int, body: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def key_of(i: int) -> bytes:
    return struct.pack("<Q8sIB", 8, b"%08d" % i, 0, 7)


def tensor_of(i: int) -> bytes:
    return struct.pack("<Q8sIQIQ", 8, b"%08d" % i, 1, 0, 0, 0)


def array_of(kind: int, count: int, body: bytes) -> bytes:
    return gguf_of(0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, kind, count) + body)


BOMBS: dict[str, Callable[[], bytes]] = {
    "tables": lambda: packed(b'{"a":[' + repeated(b"{},") + b"0]}", b""),
    "lists": lambda: packed(b'{"a":[' + repeated(b"[],") + b"0]}", b""),
    "strings": lambda: packed(b'{"a":[' + repeated(b'"ab",') + b"0]}", b""),
    "floats": lambda: packed(b'{"a":[' + repeated(b"0.1,") + b"0]}", b""),
    "a long shape": lambda: packed(
        b'{"a":{"dtype":"U8","shape":[' + repeated(b"9,") + b'0],"data_offsets":[0,0]}}', b""
    ),
    "numbers of many digits": lambda: packed(b'{"a":[' + repeated(b"9" * 4200 + b",") + b"0]}", b""),
    "tensors": lambda: many_tensors(33_000),
    "one name": lambda: packed(b'{"' + repeated(b"a") + b'":1}', b""),
    "header": lambda: packed(b"{" + b" " * 3_990_000, b""),
    "gguf keys": lambda: gguf_of(0, 100_000, b"".join(map(key_of, range(100_000)))),
    "gguf tensors": lambda: gguf_of(100_000, 0, b"".join(map(tensor_of, range(100_000)))),
    "gguf strings": lambda: array_of(8, 5_000_000, bytes(40_000_000)),
    "gguf bytes": lambda: array_of(0, 60_000_000, bytes(60_000_000)),
    "gguf string": lambda: gguf_of(0, 1, struct.pack("<Q1sIQ", 1, b"a", 8, 60_000_000) + bytes(60_000_000)),
}


# What is only just allowed: it must be read within the same limits.
LARGEST: dict[str, Callable[[], bytes]] = {
    "metadata": lambda: packed(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(300_000)) + b"}}", b""),
    "tensors": lambda: many_tensors(32_768),
    "gguf keys": lambda: gguf_of(0, 65_536, b"".join(map(key_of, range(65_536)))),
    "gguf tensors": lambda: gguf_of(65_536, 0, b"".join(map(tensor_of, range(65_536))) + bytes(32)),
    "gguf strings": lambda: array_of(8, 1_000_000, bytes(8_000_000)),
    "gguf bytes": lambda: array_of(0, 47_000_000, bytes(47_000_000)),
    "gguf bools": lambda: array_of(7, 47_000_000, bytes(47_000_000)),
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=[name.replace(" ", "-") for name in BOMBS])
def test_bombs(tmp_path, make):
    assert not opened_within_limits(tmp_path / "x", make())


@pytest.mark.parametrize("make", LARGEST.values(), ids=[name.replace(" ", "-") for name in LARGEST])
def test_largest(tmp_path, make):
    assert opened_within_limits(tmp_path / "x", make())


def opened_within_limits(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    forget_peak()
    before = status("VmRSS")
    result = opened(path)
    assert status("VmHWM") - before < MEGABYTES
    return result


def opened(path: Path, tries: int = 3) -> bool:
    """A busy machine may need a second try."""
    try:
        with limited(), open_checkpoint(path):
            return True
    except UserError:
        return False
    except Hang:
        if tries == 1:
            raise
        return opened(path, tries - 1)
