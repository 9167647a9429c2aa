"""FP8 in all conventions found in the wild: read by value, or refused with a reason. Never read unscaled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import components, open_component
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.summary import summarize
from flux_quant.errors import UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(8, 12, generator=GENERATOR)
ROWS = torch.rand(8, generator=GENERATOR) + 0.5
GRID = torch.rand(4, 3, generator=GENERATOR) + 0.5  # blocks of 2 x 4
PER_ROW_BLOCKS = torch.rand(8, 3, 1, generator=GENERATOR) + 0.5
ONE = torch.tensor(0.25)


def marker(**content: object) -> Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def stored(scale: Tensor | None, name: str = "weight_scale", dtype: torch.dtype = E4M3, **others: Tensor) -> dict:
    tensors = {"m.weight": VALUES.to(dtype)} | {f"m.{key}": value for key, value in others.items()}
    return tensors if scale is None else tensors | {f"m.{name}": scale}


LEGACY = {"scaled_fp8": torch.empty(0, dtype=E4M3)}
DATA, DATA5 = VALUES.to(E4M3).float(), VALUES.to(E5M2).float()
BY_GRID = DATA * GRID.repeat_interleave(2, 0).repeat_interleave(4, 1)
BY_ROW_BLOCKS = (DATA.view(8, 3, 4) * PER_ROW_BLOCKS).view(8, 12)  # as kohya's fp8_optimization_utils
CONVENTIONS = {  # id -> (stored tensors, format that is shown, name of the stored form, values)
    "A plain e4m3": (stored(None), "fp8_plain", "fp8_plain", DATA),
    "A plain e5m2": (stored(None, dtype=E5M2), "f16", "fp8_e5m2", DATA5),
    "B legacy": (stored(ONE, "scale_weight") | LEGACY, "fp8", "fp8", DATA / 4),
    "B marker of another type": (
        stored(ONE, "scale_weight") | {"scaled_fp8": torch.zeros(2, dtype=E5M2)}, "fp8", "fp8", DATA / 4,
    ),
    "B e5m2": (
        stored(ONE, "scale_weight", E5M2) | {"scaled_fp8": torch.empty(0, dtype=E5M2)}, "f32", "fp8_e5m2 scaled",
        DATA5 / 4,
    ),
    "B a layer without a scale": (stored(None) | LEGACY, "fp8_plain", "fp8_plain", DATA),
    "C marked": (stored(ONE, comfy_quant=marker(format="float8_e4m3fn")), "fp8", "fp8", DATA / 4),
    "C e5m2": (
        stored(ONE, dtype=E5M2, comfy_quant=marker(format="float8_e5m2", full_precision_matrix_mult=True)),
        "f32", "fp8_e5m2 scaled", DATA5 / 4,
    ),
    "C' per row": (
        stored(ROWS, comfy_quant=marker(format="float8_e4m3fn_rowwise")), "f32", "fp8 per row", DATA * ROWS[:, None],
    ),
    "C' per block": (
        stored(GRID, comfy_quant=marker(format="float8_e4m3fn_blockwise", group_size=4)),
        "f32", "fp8 per block", BY_GRID,
    ),
    "F ModelOpt": (stored(ONE, input_scale=ONE), "fp8", "fp8", DATA / 4),
    "F its name for it": (stored(ONE, comfy_quant=marker(format="fp8")), "fp8", "fp8", DATA / 4),
    "F per row": (stored(ROWS[:, None]), "f32", "fp8 per row", DATA * ROWS[:, None]),
    "H one": (stored(ONE.view(1), "scale_weight"), "fp8", "fp8", DATA / 4),
    "H per row": (stored(ROWS[:, None], "scale_weight"), "f32", "fp8 per row", DATA * ROWS[:, None]),
    "H per block": (stored(PER_ROW_BLOCKS, "scale_weight"), "f32", "fp8 per block", BY_ROW_BLOCKS),
    "scale in bfloat16": (stored(ONE.bfloat16()), "fp8", "fp8", DATA / 4),
    "no rows": ({"m.weight": torch.empty(0, 12).to(E4M3), "m.weight_scale": ROWS}, "f32", "fp8 per block", DATA[:0]),
    "a norm's scale": ({"m.scale": VALUES[0], "m.weight": VALUES.to(E4M3)}, "fp8_plain", "fp8_plain", DATA),
}  # fmt: skip


def written(folder: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "x.safetensors", metadata or None)
    return folder / "x.safetensors"


@pytest.mark.parametrize(("tensors", "shown", "kind", "expected"), CONVENTIONS.values(), ids=CONVENTIONS)
def test_conventions(tmp_path, tensors, shown, kind, expected):
    with open_checkpoint(written(tmp_path, tensors)) as reader:
        assert set(reader.tensors) - {"m.scale"} == {"m.weight"} and not reader.foreign
        assert reader.tensors["m.weight"] == TensorInfo("m.weight", tuple(expected.shape), shown)
        assert reader.stored_as("m.weight") == kind
        assert torch.equal(load(reader, "m.weight"), expected)
        scale = sum(t.nbytes for name, t in tensors.items() if name in ("m.weight_scale", "m.scale_weight"))
        assert reader.nbytes("m.weight") == expected.numel() + scale
    assert kind in summarize(tmp_path / "x.safetensors").formats


REFUSED = {
    "D torchao": ({"m._weight_qdata": DATA.to(E4M3), "m._weight_scale": ONE}, "quantized by torchao: m._weight_qdata"),
    "E quanto": ({"m.weight._data": DATA.to(E4M3), "m.weight._scale": ROWS}, "quantized by quanto"),
    "G flux-fp8-api": (
        {"m.float8_data": DATA.to(E4M3), "m.weight": torch.zeros(1), "m.scale": ONE, "m.scale_reciprocal": 1 / ONE},
        r"flux-fp8-api \(its scales are inverse\).*convert the original file instead",
    ),
    "J NF4": (
        {"m.weight": torch.zeros(48, 1, dtype=torch.uint8), "m.weight.quant_state.bitsandbytes__nf4": marker(a=1)},
        "bitsandbytes NF4",
    ),
    "a format of the future": (stored(ONE, comfy_quant=marker(format="mxfp8")), "quantized as mxfp8"),
    "marked as what it is not": (stored(ONE, comfy_quant=marker(format="float8_e5m2")), "stored as"),
    "marked, no scale": (stored(None, comfy_quant=marker(format="float8_e4m3fn")), "has no scale"),
    "scale without weight": ({"m.scale_weight": ONE}, "m.weight is missing"),
    "scale of a float": ({"m.weight": VALUES, "m.weight_scale": ONE}, "is float32 where FP8 was expected"),
    "integer scale": (stored(torch.ones(1, dtype=torch.int32)), "no scale that is known"),
    "two scales": (stored(ONE, scale_weight=ONE.clone()), "two scales"),
    "scales that do not fit": (stored(ROWS[:5]), "does not divide"),
    "no scales at all": (stored(torch.empty(0)), "does not divide"),
    "columns that do not fit": (stored(torch.ones(8, 5)), "does not divide"),
    "input scale of no weight": ({"m.input_scale": ONE}, "its weight is not"),
    "many input scales": (stored(ONE, input_scale=ROWS), "is not one number"),
    "marker that is no JSON": (
        stored(ONE, comfy_quant=marker(format="x")[:5]),
        "marker of quantized layers is damaged",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message) as error:
        open_checkpoint(written(tmp_path, tensors))
    assert "\n" not in str(error.value)


HEADERS = {
    "of a layer that is not there": ('{"layers": {"n": {"format": "float8_e4m3fn"}}}', "n.weight is marked"),
    "not JSON": ("{", "is damaged"),
    "no layers": ("{}", "is damaged"),
    "a list": ("[]", "is damaged"),
    "a layer that is a number": ('{"layers": {"m": 1}}', "is damaged"),
    "nested too deep": ("[" * 100_000, "is damaged"),
}


@pytest.mark.parametrize(("header", "message"), HEADERS.values(), ids=HEADERS)
def test_header_markers(tmp_path, header, message):
    with pytest.raises(UserError, match=message):
        open_checkpoint(written(tmp_path, stored(ONE), _quantization_metadata=header))


def test_scales_of_activations(tmp_path):
    """By the name of the weight; ComfyUI's rule drops a legacy scale of exactly 1."""
    tensors = {}
    for name, kind, scale in (("a", "input_scale", 0.5), ("b", "scale_input", 0.125), ("c", "scale_input", 1.0)):
        suffix = "weight_scale" if kind == "input_scale" else "scale_weight"
        tensors |= {f"{name}.weight": DATA.to(E4M3), f"{name}.{suffix}": ONE.clone()}
        tensors[f"{name}.{kind}"] = torch.tensor(scale)
    with open_checkpoint(written(tmp_path, tensors)) as reader:
        assert reader.input_scales == {"a.weight": 0.5, "b.weight": 0.125}


def test_components_pass_them_on(tmp_path):
    """In diffusers names the largest of q, k, v; with equal weight scales the joined weight stays FP8."""
    tensors = {}
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        module = f"transformer_blocks.0.attn.{name}"
        tensors |= {f"{module}.weight": (DATA + i).to(E4M3), f"{module}.weight_scale": ONE.clone()}
        tensors[f"{module}.input_scale"] = torch.tensor(0.5 + i)
    tensors |= {"transformer_blocks.0.attn.add_q_proj.weight": DATA, "x_embedder.weight": torch.ones(8, 64)}
    tensors |= {f"transformer_blocks.0.attn.add_{c}_proj.weight": DATA.clone() for c in "kv"}
    tensors["time_text_embed.text_embedder.linear_1.weight"] = torch.ones(8, 8)
    with open_component(written(tmp_path, tensors), "FLUX.1") as reader:
        name = "double_blocks.0.img_attn.qkv.weight"
        assert reader.input_scales == {name: 2.5} and reader.quantized == {"fp8"}
        assert reader.tensors[name] == TensorInfo(name, (24, 12), "fp8") and reader.read(name)[1] == 0.25
        expected = torch.cat([(DATA + i).to(E4M3).float() for i in range(3)]) / 4
        assert torch.equal(load(reader, name), expected)


def test_an_all_in_one_file_of_two_conventions(tmp_path, tiny_flux):
    """Scaled transformer, VAE as it is, a legacy marker at the root of the transformer."""
    prefix = "model.diffusion_model."
    tensors = {prefix + name: tensor for name, tensor in tiny_flux.items()}
    name = prefix + "double_blocks.0.img_mlp.0"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(E4M3)
    tensors |= {f"{name}.scale_weight": ONE, f"{prefix}scaled_fp8": torch.empty(0, dtype=E4M3)}
    with open_checkpoint(written(tmp_path, tensors)) as reader:
        (component,) = components(reader)
        assert component.tensors.keys() == tiny_flux.keys() and not component.ignored
        assert component.quantized == {"fp8"} and component.stored_as("img_in.weight") == "bf16"
