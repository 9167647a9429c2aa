"""T5 as GGUF, judged by gguf (keys, types, names), sentencepiece (vocabulary) and transformers (the model)."""

import base64
import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

import flux_quant
from flux_quant.arch import Shape
from flux_quant.converters.checkpoint import TensorInfo, load, open_checkpoint
from flux_quant.converters.gguf_io import model_metadata
from flux_quant.converters.t5_gguf import t5_metadata
from flux_quant.converters.t5_tokenizer import read_vocabulary
from flux_quant.converters.writer import create_checkpoint
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.naming import to_stored

BUNDLED = Path(flux_quant.__file__).parent / "tiny_flux"
MODEL, TOKENIZER = BUNDLED / "text_encoders" / "t5.safetensors", BUNDLED / "tokenizers" / "t5"
PRECISE = ("norm.weight", "attn_rel_b.weight")


@pytest.fixture(scope="module")
def encoder() -> dict[str, Tensor]:
    """The bundled encoder, in Hugging Face's names."""
    with open_checkpoint(MODEL) as reader:
        return {name: load(reader, name) for name in reader.tensors}


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_gguf(path: Path, encoder: dict[str, Tensor], format_name: str) -> dict[str, Tensor]:
    """Weights in one format, norms and biases F32. Returns what the file holds, unpacked, by llama.cpp's names."""
    names = {name: stored.names[0] for name, stored in to_stored("T5 encoder", "llama.cpp", shapes_of(encoder)).items()}
    formats = {name: "f32" if names[name].endswith(PRECISE) else format_name for name in encoder}
    infos = [TensorInfo(names[name], tuple(encoder[name].shape), formats[name]) for name in encoder]
    metadata = model_metadata("t5encoder", format_name) | t5_metadata(shapes_of(encoder), TOKENIZER)
    out = {}
    with create_checkpoint(path, infos, metadata) as writer:
        for info, weight in zip(infos, encoder.values(), strict=True):
            packed = FORMATS[info.format].pack(weight)
            writer.write(info.name, packed)
            out[info.name] = FORMATS[info.format].unpack(*packed)
    return out


def test_keys_and_types_are_those_of_gguf_s_writer(tmp_path, encoder):
    """The dimensions by hand: the bundled encoder has 2 blocks of width 128, 4 heads of 32, 1,024 tokens."""
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "t5encoder")
    theirs.add_vocab_size(1024)
    theirs.add_context_length(512)
    theirs.add_embedding_length(128)
    theirs.add_feed_forward_length(256)
    theirs.add_block_count(2)
    theirs.add_head_count(4)
    theirs.add_key_length(32)
    theirs.add_value_length(32)
    theirs.add_layer_norm_eps(1e-6)
    theirs.add_layer_norm_rms_eps(1e-6)
    theirs.add_relative_attn_buckets_count(32)
    theirs.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    theirs.add_quantization_version(2)
    pieces = SentencePieceProcessor(str(TOKENIZER / "spiece.model"))
    theirs.add_tokenizer_model("t5")
    theirs.add_tokenizer_pre("default")
    theirs.add_token_list([pieces.IdToPiece(i) for i in range(1024)])
    theirs.add_token_scores([pieces.GetScore(i) for i in range(1024)])
    control, unknown = gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN
    kinds = [control if pieces.IsControl(i) else unknown if pieces.IsUnknown(i) else 1 for i in range(1024)]
    theirs.add_token_types(kinds)
    theirs.add_add_space_prefix(True)
    theirs.add_remove_extra_whitespaces(True)
    theirs.add_eos_token_id(pieces.eos_id())
    theirs.add_pad_token_id(pieces.pad_id())
    theirs.add_unk_token_id(pieces.unk_id())
    theirs.add_add_bos_token(False)
    theirs.add_add_eos_token(True)
    for step in (theirs.write_header_to_file, theirs.write_kv_data_to_file, theirs.write_tensors_to_file, theirs.close):
        step()
    write_gguf(tmp_path / "ours.gguf", encoder, "q8_0")
    expected, got = (gguf.GGUFReader(tmp_path / name).fields for name in ("theirs.gguf", "ours.gguf"))
    assert set(got) == set(expected) | {"tokenizer.ggml.precompiled_charsmap"}
    for key in expected:
        if not key.startswith("GGUF."):
            assert got[key].types == expected[key].types, key
            assert got[key].contents() == expected[key].contents(), key
    charsmap = got["tokenizer.ggml.precompiled_charsmap"]
    assert charsmap.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8]
    normalizer = json.loads((TOKENIZER / "tokenizer.json").read_bytes())["normalizer"]
    assert bytes(charsmap.contents()) == base64.b64decode(normalizer["precompiled_charsmap"])


def test_names_are_those_of_gguf_s_map(tmp_path, encoder):
    write_gguf(tmp_path / "x.gguf", encoder, "f32")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    expected = {f"{names.get_name(name.removesuffix('.weight'))}.weight" for name in encoder}
    assert {tensor.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors} == expected


@pytest.mark.parametrize("format_name", ["f32", "q8_0"])
def test_transformers_loads_it(tmp_path, encoder, format_name):
    """Its hidden states are those of the same values loaded the ordinary way."""
    from transformers import T5Config, T5EncoderModel

    stored = write_gguf(tmp_path / "t5.gguf", encoder, format_name)
    names = to_stored("T5 encoder", "llama.cpp", shapes_of(encoder))
    config = T5Config(
        d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=2, vocab_size=1024, feed_forward_proj="gated-gelu"
    )
    expected = T5EncoderModel(config).eval()
    expected.load_state_dict({name: stored[names[name].names[0]] for name in encoder}, strict=False)
    got = T5EncoderModel.from_pretrained(tmp_path, gguf_file="t5.gguf", config=config, dtype=torch.float32).eval()
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        wanted = expected(ids).last_hidden_state
        assert torch.equal(got(ids).last_hidden_state, wanted) and wanted.std() > 0.01


# --- The vocabulary ---------------------------------------------------------------------------------------------------


def test_tokenizer_json_says_the_same(tmp_path):
    original, other = read_vocabulary(TOKENIZER / "spiece.model"), read_vocabulary(TOKENIZER / "tokenizer.json")
    assert original == other and len(original.tokens) == 1024
    assert read_vocabulary(TOKENIZER) == original
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    assert read_vocabulary(tmp_path) == original


def test_added_tokens(tmp_path):
    content = json.loads((TOKENIZER / "tokenizer.json").read_bytes())
    content["model"]["vocab"].append(["<extra_id_0>", 0.0])
    content["added_tokens"].append({"id": 1024, "content": "<extra_id_0>", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    vocabulary = read_vocabulary(tmp_path)
    last = vocabulary.tokens[-1], vocabulary.scores[-1], vocabulary.types[-1]
    assert last == ("<extra_id_0>", -1000.0, gguf.TokenType.USER_DEFINED)


def test_vocabulary_is_padded_to_the_embedding(encoder):
    """As T5-XXL: 32,000 tokens and 32,128 rows."""
    shapes = shapes_of(encoder) | {"shared.weight": (1030, 128)}
    metadata = t5_metadata(shapes, TOKENIZER)
    assert metadata["tokenizer.ggml.tokens"][1022:] == [*read_vocabulary(TOKENIZER).tokens[1022:]] + [
        f"[PAD{i}]" for i in range(1024, 1030)
    ]
    assert metadata["tokenizer.ggml.scores"][1024:].tolist() == [-10000.0] * 6
    assert metadata["tokenizer.ggml.token_type"][1024:].tolist() == [gguf.TokenType.UNUSED] * 6
    assert metadata["tokenizer.ggml.token_type"].dtype == np.int32 and metadata["t5encoder.vocab_size"] == 1030


def test_without_a_tokenizer(encoder):
    with_one, without = t5_metadata(shapes_of(encoder), TOKENIZER), t5_metadata(shapes_of(encoder))
    assert without == {key: value for key, value in with_one.items() if not key.startswith("tokenizer.")}


def test_other_models_are_refused(encoder):
    shapes = shapes_of(encoder)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for change, message in (
        ({}, f"{bias}' is missing"),
        ({bias: (32,)}, "no matrix"),
        ({bias: (32, 4), "shared.weight": (1023, 128)}, "1,024 tokens, the model 1,023"),
    ):
        others = {name: shape for name, shape in shapes.items() if name != bias} | change
        with pytest.raises(UserError, match=re.escape(message)):
            t5_metadata(others, TOKENIZER)


NO_TOKENIZER = {
    "spiece.model": [b"\xff\xff\xff", b"", (TOKENIZER / "spiece.model").read_bytes()[:5000]],
    "tokenizer.json": [b"[]", b"{", b"[" * 100_000, b'{"model": {"type": "BPE"}}', b'{"model": {"type": "Unigram"}}'],
}


@pytest.mark.parametrize("name", NO_TOKENIZER)
def test_damaged_tokenizers(tmp_path, name):
    with pytest.raises(UserError, match="holds no T5 tokenizer"):
        read_vocabulary(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        read_vocabulary(tmp_path / name)
    for content in NO_TOKENIZER[name]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as error:
            read_vocabulary(tmp_path)
        assert "\n" not in str(error.value)
