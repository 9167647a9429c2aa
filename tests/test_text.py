"""Text encoders and prompts against transformers' own models, on any stored format; weights, lengths, memory."""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from flux_quant import loading
from flux_quant.components import BUNDLED
from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.component import Component
from flux_quant.converters.container import TensorInfo
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_clip, load_t5
from flux_quant.text.encode import TextOptions, encode_clip, encode_t5
from flux_quant.text.encoders import PRECISIONS, Placement, t5_states
from flux_quant.text.tokenizers import load_tokenizer, longest, tokenizer_folder

T5, CLIP = BUNDLED / "text_encoders/t5.safetensors", BUNDLED / "text_encoders/clip_l.safetensors"
TOKENIZERS = BUNDLED / "tokenizers"


@pytest.fixture(scope="module")
def t5() -> T5EncoderModel:
    """Wide enough for blocks of 256."""
    torch.manual_seed(1)
    return T5EncoderModel(
        T5Config(
            vocab_size=120,
            d_model=256,
            d_kv=64,
            d_ff=256,
            num_layers=3,
            num_heads=8,
            relative_attention_num_buckets=24,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    ).eval()


@pytest.fixture(scope="module")
def clip() -> CLIPTextModel:
    torch.manual_seed(2)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=90,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=20,
            bos_token_id=0,
            eos_token_id=89,
            pad_token_id=1,
        )
    ).eval()


def t5_tensors(model: T5EncoderModel) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name != "encoder.embed_tokens.weight"}


def clip_tensors(model: CLIPTextModel) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": t.clone() for name, t in model.state_dict().items()}


def stored_in(name: str, tensors: dict[str, Tensor]) -> tuple[SimpleNamespace, dict[str, Tensor]]:
    """A reader of these tensors, as many of them as possible in one format; and what they are, unpacked."""
    formats = {n: name if FORMATS[name].fits(t.shape) else "f32" for n, t in tensors.items()}
    stored = {n: FORMATS[formats[n]].pack(t) for n, t in tensors.items()}
    infos = {n: TensorInfo(n, tuple(t.shape), formats[n]) for n, t in tensors.items()}
    reader = SimpleNamespace(path=Path("model"), tensors=infos, read=stored.__getitem__)
    return reader, {n: FORMATS[formats[n]].unpack(*parts) for n, parts in stored.items()}


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


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_t5_on_any_format(name: str, t5: T5EncoderModel, monkeypatch: pytest.MonkeyPatch):
    """transformers casts activations to the dtype of `wo.weight`: a packed one must not drag them along."""
    reader, unpacked = stored_in(name, t5_tensors(t5))
    monkeypatch.setattr(loading, "open_component", lambda path, *_: reader)
    judge = T5EncoderModel(t5.config).eval()
    judge.load_state_dict(unpacked, strict=False)
    model = load_t5("t5")
    ids = torch.randint(0, 120, (2, 9))
    out = model(ids)[0]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, judge(ids)[0], rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 3 * 7
    assert model.shared is model.encoder.embed_tokens and model.shared.fmt.name == name


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_clip_on_any_format(name: str, clip: CLIPTextModel, monkeypatch: pytest.MonkeyPatch):
    reader, unpacked = stored_in(name, clip_tensors(clip))
    monkeypatch.setattr(loading, "open_component", lambda path, *_: reader)
    judge = CLIPTextModel(clip.config).eval()
    prefix = "" if "embeddings.token_embedding.weight" in judge.state_dict() else "text_model."
    judge.load_state_dict({prefix + n.removeprefix("text_model."): t for n, t in unpacked.items()})
    model = load_clip("clip", end_of_text=89)
    ids = torch.randint(2, 80, (3, 20))
    ids[0, 7:] = ids[1, 12:] = ids[2, 19:] = 89
    torch.testing.assert_close(model(ids).pooler_output, judge(ids).pooler_output, rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 2 * 6


@pytest.mark.parametrize("with_projection", [False, True])
@torch.no_grad()
def test_clip_equals_transformers(with_projection: bool, clip: CLIPTextModel, tmp_path: Path):
    tensors = clip_tensors(clip)
    if with_projection:
        tensors["text_projection.weight"] = torch.zeros(256, 256)
    save_file(tensors, tmp_path / "clip.safetensors")
    ids = torch.randint(2, 80, (3, 20))
    ids[0, 7:] = ids[1, 12:] = ids[2, 19:] = 89
    model = load_clip(tmp_path / "clip.safetensors", end_of_text=89)
    torch.testing.assert_close(model(ids).pooler_output, clip(ids).pooler_output, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_precisions(t5: T5EncoderModel, tmp_path: Path):
    """The residual stream is what it should be in every block, the linears get what they should get."""
    save_file(t5_tensors(t5), tmp_path / "t5.safetensors")
    ids = torch.randint(0, 120, (2, 11))
    exact = t5(ids)[0]
    for name, (residual, products) in PRECISIONS.items():
        streams, inputs = set(), set()

        @contextmanager
        def watch(
            blocks: nn.ModuleList, device: torch.device, streams: set = streams, inputs: set = inputs
        ) -> Iterator[None]:
            for block in blocks:
                block.register_forward_hook(lambda _, given, made: streams.add(made[0].dtype))
                for layer in block.modules():
                    if isinstance(layer, QuantLinear):
                        layer.register_forward_pre_hook(lambda _, given: inputs.add(given[0].dtype))
            yield

        out = t5_states(tmp_path / "t5.safetensors", ids, Placement(precision=name, attach=watch))
        assert out.dtype == residual and (streams, inputs) == ({residual}, {products})
        error = (out.float() - exact).norm() / exact.norm()
        assert error < 1e-5 if name == "float32" else 1e-5 < error < 2e-2, name
    with pytest.raises(UserError, match="float16"):
        Placement(precision="float16")


@torch.no_grad()
def test_states_beyond_float16(t5: T5EncoderModel, tmp_path: Path):
    tensors = t5_tensors(t5)
    for name in tensors:
        if name.endswith("wo.weight"):
            tensors[name] *= 1e6
    save_file(tensors, tmp_path / "t5.safetensors")
    judge = T5EncoderModel(t5.config).eval()
    judge.load_state_dict(tensors, strict=False)
    ids = torch.randint(0, 120, (1, 8))
    largest = []
    judge.encoder.block[-1].register_forward_hook(lambda _, inputs, out: largest.append(out[0].abs().max().item()))
    expected = judge(ids)[0]
    assert largest[0] > 65504
    for name in PRECISIONS:
        out = t5_states(tmp_path / "t5.safetensors", ids, Placement(precision=name)).float()
        assert (out - expected).norm() < 3e-2 * expected.norm()


@torch.no_grad()
def test_every_prompt_is_encoded_for_itself():
    prompts = ["ant", "large red apple", "ant"]
    for encode, path in ((encode_t5, T5), (encode_clip, CLIP)):
        batch = encode(path, TOKENIZERS, prompts)
        for row, prompt in zip(batch, prompts, strict=True):
            assert torch.equal(row, encode(path, TOKENIZERS, [prompt])[0])
    together = encode_t5(T5, TOKENIZERS, prompts, TextOptions(placement=Placement(at_once=2)))
    torch.testing.assert_close(together, encode_t5(T5, TOKENIZERS, prompts), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_weights_move_tokens_away_from_the_empty_prompt():
    """ComfyUI's formula, with transformers' own tokens and states."""
    model, tokenizer = load_t5(T5), load_tokenizer(TOKENIZERS, "t5")
    length = tokenizer.model_max_length

    def states(text: str) -> Tensor:
        return model(tokenizer(text, padding="max_length", max_length=length, return_tensors="pt").input_ids)[0][0]

    plain, empty = states("large red apple on a beach"), states("")
    begin, end = (len(tokenizer.tokenize(text)) for text in ("large", "large red apple on"))
    for prompt, weight in (("large (red apple on:1.5) a beach", 1.5), ("large [red apple on] a beach", 1 / 1.1)):
        expected = plain.clone()
        expected[begin:end] = (plain[begin:end] - empty[begin:end]) * weight + empty[begin:end]
        found = encode_t5(T5, TOKENIZERS, [prompt])[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - plain).abs().max() > 0.05
    assert torch.equal(encode_t5(T5, TOKENIZERS, ["large (red:1) apple on a beach"])[0], plain)


def test_weights_change_nothing_for_clip():
    plain, weighted = encode_clip(CLIP, TOKENIZERS, ["large red apple", "large (red:1.9) [apple]"])
    assert torch.equal(plain, weighted)


def test_weights_beyond_measure_are_refused():
    with pytest.raises(UserError, match="'ant' are not finite"):
        encode_t5(T5, TOKENIZERS, ["(ant:1e60)"])


def test_length_is_the_tokenizers_or_what_is_asked_for():
    limit = load_tokenizer(TOKENIZERS, "t5").model_max_length
    assert longest(TOKENIZERS / "t5") == limit
    assert encode_t5(T5, TOKENIZERS, ["ant"]).shape[1] == limit
    assert encode_t5(T5, TOKENIZERS, ["ant"], most=5).shape[1] == 5
    assert encode_t5(T5, TOKENIZERS, ["ant"], TextOptions(pad_to=3 * limit)).shape[1] == 3 * limit
    short, padded = (encode_t5(T5, TOKENIZERS, ["ant"], TextOptions(pad_to=n))[0] for n in (6, 24))
    assert (short - padded[:6]).abs().max() > 1e-4, "T5 sees its padding"
    with pytest.warns(UserWarning, match="T5 reads 5 tokens, the last 96 of the prompt are cut off"):
        cut = encode_t5(T5, TOKENIZERS, ["ant " * 50], TextOptions(pad_to=5))
    assert cut.shape[1] == 5
    with pytest.raises(UserError, match="at least 1"):
        TextOptions(pad_to=0)


def test_blocks_come_by_what_is_attached():
    order, plain = [], encode_t5(T5, TOKENIZERS, ["ant"])

    @contextmanager
    def attach(blocks: nn.ModuleList, device: torch.device) -> Iterator[None]:
        assert isinstance(blocks, nn.ModuleList) and device == torch.device("cpu")
        handles = [block.register_forward_pre_hook(lambda *_, i=i: order.append(i)) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            order.append("detached")
            for handle in handles:
                handle.remove()

    options = TextOptions(placement=Placement(attach=attach))
    assert torch.equal(encode_t5(T5, TOKENIZERS, ["ant"], options), plain)
    assert order == [0, 1, "detached"]


def test_pages_of_a_block_are_given_back_under_a_budget(monkeypatch: pytest.MonkeyPatch):
    events, plain = [], encode_t5(T5, TOKENIZERS, ["ant"])
    forget, forward = Component.forget, QuantLinear.forward
    monkeypatch.setattr(Component, "forget", lambda self, name: (events.append(name), forget(self, name)))
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: (events.append("linear"), forward(self, x))[1])
    fits, small = (TextOptions(placement=Placement(ram_budget=n)) for n in (3_000_000_000, 1_000_000_000))
    assert torch.equal(encode_t5(T5, TOKENIZERS, ["ant"], fits), plain)
    assert set(events) == {"linear"}
    events.clear()
    assert torch.equal(encode_t5(T5, TOKENIZERS, ["ant"], small), plain)
    with open_checkpoint(T5) as reader:
        for i in range(2):
            own = {name for name in reader.tensors if name.startswith(f"encoder.block.{i}.")}
            assert events[:7] == ["linear"] * 7 and set(events[7 : 7 + len(own)]) == own
            del events[: 7 + len(own)]
    assert not events


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_t5_on_cuda(precision: str):
    """As on the CPU; the table stays there, and the device's memory is free afterwards."""
    plain = encode_t5(T5, TOKENIZERS, ["ant", "red apple"], TextOptions(placement=Placement(precision=precision)))
    before = torch.cuda.memory_allocated()
    placement = Placement("cuda", precision, at_once=2)
    found = encode_t5(T5, TOKENIZERS, ["ant", "red apple"], TextOptions(placement=placement))
    assert found.device.type == "cpu" and found.dtype == plain.dtype
    error = (found.float() - plain.float()).norm() / plain.float().norm()
    assert error < (1e-4 if precision == "float32" else 2e-2)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows the mapped files of a process")
def test_encoders_are_gone_after_use():
    def mapped() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sum(line.endswith((T5.name, CLIP.name)) for line in lines)

    gc.collect()
    before = mapped()  # what other tests of this process hold
    model = load_t5(T5)
    assert mapped() > before
    del model
    for precision in PRECISIONS:
        encode_t5(T5, TOKENIZERS, ["ant"], TextOptions(placement=Placement(precision=precision)))
    encode_clip(CLIP, TOKENIZERS, ["ant"])
    assert mapped() == before


def test_pooled_vector_ignores_padding():
    short = encode_clip(CLIP, TOKENIZERS, ["ant", "red apple"])
    single = encode_clip(CLIP, TOKENIZERS, ["red apple"])
    torch.testing.assert_close(short[1:], single, rtol=1e-4, atol=1e-5)
    assert (short[0] - short[1]).norm() > 0.1


def test_missing_tokenizer_is_one_clear_line(tmp_path: Path):
    """Which files, where they may lie, where they come from."""
    for kind, other in (("t5", "tokenizer_2"), ("clip", "tokenizer")):
        advice = f"no folder {kind} or {other} .* copy the files of {other} of the FLUX.1 repository"
        with pytest.raises(UserError, match=advice) as error:
            load_tokenizer(tmp_path, kind)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        (tmp_path / kind).mkdir()
        with pytest.raises(UserError, match=f"neither tokenizer.json nor .*not a {kind.upper()} tokenizer"):
            load_tokenizer(tmp_path, kind)


def test_weights_in_a_folder_of_that_name_are_no_tokenizer(tmp_path: Path):
    """ComfyUI keeps text encoders in `clip`; diffusers' tokenizers may lie beside it."""
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "clip_l.safetensors").touch()
    for ours, theirs in (("t5", "tokenizer_2"), ("clip", "tokenizer")):
        shutil.copytree(TOKENIZERS / ours, tmp_path / theirs)
        assert tokenizer_folder(tmp_path, ours) == tmp_path / theirs


def test_bundled_tokenizers_know_their_end():
    for kind, ids in (("t5", 1), ("clip", 1)):
        tokenizer = load_tokenizer(BUNDLED / "tokenizers", kind)
        assert tokenizer.eos_token_id == ids
        assert tokenizer("RED Apple").input_ids == tokenizer("red apple").input_ids
        assert 1 in tokenizer("red apple").input_ids
