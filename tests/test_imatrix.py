"""Importance matrices in every form found: other people's writers and a hand-written one, and damaged files."""

import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_quant.converters.imatrix import check_imatrix, read_imatrix, write_imatrix
from flux_quant.errors import UserError

COLUMNS = {"double_blocks.0.img_attn.qkv.weight": 33, "img_in.weight": 1, "single_blocks.2.linear2.weight": 257}
CALLS = {"double_blocks.0.img_attn.qkv.weight": 7, "img_in.weight": 1, "single_blocks.2.linear2.weight": 1000}
MEANS = {
    name: torch.rand(columns, generator=torch.Generator().manual_seed(columns)) for name, columns in COLUMNS.items()
}
SDCPP = "model.diffusion_model."


def entry(name: str, calls: int, values: np.ndarray) -> bytes:
    text = name.encode()
    return struct.pack("<i", len(text)) + text + struct.pack("<ii", calls, len(values)) + values.astype("<f4").tobytes()


def dat(prefix: str = "", tail: bytes = struct.pack("<ii", 12, 4) + b"data") -> bytes:
    """As llama.cpp wrote it until 2025: values are means times the number of calls."""
    entries = [entry(prefix + name, CALLS[name], mean.numpy() * CALLS[name]) for name, mean in MEANS.items()]
    return struct.pack("<i", len(entries)) + b"".join(entries) + tail


def write_gguf(path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, arch="imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["prompts.txt"])
    writer.add_uint32("imatrix.chunk_count", 12)
    for name in sums:
        writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32))
        if name in counts:
            writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def write_dense_gguf(path, prefix: str = "") -> None:
    sums = {prefix + name: mean.numpy()[None] * CALLS[name] for name, mean in MEANS.items()}
    write_gguf(path, sums, {prefix + name: np.array([[CALLS[name]]]) for name in MEANS})


FORMS = {
    "x.dat": lambda path: path.write_bytes(dat()),
    "no tail.dat": lambda path: path.write_bytes(dat(tail=b"")),
    "sdcpp.dat": lambda path: path.write_bytes(dat(SDCPP)),
    "x.gguf": write_dense_gguf,
    "sdcpp.gguf": lambda path: write_dense_gguf(path, SDCPP),
    "x.safetensors": lambda path: write_imatrix(path, MEANS, {"count": 4096}),
    "sdcpp.safetensors": lambda path: write_imatrix(path, {SDCPP + n: m for n, m in MEANS.items()}, {"count": 4096}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_means(tmp_path, form):
    FORMS[form](tmp_path / form)
    found = read_imatrix(tmp_path / form)
    assert found.keys() == MEANS.keys()
    for name, mean in MEANS.items():
        assert found[name].dtype == torch.float32 and found[name].shape == mean.shape
        torch.testing.assert_close(found[name], mean, rtol=3e-7, atol=0)


def test_own_form_is_an_ordinary_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_imatrix(path, MEANS, {"count": 4096, "prompts": 16})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "imatrix", "count": "4096", "prompts": "16"}
    assert {name: mean.tolist() for name, mean in load_file(path).items()} == {n: m.tolist() for n, m in MEANS.items()}
    with pytest.raises(UserError, match="exists"):
        write_imatrix(path, MEANS, {})
    write_imatrix(path, {"a": torch.ones(3)}, {}, force=True)
    assert list(read_imatrix(path)) == ["a"] and os.listdir(tmp_path) == [path.name]


def test_what_gguf_wrote_reads_the_same_in_gguf(tmp_path):
    """The quotient of the two tensors as gguf's own reader sees them."""
    write_dense_gguf(tmp_path / "x.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, mean in read_imatrix(tmp_path / "x.gguf").items():
        expected = tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"]
        np.testing.assert_allclose(mean.numpy(), expected.squeeze(0), rtol=3e-7)


def test_experts_are_averaged_and_layers_that_never_ran_have_no_entry(tmp_path):
    sums = np.array([[6.0, 2.0, 4.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    counts = {"moe.weight": np.array([[2], [0], [3]]), "idle.weight": np.array([[0]])}
    write_gguf(tmp_path / "x.gguf", {"moe.weight": sums, "idle.weight": np.zeros((1, 5))}, counts)
    found = read_imatrix(tmp_path / "x.gguf")
    assert list(found) == ["moe.weight"]
    torch.testing.assert_close(found["moe.weight"], torch.tensor([7.0, 4.0, 7.0]) / 5)


def test_calls_of_zero_in_the_older_form(tmp_path):
    """llama.cpp divides only by a positive number of calls."""
    (tmp_path / "x.dat").write_bytes(struct.pack("<i", 1) + entry("a", 0, np.array([1.0, 2.0])))
    assert read_imatrix(tmp_path / "x.dat")["a"].tolist() == [1, 2]


def damaged() -> dict[str, tuple[bytes, str]]:
    good = dat()
    huge = struct.pack("<i", 2**31 - 1)
    vector = 4 + 4 + len(next(iter(MEANS))) + 4  # where the length of the first vector lies
    return {
        "empty": (b"", "is empty"),
        "text": (b"hello world, I am no imatrix", "the number of entries is"),
        "no entries": (bytes(64), "the number of entries is 0"),
        "more entries than bytes": (huge + good[4:], "the number of entries is"),
        "one entry too many": (struct.pack("<i", 4) + dat(tail=b"")[4:], "are left"),
        "long name": (good[:4] + huge + good[8:], "the length of name 0"),
        "name of no bytes": (good[:4] + bytes(4) + good[8:], "the length of name 0 is 0"),
        "name that is no text": (good[:8] + b"\xff" + good[9:], "no text"),
        "negative calls": (struct.pack("<i", 1) + entry("a", -1, np.ones(2)), "calls of a is -1"),
        "long vector": (good[:vector] + huge + good[vector + 4 :], "the length of double"),
        "vector of nothing": (struct.pack("<i", 1) + entry("a", 1, np.ones(0)), "the length of a is 0"),
        "twice": (struct.pack("<i", 2) + 2 * entry("a", 1, np.ones(2)), "two entries for a"),
        "twice after the prefix": (
            struct.pack("<i", 2) + entry("a", 1, np.ones(2)) + entry(SDCPP + "a", 1, np.ones(2)),
            "two entries for a",
        ),
        "not finite": (struct.pack("<i", 1) + entry("a", 1, np.array([1, np.nan])), "no mean squares"),
        "negative": (struct.pack("<i", 1) + entry("a", 1, np.array([1, -1])), "no mean squares"),
    }


@pytest.mark.parametrize(("content", "message"), damaged().values(), ids=damaged())
def test_damaged_dat(tmp_path, content, message):
    path = tmp_path / "x.dat"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_imatrix(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_no_shortened_or_altered_dat_does_harm(tmp_path):
    """A clear line or a readable imatrix, without memory beyond a few times the file."""
    good, path = dat(tail=b""), tmp_path / "x.dat"
    generator = np.random.default_rng(0)
    tracemalloc.start()
    for end in range(1, len(good), 7):
        path.write_bytes(good[:end])
        with pytest.raises(UserError):
            read_imatrix(path)
    for _ in range(400):
        content = bytearray(good)
        for at in generator.integers(0, len(good), 3):
            content[at] = generator.choice([0, 1, 127, 128, 255])
        path.write_bytes(content)
        try:
            assert all(mean.isfinite().all() for mean in read_imatrix(path).values())
        except UserError as error:
            assert "\n" not in str(error)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_other_files_are_no_imatrix(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path, {"format": "pt"})
    with pytest.raises(UserError, match="no imatrix"):
        read_imatrix(path)
    for tensor in (torch.ones(3, 3), torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.int32)):
        save_file({"a": tensor}, path, {"format": "imatrix"})
        with pytest.raises(UserError, match="not an F32 vector"):
            read_imatrix(path)


BROKEN_GGUF = {
    "no sums": ({}, {}, "no imatrix"),
    "no counts": ({"a": np.ones((1, 3))}, {}, r"a\.counts"),
    "more counts": ({"a": np.ones((1, 3))}, {"a": np.ones((2, 1))}, "needs 1 counts, not 2"),
    "negative counts": ({"a": np.ones((1, 3))}, {"a": -np.ones((1, 1))}, "no counts"),
    "nothing ran": ({"a": np.ones((1, 3))}, {"a": np.zeros((1, 1))}, "without entries"),
}


@pytest.mark.parametrize(("sums", "counts", "message"), BROKEN_GGUF.values(), ids=BROKEN_GGUF)
def test_broken_gguf(tmp_path, sums, counts, message):
    write_gguf(tmp_path / "x.gguf", sums, counts)
    with pytest.raises(UserError, match=message):
        read_imatrix(tmp_path / "x.gguf")


def test_check_against_a_model(tiny_flux):
    shapes = {name: tuple(tensor.shape) for name, tensor in tiny_flux.items()}
    weights = [name for name, shape in shapes.items() if len(shape) == 2]
    full = {name: torch.ones(shapes[name][1]) for name in weights}
    assert check_imatrix(full, shapes) == []
    missing = "single_blocks.1.linear2.weight"
    assert check_imatrix({name: mean for name, mean in full.items() if name != missing}, shapes) == [missing]
    assert check_imatrix({**full, "of another component": torch.ones(3)}, shapes) == []
    with pytest.raises(UserError, match=r"1,279 values for single_blocks\.1\.linear2\.weight, which has 1,280"):
        check_imatrix({**full, missing: torch.ones(1279)}, shapes)
    with pytest.raises(UserError, match=r"first entry is blk\.0"):
        check_imatrix({"blk.0": torch.ones(3)}, shapes)
