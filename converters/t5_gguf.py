"""A T5 encoder as llama.cpp and ComfyUI-GGUF expect it in GGUF: the metadata, and what stays precise.

Names       `layouts.T5_LLAMA_CPP`; `encoder.embed_tokens.weight` is the same matrix as `shared.weight`: not stored.
Order       the embedding, block after block, the last norm, as the model runs. Readers take any.
Precision   norms and `attn_rel_b` F32 in every file type (ComfyUI takes T5's type from the last norm; readers do not
            unpack a quantized `attn_rel_b`). `token_embd` follows llama.cpp's rule for an embedding without an output
            matrix: Q8_0 in a Q8_0 file, else Q6_K, or Q8_0 where the columns are no multiple of 256. F16 weights are
            safe to store and not to compute with: the feed-forward part overflows in float16.
Metadata    `t5_metadata`. Integers are uint32, the epsilons float32, tokens an array of strings, scores of float32,
            token types of int32, the character map of uint8. ComfyUI-GGUF refuses a text encoder without
            `general.architecture`; llama.cpp needs all keys, the tokenizer too; image programs bring their own.
Source: ggml-org/llama.cpp conversion/t5.py (T5EncoderModel), src/llama-quant.cpp; city96/ComfyUI-GGUF loader.py.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flux_quant.arch import Shape, count_blocks
from flux_quant.converters.t5_tokenizer import read_vocabulary
from flux_quant.errors import UserError

ARCHITECTURE = "t5encoder"
CONTEXT = 512  # positions T5 was trained with; no tensor tells
EPSILON = 1e-6  # of its norms; no tensor tells


def t5_metadata(shapes: Mapping[str, Shape], tokenizer: Path | None = None) -> dict[str, object]:
    """All keys but the file type, which `gguf_io.model_metadata` gives.

    shapes: of an encoder in Hugging Face's names. tokenizer: `spiece.model`, `tokenizer.json` or a folder with one.
    """
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    try:
        rows, width = shapes["shared.weight"]
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        inner, _ = shapes[f"{attention}.q.weight"]
        hidden, _ = shapes[f"{feed_forward}.wi_0.weight"]
    except KeyError as missing:
        raise UserError(f"not a T5 v1.1 encoder: tensor {missing} is missing") from None
    except ValueError:
        raise UserError("not a T5 v1.1 encoder: a weight that is no matrix") from None
    keys = {
        "vocab_size": rows,
        "context_length": CONTEXT,
        "embedding_length": width,
        "feed_forward_length": hidden,
        "block_count": count_blocks(shapes, "encoder.block."),
        "attention.head_count": heads,
        "attention.key_length": inner // max(heads, 1),
        "attention.value_length": inner // max(heads, 1),
        "attention.layer_norm_epsilon": np.float32(EPSILON),
        "attention.layer_norm_rms_epsilon": np.float32(EPSILON),
        "attention.relative_buckets_count": buckets,
    }
    metadata = {"general.architecture": ARCHITECTURE, **{f"{ARCHITECTURE}.{key}": keys[key] for key in keys}}
    if tokenizer is None:
        return metadata
    vocabulary = read_vocabulary(tokenizer)
    if len(vocabulary.tokens) > rows:
        raise UserError(f"{tokenizer} has {len(vocabulary.tokens):,} tokens, the model {rows:,}: not its tokenizer")
    return metadata | vocabulary.metadata(rows)
