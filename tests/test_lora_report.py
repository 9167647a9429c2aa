"""What a LoRA file is said to be, and LoRAs taken from two checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_quant.cli import main
from flux_quant.converters import lora_extract
from flux_quant.converters.lora_extract import extract
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_report import check_complete, describe, precision_of
from flux_quant.converters.lora_write import Factors, kohya, peft, write_lora
from flux_quant.errors import UserError
from lora_checks import HIDDEN, State, assert_same, floats, fuse, random, shapes_of

BLOCK, SINGLE = "double_blocks.7.img_attn.qkv", "single_blocks.37.linear1"
A, B = ".lora_A.weight", ".lora_B.weight"
FAMILIES: dict[str, tuple[tuple[str, ...], str]] = {  # how a module is called -> the family's name
    "kohya": (("lora_unet_double_blocks_7_img_attn_qkv", "lora_unet_single_blocks_37_linear1"), "kohya"),
    "diffusers": (("transformer.transformer_blocks.7.attn.to_q", "transformer.norm_out.linear"), "diffusers (PEFT)"),
    "ai-toolkit": ((f"diffusion_model.{BLOCK}", f"diffusion_model.{SINGLE}"), "ai-toolkit or ComfyUI"),
    "fal": ((f"base_model.model.{BLOCK}", f"base_model.model.{SINGLE}"), "fal"),
    "XLabs": (("double_blocks.7.processor.qkv_lora1", "single_blocks.3.processor.proj_lora"), "XLabs"),
    "OneTrainer": (("lora_transformer_transformer_blocks_7_attn_to_q", "lora_transformer_proj_out"), "OneTrainer"),
    "OneTrainer's slices": ((f"transformer.{BLOCK}.0", f"transformer.{SINGLE}.3"), "OneTrainer"),
    "SimpleTuner": (("lycoris_transformer_blocks_7_attn_to_q", "lycoris_x_embedder"), "LyCORIS (SimpleTuner)"),
    "DiffSynth": (
        ("transformer_blocks.7.attn.to_q", "single_transformer_blocks.3.proj_mlp"),
        "diffusers names (DiffSynth)",
    ),
}


def ends(name: str) -> tuple[str, str]:
    return (".down.weight", ".up.weight") if "processor" in name else (A, B)


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize("case", FAMILIES)
def test_families(tmp_path, case):
    modules, family = FAMILIES[case]
    tensors = {}
    for rank, name in zip((4, 16), modules, strict=True):
        down, up = ends(name)
        tensors |= {name + down: torch.ones(rank, 8), name + up: torch.ones(8, rank)}
    report = describe(saved(tmp_path / "x.safetensors", tensors))
    assert (report.family, report.kinds, report.ranks) == (family, {"LoRA": 2}, (4, 16))
    assert report.modules == {"transformer": 2} and not (report.unmatched or report.partial or report.colliding)
    assert report.precision is None


def test_kinds_components_and_complaints(tmp_path):
    pair = {A: torch.ones(2, 8), B: torch.ones(8, 2)}
    tensors = {f"diffusion_model.{BLOCK}{end}": tensor for end, tensor in pair.items()}
    tensors |= {f"transformer.{BLOCK}.lora_down.weight": torch.ones(2, 8)}  # the same once more
    tensors |= {f"diffusion_model.{SINGLE}.lokr_{part}": torch.ones(2, 2) for part in ("w1", "w2_a")}
    tensors |= {f"diffusion_model.{SINGLE}.dora_scale": torch.ones(8), "bundle_emb.x.string": torch.ones(2)}
    tensors |= {"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff_b": torch.ones(4)}
    tensors |= {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.hada_w1_a": torch.ones(4, 2)}
    path = saved(tmp_path / "x.safetensors", tensors, {"ss_fp8_base": "True", "ss_mixed_precision": "bf16"})
    report = describe(path)
    assert report.kinds == {"LoRA": 1, "LoKr": 1, "DoRA": 1, "LoHa": 1}
    assert report.modules == {"transformer": 2, "clip_l": 1, "t5": 1}
    assert report.unmatched == ("bundle_emb.x.string",)
    assert set(report.partial) == {
        f"diffusion_model.{SINGLE}.lokr_w2_a",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.hada_w1_a",
    }
    assert [set(pair) for pair in report.colliding] == [
        {f"diffusion_model.{BLOCK}{A}", f"transformer.{BLOCK}.lora_down.weight"}
    ]
    assert report.precision == "fp8_base=True, mixed_precision=bf16"
    assert dict(report.lines())["unmatched keys"] == "1, bundle_emb.x.string among them"


def test_training_precision():
    toolkit = {"software": '{"name": "ai-toolkit"}', "training_info": '{"quantize": true}'}
    assert precision_of(toolkit) == "quantize=True, by ai-toolkit"
    assert precision_of({"software": "{", "ss_full_bf16": "False"}) is None
    assert precision_of({"training_info": "[]", "software": "3"}) is None


def test_what_is_no_lora(tmp_path, tiny_flux_file):
    assert describe(tiny_flux_file) is None
    path = saved(tmp_path / "x.safetensors", {"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)})
    assert describe(path) is None


def test_command_line(tmp_path, capsys):
    tensors = {f"diffusion_model.{BLOCK}{A}": torch.ones(2, 8), f"diffusion_model.{BLOCK}{B}": torch.ones(8, 2)}
    path = saved(tmp_path / "x.safetensors", tensors | {"strange": torch.ones(1)})
    for verb in (["inspect"], ["lora", "info"]):
        assert main([*verb, str(path)]) == 0
        out = capsys.readouterr().out
        assert "ai-toolkit or ComfyUI" in out and "1, strange among them" in out
        assert main([*verb, str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["lora"] if verb == ["inspect"] else found)["unmatched"] == ["strange"]
    assert main(["lora", "info", str(saved(tmp_path / "y.safetensors", {"strange": torch.ones(1)}))]) == 2
    assert "is no LoRA for FLUX.1" in capsys.readouterr().err


# --- Files that are written -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_flux) -> State:
    return floats(tiny_flux)


def tuned(model: State, rank: int = 3, seed: int = 0) -> tuple[State, dict[str, Factors]]:
    """Every matrix changed by so many ranks, and one bias and one norm."""
    changes = {}
    for i, (name, weight) in enumerate(model.items()):
        if weight.ndim == 2:
            down, up = random(rank, weight.shape[1], seed=seed + i), random(weight.shape[0], rank, seed=seed - i)
            changes[name.removesuffix(".weight")] = Factors(down, up)
    return {**model, **{f"{m}.weight": model[f"{m}.weight"] + up @ down for m, (down, up) in changes.items()}}, changes


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
def test_written_files_are_read_back(model, tmp_path, naming):
    """Modulation with exchanged halves, fused modules, everything outside of blocks."""
    after, changes = tuned(model)
    tensors = kohya(changes, {}) if naming == "kohya" else peft(changes, HIDDEN)
    write_lora(tmp_path / "x.safetensors", tensors, "f32", {"note": "x"})
    lora = read_lora(tmp_path / "x.safetensors", shapes_of(model))
    assert not lora.unused and lora.metadata["note"] == "x"
    assert_same(fuse(model, (lora, 1.0)), after)
    with pytest.raises(UserError, match="written as .safetensors"):
        write_lora(tmp_path / "x.pt", tensors, "f32", {})


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("exact", [True, False])
def test_extraction_finds_the_change(model, tmp_path, naming, exact, monkeypatch):
    if not exact:
        monkeypatch.setattr(lora_extract, "EXACT", 0)
    after, _ = tuned(model)
    norm, bias = "double_blocks.0.img_attn.norm.key_norm.scale", "img_in.bias"
    after |= {norm: after[norm] + 0.5, bias: after[bias] + 0.25}
    paths = [saved(tmp_path / f"{name}.safetensors", state) for name, state in (("a", model), ("b", after))]
    found = extract(*paths, tmp_path / "x.safetensors", 4, naming, "f32")
    assert len(found.layers) == sum(tensor.ndim == 2 for tensor in model.values())
    assert max(layer.error for layer in found.layers) < 1e-4 and found.error < 1e-4
    lora = read_lora(tmp_path / "x.safetensors", shapes_of(model))
    if naming == "diffusers":
        assert set(found.left_out) == {norm, bias} and not found.extras
        after |= {name: model[name] for name in (norm, bias)}
    else:
        assert set(found.extras) == {norm, bias}
    fused = fuse(model, (lora, 1.0))
    for name in after:
        assert (fused[name] - after[name]).norm() <= 1e-4 * after[name].norm(), name
    lower = extract(*paths, tmp_path / "x.safetensors", 1, naming, force=True)
    assert 0.3 < lower.error < 1 and all(layer.rank == 1 for layer in lower.layers)
    assert load_file(tmp_path / "x.safetensors")[next(iter(load_file(tmp_path / "x.safetensors")))].dtype in (
        torch.bfloat16,
        torch.float32,
    )


def test_extraction_is_the_best_of_its_rank(model, tmp_path):
    """Eckart and Young: what is missing are the other singular values."""
    change = random(60, 40)
    s = torch.linalg.svdvals(change)
    down, up = lora_extract.truncated(change, 7)
    assert abs(float((change - up @ down).norm()) - float(s[7:].norm())) < 1e-4
    assert lora_extract.truncated(change, 100).down.shape == (40, 40)


def test_extraction_from_the_command_line(model, tmp_path, capsys):
    after, _ = tuned(model)
    a, b = (saved(tmp_path / f"{name}.safetensors", state) for name, state in (("a", model), ("b", after)))
    target = tmp_path / "x.safetensors"
    assert main(["lora", "extract", str(a), str(b), "-o", str(target), "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert "double_blocks.1.img_mlp.0" in out and "of the change is missing" in out
    for arguments, message in {
        (a, a, "y"): "hold the same weights",
        (a, b, "x"): "x.safetensors",
        (a, target, "y"): "x.safetensors",
    }.items():
        one, two, name = arguments
        assert main(["lora", "extract", str(one), str(two), "-o", str(tmp_path / f"{name}.safetensors")]) == 2
        assert message in capsys.readouterr().err
    other = saved(tmp_path / "c.safetensors", {**model, "img_in.weight": torch.ones(HIDDEN, 128)})
    assert main(["lora", "extract", str(a), str(other), "-o", str(tmp_path / "y.safetensors")]) == 2
    assert "img_in.weight is [256, 64] and [256, 128]" in capsys.readouterr().err


# --- Files that cannot be right ---------------------------------------------------------------------------------------


def test_halves_are_named(model, tmp_path):
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    good = {f"{name}{A}": torch.ones(2, HIDDEN), f"{name}{B}": torch.ones(HIDDEN, 2)}
    for missing in (A, B):
        other = "diffusion_model.double_blocks.1.img_attn.proj"
        tensors = good | {f"{other}{end}": good[f"{name}{end}"] for end in (A, B) if end != missing}
        lora = read_lora(saved(tmp_path / "x.safetensors", tensors), shapes_of(model))
        with pytest.raises(UserError, match=rf"x.safetensors: {other}\S+ has no other half"):
            check_complete(lora)
    unknown = {f"elsewhere{A}": torch.ones(1), f"elsewhere{B}": torch.ones(1)}
    lora = read_lora(saved(tmp_path / "x.safetensors", good | unknown), shapes_of(model))
    check_complete(lora)  # complete, but unknown: reported, no error
    assert len(lora.unused) == 2
