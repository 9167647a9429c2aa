"""Sound files pass; every kind of damage is found and named; errors are those that conversion measures."""

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flux_quant
from flux_quant.converters import checksums, gguf_io
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.expectations import ALIKE, ARCHITECTURES, REQUIRED
from flux_quant.converters.gguf_io import TYPES
from flux_quant.converters.plan import make_plan
from flux_quant.converters.quantize import Deviation, requantize
from flux_quant.converters.verify import Report, diff, verify
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.families import SIGNATURES
from flux_quant.formats import FORMATS
from flux_quant.naming import to_diffusers, to_stored

SAFETENSORS = ("f32", "f16", "bf16", "fp8", "fp8_plain")
CASES = [(name, ".safetensors") for name in SAFETENSORS] + [(name, ".gguf") for name in TYPES]
QKV, PROJ = "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.proj.weight"
MLP = "double_blocks.0.txt_mlp.0.weight"
ENCODERS = Path(flux_quant.__file__).parent / "tiny_flux" / "text_encoders"


@pytest.fixture(scope="module")
def model(tiny_flux) -> dict[str, Tensor]:
    """A FLUX.1 [dev] of 1 + 1 blocks, BFL names, F32."""
    return {name: tensor.float() for name, tensor in tiny_flux.items() if not re.search(r"_blocks\.[1-9]", name)}


@pytest.fixture(scope="module")
def source(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "flux1-tiny.safetensors"
    save_file(model, path)
    return path


def write(path: Path, tensors: dict[str, Tensor], format_name: str, summed: bool = False, **metadata: object) -> Path:
    """Two matrices in one format, all else F32."""
    packed = {}
    for name, tensor in tensors.items():
        used = format_name if name in (QKV, PROJ) else "f32"
        shape, formats = tuple(tensor.shape), (FORMATS["f32"], FORMATS[used])
        packed[name] = TensorInfo(name, shape, used), requantize(formats[0], (tensor,), shape, formats[1])[0]
    if path.suffix == ".gguf":
        metadata = gguf_io.model_metadata("flux", format_name) | metadata
    if summed:
        metadata |= checksums.entry({name: checksums.checksum(parts) for name, (_, parts) in packed.items()})
    with create_checkpoint(path, [info for info, _ in packed.values()], metadata) as writer:
        for name, (_, parts) in packed.items():
            writer.write(name, parts)
    return path


def patch(path: Path, name: str, offset: int, content: bytes) -> None:
    """Overwrite bytes of a tensor."""
    with open_checkpoint(path) as reader:
        place = reader.places[name][0]
    with path.open("r+b") as file:
        file.seek(place.offset + offset)
        file.write(content)


def found(report: Report, *words: str) -> bool:
    """One problem, and it has these words."""
    return len(report.problems) == 1 and all(word in report.problems[0] for word in words)


# --- Sound files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_name", "suffix"), CASES)
def test_sound_files_pass(tmp_path, model, source, format_name, suffix):
    """The errors are those that `requantize` reports while it converts."""
    path = write(tmp_path / f"x{suffix}", model, format_name, summed=True)
    steps = []
    report = verify(path, source, lambda *step: steps.append(step))
    assert (report.problems, report.warnings) == ([], [])
    assert report.checksums == len(report.rows) == len(model)
    assert [family.name for family in report.families] == ["FLUX.1"]
    expected: dict[str, Deviation] = {}
    for row in report.rows:
        shape, weight = tuple(model[row.name].shape), model[row.name]
        assert (row.shape, row.source_format, row.nbytes) == (shape, "f32", FORMATS[row.format].nbytes(shape))
        _, deviation = requantize(FORMATS["f32"], (weight,), shape, FORMATS[row.format])
        assert (row.deviation.noise, row.deviation.signal) == pytest.approx((deviation.noise, deviation.signal))
        assert row.identical == (row.format == "f32")
        expected[row.format] = expected.get(row.format, Deviation()) + deviation
    assert {name: sums.snr for name, sums in report.deviations.items()} == pytest.approx(
        {name: sums.snr for name, sums in expected.items()}
    )
    total = sum(tensor.numel() for tensor in model.values())
    assert steps[-1] == ("comparing", total, total) and ("checking", total, total) in steps


def test_errors_are_those_that_conversion_reports(tmp_path, source):
    result = run(make_plan(Conversion(source, tmp_path / "x.gguf", "q4_1")))
    report = verify(tmp_path / "x.gguf", source)
    assert (report.problems, report.warnings) == ([], []) and set(report.deviations) == set(result.formats)
    for name, usage in result.formats.items():
        assert report.deviations[name].snr == pytest.approx(usage.deviation.snr), name


MODELS = sorted(path for path in ENCODERS.parent.rglob("*.*") if path.suffix in (".safetensors", ".gguf"))


@pytest.mark.parametrize("path", [path for path in MODELS if path.parent.name != "loras"], ids=lambda path: path.stem)
def test_bundled_models_pass(path):
    report = verify(path)
    assert (report.problems, report.warnings) == ([], []) and len(report.families) == 1


def test_source_in_other_names(tmp_path, model):
    """Matched by canonical names; q, k and v are joined, the last modulation's halves change places."""
    ours = write(tmp_path / "x.safetensors", model, "f32")
    save_file(
        {name: tensor.contiguous() for name, tensor in to_diffusers(model).items()}, tmp_path / "theirs.safetensors"
    )
    report = verify(ours, tmp_path / "theirs.safetensors")
    assert report.problems == [] and len(report.rows) == len(model) and all(row.identical for row in report.rows)


def test_only_some_models_are_in_the_source(tmp_path, model, source):
    names = {f"model.diffusion_model.{name}": tensor for name, tensor in model.items()}
    encoder = load_file(ENCODERS / "clip_l.safetensors")
    names |= {f"text_encoders.clip_l.transformer.{name}": tensor for name, tensor in encoder.items()}
    save_file(names, tmp_path / "all.safetensors")
    report = verify(tmp_path / "all.safetensors", source)
    assert report.problems == [] and len(report.rows) == len(model) and {row.name for row in report.rows} <= set(names)
    assert [warning for warning in report.warnings if "CLIP-L" in warning] == report.warnings != []
    with pytest.raises(UserError, match=r"FLUX\.1.*T5 encoder.*no model in common"):
        verify(source, ENCODERS / "t5.safetensors")


def test_encoder_in_llama_cpp_s_names(tmp_path):
    encoder = ENCODERS / "t5.safetensors"
    with open_checkpoint(encoder) as reader:
        shapes = {name: info.shape for name, info in reader.tensors.items()}
        places = to_stored("T5 encoder", "llama.cpp", shapes)
        infos = [TensorInfo(places[name].names[0], shape, "f32") for name, shape in shapes.items()]
        with create_checkpoint(tmp_path / "x.gguf", infos, gguf_io.model_metadata("t5encoder", "f32")) as writer:
            for name, info in zip(shapes, infos, strict=True):
                writer.write(info.name, (load(reader, name),))
    report = verify(tmp_path / "x.gguf", encoder)
    assert (report.problems, report.warnings) == ([], []) and len(report.rows) == len(shapes)
    assert all(row.deviation.noise == 0 and row.source_format == "bf16" for row in report.rows)


def test_model_in_several_files(tmp_path, model, source):
    """Checksums of all parts are in the first; image programs would read that alone."""
    names = list(model)
    sums = checksums.entry({name: checksums.checksum((model[name],)) for name in names})
    first = gguf_io.model_metadata("flux", "f32") | sums
    for i, part in enumerate((names[:20], names[20:])):
        path = tmp_path / gguf_io.split_name("x", i, 2)
        metadata = gguf_io.split_metadata(i, 2, len(names)) | ({} if i else first)
        infos = [TensorInfo(name, tuple(model[name].shape), "f32") for name in part]
        with create_checkpoint(path, infos, metadata) as writer:
            for name in part:
                writer.write(name, (model[name],))
    report = verify(tmp_path / gguf_io.split_name("x", 0, 2), source)
    assert report.problems == [] and report.checksums == len(report.rows) == len(model)
    assert ["the model is split" in warning for warning in report.warnings] == [True]


# --- Damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format_name", "suffix"), [("q4_0", ".gguf"), ("q4_k", ".gguf"), ("fp8", ".safetensors")])
def test_nan_in_a_file(tmp_path, model, source, format_name, suffix):
    path = write(tmp_path / f"x{suffix}", model, format_name)
    with open_checkpoint(path) as reader:
        row = reader.read(QKV)[0][0].nbytes
    patch(path, QKV, 5 * row, b"\xff\xff")
    assert found(verify(path), QKV, format_name, "NaN", "row 5")
    report = verify(path, source)
    assert found(report, QKV) and np.isnan(report.deviations[format_name].snr)


@pytest.mark.parametrize(("format_name", "suffix"), CASES)
def test_flipped_byte(tmp_path, model, format_name, suffix):
    path = write(tmp_path / f"x{suffix}", model, format_name, summed=True)
    with open_checkpoint(path) as reader:
        content = reader.read(QKV)[0].reshape(-1).view(torch.uint8)[60:61].numpy()
    patch(path, QKV, 60, bytes(content ^ 1))
    report = verify(path)
    assert found(report, QKV, "SHA-256") and report.checksums == len(model) - 1


def test_checksums_that_do_not_fit(tmp_path, model):
    sums = {"other": "0" * 64, QKV: checksums.checksum((model[QKV],))}
    report = verify(write(tmp_path / "a.gguf", model, "f32", **checksums.entry(sums)))
    assert found(report, "other") and report.checksums == 1
    assert [f"{len(model) - 1} tensors have no checksum" in warning for warning in report.warnings] == [True]
    for i, content in enumerate(("{", "[]", '{"a": 5}', '{"a": "xyz"}', "[" * 100_000)):
        path = write(tmp_path / f"{i}.gguf", model, "f32", **{checksums.KEY: content})
        assert found(verify(path), checksums.KEY, "damaged")


def test_swapped_tensors(tmp_path, model, source):
    """Both have the shape that they should have: only the source tells."""
    other = MLP.replace("txt", "img")
    path = write(tmp_path / "x.gguf", model | {MLP: model[other], other: model[MLP]}, "q8_0")
    assert verify(path).problems == []
    problems = verify(path, source).problems
    assert len(problems) == 2 and MLP in problems[1] and other in problems[0] and "SNR -3" in problems[0]


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
DAMAGE: dict[str, tuple[Change, str]] = {
    "missing bias": (lambda t: {n: v for n, v in t.items() if n != "img_in.bias"}, "img_in.bias is missing"),
    "missing weight": (lambda t: {n: v for n, v in t.items() if n != QKV}, f"{QKV} is missing"),
    "wrong rows": (lambda t: t | {QKV: t[QKV][:512]}, rf"{QKV} has the shape \[512, 256\]; \[768, 256\]"),
    "wrong vector": (lambda t: t | {"txt_in.bias": torch.ones(3)}, r"txt_in.bias has the shape \[3\]; \[256\]"),
    "wrong order": (lambda t: t | {MLP: t[MLP].t().contiguous()}, rf"{MLP} has the shape \[256, 1024\]"),
    "no input layer": (lambda t: {n: v for n, v in t.items() if n != "txt_in.weight"}, "txt_in.weight"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGE.values(), ids=DAMAGE)
def test_names_and_shapes(tmp_path, model, source, change, message):
    """Without a source, and with one."""
    path = write(tmp_path / "x.safetensors", change(model), "f32")
    alone, compared = verify(path), verify(path, source)
    assert len(alone.problems) == 1 and re.search(message, alone.problems[0])
    assert len(compared.problems) == 2  # once for the model, once for the source


def test_tensors_that_do_not_belong(tmp_path, model, source):
    path = write(tmp_path / "x.safetensors", model | {"stray.weight": torch.ones(2)}, "f32")
    report = verify(path, source)
    assert report.problems == []
    assert len(report.warnings) == 1 and "stray.weight" in report.warnings[0] and "FLUX.1" in report.warnings[0]


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_truncated(tmp_path, model, suffix):
    path = write(tmp_path / f"x{suffix}", model, "f32")
    for keep in (path.stat().st_size // 2, 100):
        path.write_bytes(path.read_bytes()[:keep])
        assert found(verify(path), "truncated", str(path))


T5_Q, CLIP_FC = "encoder.block.1.layer.0.SelfAttention.q.weight", "text_model.encoder.layers.0.mlp.fc1.weight"
OTHERS = {
    "T5 without the last norm": ("t5", {"encoder.final_layer_norm.weight": None}, "final_layer_norm.weight is missing"),
    "T5 without a weight of a block": ("t5", {T5_Q: None}, f"{T5_Q} is missing"),
    "T5 with a wrong shape": ("t5", {T5_Q: (64, 128)}, "has the shape"),
    "CLIP without a weight of a block": ("clip_l", {CLIP_FC: None}, f"{CLIP_FC} is missing"),
}


@pytest.mark.parametrize(("name", "change", "message"), OTHERS.values(), ids=OTHERS)
def test_blocks_of_one_kind_are_alike(tmp_path, name, change, message):
    tensors = load_file(ENCODERS / f"{name}.safetensors")
    for tensor, shape in change.items():
        kept = {} if shape is None else {tensor: torch.ones(shape)}
        tensors = {n: v for n, v in tensors.items() if n != tensor} | kept
    save_file(tensors, tmp_path / "x.safetensors")
    report = verify(tmp_path / "x.safetensors")
    assert report.problems and any(message in problem for problem in report.problems)


def test_a_file_of_nothing_known(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}, tmp_path / "x.safetensors")
    report = verify(tmp_path / "x.safetensors", tmp_path / "x.safetensors")
    assert found(report, "b (f32)", "NaN") and "no model" in report.warnings[0] and len(report.rows) == 2


def test_expectations_are_of_families_that_exist():
    assert {*ALIKE, *REQUIRED, *ARCHITECTURES} <= {family for _, family, _ in SIGNATURES}


# --- Traps of GGUF readers --------------------------------------------------------------------------------------------


def with_format(name: str, format_name: str) -> Callable[[list[TensorInfo]], list[TensorInfo]]:
    return lambda infos: [TensorInfo(i.name, i.shape, format_name) if i.name == name else i for i in infos]


def unchanged(infos: list[TensorInfo]) -> list[TensorInfo]:
    return infos


VERSION = {"general.quantization_version": 2}
FLUX = {"general.architecture": "flux", **VERSION}
TRAPS = {
    "none": (unchanged, FLUX, None),
    "img_in BF16": (with_format("img_in.weight", "bf16"), FLUX, "img_in.weight is bf16"),
    "img_in quantized": (with_format("img_in.weight", "q8_0"), FLUX, "img_in.weight is q8_0"),
    "vector BF16": (with_format("txt_in.bias", "bf16"), FLUX, "1 vectors are neither F32 nor F16 (txt_in.bias: bf16)"),
    "no architecture": (unchanged, VERSION, "general.architecture is missing"),
    "pig": (unchanged, FLUX | {"general.architecture": "pig"}, "general.architecture is pig"),
    "no version": (with_format(QKV, "q8_0"), {"general.architecture": "flux"}, "quantization_version is missing"),
    "reshaped": (unchanged, FLUX | {f"{gguf_io.SHAPE_KEY}{QKV}": [768, 256]}, "1 tensors are reshaped"),
}


@pytest.mark.parametrize(("change", "metadata", "message"), TRAPS.values(), ids=TRAPS)
def test_traps(tmp_path, model, change, metadata, message):
    infos = change([TensorInfo(name, tuple(tensor.shape), "f32") for name, tensor in model.items()])
    with create_checkpoint(tmp_path / "x.gguf", infos, metadata) as writer:
        for info in infos:
            writer.write(info.name, FORMATS[info.format].pack(model[info.name]))
    report = verify(tmp_path / "x.gguf")
    assert report.problems == []
    assert report.warnings == [] if message is None else len(report.warnings) == 1 and message in report.warnings[0]


def test_what_only_we_can_read(tmp_path, model):
    """Bytes after the last tensor, and a prefix."""
    path = write(tmp_path / "a.gguf", model, "f32")
    path.write_bytes(path.read_bytes() + bytes(5))
    assert ["5 bytes follow" in warning for warning in verify(path).warnings] == [True]
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "flux")
    for name, tensor in model.items():
        writer.add_tensor(f"model.diffusion_model.{name}", tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    report = verify(tmp_path / "b.gguf")
    assert report.problems == [] and len(report.warnings) == 5
    assert all("stock readers allow 63" in warning for warning in report.warnings[:3])
    assert "1 more of the kind" in report.warnings[3] and "names begin with model." in report.warnings[4]


# --- Two files --------------------------------------------------------------------------------------------------------


def test_difference_of_two_formats(tmp_path, model, source):
    """Against Q8_0, Q4_0 has the error that it has against the source, to a tenth of a dB."""
    a, b = write(tmp_path / "a.gguf", model, "q8_0"), write(tmp_path / "b.gguf", model, "q4_0", extra=5)
    report, wanted = diff(a, b), verify(b, source)
    assert report.problems == [] and (report.path, report.against) == (b, a)
    assert report.deviations["q4_0"].snr == pytest.approx(wanted.deviations["q4_0"].snr, abs=0.1)
    for row in report.rows:
        assert row.identical == (row.format == "f32")
        assert (row.format, row.source_format) in {("f32", "f32"), ("q4_0", "q8_0")}
        assert row.deviation.noise == 0 if row.identical else 15 < row.deviation.snr < 25
    assert report.metadata == [("extra", 5, None), ("general.file_type", 2, 7)]


def test_difference_of_a_file_and_itself(tmp_path, model):
    path = write(tmp_path / "a.gguf", model, "q4_k", words=["a", "b"], numbers=np.arange(3))
    report = diff(path, path)
    assert (report.problems, report.metadata) == ([], []) and all(row.identical for row in report.rows)
    assert report.deviations["q4_k"].snr == float("inf")


def test_difference_of_names_and_shapes(tmp_path, model):
    a = write(tmp_path / "a.safetensors", model, "f32")
    changed = {n: t for n, t in model.items() if n != "txt_in.bias"} | {
        QKV: torch.ones(512, 256),
        "stray": torch.ones(2),
    }
    problems = diff(a, write(tmp_path / "b.safetensors", changed, "f32")).problems
    assert len(problems) == 2 and QKV in problems[0] and problems[1].startswith("txt_in.bias is missing")
    problems = diff(tmp_path / "b.safetensors", a).problems
    assert len(problems) == 2 and {QKV, "txt_in.bias"} == {problem.split()[0] for problem in problems}
