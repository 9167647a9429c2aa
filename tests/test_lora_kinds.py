"""What a LoRA file can do to a weight: each formula against a dense one, in any slices and order of rows."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.converters import lora_math
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_math import fused
from flux_quant.converters.lora_records import KINDS
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


# --- Kinds of changes -------------------------------------------------------------------------------------------------


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
    prefix, joint = ("lora_unet_", "_") if style == "kohya" else ("transformer.", ".")
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


# --- Slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 100, 1023, 1024])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_slices_give_the_same(model, read, monkeypatch, rows, axis):
    """However few rows are done at a time."""
    n, k = model[f"{MODULE}.weight"].shape
    tensors = {f"{KEY}{end}": tensor for end, tensor in lokr((8, 128), (4, 64), "w2", 5.0)[0].items()}
    tensors[f"{KEY}.dora_scale"] = 1 + (random(1, k) if axis == "columns" else random(n, 1)).abs()
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
    tensors = {f"{MODULE}.lora_A.weight": random(2, HIDDEN), f"{MODULE}.lora_B.weight": random(1024, 2)}
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
