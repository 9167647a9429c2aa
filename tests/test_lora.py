"""LoRA files of every family, fused and compared with changes that are computed here in the file's own naming.

The judge for names is the model itself (BFL's table, diffusers' FluxTransformer2DModel) and diffusers' own converters
where they are right; every way in which known programs lose a part of a file is a case.
"""

import pytest
import torch
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.converters.lora_names import ModuleNames
from flux_quant.layouts import KEY_MAP
from flux_quant.naming import to_diffusers
from lora_checks import (
    FINAL,
    HIDDEN,
    KEY,
    MODULE,
    OUT,
    Shapes,
    State,
    assert_same,
    floats,
    fuse,
    plus,
    product,
    random,
    reader,
    shapes_of,
)


@pytest.fixture(scope="module")
def model(tiny_flux) -> State:
    return floats(tiny_flux)


@pytest.fixture(scope="module")
def shapes(model) -> Shapes:
    return shapes_of(model)


@pytest.fixture
def read(tmp_path, shapes):
    return reader(tmp_path, shapes)


def linears(model: State) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): tensor for name, tensor in model.items() if tensor.ndim == 2}


# --- Names: every linear of the model, in every spelling --------------------------------------------------------------

STYLES = {  # of names: (BFL or diffusers, prefix, what joins the words, ends of the two factors, alpha)
    "kohya": ("BFL", "lora_unet_", "_", ".lora_down.weight", ".lora_up.weight", True),
    "diffusers": ("diffusers", "transformer.", ".", ".lora_A.weight", ".lora_B.weight", False),
    "ai-toolkit": ("BFL", "diffusion_model.", ".", ".lora_A.weight", ".lora_B.weight", False),
    "generic with alpha": ("BFL", "diffusion_model.", ".", ".lora_down.weight", ".lora_up.weight", True),
    "no prefix": ("BFL", "", ".", ".lora_A.weight", ".lora_B.weight", False),
    "fal": ("BFL", "base_model.model.", ".", ".lora_A.weight", ".lora_B.weight", False),
    "OneTrainer": ("diffusers", "lora_transformer_", "_", ".lora_down.weight", ".lora_up.weight", True),
    "LyCORIS": ("diffusers", "lycoris_", "_", ".lora_down.weight", ".lora_up.weight", True),
    "DiffSynth": ("diffusers", "", ".", ".lora_A.default.weight", ".lora_B.default.weight", False),
    "diffusers, lora_down": ("diffusers", "transformer.", ".", ".lora_down.weight", ".lora_up.weight", True),
    "old diffusers": ("diffusers", "transformer.", ".", "_lora.down.weight", "_lora.up.weight", False),
    "older diffusers": ("diffusers", "transformer.", ".", ".lora.down.weight", ".lora.up.weight", False),
    "linear layer": (
        "diffusers",
        "transformer.",
        ".",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
        False,
    ),
    "bare parameters": ("BFL", "diffusion_model.", ".", ".lora_A", ".lora_B", False),
    "checkpoint": ("BFL", "model.diffusion_model.", ".", ".lora_A.weight", ".lora_B.weight", True),
    "kohya, diffusers names": ("diffusers", "lora_unet_", "_", ".lora_down.weight", ".lora_up.weight", True),
}


def low_rank_file(weights: dict[str, Tensor], style: str) -> tuple[State, State]:
    """A LoRA on every module, of ranks that differ; and the changes, in the naming of `weights`."""
    _, prefix, joint, down_end, up_end, has_alpha = STYLES[style]
    tensors, changes = {}, {}
    for i, (module, weight) in enumerate(weights.items()):
        rank = 1 + i % 5
        up, down = random(weight.shape[0], rank, seed=i), random(rank, weight.shape[1], seed=-i)
        key = prefix + module.replace(".", joint)
        tensors[key + down_end], tensors[key + up_end] = down, up
        alpha = 0.5 + i if has_alpha else rank
        if has_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        changes[f"{module}.weight"] = product(up, down, alpha / rank)
    return tensors, changes


@pytest.mark.parametrize("style", STYLES)
def test_every_module_in_every_naming(model, read, style):
    naming = STYLES[style][0]
    own = to_diffusers(model) if naming == "diffusers" else model
    tensors, changes = low_rank_file(linears(own), style)
    found = fuse(model, (read(tensors), 0.7))
    expected = plus(own, {name: 0.7 * change for name, change in changes.items()})
    assert_same(to_diffusers(found) if naming == "diffusers" else found, expected)


def test_every_linear_of_the_diffusers_model_is_known(model, shapes):
    """Their class, not our table, says what the modules are called."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**FluxConfig.from_shapes(shapes).diffusers())
    names, rows = ModuleNames(shapes), {}
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):
            for text in (f"transformer.{name}", "lora_transformer_" + name.replace(".", "_")):
                target, _ = names.resolve(text)
                assert target.row_len == module.out_features
                assert shapes[f"{target.module}.weight"][1] == module.in_features
            rows[target.module] = rows.get(target.module, 0) + module.out_features
    assert rows == {name.removesuffix(".weight"): shape[0] for name, shape in shapes.items() if len(shape) == 2}


def test_spellings_are_unambiguous_at_full_size():
    """Nothing that a file can say means two things; every name of both tables is there."""
    blocks = {"double_blocks": 19, "single_blocks": 38}
    modules = [m.format(i) for m in KEY_MAP for i in range(blocks.get(m.split(".")[0], 1))]
    names = ModuleNames({f"{m}.{'scale' if m.endswith('_norm') else 'weight'}": (3072 * 7, 3072) for m in modules})
    spelled = [text for m, parts in KEY_MAP.items() for p in (m, *parts) for text in [p.format(0)]]
    assert all(names.resolve(text) for text in spelled)
    assert len({target.module for target in names.targets.values()}) == len(modules)


def test_kohya_and_xlabs_as_diffusers_converts_them(model, read):
    """Their own converters as judges, for what these do right: blocks, without linear1's rows of full size."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_kohya_flux_lora_to_diffusers,
        _convert_xlabs_flux_lora_to_diffusers,
    )

    blocks = {name: weight for name, weight in linears(model).items() if "_blocks." in name and "linear1" not in name}
    kohya, _ = low_rank_file(blocks, "kohya")
    xlabs = xlabs_file(model)[0]
    for tensors, convert in (
        (kohya, _convert_kohya_flux_lora_to_diffusers),
        (xlabs, _convert_xlabs_flux_lora_to_diffusers),
    ):
        theirs = convert({name: tensor.clone() for name, tensor in tensors.items()})
        changes = {}
        for key, down in theirs.items():
            if ".lora_A." in key:
                name = key.removeprefix("transformer.").replace(".lora_A", "")
                changes[name] = product(theirs[key.replace("lora_A", "lora_B")], down)
        assert_same(to_diffusers(fuse(model, (read(tensors), 1.0))), plus(to_diffusers(model), changes))


def xlabs_file(model: State) -> tuple[State, State]:
    tensors, changes = {}, {name: torch.zeros_like(model[name]) for name in model if name.endswith("linear1.weight")}
    for i in range(2):
        for stream, number in (("img", 1), ("txt", 2)):
            for ours, theirs, rows in (("qkv", "qkv_lora", 3 * HIDDEN), ("proj", "proj_lora", HIDDEN)):
                up, down = random(rows, 4, seed=i + number), random(4, HIDDEN, seed=i - number)
                key = f"double_blocks.{i}.processor.{theirs}{number}"
                tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
                changes[f"double_blocks.{i}.{stream}_attn.{ours}.weight"] = product(up, down)
    for i in range(3):
        up, down = random(3 * HIDDEN, 4, seed=i), random(4, HIDDEN, seed=-i)
        key = f"single_blocks.{i}.processor.qkv_lora"
        tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        changes[f"single_blocks.{i}.linear1.weight"][: 3 * HIDDEN] = product(up, down).float()
        up, down = random(HIDDEN, 4, seed=i), random(4, HIDDEN + 1024, seed=-i)
        tensors |= {f"{key.replace('qkv', 'proj')}.down.weight": down, f"{key.replace('qkv', 'proj')}.up.weight": up}
        changes[f"single_blocks.{i}.linear2.weight"] = product(up, down)
    return tensors, changes


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(model, read, prefix):
    tensors, changes = xlabs_file(model)
    lora = read({prefix + name: tensor for name, tensor in tensors.items()})
    assert_same(fuse(model, (lora, 0.5)), plus(model, {name: 0.5 * change for name, change in changes.items()}))


@pytest.mark.parametrize("slices", [(0, 2), (3,), (2, 1), (0, 1, 2, 3)], ids=str)
def test_onetrainer_slices_stand_at_fixed_rows(model, read, slices):
    """Whatever slices a file has: 0, 1, 2 are q, k, v and 3 is the MLP. Each has a rank and an alpha of its own."""
    tensors, changes = {}, {}
    for module, last in (("double_blocks.1.txt_attn.qkv", 3), ("single_blocks.2.linear1", 4)):
        change = torch.zeros(model[f"{module}.weight"].shape, dtype=torch.float64)
        for i in (i for i in slices if i < last):
            rank, rows = 2 + i, 1024 if i == 3 else HIDDEN
            up, down = random(rows, rank, seed=i), random(rank, HIDDEN, seed=-i)
            key = f"transformer.{module}.{i}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(3.0)
            change[i * HIDDEN : i * HIDDEN + rows] = product(up, down, 3 / rank)
        if change.any():
            changes[f"{module}.weight"] = change
    lora = read(tensors)
    assert_same(fuse(model, (lora, 1.0)), plus(model, changes))


def test_sparse_qkv_of_kohya(model, read):
    """`split_qkv`: rank three times as large, the up matrix block-diagonal, alpha in proportion."""
    parts = [(random(HIDDEN, 4, seed=i), random(4, HIDDEN, seed=-i - 1)) for i in range(3)]
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_up.weight": torch.block_diag(*(up for up, _ in parts))}
    tensors |= {f"{key}.lora_down.weight": torch.cat([down for _, down in parts]), f"{key}.alpha": torch.tensor(6.0)}
    change = torch.cat([product(up, down, 0.5) for up, down in parts])
    assert_same(fuse(model, (read(tensors), 1.0)), plus(model, {"double_blocks.0.img_attn.qkv.weight": change}))


def test_split_records_fuse_like_the_joined_one(model, read):
    """q, k, v (and the MLP) one by one in diffusers' names, and as one matrix in BFL's: the same weights."""
    sides = {"transformer_blocks.0": ("double_blocks.0.img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"))}
    sides["single_transformer_blocks.1"] = (
        "single_blocks.1.linear1",
        ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    )
    split, joined = {}, {}
    for block, (module, parts) in sides.items():
        up, down = random(model[f"{module}.weight"].shape[0], 5), random(5, HIDDEN, seed=3)
        joined |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}
        for part, rows in zip(parts, up.split([HIDDEN] * 3 + [1024] * (len(parts) - 3)), strict=True):
            split |= {
                f"transformer.{block}.{part}.lora_A.weight": down,
                f"transformer.{block}.{part}.lora_B.weight": rows,
            }
    one = fuse(model, (read(split), 0.3))
    assert_same(one, fuse(model, (read(joined), 0.3)))


# --- What other programs lose without a word (runtime.md 1.2.9) -------------------------------------------------------


def test_kohya_outside_the_blocks(model, read):
    """Ten modules that a converter names without a prefix and then drops; each with its own alpha."""
    outer = {name: weight for name, weight in linears(model).items() if "_blocks." not in name}
    tensors, changes = low_rank_file(outer, "kohya")
    assert len(changes) == 10
    assert_same(fuse(model, (read(tensors), 1.0)), plus(model, changes))


ONETRAINER_PARTS = (
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2",
    "transformer_blocks.0.ff_context.net.0.proj",
    "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.norm1_context.linear",
    "single_transformer_blocks.1.proj_mlp",
    "single_transformer_blocks.1.proj_out",
    "single_transformer_blocks.1.norm.linear",
    "proj_out",
)


def test_onetrainer_modules_do_not_collapse(model, read):
    """Several modules of a block that a converter writes over each other; `proj_out` of a block and of the model."""
    own = to_diffusers(model)
    tensors, changes = low_rank_file({name: own[f"{name}.weight"] for name in ONETRAINER_PARTS}, "OneTrainer")
    lora = read(tensors)
    assert len(lora.records) == len(ONETRAINER_PARTS)
    assert_same(to_diffusers(fuse(model, (lora, 1.0))), plus(own, changes))


def test_alpha_of_lora_down_in_diffusers_names_counts(model, read):
    """Renaming to A and B without the alpha would give eight times the change."""
    up, down = random(HIDDEN, 8), random(8, HIDDEN, seed=1)
    key = "transformer.transformer_blocks.0.attn.to_q"
    lora = read({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)})
    change = {"transformer_blocks.0.attn.to_q.weight": product(up, down, 1 / 8)}
    assert_same(to_diffusers(fuse(model, (lora, 1.0))), plus(to_diffusers(model), change))


@pytest.mark.parametrize("parts", [("to_q",), ("to_q", "to_v"), ("to_k",)], ids=str)
def test_some_of_q_k_v(model, read, parts):
    """Programs that need all three fail or put the rows elsewhere."""
    own = to_diffusers(model)
    modules = [
        f"{block}.attn.{part}" for block in ("transformer_blocks.1", "single_transformer_blocks.2") for part in parts
    ]
    tensors, changes = low_rank_file({name: own[f"{name}.weight"] for name in modules}, "diffusers")
    assert_same(to_diffusers(fuse(model, (read(tensors), 1.0))), plus(own, changes))


def test_linear1_begins_with_q_k_v_and_ends_with_the_mlp(model, read):
    tensors, changes = low_rank_file({"single_transformer_blocks.0.proj_mlp": torch.empty(1024, HIDDEN)}, "diffusers")
    found = fuse(model, (read(tensors), 1.0))["single_blocks.0.linear1.weight"]
    before = model["single_blocks.0.linear1.weight"]
    assert torch.equal(found[: 3 * HIDDEN], before[: 3 * HIDDEN])
    torch.testing.assert_close((found - before)[3 * HIDDEN :], changes.popitem()[1].float(), rtol=1e-4, atol=1e-5)


def test_halves_of_the_final_modulation_are_exchanged(model, read):
    """diffusers has (scale, shift), BFL (shift, scale): the rows of B change places, A stays."""
    up, down = random(2 * HIDDEN, 3), random(3, HIDDEN, seed=1)
    lora = read({f"{OUT}.lora_A.weight": down, f"{OUT}.lora_B.weight": up})
    change = product(torch.cat([up[HIDDEN:], up[:HIDDEN]]), down)
    assert_same(fuse(model, (lora, 1.0)), plus(model, {f"{FINAL}.weight": change}))


def test_one_unknown_key_does_not_spoil_the_file(model, read):
    """kohya's T5 keys, a textual inversion, a block that the model does not have, an adapter that is not supported."""
    tensors, changes = low_rank_file({MODULE: model[f"{MODULE}.weight"]}, "kohya")
    text, _ = low_rank_file({"encoder.block.0.layer.1.DenseReluDense.wo": torch.empty(8, 8)}, "no prefix")
    known = {"lora_te3_encoder_block_0_layer_1_DenseReluDense_wo" + k[k.index(".lora_") :]: t for k, t in text.items()}
    unknown = {
        "bundle_emb.cat.clip_l": torch.ones(2, 8),
        "lora_unet_double_blocks_9_img_mlp_0.lora_down.weight": torch.ones(1, HIDDEN),
        "lora_unet_double_blocks_9_img_mlp_0.alpha": torch.tensor(1.0),
        "lora_unet_double_blocks_0_img_mlp_0.oft_blocks": torch.ones(2, 2, 2),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),  # CLIP-G, of SDXL
        "lora_unet_double_blocks_0_img_mlp_2.lora_down.weight": torch.ones(1, 1024),  # without its other half
        "lora_unet_double_blocks_0_txt_mlp_2.alpha": torch.tensor(1.0),
        "diffusion_model.double_blocks.0.img_mlp.2.weight": torch.ones(256, 1024),
    }
    lora = read({**tensors, **known, **unknown}, unused=list(unknown))
    assert {record.component for record in lora.records} == {"transformer", "t5"}
    assert_same(fuse(model, (lora, 1.0)), plus(model, changes))
    assert lora.unapplied(model) == list(known)


def test_dora_divides_by_the_length_of_the_changed_rows(model, read):
    """A magnitude equal to the changed length gives the plain LoRA; one program divides by the unchanged length."""
    weight = model[f"{MODULE}.weight"]
    up, down = random(1024, 4), random(4, HIDDEN, seed=1)
    tensors = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down}
    plain = read(tensors)
    magnitude = (weight + up @ down).norm(dim=1, keepdim=True)
    with_lengths = read({**tensors, f"{KEY}.dora_scale": magnitude})
    assert_same(fuse(model, (with_lengths, 1.0)), fuse(model, (plain, 1.0)))
