"""Tables of names, judged by the libraries whose names they are: on full-size models, without values."""

import pytest
import torch
from torch import nn

from flux_quant.errors import UserError
from flux_quant.families import Family, identify, identify_all
from flux_quant.layouts import CANONICAL, TABLES
from flux_quant.naming import Stored, from_stored, gather, spread, to_stored

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # within diffusers

Shapes = dict[str, tuple[int, ...]]

SDXL = dict(  # as in the repositories' config.json
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
    use_linear_projection=True,
)
REFINER = SDXL | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers_per_block=4,
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    projection_class_embeddings_input_dim=2560,
)
VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=16,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    use_quant_conv=False,
    use_post_quant_conv=False,
)


def diffusers(name: str, **config: object) -> nn.Module:
    import diffusers
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    return (ReduxImageEncoder if name == "ReduxImageEncoder" else getattr(diffusers, name))(**config)


def t5(full: bool = False) -> nn.Module:
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, num_decoder_layers=2, vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return (T5ForConditionalGeneration if full else T5EncoderModel)(config)


def clip(width: int = 768) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
    return CLIPTextModelWithProjection(config)


MODELS = {  # id -> (what makes the model, its family and variant in its library's names, tensors in canonical names)
    "FLUX.1-dev": (lambda: diffusers("FluxTransformer2DModel", guidance_embeds=True), ("FLUX.1", "dev"), 780),
    "FLUX.1-schnell": (lambda: diffusers("FluxTransformer2DModel"), ("FLUX.1", "schnell"), 776),
    "Fill": (
        lambda: diffusers("FluxTransformer2DModel", guidance_embeds=True, in_channels=384, out_channels=64),
        ("FLUX.1", "Fill"),
        780,
    ),
    "ControlNet": (
        lambda: diffusers("FluxControlNetModel", num_layers=5, num_single_layers=10, guidance_embeds=True),
        ("FLUX ControlNet", ""),
        None,
    ),
    "Union": (
        lambda: diffusers("FluxControlNetModel", num_layers=2, num_single_layers=0, num_mode=10),
        ("FLUX ControlNet", "Union"),
        None,
    ),
    "XLabs-in-diffusers": (
        lambda: diffusers("FluxControlNetModel", num_layers=2, num_single_layers=0, conditioning_embedding_channels=16),
        ("FLUX ControlNet", ""),
        None,
    ),
    "Redux": (lambda: diffusers("ReduxImageEncoder"), ("FLUX Redux", ""), 4),
    "VAE": (lambda: diffusers("AutoencoderKL", **VAE), ("VAE", ""), 244),
    "VAE-of-SDXL": (
        lambda: diffusers(
            "AutoencoderKL", **VAE | dict(latent_channels=4, use_quant_conv=True, use_post_quant_conv=True)
        ),
        ("VAE", ""),
        248,
    ),
    "SDXL": (lambda: diffusers("UNet2DConditionModel", **SDXL), ("SDXL", "base"), 1680),
    "SDXL-refiner": (lambda: diffusers("UNet2DConditionModel", **REFINER), ("SDXL", "refiner"), 1220),
    "T5": (t5, ("T5 encoder", ""), 219),
    "T5-with-decoder": (lambda: t5(full=True), ("T5 encoder", ""), 219),
    "CLIP-L": (clip, ("CLIP-L", ""), 197),
    "CLIP-G": (lambda: clip(1280), ("CLIP-G", ""), 197),
}


def shapes_of(make) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}


@pytest.fixture(scope="module")
def shapes(request) -> Shapes:
    return shapes_of(MODELS[request.param][0])


@pytest.mark.parametrize(("shapes", "model"), [(name, name) for name in MODELS], ids=MODELS, indirect=["shapes"])
def test_library_names_and_back(shapes, model):
    """Recognised; every stored tensor has its place; the tables are inverse; no canonical name is a stranger."""
    _, (family, variant), count = MODELS[model]
    found = identify(shapes)
    assert found == Family(family, variant, found.naming)
    places = from_stored(found.name, found.naming, shapes)
    canonical = {name: place.full for name, place in places.items()}
    used = {name for place in places.values() for name in place.names}
    unused = {name for name in shapes if not name.startswith(("decoder.", "lm_head.")) or family != "T5 encoder"} - used
    assert unused <= {"encoder.embed_tokens.weight", "text_model.embeddings.position_ids", "embeddings.position_ids"}
    assert count is None or len(places) == count
    assert to_stored(found.name, found.naming, canonical) == places
    assert identify(canonical) == Family(family, variant, CANONICAL[family])
    assert from_stored(family, CANONICAL[family], canonical).keys() == canonical.keys()


@pytest.mark.parametrize(("family", "naming"), [(f, n) for f, tables in TABLES.items() for n in tables])
def test_every_table_both_ways(family, naming):
    """Canonical names of a full-size model -> stored -> canonical: the same places, each stored row used once."""
    model = next(name for name, (_, (known, _), _) in MODELS.items() if known == family)
    library = shapes_of(MODELS[model][0])
    places = from_stored(family, identify(library).naming, library)
    canonical = {name: place.full for name, place in places.items()}
    stored = to_stored(family, naming, canonical)
    shapes: Shapes = {}
    used: dict[str, int] = {}
    for name, place in stored.items():
        for piece, rows in zip(place.names, place.rows, strict=True):
            shapes[piece] = place.shape or (rows, *canonical[name][1:])[: len(canonical[name])]
            used[piece] = used.get(piece, 0) + rows
    assert identify(shapes).naming == naming
    assert from_stored(family, naming, shapes) == stored
    transposed = {name for place in stored.values() if place.transposed for name in place.names}
    assert all(rows == (shapes[name][:1] or (1,))[0] for name, rows in used.items() if name not in transposed)


def test_tables_agree_with_their_list():
    assert TABLES.keys() == CANONICAL.keys() and all(CANONICAL[family] in tables for family, tables in TABLES.items())


@pytest.mark.parametrize("place", [
    Stored(("a",), (6,), (6, 4)),
    Stored(("a", "b", "c"), (2, 2, 2), (6, 4)),
    Stored(("a",), (6,), (6, 4), swapped=True),
    Stored(("a",), (6,), (6, 4), (4, 6), transposed=True),
    Stored(("a",), (6,), (6, 4, 1, 1), (6, 4)),
    Stored(("a",), (6,), (6,)),
    Stored(("a",), (1,), ()),
], ids=str)  # fmt: skip
def test_values_follow_the_places(place):
    tensor = torch.randn(place.full, generator=torch.Generator().manual_seed(0))
    stored = spread(place, tensor)
    assert set(stored) == set(place.names)
    assert all(place.shape in (None, tuple(piece.shape)) for piece in stored.values())
    assert torch.equal(gather(place, stored), tensor)
    if place.swapped:
        assert torch.equal(stored["a"][:3], tensor[3:])


def test_a_third_of_the_rows():
    fused = torch.arange(18.0).view(9, 2)
    place = Stored(("a",), (3,), (3, 2), (9, 2), start=6)
    assert torch.equal(gather(place, {"a": fused}), fused[6:])


def test_llama_cpp_names_of_t5():
    """gguf's own map from Hugging Face names, which llama.cpp's converter uses."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    shapes = shapes_of(t5)
    shapes.pop("encoder.embed_tokens.weight", None)
    names = get_tensor_name_map(MODEL_ARCH.T5ENCODER, 24)
    places = to_stored("T5 encoder", "llama.cpp", shapes)
    assert {name: place.names[0] for name, place in places.items()} == {
        name: names.get_name(name, try_suffixes=(".weight",)) for name in shapes
    }


BLOCK = "single_transformer_blocks.0.attn.to_{}.weight"
PROBLEMS = {
    "incomplete": ({BLOCK.format(c): (4, 4) for c in "qv"}, "single_transformer_blocks.0.attn.to_k.weight is missing"),
    "do not fit": (
        {BLOCK.format("q"): (4, 4), BLOCK.format("k"): (4, 5), BLOCK.format("v"): (4, 4)}
        | {"single_transformer_blocks.0.proj_mlp.weight": (8, 4)},
        "do not fit below each other",
    ),
    "no halves": ({"norm_out.linear.weight": (7, 4)}, "no two halves"),
}


@pytest.mark.parametrize(("shapes", "message"), PROBLEMS.values(), ids=PROBLEMS)
def test_tensors_that_cannot_be_put_together(shapes, message):
    with pytest.raises(UserError, match=message):
        from_stored("FLUX.1", "diffusers", shapes)


def test_other_problems():
    norm = "single_blocks.0.norm.key_norm."
    with pytest.raises(UserError, match="are the same tensor"):
        from_stored("FLUX.1", "BFL", {norm + "scale": (8,), norm + "weight": (8,)})
    with pytest.raises(UserError, match="three equal parts"):
        from_stored("CLIP-L", "OpenAI", {"transformer.resblocks.0.attn.in_proj_bias": (7,)})
    with pytest.raises(UserError, match="has no place in a VAE"):
        to_stored("VAE", "diffusers", {"img_in.weight": (4, 4)})
    with pytest.raises(UserError, match="SDXL in llama.cpp names is not supported"):
        to_stored("SDXL", "llama.cpp", {})


RELATIVES = {  # made of a few names: what tells them apart
    "XLabs": (
        {"controlnet_blocks.0.weight": (8, 8), "double_blocks.0.img_attn.norm.key_norm.scale": (8,)}
        | {"img_in.weight": (8, 64), "vector_in.in_layer.weight": (8, 8)},
        ("XLabs ControlNet", "", "BFL"),
    ),
    "Alimama": (
        {"controlnet_x_embedder.weight": (3072, 68), "transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072)}
        | {"time_text_embed.text_embedder.linear_1.weight": (3072, 768)},
        ("FLUX ControlNet", "inpainting", "diffusers"),
    ),
    "SigLIP": (
        {"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8), "text_model.head.weight": (8, 8)},
        ("SigLIP", "", "Hugging Face"),
    ),
    "SD-2-unclip": (
        {"label_emb.0.0.weight": (8, 8), "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (8, 8)},
        None,
    ),
}


@pytest.mark.parametrize(("shapes", "expected"), RELATIVES.values(), ids=RELATIVES)
def test_relatives(shapes, expected):
    assert identify(shapes) == (expected and Family(*expected))


@pytest.mark.parametrize("name", ["QwenImageControlNetModel", "SD3ControlNetModel"])
def test_other_controlnets_are_not_flux(name):
    assert identify(shapes_of(lambda: diffusers(name))) is None


def test_umt5_is_not_t5():
    from transformers import UMT5Config, UMT5EncoderModel

    found = identify(shapes_of(lambda: UMT5EncoderModel(UMT5Config(num_layers=2))))
    assert found == Family("UMT5 encoder", "", "Hugging Face")


def test_components_by_prefix():
    shapes = {f"text_encoder/{name}": shape for name, shape in shapes_of(clip).items()}
    shapes |= {f"vae/{name}": shape for name, shape in shapes_of(lambda: diffusers("AutoencoderKL", **VAE)).items()}
    assert {prefix: family.name for prefix, family in identify_all(shapes).items()} == {
        "text_encoder/": "CLIP-L",
        "vae/": "VAE",
    }
