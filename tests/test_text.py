"""Text encoders from single files against transformers' own loading, on any stored format."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_quant import loading
from flux_quant.components import BUNDLED
from flux_quant.converters.container import TensorInfo
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_clip, load_t5
from flux_quant.text import encode_clip, encode_t5, load_tokenizer


@pytest.fixture(scope="module")
def t5() -> T5EncoderModel:
    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(
            vocab_size=120,
            d_model=64,
            d_kv=32,
            d_ff=160,
            num_layers=3,
            num_heads=5,
            relative_attention_num_buckets=24,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    ).eval()


def t5_tensors(model: T5EncoderModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


@pytest.mark.parametrize("copies", ["once", "embedding twice", "with decoder"])
@torch.no_grad()
def test_t5_equals_transformers(copies: str, t5: T5EncoderModel, tmp_path: Path):
    tensors = t5_tensors(t5)
    if copies == "embedding twice":
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    if copies == "with decoder":
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(4, 4)
    save_file(tensors, tmp_path / "t5.safetensors")
    ids = torch.randint(0, 120, (2, 17))
    torch.testing.assert_close(load_t5(tmp_path / "t5.safetensors")(ids)[0], t5(ids)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.block <= 32])
@torch.no_grad()
def test_t5_on_any_format(name: str, t5: T5EncoderModel, monkeypatch: pytest.MonkeyPatch):
    """transformers casts activations to the dtype of `wo.weight`: a packed one must not drag them along."""
    fmt = FORMATS[name]
    tensors = t5_tensors(t5)
    packed = {n for n, t in tensors.items() if fmt.fits(t.shape) and "DenseReluDense" in n}
    formats = {n: name if n in packed else "f32" for n in tensors}
    stored = {n: FORMATS[formats[n]].pack(t) for n, t in tensors.items()}
    unpacked = {n: FORMATS[formats[n]].unpack(*parts) for n, parts in stored.items()}
    infos = {n: TensorInfo(n, tuple(t.shape), formats[n]) for n, t in tensors.items()}
    reader = SimpleNamespace(path=Path("t5"), tensors=infos, read=stored.__getitem__)
    monkeypatch.setattr(loading, "open_component", lambda path, *_: reader)
    judge = T5EncoderModel(t5.config).eval()
    judge.load_state_dict(unpacked, strict=False)
    model = load_t5("t5")
    ids = torch.randint(0, 120, (2, 9))
    out = model(ids)[0]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, judge(ids)[0], rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 3 * 7


@pytest.mark.parametrize("prefix", ["text_model.", "text_model. with projection"])
@torch.no_grad()
def test_clip_equals_transformers(prefix: str, tmp_path: Path):
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=90,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        bos_token_id=0,
        eos_token_id=89,
        pad_token_id=1,
    )
    judge = CLIPTextModel(config).eval()
    tensors = {"text_model." + name.removeprefix("text_model."): t for name, t in judge.state_dict().items()}
    if "projection" in prefix:
        tensors["text_projection.weight"] = torch.zeros(128, 128)
    save_file(tensors, tmp_path / "clip.safetensors")
    ids = torch.randint(2, 80, (3, 20))
    ids[0, 7:] = ids[1, 12:] = ids[2, 19:] = 89
    model = load_clip(tmp_path / "clip.safetensors", end_of_text=89)
    torch.testing.assert_close(model(ids).pooler_output, judge(ids).pooler_output, rtol=1e-5, atol=1e-5)


def test_pooled_vector_ignores_padding():
    short = encode_clip(BUNDLED / "text_encoders/clip_l.safetensors", BUNDLED / "tokenizers", ["ant", "red apple"])
    single = encode_clip(BUNDLED / "text_encoders/clip_l.safetensors", BUNDLED / "tokenizers", ["red apple"])
    torch.testing.assert_close(short[1:], single, rtol=1e-4, atol=1e-5)
    assert (short[0] - short[1]).norm() > 0.1


def test_t5_length_is_the_tokenizers():
    path, tokenizers = BUNDLED / "text_encoders/t5.safetensors", BUNDLED / "tokenizers"
    longest = load_tokenizer(tokenizers, "t5").model_max_length
    assert encode_t5(path, tokenizers, ["ant"]).shape[1] == longest
    assert encode_t5(path, tokenizers, ["ant"], most=5).shape[1] == 5


def test_missing_tokenizer_is_one_clear_line(tmp_path: Path):
    with pytest.raises(UserError, match="no folder t5 or tokenizer_2"):
        load_tokenizer(tmp_path, "t5")
    (tmp_path / "t5").mkdir()
    with pytest.raises(UserError, match="not a T5 tokenizer"):
        load_tokenizer(tmp_path, "t5")


def test_bundled_tokenizers_know_their_end():
    for kind, ids in (("t5", 1), ("clip", 1)):
        tokenizer = load_tokenizer(BUNDLED / "tokenizers", kind)
        assert tokenizer.eos_token_id == ids
        assert tokenizer("RED Apple").input_ids == tokenizer("red apple").input_ids
        assert 1 in tokenizer("red apple").input_ids
