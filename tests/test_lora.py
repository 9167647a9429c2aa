"""LoRA files of every family, fused and compared with changes that are computed here in the file's own naming.

The judge for names is the model itself (BFL's table, diffusers' FluxTransformer2DModel, transformers' encoders) and
diffusers' own converters where they are right; every way in which known programs lose a part of a file is a case.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.arch import FluxConfig
from flux_quant.converters import lora_math
from flux_quant.converters.lora_io import parse_lora_option, read_lora
from flux_quant.converters.lora_math import fused, new_shape, touches
from flux_quant.converters.lora_names import ModuleNames
from flux_quant.converters.lora_records import KINDS, Lora
from flux_quant.errors import UserError
from flux_quant.layouts import KEY_MAP
from flux_quant.naming import to_diffusers

State = dict[str, Tensor]
HIDDEN = 256


@pytest.fixture(scope="module")
def model(tiny_flux) -> State:
    return {name: tensor.float() for name, tensor in tiny_flux.items()}


@pytest.fixture(scope="module")
def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.items()}


@pytest.fixture
def read(tmp_path, shapes):
    """Tensors -> the LoRA that is read from a file with them. No key is ever lost."""

    def read(tensors: State, metadata: dict[str, str] | None = None, unused: list[str] | None = None) -> Lora:
        path = tmp_path / "lora.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
        lora = read_lora(path, shapes)
        used = [key for record in lora.records for key in record.sources]
        assert sorted({*used, *lora.unused}) == sorted(tensors) and not {*used} & {*lora.unused}
        assert sorted(lora.unused) == sorted(unused or [])
        return lora

    return read


def fuse(model: State, *adapters: tuple[Lora, float]) -> State:
    """All tensors through `fused`, which must not write into them."""
    after = {}
    for name, tensor in model.items():
        before = tensor.clone() if touches(name, adapters) else tensor
        after[name] = fused(name, tensor, adapters)
        assert torch.equal(tensor, before) and (after[name] is tensor) == (before is tensor)
        assert tuple(after[name].shape) == new_shape(name, tuple(tensor.shape), adapters)
        assert after[name].dtype == torch.float32
    return after


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if found[name] is not tensor:
            assert found[name].shape == tensor.shape, name
            worst = (found[name] - tensor).abs().max()
            assert worst <= 2e-5, f"{name} is wrong by {worst}"


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape) * 31)
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


def product(up: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    return up.double() @ down.double() * scale


def plus(model: State, changes: State) -> State:
    """The model with some tensors changed, in double."""
    assert changes.keys() <= model.keys()
    return model | {name: model[name].double() + change for name, change in changes.items()}


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


# --- Text encoders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders() -> dict[str, State]:
    """Small T5 and CLIP-L with the names of transformers (CLIP's with `text_model`, as before version 5)."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    small = dict(vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    t5 = T5Config(d_model=48, d_ff=80, d_kv=8, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", **small)
    clip = CLIPTextConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=2, **small)
    clip = {name.removeprefix("text_model."): tensor for name, tensor in CLIPTextModel(clip).state_dict().items()}
    clip = {f"text_model.{name}": tensor for name, tensor in clip.items()}
    return {"t5": T5EncoderModel(t5).state_dict(), "clip_l": clip}


TEXT_STYLES = {  # prefix, what joins the words, ends
    "kohya T5": ("t5", "lora_te3_", "_", ".lora_down.weight", ".lora_up.weight"),
    "OneTrainer T5": ("t5", "lora_te2_", "_", ".lora_down.weight", ".lora_up.weight"),
    "diffusers T5": ("t5", "text_encoder_2.", ".", ".lora_A.weight", ".lora_B.weight"),
    "ComfyUI T5": ("t5", "text_encoders.t5xxl.transformer.", ".", ".lora_A.weight", ".lora_B.weight"),
    "kohya CLIP": ("clip_l", "lora_te1_", "_", ".lora_down.weight", ".lora_up.weight"),
    "old kohya CLIP": ("clip_l", "lora_te_", "_", ".lora_down.weight", ".lora_up.weight"),
    "diffusers CLIP": (
        "clip_l",
        "text_encoder.",
        ".",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "ComfyUI CLIP": ("clip_l", "text_encoders.clip_l.transformer.", ".", ".lora_A.weight", ".lora_B.weight"),
}


@pytest.mark.parametrize("style", TEXT_STYLES)
@pytest.mark.parametrize("short", [False, True], ids=["", "without text_model"])
def test_text_encoders(encoders, read, style, short):
    component, prefix, joint, down_end, up_end = TEXT_STYLES[style]
    encoder = encoders[component]
    tensors, changes = {}, {}
    linear = re.compile(r".*(SelfAttention\.[qkvo]|DenseReluDense\.w\w+|_proj|fc[12])\.weight")
    for i, name in enumerate(name for name in encoder if linear.fullmatch(name)):
        up, down = random(encoder[name].shape[0], 3, seed=i), random(3, encoder[name].shape[1], seed=-i)
        module = name.removesuffix(".weight").removeprefix("text_model." if short else "")
        key = prefix + module.replace(".", joint)
        tensors |= {key + down_end: down, key + up_end: up, f"{key}.alpha": torch.tensor(1.5)}
        changes[name] = product(up, down, 0.5)
    assert len(changes) == {"t5": 14, "clip_l": 12}[component]
    lora = read(tensors)
    assert {record.component for record in lora.records} == {component}
    assert_same(fuse(encoder, (lora, 2.0)), plus(encoder, {name: 2 * change for name, change in changes.items()}))
    assert lora.unapplied(encoder) == [] and lora.unapplied([]) == [k for r in lora.records for k in r.sources]


def test_text_encoder_of_another_size(encoders, read):
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    lora = read({f"{key}.lora_down.weight": torch.ones(2, 64), f"{key}.lora_up.weight": torch.ones(32, 2)})
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    with pytest.raises(
        UserError, match=rf"{key}\.lora_down\.weight changes 32 x 64 values .* 32 x 48: the LoRA was made"
    ):
        fused(name, encoders["t5"][name], [(lora, 1.0)])


# --- Kinds of changes -------------------------------------------------------------------------------------------------

MODULE, KEY = "double_blocks.1.img_mlp.0", "lora_unet_double_blocks_1_img_mlp_0"
FINAL, OUT = "final_layer.adaLN_modulation.1", "transformer.norm_out.linear"  # (shift, scale) and (scale, shift)


def lokr(rows: tuple[int, int], columns: tuple[int, int], factored: str, alpha: float | None) -> tuple[State, Tensor]:
    """Tensors by their ends and the change, by LyCORIS's rule for the scale: the rank of the last factored matrix."""
    tensors, whole, scale = {}, {}, 1.0
    for part, (n, k), rank in (("w1", (rows[0], columns[0]), 2), ("w2", (rows[1], columns[1]), 3)):
        left, right = random(n, rank), random(rank, k, seed=1)
        whole[part] = left.double() @ right.double()
        if part in factored:
            tensors |= {f".lokr_{part}_a": left, f".lokr_{part}_b": right}
            scale = 1.0 if alpha is None else alpha / rank
        else:
            tensors[f".lokr_{part}"] = whole[part].float()
    if alpha is not None:
        tensors[".alpha"] = torch.tensor(alpha)
    return tensors, torch.kron(whole["w1"], whole["w2"]) * scale


@pytest.mark.parametrize("factored", ["", "w1", "w2", "w1 w2"])
@pytest.mark.parametrize("alpha", [None, 5.0, 1e10])
def test_lokr(model, read, factored, alpha):
    """Two whole matrices make alpha meaningless, absurd ones included."""
    if factored and alpha == 1e10:
        alpha = 0.25
    tensors, change = lokr((8, 128), (4, 64), factored, alpha)
    lora = read({f"diffusion_model.{MODULE}{end}": tensor for end, tensor in tensors.items()}, unused=[])
    assert_same(fuse(model, (lora, 1.0)), plus(model, {f"{MODULE}.weight": change}))


@pytest.mark.parametrize("rows", [(8, 64), (1, 512), (512, 1)], ids=str)
@pytest.mark.parametrize("factored", ["", "w1 w2"])
def test_lokr_of_exchanged_halves(model, read, rows, factored):
    tensors, change = lokr(rows, (4, 64), factored, 4.0)
    lora = read({f"lycoris_norm_out_linear{end}": tensor for end, tensor in tensors.items()})
    assert lora.records[0].kind == "lokr"
    expected = plus(to_diffusers(model), {"norm_out.linear.weight": change})
    assert_same(to_diffusers(fuse(model, (lora, 1.0))), expected)


def test_lokr_whose_halves_cut_a_factor(tmp_path):
    """Three rows in w1: no product of two matrices has the exchanged halves, so the change itself is kept."""
    shapes = {"img_in.weight": (3, 64), "img_in.bias": (3,), f"{FINAL}.weight": (6, 3), f"{FINAL}.bias": (6,)}
    tensors, change = lokr((3, 2), (1, 3), "w1", 4.0)
    save_file({f"{OUT}{end}": tensor for end, tensor in tensors.items()}, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", shapes)
    found = fused(f"{FINAL}.weight", torch.zeros(6, 3), [(lora, 1.0)])
    torch.testing.assert_close(found, torch.cat([change[3:], change[:3]]).float())


@pytest.mark.parametrize("module", [MODULE, FINAL])
@pytest.mark.parametrize("tucker", [False, True])
def test_loha(model, read, module, tucker):
    n, k = model[f"{module}.weight"].shape
    tensors, halves = {"alpha": torch.tensor(2.0)}, []
    for i in (1, 2):
        left, right = random(n, 4, seed=i), random(4, k, seed=-i)
        core = random(4, 4, 1, 1, seed=i)
        if tucker:  # LyCORIS: einsum("i j k l, j r, i p -> p r k l", core, right, left)
            tensors |= {f"hada_w{i}_a": left.t(), f"hada_w{i}_b": right, f"hada_t{i}": core}
            halves.append(torch.einsum("ijkl,jr,ip->prkl", core.double(), right.double(), left.t().double())[..., 0, 0])
        else:
            tensors |= {f"hada_w{i}_a": left, f"hada_w{i}_b": right}
            halves.append(product(left, right))
    change = halves[0] * halves[1] * 2 / 4
    key, own, back = (f"diffusion_model.{MODULE}", model, lambda state: state)
    if module == FINAL:
        key, own, back = OUT, to_diffusers(model), to_diffusers
    name = "norm_out.linear.weight" if module == FINAL else f"{MODULE}.weight"
    lora = read({f"{key}.{end}": tensor for end, tensor in tensors.items()})
    assert_same(back(fuse(model, (lora, 1.5))), plus(own, {name: 1.5 * change}))


@pytest.mark.parametrize("ndim", [2, 4])
def test_convolutions_of_one_pixel_and_their_core(model, read, ndim):
    n, k = model[f"{MODULE}.weight"].shape
    up, mid, down = random(n, 4), random(4, 4, seed=1), random(4, k, seed=2)
    change = up.double() @ mid.double() @ down.double() * 3 / 4
    tail = (1, 1) if ndim == 4 else ()
    tensors = {"up": up, "mid": mid, "down": down}
    tensors = {f"{KEY}.lora_{part}.weight": tensor.reshape(*tensor.shape, *tail) for part, tensor in tensors.items()}
    lora = read({**tensors, f"{KEY}.alpha": torch.tensor(3.0)})
    assert_same(fuse(model, (lora, 1.0)), plus(model, {f"{MODULE}.weight": change}))


def dora(weight: Tensor, change: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """The change by the paper: m V / |V| with V the changed weight, and strength between it and the weight."""
    changed = weight.double() + change
    over = 1 if magnitude.shape[0] == len(weight) else 0
    result = magnitude.double() * changed / changed.norm(dim=over, keepdim=True)
    return strength * (result - weight.double())


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_dora(model, read, strength, axis, kind):
    weight = model[f"{MODULE}.weight"]
    n, k = weight.shape
    magnitude = 1 + random(n, 1).abs() if axis == "rows" else 1 + random(1, k).abs()
    if kind == "lora":
        up, down = random(n, 4), random(4, k, seed=5)
        tensors, change = {".lora_up.weight": up, ".lora_down.weight": down}, product(up, down)
    else:
        tensors, change = lokr((8, 128), (4, 64), "w2", 5.0)
    tensors = {KEY + end: tensor for end, tensor in tensors.items()}
    lora = read({**tensors, f"{KEY}.dora_scale": magnitude})
    expected = plus(model, {f"{MODULE}.weight": dora(weight, change, magnitude, strength)})
    assert_same(fuse(model, (lora, strength)), expected)


@pytest.mark.parametrize("end", ["", ".weight", ".default.weight"])
@pytest.mark.parametrize(
    "part", ["transformer_blocks.1.attn.to_k", "single_transformer_blocks.0.proj_mlp", "norm_out.linear"]
)
def test_peft_dora_on_rows_of_a_module(model, read, end, part):
    """A magnitude per output, in diffusers' rows; with the exchange of halves where there is one."""
    own = to_diffusers(model)
    weight = own[f"{part}.weight"]
    up, down, magnitude = random(len(weight), 4), random(4, HIDDEN, seed=5), 1 + random(len(weight), seed=2).abs()
    tensors = {f"transformer.{part}.lora_A.weight": down, f"transformer.{part}.lora_B.weight": up}
    lora = read({**tensors, f"transformer.{part}.lora_magnitude_vector{end}": magnitude})
    change = dora(weight, product(up, down), magnitude[:, None], 0.8)
    assert_same(to_diffusers(fuse(model, (lora, 0.8))), plus(own, {f"{part}.weight": change}))


def test_dora_of_rows_of_zeros(model, read):
    """No length to divide by: the rows stay zero."""
    n, k = model[f"{MODULE}.weight"].shape
    tensors = {f"{KEY}.lora_up.weight": torch.zeros(n, 2), f"{KEY}.lora_down.weight": torch.zeros(2, k)}
    lora = read({**tensors, f"{KEY}.dora_scale": torch.ones(n, 1)})
    assert not fused(f"{MODULE}.weight", torch.zeros(n, k), [(lora, 1.0)]).any()


@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_whole_differences_biases_and_norms(model, read, style):
    """`diff`, `diff_b`, `w_norm`, `set_weight`: everything that is no product."""
    own = model if style == "kohya" else to_diffusers(model)
    names = ("double_blocks.0.txt_mod.lin", FINAL, "double_blocks.1.img_attn.norm.key_norm", "txt_in")
    if style == "diffusers":
        names = (
            "transformer_blocks.0.attn.to_v",
            "norm_out.linear",
            "transformer_blocks.1.attn.norm_k",
            "context_embedder",
        )
    norm = "scale" if style == "kohya" else "weight"
    _, prefix, joint, *_ = STYLES[style]
    keys = [prefix + name.replace(".", joint) for name in names]
    diff, last, bias, scale = (random(*own[f"{names[i]}.weight"].shape, seed=i) for i in (0, 1, 0, 0))
    bias, scale, new = random(len(last)), random(128), random(*own[f"{names[3]}.weight"].shape)
    tensors = {f"{keys[0]}.diff": diff, f"{keys[1]}.diff": last, f"{keys[1]}.diff_b": bias}
    lora = read({**tensors, f"{keys[2]}.w_norm": scale, f"{keys[3]}.set_weight": new})
    expected = plus(own, {f"{names[0]}.weight": 0.5 * diff, f"{names[1]}.weight": 0.5 * last})
    expected |= {f"{names[1]}.bias": own[f"{names[1]}.bias"] + 0.5 * bias, f"{names[3]}.weight": new}
    expected[f"{names[2]}.{norm}"] = own[f"{names[2]}.{norm}"] + 0.5 * scale
    found = fuse(model, (lora, 0.5))
    assert_same(found if style == "kohya" else to_diffusers(found), expected)


def test_bias_alone_and_bias_of_a_norm(model, read):
    """A bias may be all that changes; a norm without one has no place for it."""
    lora = read(
        {f"{KEY}.diff_b": torch.ones(1024), "lora_unet_single_blocks_0_norm_key_norm.b_norm": torch.ones(128)},
        unused=["lora_unet_single_blocks_0_norm_key_norm.b_norm"],
    )
    assert not lora.touches(f"{MODULE}.weight")
    assert_same(fuse(model, (lora, 2.0)), plus(model, {f"{MODULE}.bias": torch.full((1024,), 2.0)}))


# --- Control LoRA -----------------------------------------------------------------------------------------------------


def control_file(model: State) -> tuple[State, State, State]:
    """As BFL publishes them: every linear with a bias, img_in twice as wide, all norm scales anew."""
    tensors, changes, scales = {}, {}, {}
    for i, (module, weight) in enumerate(linears(model).items()):
        n, k = weight.shape[0], weight.shape[1] * (2 if module == "img_in" else 1)
        rank = min(8, n, k)
        up, down, bias = random(n, rank, seed=i), random(rank, k, seed=-i), random(n, seed=i)
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up, f"{module}.lora_B.bias": bias}
        changes |= {f"{module}.weight": product(up, down), f"{module}.bias": bias}
    for i, name in enumerate(name for name in model if name.endswith("_norm.scale")):
        tensors[name] = scales[name] = 1 + random(128, seed=i)
    return tensors, changes, scales


def widened(model: State) -> State:
    return {**model, "img_in.weight": torch.nn.functional.pad(model["img_in.weight"], (0, 64))}


def test_control_lora(model, read):
    tensors, changes, scales = control_file(model)
    lora = read(tensors)
    assert lora.widths == {"img_in": 128}
    assert new_shape("img_in.weight", (256, 64), [(lora, 0.85)]) == (256, 128)
    assert new_shape("img_in.weight", (256, 128), [(lora, 0.85)]) == (256, 128)
    found = fuse(model, (lora, 0.85))
    expected = plus(widened(model), {name: 0.85 * change for name, change in changes.items()}) | scales
    assert_same(found, expected)


def test_control_lora_with_a_style(model, read):
    """The style's img_in is as wide as the base; the order makes no difference."""
    tensors, changes, scales = control_file(model)
    control = read(tensors)
    style, more = low_rank_file(linears(model), "diffusers")[0], {}
    style, more = low_rank_file(linears(model), "ai-toolkit")
    lora = read(style)
    more["img_in.weight"] = torch.nn.functional.pad(more["img_in.weight"], (0, 64))
    changes = {name: 0.85 * change + 0.5 * more.get(name, 0) for name, change in changes.items()}
    for adapters in ([(control, 0.85), (lora, 0.5)], [(lora, 0.5), (control, 0.85)]):
        assert_same(fuse(model, *adapters), plus(widened(model), changes) | scales)


def test_control_lora_in_diffusers_names(model, read):
    """As their training script saves it: a wide x_embedder, norms by their names."""
    up, down, scale = random(HIDDEN, 4), random(4, 128, seed=1), 1 + random(128)
    tensors = {"transformer.x_embedder.lora_A.weight": down, "transformer.x_embedder.lora_B.weight": up}
    lora = read({**tensors, "transformer.transformer_blocks.0.attn.norm_added_q.weight": scale})
    expected = plus(to_diffusers(widened(model)), {"x_embedder.weight": product(up, down)})
    expected["transformer_blocks.0.attn.norm_added_q.weight"] = scale
    assert_same(to_diffusers(fuse(model, (lora, 1.0))), expected)


def test_declared_width(model, read):
    """`reshape_weight` allows another width than twice the base's; without it the file is for another model."""
    tensors = {
        "diffusion_model.img_in.lora_A.weight": torch.ones(2, 196),
        "diffusion_model.img_in.lora_B.weight": torch.ones(256, 2),
    }
    lora = read({**tensors, "diffusion_model.img_in.reshape_weight": torch.tensor([256, 196])})
    assert fused("img_in.weight", model["img_in.weight"], [(lora, 1.0)]).shape == (256, 196)
    with pytest.raises(UserError, match=r"img_in\.lora_A\.weight \[2, 196\] .* 256 x 64 were expected"):
        read(tensors)


def test_lora_of_the_base_on_a_wider_model(model, tmp_path, shapes):
    """A style for dev fits Fill's first 64 input columns."""
    up, down = random(256, 2), random(2, 64)
    path = tmp_path / "x.safetensors"
    save_file({"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}, path)
    lora = read_lora(path, {**shapes, "img_in.weight": (256, 384)})
    found = fused("img_in.weight", torch.zeros(256, 384), [(lora, 1.0)])
    torch.testing.assert_close(found[:, :64], (up @ down))
    assert not found[:, 64:].any() and lora.widths == {}


def test_two_files_that_replace_the_same(model, read):
    name = "double_blocks.0.img_attn.norm.key_norm.scale"
    linear = {"img_in.lora_A.weight": torch.ones(1, 64), "img_in.lora_B.weight": torch.ones(256, 1)}
    one, other = (read({**linear, name: torch.full((128,), value)}) for value in (2.0, 3.0))
    assert torch.equal(fused(name, model[name], [(one, 1.0), (one, 0.5)]), torch.full((128,), 2.0))
    with pytest.raises(UserError, match=rf"both replace {name}"):
        fused(name, model[name], [(one, 1.0), (other, 1.0)])


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


# --- Scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize(("alpha", "scale"), [(2, 0.5), (8, 2), (0, 1)])
def test_alpha(read, model, dtype, alpha, scale):
    """kohya means rank by 0. Alphas come in every type."""
    up, down = torch.ones(1024, 4), torch.ones(4, HIDDEN)
    tensors = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down}
    lora = read({**tensors, f"{KEY}.alpha": torch.tensor(alpha, dtype=dtype)})
    assert lora.records[0].scale == scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_types_of_factors(read, model, dtype):
    up, down = (torch.randint(-3, 4, shape).to(dtype) for shape in ((1024, 2), (2, HIDDEN)))
    lora = read({f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down})
    found = fused(f"{MODULE}.weight", torch.zeros(1024, HIDDEN), [(lora, 1.0)])
    assert torch.equal(found, up.float() @ down.float())


PEFT = {
    "alpha": ({"transformer.lora_alpha": 16, "transformer.r": 4}, 4.0),
    "pattern": ({"transformer.lora_alpha": 16, "transformer.alpha_pattern": {"attn.to_q": 2}}, 0.5),
    "full pattern": ({"transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 2}}, 0.5),
    "anchored pattern": ({"transformer.alpha_pattern": {r"^transformer_blocks\.1\.attn\.to_q": 2}}, 0.5),
    "other pattern": ({"transformer.lora_alpha": 16, "transformer.alpha_pattern": {"to_k": 2, "o_q": 3}}, 4.0),
    "root": ({"transformer.lora_alpha": 16, "transformer.use_rslora": True}, 8.0),
    "other component": ({"text_encoder.lora_alpha": 16}, 1.0),
    "zero": ({"transformer.lora_alpha": 0}, 1.0),
}


@pytest.mark.parametrize(("table", "scale"), PEFT.values(), ids=PEFT)
def test_alpha_in_the_header(read, table, scale):
    key = "transformer.transformer_blocks.1.attn.to_q"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, HIDDEN), f"{key}.lora_B.weight": torch.ones(HIDDEN, 4)}
    assert read(tensors, {"lora_adapter_metadata": json.dumps(table)}).records[0].scale == scale
    own = read({**tensors, f"{key}.alpha": torch.tensor(2.0)}, {"lora_adapter_metadata": json.dumps(table)})
    assert own.records[0].scale == 0.5


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"transformer.lora_alpha": "x"}', "[" * 100_000, '{"transformer.lora_alpha": NaN}']
)
def test_damaged_header_entry(read, text):
    tensors = {f"{KEY}.lora_down.weight": torch.ones(4, HIDDEN), f"{KEY}.lora_up.weight": torch.ones(1024, 4)}
    with pytest.raises(UserError, match="lora_adapter_metadata of the header is damaged"):
        read(tensors, {"lora_adapter_metadata": text})


# --- Mistakes ---------------------------------------------------------------------------------------------------------

GOOD = {f"{KEY}.lora_down.weight": torch.ones(2, HIDDEN), f"{KEY}.lora_up.weight": torch.ones(1024, 2)}
BAD = {
    "nothing known": (
        {"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(2, 2)},
        "no key belongs .*input_blocks_1",
    ),
    "no tensors": ({}, "no key belongs to a LoRA for this model .first key: the file is empty"),
    "half of a pair": ({f"{KEY}.lora_down.weight": torch.ones(2, HIDDEN)}, rf"no key belongs .*{KEY}"),
    "wrong columns": (
        {**GOOD, f"{KEY}.lora_down.weight": torch.ones(2, 64)},
        rf"{KEY}\.lora_down.* 1024 x 64 values for .* 1024 x 256",
    ),
    "wrong rows": (
        {**GOOD, f"{KEY}.lora_up.weight": torch.ones(1023, 2)},
        r"1023 x 256 values for double_blocks\.1\.img_mlp\.0, where",
    ),
    "wrong rows of a part": (
        {
            "transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(2, HIDDEN),
            "transformer_blocks.0.attn.to_k.lora_B.weight": torch.ones(3 * HIDDEN, 2),
        },
        r"rows 256 to 511 of double_blocks\.0\.img_attn\.qkv, where 256 x 256",
    ),
    "ranks": ({**GOOD, f"{KEY}.lora_up.weight": torch.ones(1024, 3)}, "have different ranks"),
    "a vector": ({**GOOD, f"{KEY}.lora_up.weight": torch.ones(1024)}, r"\[1024\] is not a matrix"),
    "a real convolution": ({**GOOD, f"{KEY}.lora_down.weight": torch.ones(2, HIDDEN, 3, 3)}, "is not a matrix"),
    "rank zero": (
        {f"{KEY}.lora_down.weight": torch.ones(0, HIDDEN), f"{KEY}.lora_up.weight": torch.ones(1024, 0)},
        "is empty",
    ),
    "core": ({**GOOD, f"{KEY}.lora_mid.weight": torch.ones(2, 3)}, "does not fit its factors"),
    "alpha that is no number": ({**GOOD, f"{KEY}.alpha": torch.tensor(float("nan"))}, "alpha .* is nan"),
    "many alphas": ({**GOOD, f"{KEY}.alpha": torch.ones(2)}, "is not one number"),
    "magnitude": ({**GOOD, f"{KEY}.dora_scale": torch.ones(7)}, "neither the rows nor the columns of 1024 x 256"),
    "bias": ({**GOOD, f"{KEY}.diff_b": torch.ones(7)}, "which has 1024 values"),
    "two spellings": (
        {
            **GOOD,
            **{name.replace("lora_unet_double_blocks_1_img_mlp_0", MODULE): tensor for name, tensor in GOOD.items()},
        },
        "mean the same; the file holds two LoRAs",
    ),
    "two ends": ({**GOOD, f"{KEY}.lora_A.weight": torch.ones(2, HIDDEN)}, "mean the same"),
    "a part and the whole": (
        {
            "transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(2, HIDDEN),
            "transformer_blocks.0.attn.to_k.lora_B.weight": torch.ones(HIDDEN, 2),
            "double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, HIDDEN),
            "double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(3 * HIDDEN, 2),
        },
        r"change the same rows of double_blocks\.0\.img_attn\.qkv",
    ),
    "the halves in both orders": (
        {f"{name}.diff": torch.ones(2 * HIDDEN, HIDDEN) for name in (FINAL, OUT)},
        "change the same rows of final_layer",
    ),
    "difference of another size": ({f"{KEY}.diff": torch.ones(3, 3)}, "3 x 3 values"),
    "LoHa halves": (
        {
            f"{KEY}.hada_{part}": torch.ones(shape)
            for part, shape in {"w1_a": (1024, 2), "w1_b": (2, 256), "w2_a": (1024, 2), "w2_b": (2, 255)}.items()
        },
        "do not belong to one weight",
    ),
    "LoKr": ({f"{KEY}.lokr_w1": torch.ones(8, 8), f"{KEY}.lokr_w2": torch.ones(8, 8)}, "64 x 64 values"),
}


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD)
def test_mistakes(read, tensors, message):
    with pytest.raises(UserError, match=message) as error:
        read(tensors)
    assert "\n" not in str(error.value) and "lora.safetensors" in str(error.value)


def test_a_model_is_no_lora(tiny_flux_file, shapes):
    with pytest.raises(UserError, match="is no LoRA: its keys are those of a model"):
        read_lora(tiny_flux_file, shapes)


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("a/b.safetensors:0.8", "a/b.safetensors", 0.8),
        ("a/b.safetensors", "a/b.safetensors", 1.0),
        ("a/b.safetensors:-1", "a/b.safetensors", -1.0),
        ("a/b.safetensors:1e-1", "a/b.safetensors", 0.1),
        ("C:\\loras\\x.safetensors", "C:\\loras\\x.safetensors", 1.0),
        ("C:\\loras\\x.safetensors:0.5", "C:\\loras\\x.safetensors", 0.5),
        ("C:/loras/x", "C:/loras/x", 1.0),
        ("C:/loras/x:2", "C:/loras/x", 2.0),
        ("at 10:30.safetensors", "at 10:30.safetensors", 1.0),
        ("at 10:30.safetensors:.5", "at 10:30.safetensors", 0.5),
    ],
)
def test_option(text, path, strength):
    assert parse_lora_option(text) == (Path(path), strength)


@pytest.mark.parametrize(
    "text", ["a.safetensors:", "a.safetensors:strong", "a.safetensors:0,8", "a.safetensors:nan", "a.safetensors:0"]
)
def test_option_mistakes(text):
    with pytest.raises(UserError, match="strength"):
        parse_lora_option(text)


# --- Slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 100, 1023, 1024])
def test_slices_give_the_same(model, read, monkeypatch, rows):
    """However few rows are done at a time."""
    n, k = model[f"{MODULE}.weight"].shape
    tensors = {f"{KEY}{end}": tensor for end, tensor in lokr((8, 128), (4, 64), "w2", 5.0)[0].items()}
    tensors[f"{KEY}.dora_scale"] = 1 + random(1, k).abs()
    tensors |= {
        "img_in.diff": random(256, 64),
        "txt_in.lora_A.weight": random(2, 96),
        "txt_in.lora_B.weight": random(256, 2),
    }
    lora = read(tensors)
    whole = fuse(model, (lora, 0.7))
    monkeypatch.setattr(lora_math, "SLICE", rows * k)
    assert_same(fuse(model, (lora, 0.7)), whole)


def test_records_are_what_side_paths_need(model, read):
    """Every kind of the table is reached, and gives its rows in any range."""
    tensors, _ = low_rank_file({MODULE: model[f"{MODULE}.weight"]}, "no prefix")
    tensors |= {f"img_in{end}": tensor for end, tensor in lokr((8, 32), (4, 16), "w1", 5.0)[0].items()}
    tensors |= {
        f"txt_in.hada_w{i}_{s}": random(*shape) for i in (1, 2) for s, shape in (("a", (256, 3)), ("b", (3, 96)))
    }
    tensors |= {"time_in.in_layer.diff": random(256, 256), "time_in.out_layer.set_weight": random(256, 256)}
    lora = read(tensors)
    assert {record.kind for record in lora.records} == set(KINDS)
    for record in lora.records:
        kind = KINDS[record.kind]
        rows, columns = kind.shape(record.factors)
        whole = kind.rows(record.factors, 0, rows)
        assert whole.shape == (rows, columns) == (record.row_len, record.columns)
        torch.testing.assert_close(kind.rows(record.factors, 5, 17), whole[5:17])
