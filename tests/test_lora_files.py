"""Scales and types in LoRA files, what PEFT writes into the header, and files and options that cannot be right."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.converters.lora_io import parse_lora_option, read_lora
from flux_quant.converters.lora_math import fused
from flux_quant.converters.lora_names import ROLES
from flux_quant.converters.lora_records import Lora
from flux_quant.errors import UserError

State = dict[str, Tensor]
HIDDEN = 256
MODULE, KEY = "double_blocks.1.img_mlp.0", "lora_unet_double_blocks_1_img_mlp_0"
FINAL, OUT = "final_layer.adaLN_modulation.1", "transformer.norm_out.linear"  # (shift, scale) and (scale, shift)


@pytest.fixture(scope="module")
def shapes(tiny_flux) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tiny_flux.items()}


@pytest.fixture
def read(tmp_path, shapes):
    def read(tensors: State, metadata: dict[str, str] | None = None) -> Lora:
        path = tmp_path / "lora.safetensors"
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
        return read_lora(path, shapes)

    return read


# --- Scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize(("alpha", "scale"), [(2, 0.5), (8, 2), (0, 1)])
def test_alpha(read, dtype, alpha, scale):
    """kohya means rank by 0. Alphas come in every type."""
    up, down = torch.ones(1024, 4), torch.ones(4, HIDDEN)
    tensors = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down}
    lora = read({**tensors, f"{KEY}.alpha": torch.tensor(alpha, dtype=dtype)})
    assert lora.records[0].scale == scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_types_of_factors(read, dtype):
    up, down = (torch.randint(-3, 4, shape).to(dtype) for shape in ((1024, 2), (2, HIDDEN)))
    lora = read({f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down})
    found = fused(f"{MODULE}.weight", torch.zeros(1024, HIDDEN), [(lora, 1.0)])
    assert torch.equal(found, up.float() @ down.float())


def test_pickle(tmp_path, shapes):
    """`pytorch_lora_weights.bin` of older programs."""
    factors = {f"{KEY}.lora_up.weight": torch.ones(1024, 4), f"{KEY}.lora_down.weight": torch.ones(4, HIDDEN)}
    torch.save({**factors, f"{KEY}.alpha": torch.tensor(2)}, tmp_path / "lora.bin")
    lora = read_lora(tmp_path / "lora.bin", shapes)
    assert lora.records[0].scale == 0.5 and not lora.unused
    assert torch.equal(
        fused(f"{MODULE}.weight", torch.zeros(1024, HIDDEN), [(lora, 1.0)]), torch.full((1024, 256), 2.0)
    )


def test_folders_are_no_lora(tmp_path, shapes):
    for i in (1, 2):
        save_file({f"{KEY}.diff_b": torch.ones(1024)}, tmp_path / f"{i}.safetensors")
    with pytest.raises(UserError):
        read_lora(tmp_path, shapes)


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
    "core that is not square": (
        {**GOOD, f"{KEY}.lora_up.weight": torch.ones(1024, 3), f"{KEY}.lora_mid.weight": torch.ones(3, 2)},
        "does not fit its factors of rank 3 and 2",
    ),
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


def test_any_shapes_end_in_a_line_or_a_lora(read, tiny_flux):
    """Random parts of random shapes and types on few modules: never another exception, and what is read can be used."""
    generator = random.Random(0)
    modules = (
        "double_blocks.0.img_attn.qkv",
        "transformer_blocks.0.attn.to_k",
        OUT,
        "img_in",
        "lora_te3_encoder_final_layer_norm",
    )
    modules += ("single_blocks.1.norm.key_norm", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", "txt_in")
    ends = [end for role, ends in ROLES.items() for end in ends[:1]]
    sizes = (0, 1, 2, 64, 128, HIDDEN, 2 * HIDDEN, 3 * HIDDEN)
    read_well = 0
    for _ in range(600):
        tensors = {}
        for _ in range(generator.randint(1, 5)):
            shape = [generator.choice(sizes) for _ in range(generator.choice((0, 1, 2, 2, 2, 2)))]
            shape += generator.choice(([], [], [], [1, 1], [3, 3] if shape and shape[0] < 9 else []))
            dtype = generator.choice((torch.float32, torch.bfloat16, torch.int64))
            tensors[generator.choice(modules) + generator.choice(ends)] = torch.ones(shape, dtype=dtype)
        if generator.random() < 0.7:  # something that fits
            up, down = torch.ones(HIDDEN, 2), torch.ones(2, HIDDEN)
            tensors |= {f"{modules[1]}.lora_up.weight": up, f"{modules[1]}.lora_down.weight": down}
        try:
            lora = read(tensors)
            read_well += 1
            for name in {f"{record.module}.weight" for record in lora.records} & tiny_flux.keys():
                assert fused(name, tiny_flux[name].float(), [(lora, 0.5)]).isfinite().all()
        except UserError as error:
            assert "\n" not in str(error)
    assert read_well > 50


def test_endless_prefixes(read):
    """A name is a string of the file: its length must cost nothing."""
    long = "model." * 100_000
    assert read({**GOOD, f"{long}{MODULE}.diff": torch.ones(1)}).unused == [f"{long}{MODULE}.diff"]
