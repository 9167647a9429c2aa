"""LoRA that change more than the linears of the transformer: control LoRA and text encoders."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_math import fused, new_shape
from flux_quant.errors import UserError
from flux_quant.naming import to_diffusers
from lora_checks import HIDDEN, Shapes, State, assert_same, floats, fuse, plus, product, random, reader, shapes_of


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
    style, more = {}, {}
    for i, (module, weight) in enumerate(linears(model).items()):
        up, down = random(weight.shape[0], 3, seed=i), random(3, weight.shape[1], seed=-i)
        style |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}
        more[f"{module}.weight"] = product(up, down)
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


def test_bias_of_a_scaled_product(model, read):
    """`lora_B.bias` belongs to the product and is scaled with it; `diff_b` is not."""
    key, up, down, bias, diff = "img_in", random(HIDDEN, 4), random(4, 64), random(HIDDEN), random(HIDDEN, seed=1)
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    lora = read({**tensors, f"{key}.lora_B.bias": bias, f"{key}.diff_b": diff})
    changes = {"img_in.weight": product(up, down, 0.5 / 4), "img_in.bias": 0.5 * (bias / 4 + diff)}
    assert_same(fuse(model, (lora, 0.5)), plus(model, changes))


def test_two_files_that_replace_the_same(model, read):
    name = "double_blocks.0.img_attn.norm.key_norm.scale"
    linear = {"img_in.lora_A.weight": torch.ones(1, 64), "img_in.lora_B.weight": torch.ones(256, 1)}
    one, other = (read({**linear, name: torch.full((128,), value)}) for value in (2.0, 3.0))
    assert torch.equal(fused(name, model[name], [(one, 1.0), (one, 0.5)]), torch.full((128,), 2.0))
    with pytest.raises(UserError, match=rf"both replace {name}"):
        fused(name, model[name], [(one, 1.0), (other, 1.0)])


def test_replaced_rows_side_by_side(model, read):
    """Of one file or of two; a part and the whole disagree."""
    value = {part: random(HIDDEN, HIDDEN, seed=i) for i, part in enumerate("qk")}
    q, k = (read({f"transformer_blocks.0.attn.to_{part}.set_weight": value[part]}) for part in "qk")
    whole = read({"double_blocks.0.img_attn.qkv.set_weight": random(3 * HIDDEN, HIDDEN, seed=9)})
    name = "double_blocks.0.img_attn.qkv.weight"
    found = fused(name, model[name], [(k, 1.0), (q, 1.0)])
    assert torch.equal(found, torch.cat([value["q"], value["k"], model[name][2 * HIDDEN :]]))
    with pytest.raises(UserError, match="both replace"):
        fused(name, model[name], [(whole, 1.0), (k, 1.0)])


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
