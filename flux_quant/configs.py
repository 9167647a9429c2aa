"""Arguments of the libraries' classes, read off a model's tensors: shapes by canonical name in, plain values out.

What no tensor tells is what every published model of the family has.
"""

from collections.abc import Mapping

from flux_quant.arch import LATENT_SCALE, LATENT_SHIFT, FluxConfig, Shape, count_blocks

Shapes = Mapping[str, Shape]
Config = dict[str, object]


def flux_config(shapes: Shapes) -> Config:
    """diffusers' FluxTransformer2DModel."""
    return FluxConfig.from_shapes(shapes).diffusers()


def vae_config(shapes: Shapes) -> Config:
    """diffusers' AutoencoderKL."""
    levels = count_blocks(shapes, "encoder.down.")
    widths = tuple(shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels))
    return dict(
        block_out_channels=widths,
        norm_num_groups=widths[0] // 4,  # 32 in FLUX.1; no tensor tells, so smaller models keep 4 channels a group
        layers_per_block=count_blocks(shapes, "encoder.down.0.block."),
        latent_channels=shapes["decoder.conv_in.weight"][1],
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=LATENT_SCALE,
        shift_factor=LATENT_SHIFT,
    )


def t5_config(shapes: Shapes) -> Config:
    """transformers' T5Config, for the encoder of T5 1.1."""
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    buckets, heads = shapes[f"{attention}relative_attention_bias.weight"]
    vocabulary, width = shapes["shared.weight"]
    return dict(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[f"{attention}q.weight"][0] // heads,
        d_ff=shapes[f"{feed_forward}wi_0.weight"][0],
        num_layers=count_blocks(shapes, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        use_cache=False,
    )


def clip_config(shapes: Shapes, end_of_text: int | None = None) -> Config:
    """transformers' CLIPTextConfig. The end token, whose state is pooled, is the last of CLIP's own vocabulary."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=count_blocks(shapes, "text_model.encoder.layers."),
        num_attention_heads=width // 64,
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
        projection_dim=width,
        bos_token_id=None,
        eos_token_id=vocabulary - 1 if end_of_text is None else end_of_text,
        pad_token_id=None,
    )
