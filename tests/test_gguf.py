"""GGUF: the strict layout, typed metadata in both directions, splits; judged by the `gguf` library."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from flux_quant.converters import gguf_io
from flux_quant.converters.checkpoint import TensorInfo, load, open_checkpoint
from flux_quant.converters.container import MappedFile
from flux_quant.converters.gguf_io import FILE_TYPES, TYPES
from flux_quant.converters.gguf_values import DTYPES
from flux_quant.converters.summary import summarize
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS


def write(path: Path, infos: list[TensorInfo], metadata: dict[str, object]) -> Path:
    with create_checkpoint(path, infos, metadata) as writer:
        for i, info in enumerate(infos):
            values = torch.randn(info.shape, generator=torch.Generator().manual_seed(i))
            writer.write(info.name, FORMATS[info.format].pack(values))
    return path


def read_back(tmp_path: Path, metadata: dict[str, object]) -> tuple[dict[str, object], gguf.GGUFReader]:
    path = write(tmp_path / "x.gguf", [TensorInfo("a", (3,), "f32")], metadata)
    return open_checkpoint(path).metadata, gguf.GGUFReader(path)


# --- Metadata ---------------------------------------------------------------------------------------------------------

NUMBERS = {dtype.name: dtype for dtype in DTYPES.values()}
numbers = pytest.mark.parametrize("dtype", NUMBERS.values(), ids=NUMBERS)
GGUF_TYPES = {dtype: gguf.GGUFValueType(kind) for kind, dtype in DTYPES.items()}


def samples(dtype: np.dtype) -> np.ndarray:
    """The ends of the range, and numbers between."""
    if dtype.kind == "b":
        return np.array([False, True, True])
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return np.array([limits.min, 0, 7, limits.max], dtype)


@numbers
def test_numbers_keep_their_type(tmp_path, dtype):
    array = samples(dtype)
    metadata, judge = read_back(tmp_path, {"array": array, **{f"n{i}": number for i, number in enumerate(array)}})
    assert metadata["array"].dtype == dtype and np.array_equal(metadata["array"], array)
    assert judge.get_field("array").types == [gguf.GGUFValueType.ARRAY, GGUF_TYPES[dtype]]
    assert judge.get_field("array").contents() == array.tolist()
    for i, number in enumerate(array):
        assert np.array_equal(metadata[f"n{i}"], number)
        assert judge.get_field(f"n{i}").types == [GGUF_TYPES[dtype]]
        assert judge.get_field(f"n{i}").contents() == number.item()


@numbers
def test_what_is_read_can_be_written_with_the_same_type(tmp_path, dtype):
    array = samples(dtype)
    first, _ = read_back(tmp_path, {"array": array, "empty": array[:0], "one": array[1]})
    (tmp_path / "x.gguf").unlink()
    second, judge = read_back(tmp_path, first)
    for key, kind in {"array": "ARRAY", "empty": "ARRAY", "one": GGUF_TYPES[dtype].name}.items():
        assert judge.get_field(key).types[0].name == kind
        assert np.array_equal(second[key], first[key]) and np.asarray(second[key]).dtype == np.asarray(first[key]).dtype


DEFAULTS = {
    "text": ("grüße\n", "STRING"),
    "nothing": ("", "STRING"),
    "yes": (True, "BOOL"),
    "count": (7, "UINT32"),
    "largest": (2**32 - 1, "UINT32"),
    "large": (2**32, "UINT64"),
    "negative": (-7, "INT32"),
    "very negative": (-(2**40), "INT64"),
    "fraction": (0.5, "FLOAT32"),
    "words": (["▁the", "", "grüße"], "STRING"),
    "numbers": ([1, 2, -3], "INT32"),
    "shape": ((3, 5), "INT32"),
    "large numbers": ([1, 2**40], "INT64"),
    "fractions": ([0.5, 2.0], "FLOAT32"),
    "flags": ([True, False], "BOOL"),
}


@pytest.mark.parametrize(("content", "kind"), DEFAULTS.values(), ids=DEFAULTS)
def test_types_of_python_values(tmp_path, content, kind):
    metadata, judge = read_back(tmp_path, {"key": content})
    field = judge.get_field("key")
    assert field.types[-1].name == kind and (field.types[0].name == "ARRAY") == isinstance(content, list | tuple)
    assert field.contents() == (list(content) if isinstance(content, tuple) else content)
    assert np.array_equal(metadata["key"], content)


NOT_STORABLE = {
    "none": (None, "NoneType"),
    "table": ({"a": 1}, "dict"),
    "bytes": (b"abc", "bytes"),
    "nested": ([[1, 2], [3, 4]], "2 dimensions"),
    "mixed": (["a", 1], "list"),
    "empty list": ([], "empty numpy array"),
    "half": (np.zeros(3, np.float16), "float16"),
    "huge": (2**64, "int"),
}


@pytest.mark.parametrize(("content", "message"), NOT_STORABLE.values(), ids=NOT_STORABLE)
def test_values_that_gguf_cannot_hold(tmp_path, content, message):
    with pytest.raises(TypeError, match=f"key: .*{message}"):
        create_checkpoint(tmp_path / "x.gguf", [], {"key": content})


@pytest.mark.parametrize("key", ["", "k" * 65536])
def test_keys_that_gguf_cannot_hold(tmp_path, key):
    with pytest.raises(ValueError, match="a key of"):
        create_checkpoint(tmp_path / "x.gguf", [], {key: 1})


def test_file_of_another_writer(tmp_path):
    """What gguf's own writer makes of every type is read with the same value, and written again byte for byte."""
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "t5encoder")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"):
        getattr(writer, f"add_{kind}")(f"one.{kind}", 7)
    writer.add_bool("one.bool", True)
    writer.add_array("words", ["a", "bc"])
    writer.add_array("numbers", [1, -2])
    writer.add_array("fractions", [0.5])
    writer.add_array("bytes", b"\x00\xff")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with open_checkpoint(tmp_path / "theirs.gguf") as theirs:
        write(tmp_path / "ours.gguf", [], theirs.metadata)
        assert theirs.metadata["words"] == ["a", "bc"] and theirs.metadata["bytes"].tolist() == [0, 255]
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == (tmp_path / "theirs.gguf").read_bytes().ljust(len(ours), b"\0")


def test_vocabulary_is_read_in_one_piece(tmp_path):
    """No judge of time: a numpy array comes back as one, and 100,000 words as 100,000 strings."""
    words = [f"▁word{i}" for i in range(100_000)]
    scores = np.arange(len(words), dtype=np.float32)
    path = write(tmp_path / "x.gguf", [], {"tokens": words, "scores": scores})
    metadata = open_checkpoint(path).metadata
    assert metadata["tokens"] == words and np.array_equal(metadata["scores"], scores)
    assert summarize(path).metadata == {"tokens": "100,000 entries", "scores": "100,000 entries"}


# --- Layout: what the strictest reader demands ------------------------------------------------------------------------


def sizes_of_all_kinds() -> list[TensorInfo]:
    """Sizes that leave all kinds of remainders of 32, the last one too."""
    infos = [TensorInfo(f"{name}.weight", (3, 5 * FORMATS[name].block), name) for name in TYPES]
    return [
        *infos,
        TensorInfo("scalar", (), "f32"),
        TensorInfo("four", (2, 1, 3, 1), "f16"),
        TensorInfo("v", (3,), "f32"),
    ]


def test_strict_layout(tmp_path):
    infos = sizes_of_all_kinds()
    path = write(tmp_path / "x.gguf", infos, {"general.architecture": "flux"})
    judge, running = gguf.GGUFReader(path), 0
    assert judge.get_field("general.alignment") is None
    for tensor, info in zip(judge.tensors, infos, strict=True):
        assert tensor.name == info.name and tensor.data_offset == judge.data_offset + running
        assert tuple(tensor.shape)[::-1] == (info.shape or (1,))
        running += -(-info.nbytes // 32) * 32
    assert path.stat().st_size == judge.data_offset + running > tensor.data_offset + tensor.n_bytes
    assert gguf_io.strict_problems(MappedFile(path)) == []


NOT_WRITTEN = {
    "name of 64 bytes": (TensorInfo("n" * 64, (4,), "f32"), "63 bytes"),
    "name of 33 letters": (TensorInfo("ä" * 33, (4,), "f32"), "63 bytes"),
    "5 dimensions": (TensorInfo("a", (1, 1, 1, 1, 4), "f32"), "GGUF allows 4"),
    "odd columns": (TensorInfo("a", (4, 33), "q8_0"), "33 columns are no multiple of 32"),
    "FP8": (TensorInfo("a", (4, 32), "fp8"), "cannot be stored as GGUF"),
}


@pytest.mark.parametrize(("info", "message"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_tensors_that_readers_refuse_are_not_written(tmp_path, info, message):
    with pytest.raises(UserError, match=message):
        create_checkpoint(tmp_path / "x.gguf", [info], {})


def test_mistakes_of_callers(tmp_path):
    info = TensorInfo("a", (4,), "f32")
    with pytest.raises(ValueError, match="alignment"):
        create_checkpoint(tmp_path / "x.gguf", [info], {"general.alignment": 32})
    with pytest.raises(ValueError, match="twice"):
        create_checkpoint(tmp_path / "x.gguf", [info, info], {})


@pytest.mark.parametrize("original", [np.array([3, 10, 16], np.int32), [3, 10, 16]], ids=["array", "list"])
def test_reshaped_tensor_keeps_its_shape_aside(tmp_path, original):
    """(3, 10, 16) stored as (15, 32), which Q8_0 can hold: its blocks cross rows, so reading unpacks it."""
    info = TensorInfo("a.weight", (15, 32), "q8_0")
    path = write(tmp_path / "x.gguf", [info], {"comfy.gguf.orig_shape.a.weight": original})
    judge = gguf.GGUFReader(path)
    field = judge.get_field("comfy.gguf.orig_shape.a.weight")
    assert field.types[-1] == gguf.GGUFValueType.INT32 and field.contents() == [3, 10, 16]
    reader = open_checkpoint(path)
    assert reader.tensors["a.weight"] == TensorInfo("a.weight", (3, 10, 16), "f32")
    assert reader.stored_as("a.weight") == "q8_0" and reader.nbytes("a.weight") == 15 * 34
    values = torch.tensor(gguf.quants.dequantize(judge.tensors[0].data, judge.tensors[0].tensor_type))
    assert torch.equal(load(reader, "a.weight"), values.view(3, 10, 16))
    assert torch.equal(reader.stored("a.weight")[0], torch.tensor(judge.tensors[0].data))


def test_reshaped_tensor_whose_rows_are_whole_blocks_stays_packed(tmp_path):
    info = TensorInfo("a.weight", (15, 32), "q8_0")
    path = write(tmp_path / "x.gguf", [info], {"comfy.gguf.orig_shape.a.weight": [5, 3, 32]})
    reader = open_checkpoint(path)
    assert reader.tensors["a.weight"] == TensorInfo("a.weight", (5, 3, 32), "q8_0")
    assert reader.read("a.weight")[0].shape == (5, 3, 34)


def test_quantized_vector_is_unpacked(tmp_path):
    """mixed-gguf-converter writes long biases so; a slice of rows would cut through its blocks."""
    values = np.random.default_rng(1).standard_normal(96).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_tensor("a.bias", gguf.quants.quantize(values, TYPES["q8_0"]), raw_dtype=TYPES["q8_0"])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    reader = open_checkpoint(tmp_path / "x.gguf")
    assert reader.tensors["a.bias"] == TensorInfo("a.bias", (96,), "f32") and reader.stored_as("a.bias") == "q8_0"
    assert np.allclose(load(reader, "a.bias"), values, atol=0.02)


WRONG_SHAPES = {"text": "15, 32", "fractions": [15.0, 32.0], "too many": [15, 33], "signs": [-15, -32], "one": 480}


@pytest.mark.parametrize("original", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_shape_aside_that_makes_no_sense(tmp_path, original):
    metadata = {"comfy.gguf.orig_shape.a.weight": original}
    path = write(tmp_path / "x.gguf", [TensorInfo("a.weight", (15, 32), "q8_0")], metadata)
    with pytest.raises(UserError, match="cannot be viewed"):
        open_checkpoint(path)


def test_splits(tmp_path):
    """Judged by the names and types that gguf's writer gives its own parts."""
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "flux", split_max_tensors=1)
    ours = tmp_path / "ours"
    ours.mkdir()
    for i in range(3):
        theirs.add_tensor(f"t{i}", np.ones(4, np.float32))
        name = gguf_io.split_name("theirs", i, 3)
        write(ours / name, [TensorInfo(f"t{i}", (4,), "f32")], gguf_io.split_metadata(i, 3, 3))
    for step in (theirs.write_header_to_file, theirs.write_kv_data_to_file, theirs.write_tensors_to_file, theirs.close):
        step()
    for path in sorted(tmp_path.glob("*.gguf")):
        expected, got = gguf.GGUFReader(path), gguf.GGUFReader(ours / path.name)
        for key in ("split.no", "split.count", "split.tensors.count"):
            assert got.get_field(key).types == expected.get_field(key).types
            assert got.get_field(key).contents() == expected.get_field(key).contents()
    assert len(list(tmp_path.glob("*.gguf"))) == 3


RECIPE_TYPES = {
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
    "q4_k": gguf.LlamaFileType.MOSTLY_Q4_K_S,
    "q3_k_l": gguf.LlamaFileType.MOSTLY_Q3_K_L,
    "iq4_nl": gguf.LlamaFileType.MOSTLY_IQ4_NL,
    "f32": gguf.LlamaFileType.ALL_F32,
}


@pytest.mark.parametrize(("recipe", "number"), RECIPE_TYPES.items(), ids=RECIPE_TYPES)
def test_file_type(tmp_path, recipe, number):
    assert gguf_io.model_metadata("flux", recipe)["general.file_type"] == number
    assert gguf_io.model_metadata("flux", "a recipe of mine", recipe)["general.file_type"] == number
    _, judge = read_back(tmp_path, gguf_io.model_metadata("flux", recipe))
    assert [field.types[0].name for field in judge.fields.values()][-3:] == ["STRING", "UINT32", "UINT32"]


def test_every_format_has_a_file_type():
    assert set(TYPES) <= set(FILE_TYPES)


# --- Reading what should not have been written ------------------------------------------------------------------------


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def header(keys: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: int = 32, align: int = 32) -> bytes:
    """A file with `data` bytes of zeros after its header."""
    start = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors)
    return start + bytes(-len(start) % align + data)


def tensor(name: str, *sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def key(name: str, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


ONE = struct.pack("<I", 1)
ARRAY_OF = struct.Struct("<IQ")
REFUSED = {
    "key twice": (header((key("a", 4, ONE), key("a", 4, ONE))), "key a occurs twice"),
    "key without name": (header((key("", 4, ONE),)), "a key without a name"),
    "nested array": (header((key("a", 9, ARRAY_OF.pack(9, 1) + ARRAY_OF.pack(4, 1) + ONE),)), "array of arrays"),
    "unknown type": (header((key("a", 13, ONE),)), "a value of type 13"),
    "unknown type in an array": (header((key("a", 9, ARRAY_OF.pack(13, 1)),)), "a value of type 13"),
    "endless array": (header((key("a", 9, ARRAY_OF.pack(10, 1 << 61)),)), "entries in"),
    "array beyond the end": (header((key("a", 9, ARRAY_OF.pack(10, 60)),)), "beyond the"),
    "endless string": (header((key("a", 8, struct.pack("<Q", 1 << 63)),)), "beyond the"),
    "alignment of 3": (header((key("general.alignment", 4, struct.pack("<I", 24)),)), "alignment of 24"),
    "alignment of 0": (header((key("general.alignment", 4, bytes(4)),)), "alignment of 0"),
    "alignment as text": (header((key("general.alignment", 8, text("32")),)), "alignment of 32"),
    "5 dimensions": (header((), (tensor("t", 1, 1, 1, 1, 1),)), "5 dimensions"),
    "tensor twice": (header((), (tensor("t", 4), tensor("t", 4))), "t occurs twice"),
    "product overflows": (header((), (tensor("t", 1 << 32, 1 << 32),)), "absurd"),
    "overflow behind a zero": (header((), (tensor("t", 0, 1 << 63),)), "absurd"),
    "part of a block": (header((), (tensor("t", 33, 1, kind=8),)), "no multiple of 32"),
    "retired type": (header((), (tensor("t", 32, kind=4),)), "unknown type 4"),
    "beyond the end": (header((), (tensor("t", 4, offset=32),)), "truncated"),
    "overlap": (header((), (tensor("a", 4), tensor("b", 4, offset=12)), 64), "b begins inside the tensor before it"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
    "more tensors than bytes": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0), "entries in"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_damaged_headers_are_refused(tmp_path, content, message):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


TWO = (tensor("a", 4), tensor("b", 4, offset=32))
NOT_STRICT = {
    "gap": (header((), (tensor("a", 4), tensor("b", 4, offset=64)), 96), ["b begins at byte 64 of the data; 32"]),
    "order": (header((), TWO[::-1], 64), ["b begins at byte 32 of the data; 0", "a begins at byte 0 of the data; 64"]),
    "tail": (header((), TWO, 48), ["16 bytes of padding are missing after the last tensor"]),
    "bytes of no tensor": (header((), TWO, 64 + 7), []),
    "name": (header((), (tensor("n" * 64, 4),)), ["has 64 bytes; stock readers allow 63"]),
    "nothing wrong": (header((), TWO, 64), []),
    "other alignment": (header((key("general.alignment", 4, struct.pack("<I", 64)),), (tensor("a", 4),), 64, 64), []),
}


@pytest.mark.parametrize("case", NOT_STRICT)
def test_what_ggml_refuses(tmp_path, case):
    """The expectations were tried out with ggml's gguf.cpp."""
    content, expected = NOT_STRICT[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    open_checkpoint(path)
    problems = gguf_io.strict_problems(MappedFile(path))
    assert gguf_io.bytes_after(MappedFile(path)) == {"tail": -16, "bytes of no tensor": 7}.get(case, 0)
    assert len(problems) == len(expected) and all(map(str.__contains__, problems, expected))
