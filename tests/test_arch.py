"""The architecture tables against full-size models on the meta device, and what tells families apart."""

import pytest
import torch
from torch import Tensor

from flux_quant import arch, naming
from flux_quant.arch import FluxConfig
from flux_quant.configs import vae_config
from flux_quant.errors import UserError
from flux_quant.families import Family, identify

Shape = tuple[int, ...]

DEV = FluxConfig(
    in_channels=64,
    out_channels=64,
    hidden=3072,
    head_dim=128,
    mlp=12288,
    context=4096,
    pooled=768,
    double_blocks=19,
    single_blocks=38,
    guidance=True,
)


def variant(**changes: object) -> FluxConfig:
    return FluxConfig(**vars(DEV) | changes)


CONFIGS = {
    "dev": DEV,
    "schnell": variant(guidance=False),
    "Fill": variant(in_channels=384),
    "Depth": variant(in_channels=128),
    "tiny": variant(hidden=256, head_dim=64, mlp=1024, context=256, pooled=128, double_blocks=2, single_blocks=5),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def linear(name: str, rows: int, columns: int) -> dict[str, Shape]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def flux_shapes(c: FluxConfig) -> dict[str, Shape]:
    """BFL names and shapes, written from black-forest-labs/flux: model.py and modules/layers.py."""
    h = c.hidden
    shapes = linear("img_in", h, c.in_channels) | linear("txt_in", h, c.context)
    for name, width in ({"time_in": 256, "vector_in": c.pooled} | ({"guidance_in": 256} if c.guidance else {})).items():
        shapes |= linear(f"{name}.in_layer", h, width) | linear(f"{name}.out_layer", h, h)
    for i in range(c.double_blocks):
        for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
            shapes |= linear(f"{stream}_mod.lin", 6 * h, h)
            shapes |= linear(f"{stream}_attn.qkv", 3 * h, h) | linear(f"{stream}_attn.proj", h, h)
            shapes |= {f"{stream}_attn.norm.{which}_norm.scale": (c.head_dim,) for which in ("query", "key")}
            shapes |= linear(f"{stream}_mlp.0", c.mlp, h) | linear(f"{stream}_mlp.2", h, c.mlp)
    for i in range(c.single_blocks):
        block = f"single_blocks.{i}"
        shapes |= linear(f"{block}.modulation.lin", 3 * h, h)
        shapes |= linear(f"{block}.linear1", 3 * h + c.mlp, h) | linear(f"{block}.linear2", h, h + c.mlp)
        shapes |= {f"{block}.norm.{which}_norm.scale": (c.head_dim,) for which in ("query", "key")}
    shapes |= linear("final_layer.linear", c.out_channels, h)
    return shapes | linear("final_layer.adaLN_modulation.1", 2 * h, h)


def vae_shapes(channels: int = 128, factors: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2) -> dict[str, Shape]:
    """BFL names and shapes, written from black-forest-labs/flux: modules/autoencoder.py."""
    shapes: dict[str, Shape] = {}

    def conv(name: str, rows: int, columns: int, side: int = 3) -> None:
        shapes.update({f"{name}.weight": (rows, columns, side, side), f"{name}.bias": (rows,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def resnet(name: str, columns: int, rows: int) -> None:
        norm(f"{name}.norm1", columns)
        conv(f"{name}.conv1", rows, columns)
        norm(f"{name}.norm2", rows)
        conv(f"{name}.conv2", rows, rows)
        if rows != columns:
            conv(f"{name}.nin_shortcut", rows, columns, 1)

    def middle(side: str, width: int) -> None:
        resnet(f"{side}.mid.block_1", width, width)
        norm(f"{side}.mid.attn_1.norm", width)
        for projection in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{projection}", width, width, 1)
        resnet(f"{side}.mid.block_2", width, width)

    widths = [channels * factor for factor in factors]
    top = len(widths) - 1
    conv("encoder.conv_in", channels, 3)
    for level, width in enumerate(widths):
        for i in range(blocks):
            resnet(f"encoder.down.{level}.block.{i}", widths[max(level - 1, 0)] if i == 0 else width, width)
        if level < top:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder", widths[-1])
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", 2 * 16, widths[-1])
    conv("decoder.conv_in", widths[-1], 16)
    middle("decoder", widths[-1])
    for level, width in enumerate(widths):
        for i in range(blocks + 1):
            resnet(f"decoder.up.{level}.block.{i}", widths[min(level + 1, top)] if i == 0 else width, width)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", channels)
    conv("decoder.conv_out", 3, channels)
    return shapes


def on_meta(shapes: dict[str, Shape]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def diffusers_shapes(config: FluxConfig) -> dict[str, Shape]:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return shapes_of(FluxTransformer2DModel(**config.diffusers()).state_dict())


def test_the_expectation_itself():
    shapes = flux_shapes(DEV)
    assert len(shapes) == 780 and len(flux_shapes(CONFIGS["schnell"])) == 776
    assert sum(tensor.numel() for tensor in on_meta(shapes).values()) == 11_901_408_320
    assert len(vae_shapes()) == 244


@configs
def test_config_is_read_off_the_shapes(config):
    assert FluxConfig.from_shapes(flux_shapes(config)) == config


def test_derived_dimensions():
    assert DEV.heads == 24 and DEV.rope_axes == (16, 56, 56)
    assert CONFIGS["tiny"].heads == 4 and sum(CONFIGS["tiny"].rope_axes) == 64


def test_incomplete_transformer_is_a_user_error():
    shapes = flux_shapes(CONFIGS["tiny"])
    del shapes["txt_in.weight"]
    with pytest.raises(UserError, match=r"txt_in\.weight"):
        FluxConfig.from_shapes(shapes)


@configs
def test_key_map_covers_the_diffusers_model_exactly(config):
    assert shapes_of(naming.to_diffusers(on_meta(flux_shapes(config)))) == diffusers_shapes(config)


def test_key_map_produces_every_name_once():
    produced = [name.format(0) for names in arch.KEY_MAP.values() for name in names]
    assert len(produced) == len(set(produced))
    assert len(arch.KEY_MAP) == 29


def test_key_map_keeps_the_numbers():
    """Rows in order, every value once; only the halves of the final modulation change places."""
    config = CONFIGS["tiny"]
    tensors = {name: torch.arange(shape[0]).float() for name, shape in flux_shapes(config).items()}
    out = naming.to_diffusers(tensors)
    h = config.hidden
    q, k, v, mlp = (
        out[f"single_transformer_blocks.4.{name}.weight"]
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    )
    assert [part[0] for part in (q, k, v, mlp)] == [0, h, 2 * h, 3 * h] and mlp[-1] == 3 * h + config.mlp - 1
    assert out["transformer_blocks.1.attn.add_v_proj.bias"][0] == 2 * h
    assert torch.equal(out["norm_out.linear.weight"], torch.cat([torch.arange(h, 2 * h), torch.arange(h)]).float())
    assert sum(len(tensor) for tensor in out.values()) == sum(len(tensor) for tensor in tensors.values())


def test_blocks():
    names = list(flux_shapes(DEV))
    blocks = {arch.block_of(name) for name in names}
    assert len(blocks) == 19 + 38 + 1
    assert arch.block_of("double_blocks.13.img_mod.lin.weight") == "double_blocks.13"
    assert arch.block_of("final_layer.linear.bias") == "outside blocks"


@pytest.mark.parametrize("size", [{}, {"channels": 32, "factors": (1, 2, 2, 3), "blocks": 1}], ids=["full", "small"])
def test_vae_covers_the_diffusers_model_exactly(size):
    from diffusers import AutoencoderKL

    tensors = on_meta(vae_shapes(**size))
    with torch.device("meta"):
        expected = AutoencoderKL(**vae_config(shapes_of(tensors)))
    assert shapes_of(naming.vae_to_diffusers(tensors)) == shapes_of(expected.state_dict())
    assert shapes_of(naming.vae_from_diffusers(naming.vae_to_diffusers(tensors))) == shapes_of(tensors)


def test_vae_constants_are_those_of_flux():
    config = vae_config(vae_shapes())
    assert (config["scaling_factor"], config["shift_factor"], config["latent_channels"]) == (0.3611, 0.1159, 16)


def diffusers_model(name: str) -> dict[str, Shape]:
    import diffusers

    with torch.device("meta"):
        return shapes_of(getattr(diffusers, name)().state_dict())


T5_HF = {
    "shared.weight": (32128, 4096),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096),
    "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": (10240, 4096),
}
T5_LLAMA_CPP = {"token_embd.weight": (32128, 4096), "enc.blk.0.attn_q.weight": (4096, 4096)}
CLIP = {"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)}
FLUX2 = {"double_stream_modulation_img.lin.weight": (36864, 6144), "img_in.weight": (6144, 128)}
CHROMA = {"distilled_guidance_layer.norms.0.scale": (5120,)} | {
    name: shape for name, shape in flux_shapes(CONFIGS["schnell"]).items() if not name.startswith("vector_in")
}
FAMILIES = {
    "dev": (flux_shapes(DEV), ("FLUX.1", "dev", "BFL")),
    "schnell": (flux_shapes(CONFIGS["schnell"]), ("FLUX.1", "schnell", "BFL")),
    "Fill": (flux_shapes(CONFIGS["Fill"]), ("FLUX.1", "Fill", "BFL")),
    "Depth": (flux_shapes(CONFIGS["Depth"]), ("FLUX.1", "Depth or Canny", "BFL")),
    "other inputs": (flux_shapes(variant(in_channels=196)), ("FLUX.1", "unknown (196 input channels)", "BFL")),
    "tiny": (flux_shapes(CONFIGS["tiny"]), ("FLUX.1", "dev", "BFL")),
    "T5": (T5_HF, ("T5 encoder", "", "Hugging Face")),
    "T5 of llama.cpp": (T5_LLAMA_CPP, ("T5 encoder", "", "llama.cpp")),
    "CLIP": (CLIP, ("CLIP-L", "", "Hugging Face")),
    "VAE": (vae_shapes(), ("VAE", "", "BFL")),
    "VAE of diffusers": (shapes_of(naming.vae_to_diffusers(on_meta(vae_shapes()))), ("VAE", "", "diffusers")),
    "FLUX.2": (FLUX2 | flux_shapes(DEV), ("FLUX.2", "", "BFL")),
    "Chroma": (CHROMA, ("Chroma", "", "BFL")),
    "nothing": ({}, None),
    "junk": ({"weight": (3, 3), "model.layers.0.mlp.up_proj.weight": (8, 8)}, None),
}


@pytest.mark.parametrize(("shapes", "expected"), FAMILIES.values(), ids=[name.replace(" ", "-") for name in FAMILIES])
def test_identify(shapes, expected):
    assert identify(shapes) == (expected and Family(*expected))


@pytest.mark.parametrize("name", ["dev", "schnell", "Fill", "Depth"])
def test_identify_diffusers_naming(name):
    family = identify(diffusers_shapes(CONFIGS[name]))
    assert family == Family("FLUX.1", "Depth or Canny" if name == "Depth" else name, "diffusers")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Flux2Transformer2DModel", "FLUX.2"),
        ("ChromaTransformer2DModel", "Chroma"),
        ("BriaTransformer2DModel", None),
        ("LongCatImageTransformer2DModel", None),
        ("SD3Transformer2DModel", None),
        ("QwenImageTransformer2DModel", None),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_relatives_in_diffusers_are_not_flux1(name, expected):
    family = identify(diffusers_model(name))
    assert family == (expected and Family(expected, "", "diffusers"))
