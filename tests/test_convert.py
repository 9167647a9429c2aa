"""Every recipe on a small FLUX.1, judged by gguf, safetensors and diffusers."""

import dataclasses
import json
from math import isinf
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_quant import arch
from flux_quant.arch import FluxConfig
from flux_quant.converters import convert as convert_module
from flux_quant.converters import quantize
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import Result, run
from flux_quant.converters.gguf_io import FILE_TYPES, TYPES
from flux_quant.converters.mixes import BASES
from flux_quant.converters.plan import Plan, make_plan
from flux_quant.converters.recipe import OFFERED, build
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.model import Flux

RECIPES = [(name, suffix) for suffix, names in OFFERED.items() for name in names if BASES.get(name, name) in FORMATS]
QKV = {"q3_k_m": "q4_k", "q3_k_l": "q4_k", "q4_k_m": "q5_k", "q5_k_m": "q6_k"}  # of the double blocks, in these mixes
REFERENCE = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # what the library can quantize itself
GGUF = [name for name, suffix in RECIPES if suffix == ".gguf"]
F32_WEIGHTS = ("img_in", "time_in.in_layer", "vector_in.in_layer", "guidance_in.in_layer", "final_layer.linear")
LEAST_SNR = {"q8_0": 44, "q5_1": 28, "q5_0": 26, "q4_1": 21, "q4_0": 20, "iq4_nl": 21.5, "iq4_xs": 21.5}
LEAST_SNR |= {"q2_k": 10.5, "q3_k": 16, "q4_k": 22, "q5_k": 28, "q6_k": 34.5}
LEAST_SNR |= {"fp8": 30, "fp8_plain": 25, "f16": 70, "bf16": 50}


def convert(source: Path, target: Path, format_name: str, **options: object) -> Result:
    return run(make_plan(Conversion(source, target, format_name, **options)))


@pytest.mark.parametrize(("format_name", "suffix"), RECIPES)
def test_every_recipe(tmp_path, tiny_flux, tiny_flux_file, format_name, suffix):
    path = tmp_path / f"out{suffix}"
    result = convert(tiny_flux_file, path, format_name)
    with open_checkpoint(path) as reader:
        assert list(reader.tensors) == sorted(tiny_flux, key=arch.running_order)
        assert result.total.tensors == len(tiny_flux)
        assert result.total.bytes == sum(info.nbytes for info in reader.tensors.values())
        for name, info in reader.tensors.items():
            original, found = tiny_flux[name].float(), load(reader, name)
            if arch.BLOCK.match(name) and name.endswith(".weight"):
                assert info.format == expected_format(name, format_name)
            noise = (found - original).norm() / original.norm()
            assert noise <= 10 ** (-LEAST_SNR[info.format] / 20) if info.format in LEAST_SNR else noise == 0
    bulk = result.formats[BASES.get(format_name, format_name)]
    assert bulk.deviation.snr >= LEAST_SNR.get(BASES.get(format_name, format_name), float("inf"))
    assert result.file_bytes == path.stat().st_size and result.source_bytes == sum(t.nbytes for t in tiny_flux.values())


def expected_format(name: str, format_name: str) -> str:
    """Of a linear in a block: the rules of ComfyUI-GGUF, which tell from the name whether it may have more bits."""
    bulk = BASES.get(format_name, format_name)
    return QKV.get(format_name, bulk) if "attn.qkv" in name else bulk


@pytest.mark.parametrize("format_name", GGUF)
def test_gguf_library_agrees(tmp_path, tiny_flux, tiny_flux_file, format_name):
    """The layout that every reader takes, and the bytes of ggml's reference quantizer."""
    convert(tiny_flux_file, tmp_path / "out.gguf", format_name, search=False)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert reader.get_field("general.architecture").contents() == "flux"
    assert reader.get_field("general.quantization_version").contents() == 2
    assert reader.get_field("general.file_type").contents() == FILE_TYPES[format_name]
    with open_checkpoint(tmp_path / "out.gguf") as ours:
        for tensor in reader.tensors:
            module, original = tensor.name.rpartition(".")[0], tiny_flux[tensor.name].float()
            assert tuple(tensor.shape)[::-1] == original.shape
            if original.ndim == 1 or module in F32_WEIGHTS:
                expected = "f32"
            else:
                expected = "f16" if "_blocks" not in module else expected_format(tensor.name, format_name)
            assert tensor.tensor_type == TYPES[expected], tensor.name
            if BASES[format_name] in REFERENCE:
                assert same_bytes(tensor.data, gguf.quants.quantize(original.numpy(), tensor.tensor_type))
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert torch.equal(torch.tensor(values), load(ours, tensor.name))


def same_bytes(a, b) -> bool:
    return a.tobytes() == b.tobytes()


def test_fp8_as_comfyui_reads_it(tmp_path, tiny_flux, tiny_flux_file):
    convert(tiny_flux_file, tmp_path / "out.safetensors", "fp8")
    stored = load_file(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    assert metadata["modelspec.title"] == "tiny"
    marked = {name.removesuffix(".comfy_quant") for name in stored if name.endswith(".comfy_quant")}
    linears = {n.removesuffix(".weight") for n in tiny_flux if "_blocks" in n and n.endswith(".weight")}
    assert marked == set(layers) == linears and len(stored) == len(tiny_flux) + 2 * len(linears)
    for name, original in tiny_flux.items():
        module = name.removesuffix(".weight")
        if module in linears and name.endswith("weight"):
            weight, scale = stored[name], stored[f"{module}.weight_scale"]
            assert weight.dtype == torch.float8_e4m3fn and scale.shape == () and scale.dtype == torch.float32
            assert weight.float().abs().max() == 448
            torch.testing.assert_close(weight.float() * scale, original.float(), atol=scale.item() * 16.001, rtol=0)
        else:
            assert torch.equal(stored[name], original)


@pytest.mark.parametrize(
    "format_name", ["q8_0", "q4_1", "bf16", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs"]
)
def test_diffusers_reads_the_gguf(tmp_path, tiny_flux_file, format_name):
    """Its loader and its dequantizer. (The whole model from a GGUF needs FLUX.1's width there: it is hard-coded.)"""
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    path = tmp_path / "out.gguf"
    convert(tiny_flux_file, path, format_name)
    with open_checkpoint(path) as reader:
        for name, tensor in load_gguf_checkpoint(str(path)).items():
            packed = isinstance(tensor, utils.GGUFParameter)
            values = utils.dequantize_gguf_tensor(tensor) if packed else tensor
            assert packed == (reader.tensors[name].format not in ("f32", "f16"))
            torch.testing.assert_close(values.float(), load(reader, name), rtol=2e-3, atol=2e-3)


def test_row_slices_change_nothing(tmp_path, tiny_flux_file, monkeypatch):
    convert(tiny_flux_file, tmp_path / "whole.gguf", "q5_0")
    monkeypatch.setattr(quantize, "SLICE", 1000)
    convert(tiny_flux_file, tmp_path / "sliced.gguf", "q5_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "sliced.gguf").read_bytes()


def edited(tensors: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    """Some tensors replaced, or removed where None; dots are written as two underscores."""
    changed = tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def plan_for(tmp_path: Path, tensors: dict[str, Tensor], format_name: str = "q8_0", name: str = "out.gguf") -> Plan:
    save_file(tensors, tmp_path / "source.safetensors", {"modelspec.title": "tiny"})
    return make_plan(Conversion(tmp_path / "source.safetensors", tmp_path / name, format_name))


def test_values_too_large_for_float16_stay_float32(tmp_path, tiny_flux):
    weight = tiny_flux["txt_in.weight"].clone()
    weight[3, 5] = 70000
    plan = plan_for(tmp_path, edited(tiny_flux, txt_in__weight=weight))
    reasons = {row.name: (row.format, row.reason) for row in plan.rows if row.reason}
    assert reasons == {"txt_in.weight": ("f32", "values do not survive float16")}
    run(plan)
    assert load(open_checkpoint(plan.target), "txt_in.weight")[3, 5] == weight[3, 5].float()


def test_rows_that_fit_no_block_fall_back(tmp_path, tiny_flux):
    tensors = edited(tiny_flux, single_blocks__1__linear2__weight=torch.randn(256, 40))
    (row,) = (row for row in plan_for(tmp_path, tensors, "q4_0").rows if row.reason)
    assert row.format == "f16" and "multiple of 32" in row.reason and "[256, 40]" in row.reason


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(tmp_path, tiny_flux, value):
    weight = tiny_flux["double_blocks.0.img_mlp.0.weight"].clone()
    weight[0, 0] = value
    plan = plan_for(tmp_path, edited(tiny_flux, double_blocks__0__img_mlp__0__weight=weight))
    with pytest.raises(UserError, match=r"double_blocks\.0\.img_mlp\.0\.weight holds NaN or infinite"):
        run(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_incomplete_model(tmp_path, tiny_flux):
    with pytest.raises(UserError, match=r"1 tensors are missing, the first is single_blocks\.2\.linear1\.bias"):
        plan_for(tmp_path, edited(tiny_flux, single_blocks__2__linear1__bias=None))


def test_requantizing_is_allowed_and_said(tmp_path, tiny_flux, tiny_flux_file):
    convert(tiny_flux_file, tmp_path / "a.gguf", "q8_0")
    plan = make_plan(Conversion(tmp_path / "a.gguf", tmp_path / "b.gguf", "q4_0"))
    assert "quantized already (q8_0)" in plan.notes[0]
    run(plan)
    same = convert(tmp_path / "a.gguf", tmp_path / "c.gguf", "q8_0")
    assert isinf(same.total.deviation.snr)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    back = convert(tmp_path / "a.gguf", tmp_path / "d.safetensors", "bf16")
    assert set(load_file(tmp_path / "d.safetensors")) == set(tiny_flux) and back.total.bits == 16


def test_fp8_source(tmp_path, tiny_flux_file, tiny_flux):
    convert(tiny_flux_file, tmp_path / "a.safetensors", "fp8")
    convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", "q8_0")
    name = "double_blocks.1.txt_mlp.2.weight"
    weight, original = load(open_checkpoint(tmp_path / "b.gguf"), name), tiny_flux[name].float()
    assert (weight - original).norm() < 0.04 * original.norm()


def test_transformer_out_of_an_all_in_one_file(tmp_path, tiny_flux, tiny_flux_file):
    """Prefix and ComfyUI's spelling of norms go; what else is in the file is named, and left out."""
    tensors = {f"model.diffusion_model.{n.replace('_norm.scale', '_norm.weight')}": t for n, t in tiny_flux.items()}
    for name in ("encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight"):
        tensors[f"vae.{name}"] = torch.ones(4, 3, 3, 3)
    plan = plan_for(tmp_path, tensors)
    assert plan.notes == (f"{plan.source} also holds VAE: left out",)
    run(plan)
    convert(tiny_flux_file, tmp_path / "direct.gguf", "q8_0")
    assert plan.target.read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    assert open_checkpoint(plan.target).metadata["modelspec.title"] == "tiny"


def test_verification_notices_a_wrong_byte(tmp_path, tiny_flux_file, monkeypatch):
    def flipped(source, parts, shape, target, **options):
        (data, *rest), deviation = quantize.requantize(source, parts, shape, target, **options)
        calls.append(target.name)
        if len(calls) == 1:
            data = data.clone()
            data.view(torch.uint8).view(-1)[0] ^= 1
        return (data, *rest), deviation

    calls: list[str] = []
    monkeypatch.setattr(convert_module, "requantize", flipped)
    with pytest.raises(UserError, match="reads back differently"):
        convert(tiny_flux_file, tmp_path / "out.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


def test_plan_is_the_file(tmp_path, tiny_flux_file):
    """What the plan says before anything is written is what lies on the disk afterwards."""
    plan = make_plan(Conversion(tiny_flux_file, tmp_path / "out.gguf", "q5_1"))
    assert not list(tmp_path.iterdir())
    phases: list[tuple[str, int, int]] = []
    run(plan, lambda *report: phases.append(report))
    assert list(open_checkpoint(plan.target).tensors.values()) == plan.infos
    converting = [done for phase, done, _ in phases if phase == "converting"]
    assert converting == sorted(converting) and converting[-1] == phases[0][2]
    assert phases[-1][0] == "verifying" and phases[-1][1] == phases[-1][2]


@pytest.mark.parametrize(("format_name", "suffix"), RECIPES)
def test_recipes_name_formats_that_exist(format_name, suffix):
    recipe = build(format_name, "FLUX.1", suffix)
    assert {name for _, name in recipe.rows} <= {*FORMATS, "keep", "wide", "bulk"} and set(recipe.fallbacks) <= set(
        FORMATS
    )
    assert recipe.rows[-1][0] == "*" and dataclasses.is_dataclass(recipe)


def test_wrong_requests():
    for format_name, suffix, family, message in (
        ("q9", ".gguf", "FLUX.1", "unknown format q9"),
        ("q8_0", ".safetensors", "FLUX.1", "stored in a .gguf file"),
        ("fp8", ".gguf", "FLUX.1", "stored in a .safetensors file"),
        ("q8_0", ".gguf", "VAE", "not written as .gguf"),
        ("fp8", ".safetensors", "VAE", "visible noise"),
    ):
        with pytest.raises(UserError, match=message):
            build(format_name, family, suffix)


DEV = FluxConfig(64, 64, 3072, 128, 12288, 4096, 768, 19, 38, True)
DEV_BYTES = {  # data of FLUX.1 [dev] as published files in the same layout have it, counted by hand from its shapes
    "q4_0": 6_805_934_336,
    "q4_1": 7_545_573_632,
    "q5_0": 8_285_212_928,
    "q5_1": 9_024_852_224,
    "q8_0": 12_723_048_704,
}


@pytest.mark.parametrize("format_name", DEV_BYTES)
def test_bytes_at_full_size(format_name):
    with torch.device("meta"):
        state = Flux(DEV).state_dict()
    recipe = build(format_name, "FLUX.1", ".gguf", list(state))
    chosen = {name: recipe.choose(name, tuple(t.shape), "bf16", lambda: True)[0] for name, t in state.items()}
    assert sum(FORMATS[chosen[name]].nbytes(tuple(t.shape)) for name, t in state.items()) == DEV_BYTES[format_name]
