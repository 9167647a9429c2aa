"""Every model in every layout, as its library saves it, read back in canonical names: value by value."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.converters.checkpoint import load, open_checkpoint
from flux_quant.converters.component import Component, components, open_component
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.formats import FORMATS
from flux_quant.loading import load_clip, load_flux, load_t5, load_vae

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # within diffusers
Tensors = dict[str, Tensor]
FLUX = FluxConfig(
    in_channels=64, out_channels=64, hidden=64, head_dim=32, mlp=256, context=48, pooled=40,
    double_blocks=2, single_blocks=3, guidance=True,
)  # fmt: skip
VAE = dict(
    block_out_channels=(8, 16, 16),
    norm_num_groups=2,
    layers_per_block=1,
    latent_channels=16,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
SDXL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 32, 64),
    transformer_layers_per_block=(1, 2, 3),
    attention_head_dim=(2, 2, 4),
    cross_attention_dim=24,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
    use_linear_projection=True,
    norm_num_groups=8,
)
REFINER = SDXL | dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(32, 32, 64, 64),
    transformer_layers_per_block=2,
    attention_head_dim=(2, 2, 4, 4),
)


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    return model.eval()


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return randomised(FluxTransformer2DModel(**FLUX.diffusers()))


def unet(**config: object) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return randomised(UNet2DConditionModel(**config))


def vae() -> nn.Module:
    from diffusers import AutoencoderKL

    return randomised(AutoencoderKL(**VAE))


def t5(full: bool = False) -> nn.Module:
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return randomised((T5ForConditionalGeneration if full else T5EncoderModel)(config))


def clip(projection: bool = False) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=9, projection_dim=64, bos_token_id=48, eos_token_id=49, pad_token_id=49,
    )  # fmt: skip
    return randomised((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def values(reader: Component) -> Tensors:
    return {name: load(reader, name) for name in reader.tensors}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.float()), name


def in_bfl_names(model: nn.Module) -> Tensors:
    """Written by hand from the modules of diffusers' model: the judge of our table."""
    state: Tensors = {}

    def put(name: str, *modules: nn.Module) -> None:
        for kind in ("weight", "bias"):
            if all(getattr(module, kind, None) is not None for module in modules):
                state[f"{name}.{kind}"] = torch.cat([getattr(module, kind) for module in modules])

    def norm(name: str, module: nn.Module) -> None:
        state[f"{name}.scale"] = module.weight

    put("img_in", model.x_embedder)
    put("txt_in", model.context_embedder)
    embed = model.time_text_embed
    for name, part in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items():
        put(f"{name}_in.in_layer", getattr(embed, f"{part}_embedder").linear_1)
        put(f"{name}_in.out_layer", getattr(embed, f"{part}_embedder").linear_2)
    for i, block in enumerate(model.transformer_blocks):
        name, attn = f"double_blocks.{i}", block.attn
        put(f"{name}.img_mod.lin", block.norm1.linear)
        put(f"{name}.txt_mod.lin", block.norm1_context.linear)
        put(f"{name}.img_attn.qkv", attn.to_q, attn.to_k, attn.to_v)
        put(f"{name}.txt_attn.qkv", attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        put(f"{name}.img_attn.proj", attn.to_out[0])
        put(f"{name}.txt_attn.proj", attn.to_add_out)
        norm(f"{name}.img_attn.norm.query_norm", attn.norm_q)
        norm(f"{name}.img_attn.norm.key_norm", attn.norm_k)
        norm(f"{name}.txt_attn.norm.query_norm", attn.norm_added_q)
        norm(f"{name}.txt_attn.norm.key_norm", attn.norm_added_k)
        for stream, layers in {"img": block.ff, "txt": block.ff_context}.items():
            put(f"{name}.{stream}_mlp.0", layers.net[0].proj)
            put(f"{name}.{stream}_mlp.2", layers.net[2])
    for i, block in enumerate(model.single_transformer_blocks):
        name = f"single_blocks.{i}"
        put(f"{name}.modulation.lin", block.norm.linear)
        put(f"{name}.linear1", block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        put(f"{name}.linear2", block.proj_out)
        norm(f"{name}.norm.query_norm", block.attn.norm_q)
        norm(f"{name}.norm.key_norm", block.attn.norm_k)
    put("final_layer.linear", model.proj_out)
    for kind in ("weight", "bias"):
        scale, shift = getattr(model.norm_out.linear, kind).chunk(2)
        state[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
    return {name: tensor.detach() for name, tensor in state.items()}


@pytest.fixture(scope="module")
def flux_model() -> nn.Module:
    return flux()


@pytest.fixture(scope="module")
def flux_folder(flux_model, tmp_path_factory) -> Path:
    """Sharded, with an index, as diffusers saves it. Read it, never write it."""
    folder = tmp_path_factory.mktemp("sharded")
    flux_model.save_pretrained(folder, max_shard_size="300KB")
    return folder


def test_diffusers_folder(flux_model, flux_folder, tmp_path):
    """One file or shards: named by the folder, the index, any shard, the file."""
    flux_model.save_pretrained(tmp_path / "one")
    shards = sorted(flux_folder.glob("*.safetensors"))
    assert len(shards) > 3
    places = [tmp_path / "one", tmp_path / "one" / "diffusion_pytorch_model.safetensors", flux_folder]
    places += [flux_folder / "diffusion_pytorch_model.safetensors.index.json", shards[0], shards[2]]
    for path in places:
        with open_component(path, "FLUX.1") as reader:
            assert (reader.family.variant, reader.family.naming) == ("dev", "diffusers")
            assert not reader.ignored and not reader.quantized and not reader.foreign
            assert_same(values(reader), in_bfl_names(flux_model))


@torch.no_grad()
def test_engine_from_a_diffusers_folder(flux_model, flux_folder):
    generator = torch.Generator().manual_seed(1)
    img, txt, pooled = (torch.randn(1, *shape, generator=generator) for shape in ((6, 64), (5, 48), (40,)))
    positions = torch.tensor([[0, y, x] for y in range(2) for x in range(3)]).float()
    rest = {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5])}
    ids = {"img_ids": positions, "txt_ids": torch.zeros(5, 3)}
    judged = flux_model(img, encoder_hidden_states=txt, pooled_projections=pooled, **rest, **ids).sample
    ours = load_flux(flux_folder)(img=img, txt=txt, pooled=pooled, **rest, **ids)
    torch.testing.assert_close(ours, judged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format_name", ["q8_0", "q4_0", "fp8", "fp8_plain", "f16"])
def test_packed_rows_are_joined_and_swapped_exactly(format_name, tmp_path, flux_model):
    """Quantized files in diffusers names: the packed rows of q, k, v below each other are those of qkv."""
    fmt, state = FORMATS[format_name], flux_model.state_dict()
    content = {}
    for name, tensor in state.items():
        used = fmt if tensor.ndim == 2 and fmt.fits(tensor.shape) else FORMATS["f32"]
        parts = used.pack(tensor.clone())
        if format_name == "fp8" and "attn.to_" in name and len(parts) == 2 and "transformer_blocks.0" in name:
            scale = torch.tensor(2.0**-11)  # the same for q, k, v
            parts = (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale
        content[name] = TensorInfo(name, tuple(tensor.shape), used.name), parts
    path = tmp_path / ("x.gguf" if fmt.block > 1 else "x.safetensors")
    with create_checkpoint(path, [info for info, _ in content.values()], {}) as writer:
        for name, (_, parts) in content.items():
            writer.write(name, parts)
    unpacked = {name: FORMATS[info.format].unpack(*parts) for name, (info, parts) in content.items()}
    judge = flux()
    judge.load_state_dict(unpacked)
    with open_component(path, "FLUX.1") as reader:
        assert_same(values(reader), in_bfl_names(judge))
        qkv = [reader.tensors[f"double_blocks.{i}.img_attn.qkv.weight"].format for i in (0, 1)]
        assert qkv == ([format_name] * 2 if format_name != "fp8" else ["fp8", "f32"])
        assert reader.quantized == ({format_name} if format_name != "f16" else set())
        assert reader.nbytes("double_blocks.1.img_attn.qkv.weight") == 3 * fmt.nbytes((64, 64))
    load_flux(path)


def test_nothing_is_copied_that_lies_there(tiny_flux_file):
    reader = open_component(tiny_flux_file, "FLUX.1")
    for name in ("img_in.weight", "single_blocks.1.linear1.weight"):
        (first,), (second,) = reader.read(name), reader.read(name)
        assert first.data_ptr() == second.data_ptr()


# --- Text encoders, autoencoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["encoder", "with-decoder"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one", "shards"])
def test_t5(tmp_path, full, shard):
    model = t5(full)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    encoder = {n: p for n, p in model.state_dict().items() if n.startswith(("shared.", "encoder."))}
    encoder.pop("encoder.embed_tokens.weight", None)
    with open_component(tmp_path, "T5 encoder") as reader:
        assert_same(values(reader), encoder)
        assert any(name.startswith("decoder.") for name in reader.ignored) == full
    ids = torch.tensor([[3, 7, 1]])
    with torch.no_grad():
        expected = model.get_encoder()(ids).last_hidden_state
        torch.testing.assert_close(load_t5(tmp_path)(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_t5_of_older_files(tmp_path):
    """Both names of the embedding, or only the other one."""
    state = {n: p.clone() for n, p in t5().state_dict().items() if n != "encoder.embed_tokens.weight"}
    copy = {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    save_file(state | copy, tmp_path / "both.safetensors")
    save_file({n: p for n, p in state.items() if n != "shared.weight"} | copy, tmp_path / "other.safetensors")
    for name, ignored in (("both", ("encoder.embed_tokens.weight",)), ("other", ())):
        with open_component(tmp_path / f"{name}.safetensors", "T5 encoder") as reader:
            assert reader.ignored == ignored
            assert_same(values(reader), state)


def test_t5_of_llama_cpp(tmp_path):
    from gguf import MODEL_ARCH, get_tensor_name_map

    state = {n: p for n, p in t5().state_dict().items() if n != "encoder.embed_tokens.weight"}
    names = get_tensor_name_map(MODEL_ARCH.T5ENCODER, 2)
    theirs = {names.get_name(n, try_suffixes=(".weight",)): p for n, p in state.items()}
    infos = [TensorInfo(n, tuple(p.shape), "f32") for n, p in theirs.items()]
    with create_checkpoint(tmp_path / "t5.gguf", infos, {}) as writer:
        for name, tensor in theirs.items():
            writer.write(name, (tensor,))
    with open_component(tmp_path / "t5.gguf", "T5 encoder") as reader:
        assert reader.family.naming == "llama.cpp" and not reader.ignored
        assert_same(values(reader), state)


def in_clip_names(model: nn.Module) -> Tensors:
    return {n if n.startswith("text_") else f"text_model.{n}": p for n, p in model.state_dict().items()}


def test_clip(tmp_path):
    """As transformers saves it today and as it did before, with ids of positions; and what the loader makes of it."""
    model = clip()
    model.save_pretrained(tmp_path / "new")
    positions = {"text_model.embeddings.position_ids": torch.arange(9)}
    save_file(in_clip_names(model) | positions, tmp_path / "old.safetensors")
    for path in (tmp_path / "new", tmp_path / "old.safetensors"):
        with open_component(path, "CLIP-L") as reader:
            assert_same(values(reader), in_clip_names(model))
        ids = torch.tensor([[48, 5, 6, 49]])
        with torch.no_grad():
            ours, expected = load_clip(path, end_of_text=49)(ids).pooler_output, model(ids).pooler_output
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_clip_of_openai(tmp_path):
    """Fused projections and a transposed matrix, judged by diffusers' converter."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    generator = torch.Generator().manual_seed(0)
    width, layer = 64, "transformer.resblocks.{}."
    shapes = {"token_embedding.weight": (50, width), "positional_embedding": (9, width), "text_projection": (width, 40)}
    shapes |= {f"ln_final.{kind}": (width,) for kind in ("weight", "bias")}
    for i in range(2):
        inner = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        for name, rows, columns in (("attn.out_proj", 64, 64), ("mlp.c_fc", 96, 64), ("mlp.c_proj", 64, 96)):
            inner |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
        inner |= {f"{name}.{kind}": (width,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {layer.format(i) + name: shape for name, shape in inner.items()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(state | {"logit_scale": torch.tensor(4.6)}, tmp_path / "clip.safetensors")
    square = state | {"text_projection": torch.zeros(width, 1)}  # its first dimension is taken for the width there
    expected = convert_open_clip_checkpoint(clip(), square, prefix="")
    expected |= {"text_projection.weight": state["text_projection"].t(), "logit_scale": torch.tensor(4.6)}
    reader = open_component(tmp_path / "clip.safetensors", "CLIP-L")
    assert reader.family.naming == "OpenAI" and not reader.ignored
    assert_same(values(reader), expected)
    assert reader.nbytes("text_model.encoder.layers.0.self_attn.k_proj.weight") == 4 * width * width


def test_vae(tmp_path):
    """diffusers' folder; its converter from BFL names is the judge."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = vae()
    model.save_pretrained(tmp_path)
    with open_component(tmp_path, "VAE") as reader:
        assert not reader.ignored and reader.family.naming == "diffusers"
        bfl = values(reader)
    assert "decoder.up.2.upsample.conv.weight" in bfl and bfl["encoder.mid.attn_1.q.weight"].ndim == 4
    assert_same(convert_ldm_vae_checkpoint(bfl, model.config), model.state_dict())
    assert_same(dict(load_vae(tmp_path).state_dict()), model.state_dict())


def test_packed_values_that_change_their_shape(tmp_path):
    """Blocks lie along rows: a matrix that becomes a convolution, or is turned, is unpacked."""
    state = {name: tensor.contiguous() for name, tensor in vae().state_dict().items()}
    fmt, content = FORMATS["q8_0"], {}
    for name, tensor in state.items():
        rows = torch.nn.functional.pad(tensor, (0, 16)).repeat(2, 1) if ".to_" in name and tensor.ndim == 2 else tensor
        used = fmt if rows.shape == (32, 32) else FORMATS["f32"]
        content[name] = TensorInfo(name, tuple(rows.shape), used.name), used.pack(rows)
    with create_checkpoint(tmp_path / "vae.gguf", [info for info, _ in content.values()], {}) as writer:
        for name, (_, parts) in content.items():
            writer.write(name, parts)
    with open_component(tmp_path / "vae.gguf", "VAE") as reader:
        name = "decoder.mid.attn_1.k.weight"
        assert reader.tensors[name] == TensorInfo(name, (32, 32, 1, 1), "f32") and reader.quantized == {"q8_0"}
        assert reader.stored_as(name) == "q8_0" and reader.nbytes(name) == 32 * 34
        stored = fmt.unpack(*content["decoder.mid_block.attentions.0.to_k.weight"][1])
        assert torch.equal(load(reader, name)[:, :, 0, 0], stored)


# --- ControlNet, Redux, SDXL ------------------------------------------------------------------------------------------


def test_controlnet(tmp_path):
    from diffusers import FluxControlNetModel

    sizes = {key: value for key, value in FLUX.diffusers().items() if key != "out_channels"}
    model = randomised(FluxControlNetModel(**sizes, num_mode=4))
    model.save_pretrained(tmp_path)
    reader = open_component(tmp_path, "FLUX ControlNet")
    assert reader.family.variant == "Union" and not reader.ignored
    assert_same(values(reader), model.state_dict())


def test_redux(tmp_path):
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    model = randomised(ReduxImageEncoder(redux_dim=12, txt_in_features=16))
    model.save_pretrained(tmp_path)
    assert_same(values(open_component(tmp_path, "FLUX Redux")), model.state_dict())


@pytest.mark.parametrize(("config", "variant"), [(SDXL, "base"), (REFINER, "refiner")], ids=["base", "refiner"])
def test_sdxl(tmp_path, config, variant):
    """diffusers' folder against diffusers' converter of single files; then the single file itself."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = unet(**config)
    model.save_pretrained(tmp_path / "unet", max_shard_size="1MB")
    with open_component(tmp_path / "unet", "SDXL") as reader:
        assert (reader.family.variant, reader.family.naming) == (variant, "diffusers") and not reader.ignored
        sgm = values(reader)
    single = {f"model.diffusion_model.{name}": tensor for name, tensor in sgm.items()}
    layers = {"layers_per_block": 2, **config}
    assert_same(convert_ldm_unet_checkpoint(single, layers), model.state_dict())
    text = {f"conditioner.embedders.0.transformer.{n}": p.clone() for n, p in in_clip_names(clip()).items()}
    names = ("encoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight")
    other = {f"first_stage_model.{name}": torch.ones(4, 3, 3, 3) for name in names}
    save_file(single | text | other, tmp_path / "sdxl.safetensors")
    with open_checkpoint(tmp_path / "sdxl.safetensors") as reader:
        found = {component.family.name: component for component in components(reader)}
        assert found.keys() == {"SDXL", "CLIP-L", "VAE"}
        assert (found["SDXL"].family.variant, found["SDXL"].family.naming) == (variant, "SGM")
        assert_same(values(found["SDXL"]), sgm)
        assert_same(values(found["CLIP-L"]), in_clip_names(clip()))
