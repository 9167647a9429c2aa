"""Conversion beyond a plain FLUX.1 file: other models, several files, folders, own rows, LoRAs, interruptions."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_quant.components import BUNDLED, find_components
from flux_quant.converters import shards
from flux_quant.converters.bundle import merge
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import components, open_component
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import Result, run
from flux_quant.converters.imatrix import write_imatrix
from flux_quant.converters.plan import make_plan
from flux_quant.converters.recipe import build, parse_row, read_rows
from flux_quant.converters.shards import Sharding
from flux_quant.converters.verify import verify
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.loading import load_t5

PARTS = find_components(BUNDLED)


def convert(source: Path, target: Path, format_name: str, **options: object) -> Result:
    return run(make_plan(Conversion(source, target, format_name, **options)))


def formats(path: Path) -> dict[str, str]:
    return {name: info.format for name, info in open_checkpoint(path).tensors.items()}


# --- T5 and SDXL ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_t5_as_gguf(tmp_path):
    """Names, types and vocabulary as llama.cpp has them, and the engine's encoder runs on it."""
    result = convert(PARTS.t5, tmp_path / "t5.gguf", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "t5.gguf")
    assert reader.get_field("general.architecture").contents() == "t5encoder"
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == reader.tensors[0].shape[1]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert (
        kinds["token_embd.weight"] == kinds["enc.blk.1.attn_v.weight"] == kinds["enc.blk.0.ffn_down.weight"] == "Q8_0"
    )
    assert kinds["enc.blk.0.attn_rel_b.weight"] == kinds["enc.output_norm.weight"] == "F32"
    assert len(kinds) == result.total.tensors
    ids = torch.tensor([[5, 9, 300, 1]])
    ours, original = (load_t5(path)(ids).last_hidden_state for path in (tmp_path / "t5.gguf", PARTS.t5))
    assert (ours - original).norm() < 0.02 * original.norm()


T5_BYTES = {  # of T5-XXL's encoder as llama.cpp's files have it, with the relative bias in float32
    "f16": 9_525_022_720,
    "q8_0": 5_060_546_560,
    "q6_k": 3_907_223_552,
    "q5_k_m": 3_385_819_136,
    "q5_k_s": 3_292_233_728,
    "q4_k_m": 2_895_085_568,
    "q4_k_s": 2_737_537_024,
}
FLUX_BYTES = {  # of FLUX.1 [dev] in ComfyUI-GGUF's recipes, embedders in float32 and float16
    "q2_k": 4_032_286_976,
    "q3_k_s": 5_234_200_832,
    "q3_k_m": 5_377_085_696,
    "q4_k_s": 6_805_934_336,
    "iq4_nl": 6_805_934_336,
    "q4_k_m": 6_940_414_208,
    "q5_k_s": 8_285_212_928,
    "q5_k_m": 8_428_097_792,
    "q6_k": 9_856_946_432,
}


def t5_xxl() -> dict[str, tuple[int, ...]]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    config.feed_forward_proj, config.is_gated_act, config.dense_act_fn = "gated-gelu", True, "gelu_new"
    with torch.device("meta"):
        names = T5EncoderModel(config).state_dict()
    return {name: tuple(t.shape) for name, t in names.items() if name != "encoder.embed_tokens.weight"}


def flux_dev() -> dict[str, tuple[int, ...]]:
    from flux_quant.arch import FluxConfig
    from flux_quant.model import Flux

    with torch.device("meta"):
        names = Flux(FluxConfig(64, 64, 3072, 128, 12288, 4096, 768, 19, 38, True)).state_dict()
    return {name: tuple(t.shape) for name, t in names.items()}


@pytest.mark.parametrize(
    ("family", "shapes", "sizes"),
    [("T5 encoder", t5_xxl, T5_BYTES), ("FLUX.1", flux_dev, FLUX_BYTES)],
    ids=["T5-XXL", "FLUX.1 dev"],
)
def test_bytes_at_full_size(family, shapes, sizes):
    named = shapes()
    for mix, nbytes in sizes.items():
        recipe = build(mix, family, ".gguf", list(named))
        chosen = {name: recipe.choose(name, shape, "bf16", lambda: True)[0] for name, shape in named.items()}
        found = sum(FORMATS[chosen[name]].nbytes(shape) for name, shape in named.items())
        assert found - nbytes == (4096 if family == "T5 encoder" else 0), mix


def test_sdxl_as_gguf(tmp_path):
    """Narrow rows are rewritten as ComfyUI-GGUF's converter does, and read back in their own shape."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (320,),
        "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
        "input_blocks.4.1.transformer_blocks.0.attn1.to_v.weight": (640, 640),
        "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (640, 640),
        "input_blocks.4.1.transformer_blocks.0.ff.net.2.weight": (640, 2560),
        "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.6.0.op.weight": (640, 640, 3, 3),
        "time_embed.0.weight": (1280, 320),
        "label_emb.0.0.weight": (1280, 2816),
        "out.2.weight": (4, 320, 3, 3),
        "middle_block.1.transformer_blocks.0.attn1.to_q.weight": (1280, 1280),
    }
    tensors = {name: torch.randn(shape, generator=generator).half() / 30 for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "unet.safetensors")
    convert(tmp_path / "unet.safetensors", tmp_path / "unet.gguf", "q4_k_m")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "unet.gguf").tensors}
    assert kinds["input_blocks.1.0.in_layers.0.weight"] == "F32"
    for name in ("input_blocks.0.0.weight", "time_embed.0.weight", "label_emb.0.0.weight", "out.2.weight"):
        assert kinds[name] == "F16"
    assert (
        kinds["input_blocks.1.0.in_layers.2.weight"] == kinds["middle_block.1.transformer_blocks.0.attn1.to_q.weight"]
    )
    assert kinds["input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"] == "Q4_K"
    assert kinds["input_blocks.4.1.transformer_blocks.0.attn1.to_v.weight"] == "Q6_K"
    assert kinds["input_blocks.4.1.transformer_blocks.0.ff.net.2.weight"] == "Q6_K"
    with open_checkpoint(tmp_path / "unet.gguf") as reader:
        for name, tensor in tensors.items():
            found = load(reader, name)
            assert found.shape == tensor.shape and (found - tensor).norm() < 0.09 * tensor.norm(), name


# --- Several files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharding", [Sharding(2_000_000), Sharding(by_block=True)], ids=["size", "block"])
@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_several_files(tmp_path, tiny_flux_file, sharding, suffix):
    format_name = "q4_k_s" if suffix == ".gguf" else "fp8"
    convert(tiny_flux_file, tmp_path / f"whole{suffix}", format_name)
    result = convert(tiny_flux_file, tmp_path / f"part{suffix}", format_name, sharding=sharding)
    names = sorted(path.name for path in tmp_path.glob("part*"))
    parts = [f"part-{i + 1:05}-of-{result.files:05}{suffix}" for i in range(result.files)]
    assert names == parts + (["part.safetensors.index.json"] if suffix == ".safetensors" else []) and result.files > 2
    if sharding.nbytes:
        assert all((tmp_path / part).stat().st_size < sharding.nbytes + 20_000 for part in parts)
    whole, joined = open_checkpoint(tmp_path / f"whole{suffix}"), open_checkpoint(tmp_path / parts[0])
    assert set(whole.tensors) == set(joined.tensors)
    for name in whole.tensors:
        assert torch.equal(load(whole, name), load(joined, name))
    if suffix == ".gguf":
        first, last = gguf.GGUFReader(tmp_path / parts[0]), gguf.GGUFReader(tmp_path / parts[-1])
        assert first.get_field("general.architecture") and not last.get_field("general.architecture")
        assert last.get_field("split.no").contents() == result.files - 1
        assert first.get_field("split.tensors.count").contents() == len(whole.tensors)


@pytest.mark.parametrize("format_name", ["bf16", "fp8_plain"])
def test_a_folder_that_diffusers_reads(tmp_path, tiny_flux, tiny_flux_file, format_name):
    """Split rows, exchanged halves, shards, config: every value is that of the single file."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path / "transformer"
    convert(tiny_flux_file, folder, format_name, folder=True, sharding=Sharding(3_000_000))
    assert len(list(folder.glob("*.safetensors"))) > 2
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32)
    expected = {name: t.shape for name, t in model.state_dict().items()}
    assert len(expected) == len({**open_checkpoint(folder).tensors})
    single = tmp_path / "single.safetensors"
    convert(tiny_flux_file, single, format_name)
    ours, other = open_component(folder, "FLUX.1"), open_component(single, "FLUX.1")
    assert set(ours.tensors) == set(tiny_flux)
    for name in ours.tensors:
        assert torch.equal(load(ours, name), load(other, name)), name
    swapped = model.norm_out.linear.weight
    assert torch.equal(torch.cat(swapped.chunk(2)[::-1]), load(ours, "final_layer.adaLN_modulation.1.weight"))
    with pytest.raises(UserError, match="use --format fp8_plain"):
        make_plan(Conversion(tiny_flux_file, tmp_path / "other", "fp8", folder=True))
    with pytest.raises(UserError, match="exists and is not empty"):
        make_plan(Conversion(tiny_flux_file, folder, "bf16", folder=True))


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GB", 2 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 << 29), ("4096", 4096)]
)
def test_sizes(text, nbytes):
    assert shards.parse_size(text) == nbytes
    for wrong in ("GB", "-1GB", "2TBX", "0"):
        with pytest.raises(UserError, match="size"):
            shards.parse_size(wrong)


# --- What goes into the weights ---------------------------------------------------------------------------------------


def test_own_rows(tmp_path, tiny_flux_file):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("# precise ends\nsingle_blocks.2.* = q8_0  # the last block\n\nimg_in.weight=f16\n")
    rows = (parse_row("double_blocks.*_mod.*=Q5_K_S"), ("single_blocks.0.linear2.weight", "keep"), *read_rows(recipe))
    convert(tiny_flux_file, tmp_path / "out.gguf", "q4_k_s", own_rows=rows)
    found = formats(tmp_path / "out.gguf")
    assert found["double_blocks.1.img_mod.lin.weight"] == "q5_k" and found["double_blocks.1.img_mod.lin.bias"] == "f32"
    assert found["single_blocks.0.linear2.weight"] == "bf16" and found["single_blocks.0.linear1.weight"] == "q4_k"
    assert found["single_blocks.2.linear1.weight"] == "q8_0" and found["img_in.weight"] == "f16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("double_blocks.*", "should be GLOB=FORMAT"),
        ("a=q9", "unknown format q9"),
        ("=q8_0", "should be GLOB=FORMAT"),
    ],
)
def test_wrong_rows(tmp_path, tiny_flux_file, text, message):
    with pytest.raises(UserError, match=message):
        parse_row(text)
    (tmp_path / "recipe.txt").write_text(f"# comment\n{text}\n")
    with pytest.raises(UserError, match=f"recipe.txt, line 2: .*{message}"):
        read_rows(tmp_path / "recipe.txt")
    with pytest.raises(UserError, match="no tensor matches triple_blocks"):
        make_plan(Conversion(tiny_flux_file, tmp_path / "x.gguf", "q8_0", own_rows=(("triple_blocks.*", "q4_0"),)))


def test_lora_is_fused_before_quantizing(tmp_path, tiny_flux, tiny_flux_file):
    name = "double_blocks.1.img_attn.qkv"
    generator = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=generator) / 16 for shape in ((4, 256), (768, 4)))
    key = f"lora_unet_{name.replace('.', '_')}"
    lora = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(2.0)}
    lora["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(4, 768)
    lora["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.ones(3072, 4)
    save_file(lora, tmp_path / "lora.safetensors")
    asked = Conversion(tiny_flux_file, tmp_path / "x.gguf", "q8_0", loras=((tmp_path / "lora.safetensors", 1.0),))
    assert "2 keys of" in make_plan(asked).notes[0] and "lora_te1_text_model" in make_plan(asked).notes[0]
    convert(tiny_flux_file, tmp_path / "out.gguf", "q8_0", loras=((tmp_path / "lora.safetensors", 0.5),))
    fused = tiny_flux | {f"{name}.weight": tiny_flux[f"{name}.weight"].float() + 0.5 * 2 / 4 * (up @ down)}
    save_file(fused, tmp_path / "fused.safetensors")
    convert(tmp_path / "fused.safetensors", tmp_path / "expected.gguf", "q8_0")
    ours, expected = open_checkpoint(tmp_path / "out.gguf"), open_checkpoint(tmp_path / "expected.gguf")
    assert ours.metadata["flux_quant.loras"] == "lora.safetensors:0.5"
    for key in ours.tensors:
        assert torch.equal(load(ours, key), load(expected, key)), key
    changed = load(ours, f"{name}.weight") - tiny_flux[f"{name}.weight"].float()
    assert changed.norm() > 0.1 * (0.25 * (up @ down)).norm()
    convert(tiny_flux_file, tmp_path / "packed.gguf", "q4_0")
    again = Conversion(tmp_path / "packed.gguf", tmp_path / "x.gguf", "q4_0", loras=asked.loras)
    (note,) = [note for note in make_plan(again).notes if "a LoRA is fused" in note]
    assert "into 1 weights that are quantized already; of a change by 2% about 5% survives in q4_0" in note
    assert not [note for note in make_plan(asked).notes if "a LoRA is fused" in note]


def test_imatrix_spends_precision_where_it_counts(tmp_path, tiny_flux, tiny_flux_file):
    name = "single_blocks.0.linear1.weight"
    importance = torch.ones(256)
    importance[:16] = 1000.0
    write_imatrix(tmp_path / "im.safetensors", {name: importance}, {"count": "1"})
    plan = make_plan(Conversion(tiny_flux_file, tmp_path / "a.gguf", "q4_k_s", imatrix=tmp_path / "im.safetensors"))
    assert "are not in the imatrix" in plan.notes[0]
    run(plan)
    convert(tiny_flux_file, tmp_path / "b.gguf", "q4_k_s")

    def error(path: Path) -> float:
        difference = load(open_checkpoint(path), name) - tiny_flux[name].float()
        return (difference.square() * importance).sum().item()

    assert error(tmp_path / "a.gguf") < 0.8 * error(tmp_path / "b.gguf")
    write_imatrix(tmp_path / "wrong.safetensors", {name: torch.ones(100)}, {"count": "1"})
    with pytest.raises(UserError, match="256"):
        make_plan(Conversion(tiny_flux_file, tmp_path / "c.gguf", "q4_k_s", imatrix=tmp_path / "wrong.safetensors"))


def test_legacy_fp8_and_scales_of_activations(tmp_path, tiny_flux_file):
    """Forge's form; activation scales of a source stay, in both forms."""
    convert(tiny_flux_file, tmp_path / "new.safetensors", "fp8")
    convert(tiny_flux_file, tmp_path / "old.safetensors", "fp8", legacy_fp8=True)
    new, old = load_file(tmp_path / "new.safetensors"), load_file(tmp_path / "old.safetensors")
    assert old["scaled_fp8"].shape == (2,) and old["scaled_fp8"].dtype == torch.float8_e4m3fn
    modules = [name.removesuffix(".scale_weight") for name in old if name.endswith(".scale_weight")]
    assert modules and not any("comfy_quant" in name or name.endswith("weight_scale") for name in old)
    for module in modules:
        assert old[f"{module}.scale_weight"] == new[f"{module}.weight_scale"]
        assert torch.equal(old[f"{module}.weight"].float(), new[f"{module}.weight"].float())
        new[f"{module}.input_scale"] = torch.tensor(0.25)
    save_file(new, tmp_path / "calibrated.safetensors")
    convert(tmp_path / "calibrated.safetensors", tmp_path / "again.safetensors", "fp8")
    convert(tmp_path / "calibrated.safetensors", tmp_path / "legacy.safetensors", "fp8", legacy_fp8=True)
    again, legacy = load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "legacy.safetensors")
    assert all(again[f"{m}.input_scale"] == legacy[f"{m}.scale_input"] == 0.25 for m in modules)
    assert legacy["scaled_fp8"].shape == (0,)
    for path in ("old", "again", "legacy"):
        a, b = (open_component(tmp_path / f"{n}.safetensors", "FLUX.1") for n in (path, "new"))
        assert a.tensors == b.tensors and all(torch.equal(load(a, n), load(b, n)) for n in a.tensors)


def test_a_component_of_several(tmp_path):
    folder = Path(PARTS.transformer).parents[1]
    merged = tmp_path / "all.safetensors"
    merge([PARTS.transformer, PARTS.t5, PARTS.vae], merged, force=False)
    assert make_plan(Conversion(merged, tmp_path / "a.gguf", "q8_0")).rows[0].component.family.name == "FLUX.1"
    convert(merged, tmp_path / "t5.gguf", "q6_k", components=("t5",), tokenizer=folder / "tokenizers/t5/spiece.model")
    (found,) = components(open_checkpoint(tmp_path / "t5.gguf"))
    assert found.family.name == "T5 encoder"
    with pytest.raises(UserError, match="holds no clip; it is"):
        make_plan(Conversion(merged, tmp_path / "c.gguf", "q8_0", components=("clip",)))


def test_all_in_one_to_all_in_one(tmp_path):
    """Transformer and T5 get the format, the rest stays; checksums of the source do not travel."""
    merged, target = tmp_path / "all.safetensors", tmp_path / "fp8.safetensors"
    merge([PARTS.transformer, PARTS.t5, PARTS.clip, PARTS.vae], merged, force=False)
    convert(merged, merged, "keep", components=("transformer", "t5", "clip", "vae"), force=True, checksums=True)
    result = convert(merged, target, "fp8", components=("vae", "transformer", "clip", "t5"))
    assert "flux_quant.sha256" not in open_checkpoint(target).metadata and not verify(target, merged).problems
    by_family = {c.family.name: {i.format for i in c.tensors.values()} for c in components(open_checkpoint(target))}
    assert by_family == {"FLUX.1": {"fp8", "bf16"}, "T5 encoder": {"fp8", "bf16"}, "CLIP-L": {"bf16"}, "VAE": {"bf16"}}
    assert result.total.tensors == sum(len(c.tensors) for c in components(open_checkpoint(merged)))
    stored = load_file(target)
    assert "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.comfy_quant" in stored
    legacy = tmp_path / "legacy.safetensors"
    convert(merged, legacy, "fp8", components=("transformer", "t5", "clip", "vae"), legacy_fp8=True)
    markers = {name for name in load_file(legacy) if name.endswith("scaled_fp8")}
    assert markers == {"model.diffusion_model.scaled_fp8", "text_encoders.t5xxl.transformer.scaled_fp8"}
    with pytest.raises(UserError, match="do not go into one .gguf"):
        make_plan(Conversion(merged, tmp_path / "x.gguf", "q8_0", components=("transformer", "t5")))
