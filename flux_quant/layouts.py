"""What each model's tensors are called in every layout in use: tables of rows (canonical name, stored names).

A model has canonical names: those of its first publisher. A row says where a canonical tensor lies in another layout:
under one name, as rows of several tensors, as a third of the rows of one. `naming` reads the tables in both directions.

Sources: black-forest-labs/flux, diffusers' `convert_flux_to_diffusers.py`, `convert_ldm_vae_checkpoint` and
`convert_ldm_unet_checkpoint`, llama.cpp's T5 tensor names, openai/CLIP `model.py`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from flux_quant.errors import UserError


@dataclass(frozen=True)
class Row:
    """Patterns: `{}` is a number or a word, `*` at the end is the rest of the name."""

    canonical: str
    stored: tuple[str, ...]
    swapped: bool = False
    third: int | None = None  # which third of the stored rows
    transposed: bool = False
    pointwise: bool = False  # a 1 x 1 convolution, stored as a matrix


Rows = tuple[Row, ...]


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix`, which ends in a dot."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in names if name.startswith(prefix)})


def same(*patterns: str) -> Rows:
    return tuple(Row(pattern, (pattern,)) for pattern in patterns)


def pairs(names: Mapping[str, str], canonical: str = "{}", stored: str = "{}") -> Rows:
    """Rows from pairs of inner names, put into the place of `{}` in both."""
    return tuple(Row(canonical.replace("{}", a, 1), (stored.replace("{}", b, 1),)) for a, b in names.items())


# --- FLUX.1 transformer and ControlNet: BFL's names, diffusers' names -------------------------------------------------

# BFL name -> the diffusers names of its rows, from the top. Every name stands for a weight and, where there is one,
# a bias. `final_layer` holds (shift, scale) where diffusers holds (scale, shift): see SWAPPED_HALVES.
DOUBLE_BLOCK_MAP = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE_BLOCK_MAP = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
OUTER_MAP = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
KEY_MAP: dict[str, tuple[str, ...]] = {
    **OUTER_MAP,
    **{
        f"double_blocks.{{}}.{bfl}": tuple(f"transformer_blocks.{{}}.{name}" for name in names)
        for bfl, names in DOUBLE_BLOCK_MAP.items()
    },
    **{
        f"single_blocks.{{}}.{bfl}": tuple(f"single_transformer_blocks.{{}}.{name}" for name in names)
        for bfl, names in SINGLE_BLOCK_MAP.items()
    },
}
SWAPPED_HALVES = "final_layer.adaLN_modulation.1"
NORMS = tuple(module for module in KEY_MAP if module.endswith("_norm"))

FLUX_BFL = (
    *same(*(f"{module}.scale" for module in NORMS)),
    *(Row(f"{module}.scale", (f"{module}.weight",)) for module in NORMS),  # as ComfyUI saves them
    *same("double_blocks.{}.*", "single_blocks.{}.*", *(f"{module}.*" for module in OUTER_MAP)),
)
FLUX_DIFFUSERS = tuple(
    Row(f"{bfl}.scale", (f"{names[0]}.weight",))
    if bfl in NORMS
    else Row(f"{bfl}.{{}}", tuple(f"{name}.{{}}" for name in names), swapped=bfl == SWAPPED_HALVES)
    for bfl, names in KEY_MAP.items()
)
CONTROLNET = same(
    "x_embedder.*",
    "context_embedder.*",
    "time_text_embed.*",
    "transformer_blocks.{}.*",
    "single_transformer_blocks.{}.*",
    "controlnet_x_embedder.*",
    "controlnet_mode_embedder.*",
    "controlnet_blocks.{}.*",
    "controlnet_single_blocks.{}.*",
    "input_hint_block.*",
)
REDUX = same("redux_up.*", "redux_down.*")

# --- Text encoders ----------------------------------------------------------------------------------------------------

T5_HF = (*same("shared.weight", "encoder.block.{}.*", "encoder.final_layer_norm.weight"),)
T5_BLOCK = {
    "layer.0.SelfAttention.relative_attention_bias.weight": "attn_rel_b.weight",
    "layer.0.SelfAttention.q.weight": "attn_q.weight",
    "layer.0.SelfAttention.k.weight": "attn_k.weight",
    "layer.0.SelfAttention.v.weight": "attn_v.weight",
    "layer.0.SelfAttention.o.weight": "attn_o.weight",
    "layer.0.layer_norm.weight": "attn_norm.weight",
    "layer.1.DenseReluDense.wi_0.weight": "ffn_gate.weight",
    "layer.1.DenseReluDense.wi_1.weight": "ffn_up.weight",
    "layer.1.DenseReluDense.wo.weight": "ffn_down.weight",
    "layer.1.layer_norm.weight": "ffn_norm.weight",
}
T5_LLAMA_CPP = (
    Row("shared.weight", ("token_embd.weight",)),
    Row("encoder.final_layer_norm.weight", ("enc.output_norm.weight",)),
    *(Row(f"encoder.block.{{}}.{hf}", (f"enc.blk.{{}}.{ggml}",)) for hf, ggml in T5_BLOCK.items()),
)

CLIP_LAYER = "text_model.encoder.layers.{}"
CLIP_INNER = ("encoder.layers.{}.*", "final_layer_norm.*", "embeddings.token_embedding.weight")
CLIP_INNER += ("embeddings.position_embedding.weight",)
CLIP_OUTER = same("text_projection.weight", "logit_scale")
CLIP_HF = (*same(*(f"text_model.{name}" for name in CLIP_INNER)), *CLIP_OUTER)
CLIP_BARE = (*(Row(f"text_model.{name}", (name,)) for name in CLIP_INNER), *CLIP_OUTER)
CLIP_OPENAI = (
    Row("text_model.embeddings.token_embedding.weight", ("token_embedding.weight",)),
    Row("text_model.embeddings.position_embedding.weight", ("positional_embedding",)),
    Row("text_projection.weight", ("text_projection",), transposed=True),
    *same("logit_scale"),
    *pairs({"text_model.final_layer_norm.{}": "ln_final.{}"}),
    *(
        Row(f"{CLIP_LAYER}.self_attn.{q}_proj.{{}}", ("transformer.resblocks.{}.attn.in_proj_{}",), third=i)
        for i, q in enumerate("qkv")
    ),
    *(
        Row(f"{CLIP_LAYER}.{hf}.{{}}", (f"transformer.resblocks.{{}}.{openai}.{{}}",))
        for hf, openai in {
            "self_attn.out_proj": "attn.out_proj",
            "layer_norm1": "ln_1",
            "layer_norm2": "ln_2",
            "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items()
    ),
)

# --- Autoencoder ------------------------------------------------------------------------------------------------------

VAE_BFL = same("encoder.*", "decoder.*", "quant_conv.*", "post_quant_conv.*")
VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_VAE_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}  # diffusers before 0.17


def vae_diffusers(names: Collection[str]) -> Rows:
    """The decoder's levels are counted from the other end in diffusers."""
    levels = max(count_blocks(names, "decoder.up."), count_blocks(names, "decoder.up_blocks."))
    blocks = {f"{side}.mid.block_{i + 1}": f"{side}.mid_block.resnets.{i}" for side in SIDES for i in (0, 1)}
    blocks["encoder.down.{}.block.{}"] = "encoder.down_blocks.{}.resnets.{}"
    samplers = {"encoder.down.{}.downsample.*": "encoder.down_blocks.{}.downsamplers.0.*"}
    for i in range(levels):
        blocks[f"decoder.up.{i}.block.{{}}"] = f"decoder.up_blocks.{levels - 1 - i}.resnets.{{}}"
        samplers[f"decoder.up.{i}.upsample.*"] = f"decoder.up_blocks.{levels - 1 - i}.upsamplers.0.*"
    attention = []
    for side in SIDES:
        here, there = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
        attention.append(Row(f"{here}.norm.*", (f"{there}.group_norm.*",)))
        for inner in (VAE_ATTENTION, OLD_VAE_ATTENTION):
            for a, b in inner.items():
                attention.append(Row(f"{here}.{a}.weight", (f"{there}.{b}.weight",), pointwise=True))
                attention.append(Row(f"{here}.{a}.bias", (f"{there}.{b}.bias",)))
    return (
        *attention,
        *(Row(f"{a}.nin_shortcut.*", (f"{b}.conv_shortcut.*",)) for a, b in blocks.items()),
        *(Row(f"{a}.*", (f"{b}.*",)) for a, b in blocks.items()),
        *pairs(samplers, "{}", "{}"),
        *pairs({f"{side}.norm_out.*": f"{side}.conv_norm_out.*" for side in SIDES}),
        *same(*(f"{side}.conv_{end}.*" for side in SIDES for end in ("in", "out"))),
        *same("quant_conv.*", "post_quant_conv.*"),
    )


SIDES = ("encoder", "decoder")

# --- SDXL UNet --------------------------------------------------------------------------------------------------------

SDXL_SGM = same("input_blocks.*", "middle_block.*", "output_blocks.*", "time_embed.*", "label_emb.*", "out.*")
SDXL_OUTER = {
    "input_blocks.0.0.*": "conv_in.*",
    "time_embed.0.*": "time_embedding.linear_1.*",
    "time_embed.2.*": "time_embedding.linear_2.*",
    "label_emb.0.0.*": "add_embedding.linear_1.*",
    "label_emb.0.2.*": "add_embedding.linear_2.*",
    "out.0.*": "conv_norm_out.*",
    "out.2.*": "conv_out.*",
}
SDXL_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def sdxl_diffusers(names: Collection[str]) -> Rows:
    """SGM counts blocks along the network, diffusers by level and kind: the table follows from how many there are."""
    levels, layers, attended = unet_structure(names)
    resnets = {f"middle_block.{2 * i}": f"mid_block.resnets.{i}" for i in (0, 1)}
    others = {"middle_block.1.*": "mid_block.attentions.0.*"}
    for level in range(levels):
        first = 1 + level * (layers + 1)
        for i in range(layers):
            resnets[f"input_blocks.{first + i}.0"] = f"down_blocks.{level}.resnets.{i}"
            others[f"input_blocks.{first + i}.1.*"] = f"down_blocks.{level}.attentions.{i}.*"
        others[f"input_blocks.{first + layers}.0.op.*"] = f"down_blocks.{level}.downsamplers.0.conv.*"
        first = level * (layers + 1)
        place = 2 if level in attended else 1
        others[f"output_blocks.{first + layers}.{place}.conv.*"] = f"up_blocks.{level}.upsamplers.0.conv.*"
        for i in range(layers + 1):
            resnets[f"output_blocks.{first + i}.0"] = f"up_blocks.{level}.resnets.{i}"
            others[f"output_blocks.{first + i}.1.*"] = f"up_blocks.{level}.attentions.{i}.*"
    inner = (Row(f"{a}.{x}.*", (f"{b}.{y}.*",)) for a, b in resnets.items() for x, y in SDXL_RESNET.items())
    return (*pairs(SDXL_OUTER), *inner, *pairs(others))


def unet_structure(names: Collection[str]) -> tuple[int, int, frozenset[int]]:
    """Levels of resolution, resnets per level on the way down, levels on the way up that have attention."""
    if levels := count_blocks(names, "down_blocks."):
        layers = count_blocks(names, "down_blocks.0.resnets.")
        found = {re.match(r"up_blocks\.(\d+)\.attentions\.", name) for name in names}
        return levels, layers, frozenset(int(match[1]) for match in found if match)
    levels = sum(bool(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name)) for name in names) + 1
    layers = count_blocks(names, "input_blocks.") // levels - 1
    found = {re.match(r"output_blocks\.(\d+)\.1\.proj_in\.", name) for name in names}
    return levels, layers, frozenset(int(match[1]) // (layers + 1) for match in found if match)


# --- The tables together ----------------------------------------------------------------------------------------------

Names = Collection[str]
CANONICAL = {  # family -> its own naming
    "FLUX.1": "BFL",
    "FLUX ControlNet": "diffusers",
    "FLUX Redux": "BFL",
    "T5 encoder": "Hugging Face",
    "CLIP-L": "Hugging Face",
    "CLIP-G": "Hugging Face",
    "VAE": "BFL",
    "SDXL": "SGM",
}
CLIP_TABLES = {"Hugging Face": CLIP_HF, "transformers 5": CLIP_BARE, "OpenAI": CLIP_OPENAI}
TABLES: dict[str, dict[str, Rows | Callable[[Names], Rows]]] = {  # family -> naming -> rows, or what makes them
    "FLUX.1": {"BFL": FLUX_BFL, "diffusers": FLUX_DIFFUSERS},
    "FLUX ControlNet": {"diffusers": CONTROLNET},
    "FLUX Redux": {"BFL": REDUX},
    "T5 encoder": {"Hugging Face": T5_HF, "llama.cpp": T5_LLAMA_CPP},
    "CLIP-L": CLIP_TABLES,
    "CLIP-G": CLIP_TABLES,
    "VAE": {"BFL": VAE_BFL, "diffusers": vae_diffusers},
    "SDXL": {"SGM": SDXL_SGM, "diffusers": sdxl_diffusers},
}


def rows_for(family: str, naming: str, names: Names) -> Rows:
    """The table, for names of either side of it. UserError if there is none."""
    table = TABLES.get(family, {}).get(naming)
    if table is None:
        known = ", ".join(TABLES.get(family, ())) or "no layout is known for it"
        raise UserError(f"{family} in {naming} names is not supported here ({known})")
    return table(names) if callable(table) else table
