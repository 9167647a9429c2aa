"""Readers and writers, judged by the libraries that defined the containers; and what they say about damaged files."""

import json
import os
import struct
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.converters.checkpoint import TensorInfo, load, open_checkpoint
from flux_quant.converters.component import components
from flux_quant.converters.gguf_io import TYPES
from flux_quant.converters.safetensors_io import aligned_order
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS

SAFETENSORS = ("f32", "f16", "bf16", "fp8", "fp8_plain")
CASES = [(name, ".safetensors") for name in SAFETENSORS] + [(name, ".gguf") for name in TYPES]
cases = pytest.mark.parametrize(("format_name", "suffix"), CASES)


def weights(format_name: str) -> dict[str, tuple[TensorInfo, tuple[Tensor, ...]]]:
    """Two weights of one format, an odd one where the format allows it, and two vectors of odd length between them."""
    fmt = FORMATS[format_name]
    columns = fmt.block * 3 if fmt.block > 1 else 33
    shapes = {"a.weight": (7, columns), "a.bias": (7,), "b.weight": (5, columns), "b.bias": (3,)}
    out = {}
    for i, (name, shape) in enumerate(shapes.items()):
        used = fmt if name.endswith("weight") else FORMATS["f32"]
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        out[name] = TensorInfo(name, shape, used.name), used.pack(weight)
    return out


def write(path: Path, content: dict[str, tuple[TensorInfo, tuple[Tensor, ...]]], **metadata: object) -> None:
    with create_checkpoint(path, [info for info, _ in content.values()], metadata) as writer:
        for name, (_, parts) in content.items():
            writer.write(name, parts)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


@cases
def test_what_is_written_is_read(tmp_path, format_name, suffix):
    path, content = tmp_path / f"model{suffix}", weights(format_name)
    write(path, content, key="value")
    with open_checkpoint(path) as reader:
        assert dict(reader.tensors) == {name: info for name, (info, _) in content.items()}
        assert reader.metadata["key"] == "value" and not reader.foreign
        for name, (info, parts) in content.items():
            assert all(map(same, reader.read(name), parts))
            assert reader.nbytes(name) == info.nbytes
            assert same(load(reader, name), FORMATS[info.format].unpack(*parts))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("format_name", SAFETENSORS)
def test_safetensors_library_reads_it(tmp_path, format_name):
    path, content = tmp_path / "model.safetensors", weights(format_name)
    write(path, content)
    with safe_open(path, "pt") as file:
        for name, (_, parts) in content.items():
            assert same(file.get_tensor(name), parts[0])
        marked = (
            {"a.comfy_quant", "a.weight_scale", "b.comfy_quant", "b.weight_scale"} if format_name == "fp8" else set()
        )
        assert set(file.keys()) == set(content) | marked
        if marked:
            scale = file.get_tensor("a.weight_scale")
            assert scale.shape == () and scale.dtype == torch.float32
            assert json.loads(bytes(file.get_tensor("a.comfy_quant").tolist())) == {"format": "float8_e4m3fn"}
            layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
            assert layers == {"a": {"format": "float8_e4m3fn"}, "b": {"format": "float8_e4m3fn"}}


@pytest.mark.parametrize("format_name", TYPES)
def test_gguf_library_reads_it(tmp_path, format_name):
    path, content = tmp_path / "model.gguf", weights(format_name)
    write(path, content, key="value", number=7)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("key").contents() == "value" and reader.get_field("number").contents() == 7
    running = reader.data_offset
    for tensor, (name, (info, parts)) in zip(reader.tensors, content.items(), strict=True):
        assert (tensor.name, tuple(tensor.shape)[::-1]) == (name, info.shape)
        assert tensor.data_offset == running
        running += -(-info.nbytes // 32) * 32
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert torch.equal(torch.tensor(values), FORMATS[info.format].unpack(*parts))
    assert path.stat().st_size == running


def test_every_tensor_is_aligned_and_blocks_stay_together(tmp_path, tiny_flux):
    """FLUX.1's own order needs no change; odd sizes are sorted within blocks, or over the whole file."""
    names = list(tiny_flux)
    infos = [TensorInfo(name, tuple(tiny_flux[name].shape), "fp8" if "_blocks" in name else "bf16") for name in names]
    infos = [i if len(i.shape) == 2 else TensorInfo(i.name, i.shape, "bf16") for i in infos]
    with create_checkpoint(tmp_path / "model.safetensors", infos, {}) as writer:
        places = [place for name in names for place in writer.layouts[0].places[name]]
        assert all(place.offset % place.dtype.itemsize == 0 for place in places)
        starts = [writer.layouts[0].places[name][0].offset for name in names]
        assert starts == sorted(starts)
        for info in infos:
            writer.write(info.name, FORMATS[info.format].pack(tiny_flux[info.name]))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"a": (1, 4), "b": (4, 1), "c": (2, 3)}, ["a", "b", "c"]),
        ({"double_blocks.0.a": (1, 7), "double_blocks.0.b": (2, 2), "z": (4, 1)}, None),
        ({"double_blocks.0.a": (1, 8), "double_blocks.0.b": (1, 3), "double_blocks.0.c": (1, 1), "z": (4, 1)}, None),
        ({"double_blocks.0.a": (1, 4), "double_blocks.0.b": (2, 2), "z": (1, 1), "y": (4, 2)}, None),
    ],
)
def test_aligned_order(entries, expected):
    order, offset = aligned_order(entries), 0
    assert sorted(order) == sorted(entries)
    assert expected is None or order == expected
    for name in order:
        size, count = entries[name]
        assert offset % size == 0
        offset += size * count


def test_unaligned_file_is_read(tmp_path):
    """Files of other writers may begin their data anywhere."""
    values = torch.arange(5, dtype=torch.float32)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(
        safetensors_bytes({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}, values, odd=True)
    )
    assert torch.equal(load(open_checkpoint(path), "x"), values)


def safetensors_bytes(header: dict, values: Tensor, odd: bool = False) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + odd)
    return struct.pack("<Q", len(text)) + text + values.numpy().tobytes()


DATA = torch.randn(8, 16).to(torch.float8_e4m3fn)
SCALE = torch.tensor(0.25)
CONVENTIONS = {
    "per layer": ({"m.weight": DATA, "m.weight_scale": SCALE, "m.input_scale": SCALE.clone()}, "fp8"),
    "legacy": ({"m.weight": DATA, "m.scale_weight": SCALE, "scaled_fp8": torch.empty(0).to(DATA.dtype)}, "fp8"),
    "scale of shape 1": ({"m.weight": DATA, "m.scale_weight": SCALE.view(1)}, "fp8"),
    "plain cast": ({"m.weight": DATA}, "fp8_plain"),
}
MARKER = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
OTHER_MARKER = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
REFUSED = {
    "orphan scale": ({"m.weight_scale": SCALE}, "m.weight is missing"),
    "scale of another type": ({"m.weight": DATA.float(), "m.weight_scale": SCALE}, "is float32"),
    "orphan marker": ({"m.comfy_quant": MARKER}, "its weight is not"),
    "marked without scale": ({"m.weight": DATA, "m.comfy_quant": MARKER}, "has no scale"),
    "scales that do not fit": ({"m.weight": DATA, "m.weight_scale": torch.ones(3, 1)}, "does not divide"),
    "another format": ({"m.weight": DATA, "m.weight_scale": SCALE, "m.comfy_quant": OTHER_MARKER}, "nvfp4"),
    "broken marker": ({"m.weight": DATA, "m.weight_scale": SCALE, "m.comfy_quant": MARKER[:9]}, "damaged"),
    "quanto": ({"m.weight._data": DATA, "m.weight._scale": SCALE}, "quanto"),
    "torchao": ({"m._weight_qdata": DATA, "m._weight_scale": SCALE}, "torchao"),
}


@pytest.mark.parametrize(("tensors", "expected"), CONVENTIONS.values(), ids=CONVENTIONS)
def test_fp8_conventions(tmp_path, tensors, expected):
    save_file(tensors, tmp_path / "x.safetensors")
    reader = open_checkpoint(tmp_path / "x.safetensors")
    assert dict(reader.tensors) == {"m.weight": TensorInfo("m.weight", (8, 16), expected)}
    assert torch.equal(load(reader, "m.weight"), DATA.float() * (0.25 if expected == "fp8" else 1))


@pytest.mark.parametrize(("tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_fp8_that_would_be_misread(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path / "x.safetensors")


def test_header_marker_without_marker_tensors(tmp_path):
    layers = json.dumps({"format_version": "1.0", "layers": {"m": {"format": "float8_e4m3fn"}}})
    tensors = {"m.weight": DATA, "m.weight_scale": SCALE}
    save_file(tensors, tmp_path / "x.safetensors", {"_quantization_metadata": layers, "other": "kept"})
    reader = open_checkpoint(tmp_path / "x.safetensors")
    assert reader.tensors["m.weight"].format == "fp8" and reader.metadata == {"other": "kept"}


def test_types_without_a_format_are_foreign(tmp_path):
    save_file({"ids": torch.arange(3), "w": torch.ones(2)}, tmp_path / "x.safetensors")
    reader = open_checkpoint(tmp_path / "x.safetensors")
    assert list(reader.tensors) == ["w"] and reader.foreign["ids"] == TensorInfo("ids", (3,), "i64")
    with pytest.raises(UserError, match="ids has the type i64"):
        reader.read("ids")


def test_gguf_of_other_writers(tmp_path):
    """A reshaped tensor with its shape aside, an array of strings, an unknown quantization type."""
    path, values = tmp_path / "x.gguf", torch.randn(30, 64)
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("tokenizer.tokens", ["a", "bc"])
    writer.add_array("comfy.gguf.orig_shape.w", [30, 64])
    writer.add_tensor("w", gguf.quants.quantize(values.view(15, 128).numpy(), TYPES["q8_0"]), raw_dtype=TYPES["q8_0"])
    codes = torch.zeros(2, 66, dtype=torch.uint8).numpy()
    writer.add_tensor("k", codes, raw_dtype=gguf.GGMLQuantizationType.IQ2_XXS)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    reader = open_checkpoint(path)
    assert reader.metadata["tokenizer.tokens"] == ["a", "bc"]
    assert reader.tensors["w"] == TensorInfo("w", (30, 64), "q8_0")
    assert torch.equal(reader.read("w")[0], FORMATS["q8_0"].pack(values)[0])
    assert reader.foreign["k"] == TensorInfo("k", (2, 256), "iq2_xxs") and reader.nbytes("k") == 132


@pytest.fixture
def all_in_one(tmp_path, tiny_flux) -> Path:
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tiny_flux.items()}
    tensors = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()}
    for name in ("encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"):
        tensors[f"vae.{name}"] = torch.ones(4, 3, 3, 3)
    save_file(tensors, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def test_components_of_an_all_in_one_file(all_in_one, tiny_flux):
    transformer, vae = components(open_checkpoint(all_in_one))
    assert (transformer.family.name, transformer.family.variant, vae.family.name) == ("FLUX.1", "dev", "VAE")
    assert set(transformer.tensors) == set(tiny_flux)
    name = "single_blocks.1.norm.key_norm.scale"
    assert torch.equal(load(transformer, name), tiny_flux[name].float())


def damaged(good: bytes) -> dict[str, tuple[bytes, str]]:
    """From the bytes of a good safetensors file: damaged ones, and a word of what must be said."""
    length = int.from_bytes(good[:8], "little")
    entry = b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'

    def with_header(text: bytes, data: int = 16) -> bytes:
        return struct.pack("<Q", len(text)) + text + bytes(data)

    return {
        "empty": (b"", "is empty"),
        "text": (b"hello world, I am no model", "neither safetensors nor GGUF"),
        "pickle": (b"PK\x03\x04" + bytes(60), "pickle"),
        "header cut": (good[: length // 2], "truncated"),
        "data cut": (good[:-1], "truncated"),
        "data missing": (good[: 8 + length], "truncated"),
        "longer than its tensors": (good + b"x", "1 bytes follow"),
        "absurd header": (struct.pack("<Q", 1 << 62) + good[8:], "absurd"),
        "header longer than the file": (struct.pack("<Q", 3_999_999) + entry, "truncated"),
        "no JSON": (with_header(b'{"x": '), "not JSON"),
        "nested too deep": (with_header(b'{"x":' + b"[" * 100_000), "not JSON"),
        "no table": (with_header(b'{"x":5}'), "entry for x"),
        "negative offset": (with_header(entry.replace(b"[0,", b"[-4,")), "entry for x"),
        "hole": (with_header(entry.replace(b"[0,16]", b"[4,20]"), 20), "begins at byte"),
        "wrong size": (with_header(entry.replace(b"16", b"12")), "cannot take"),
        "enormous shape": (with_header(entry.replace(b"[4]", b"[4611686018427387904,9]")), "entry for x"),
        "large shape": (with_header(entry.replace(b"[4]", b"[4611686018427387]")), "cannot take"),
        "empty, but enormous": (with_header(entry.replace(b"[4]", b"[0,99999999999,9999999999]")), "entry for x"),
        "many dimensions": (with_header(entry.replace(b"[4]", b"[4,1,1,1,1,1,1,1,1]")), "entry for x"),
        "true is no number": (with_header(entry.replace(b"[4]", b"[4,true]")), "entry for x"),
        "name twice": (with_header(entry[:-1] + b"," + entry[1:], 16), "x occurs twice"),
        "half a character": (with_header(entry.replace(b'"x"', b'"\\ud800"')), "entry for"),
        "not UTF-8": (with_header(entry.replace(b'"x"', b'"\xff"')), "not JSON"),
        "metadata that are no text": (with_header(b'{"__metadata__":{"a":1}}', 0), "not a table"),
        "unknown type": (with_header(entry.replace(b"F32", b"F31")), "type F31"),
        "odd metadata": (with_header(b'{"__metadata__":[]}', 0), "not a table"),
    }


@pytest.mark.parametrize("case", damaged(bytes(8)))
def test_damaged_safetensors(tmp_path, tiny_flux_file, case):
    content, message = damaged(tiny_flux_file.read_bytes())[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_gguf(tmp_path):
    """Every shortening and many single-byte errors: a clear line or a readable file, never another exception."""
    good = tmp_path / "good.gguf"
    write(good, weights("q4_0"), key="value", number=7)
    content, path = good.read_bytes(), tmp_path / "bad.gguf"
    header = content.index(b"b.bias") + 40
    for end in [*range(4, header), len(content) - 40, len(content) - 33]:
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="truncated|damaged|neither"):
            open_checkpoint(path)
    for at in range(4, header):
        for value in (0, 255):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                reader = open_checkpoint(path)
                for name in reader.tensors:
                    reader.read(name)
            except UserError as error:
                assert "\n" not in str(error)


class Stop(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
@pytest.mark.parametrize("how", ["interrupted", "incomplete", "wrong shape"])
def test_failed_writer_leaves_the_target_as_it_was(tmp_path, suffix, how):
    path = tmp_path / f"x{suffix}"
    path.write_text("old")
    infos = [TensorInfo("a", (4, 4), "f32"), TensorInfo("b", (4, 4), "f32")]
    expected = {"interrupted": Stop, "incomplete": ValueError, "wrong shape": ValueError}[how]
    with pytest.raises(expected), create_checkpoint(path, infos, {}, force=True) as writer:
        writer.write("a", (torch.ones(4, 4) if how != "wrong shape" else torch.ones(4, 5),))
        if how == "interrupted":
            raise Stop
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "old"


def test_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "x.gguf", tmp_path / "x.gguf"
    real.write_text("old")
    link.symlink_to(real)
    with create_checkpoint(link, [TensorInfo("a", (4,), "f32")], {}, force=True) as writer:
        writer.write("a", (torch.ones(4),))
    assert link.is_symlink() and "a" in open_checkpoint(real).tensors


def test_formats_and_containers_that_do_not_go_together(tmp_path):
    for name, format_name in (("x.safetensors", "q8_0"), ("x.gguf", "fp8"), ("x.bin", "f32")):
        with pytest.raises(UserError, match=r"use a|must end in"):
            create_checkpoint(tmp_path / name, [TensorInfo("a.weight", (32, 32), format_name)], {})
    with pytest.raises(UserError, match="63 bytes"):
        create_checkpoint(tmp_path / "x.gguf", [TensorInfo("a" * 64, (32, 32), "f32")], {})
