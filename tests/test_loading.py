"""load_quantized_: any module from any checkpoint, linears as they are stored."""

import pytest
import torch
from torch import nn

from flux_quant.converters.checkpoint import open_checkpoint
from flux_quant.converters.container import TensorInfo
from flux_quant.converters.writer import create_checkpoint
from flux_quant.embedding import QuantEmbedding
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_quantized_

WIDTH = 256


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TENSORS = {
    "attn.qkv.weight": ("q4_k", random(3 * WIDTH, WIDTH)),
    "attn.qkv.bias": ("f32", random(3 * WIDTH)),
    "attn.out.weight": ("q8_0", random(WIDTH, WIDTH)),
    "words.weight": ("q6_k", random(11, WIDTH)),
    "norm.scale": ("f16", random(WIDTH).half()),
}


class Attention(nn.Module):
    """With q, k and v apart, where the checkpoint has one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
        self.norm = nn.LayerNorm(WIDTH, bias=False)


def key_map(name: str):
    module, kind = name.rsplit(".", 1)
    if module in ("to_q", "to_k", "to_v"):
        first = WIDTH * ("to_q", "to_k", "to_v").index(module)
        return f"attn.qkv.{kind}", slice(first, first + WIDTH)
    return {"embed.weight": "words.weight", "to_out.0.weight": "attn.out.weight", "norm.weight": "norm.scale"}[name]


@pytest.fixture(params=["gguf", "safetensors"])
def reader(request, tmp_path):
    """GGUF holds what is packed; in safetensors the same in 16 bits and FP8."""
    packed = {name: kind for name, (kind, _) in TENSORS.items()}
    if request.param == "safetensors":
        packed |= {"attn.qkv.weight": "fp8", "attn.out.weight": "bf16", "words.weight": "bf16"}
    infos = [TensorInfo(name, tuple(TENSORS[name][1].shape), kind) for name, kind in packed.items()]
    path = tmp_path / f"model.{request.param}"
    with create_checkpoint(path, infos, {}) as writer:
        for info in infos:
            writer.write(info.name, FORMATS[info.format].pack(TENSORS[info.name][1]))
    with open_checkpoint(path) as reader:
        yield reader


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_any_module_takes_its_weights_as_they_are_stored(reader, device):
    with torch.device(device):
        module = Attention()
    load_quantized_(module, reader, key_map)
    for i, layer in enumerate((module.to_q, module.to_k, module.to_v)):
        rows = slice(WIDTH * i, WIDTH * (i + 1))
        fmt = FORMATS[reader.tensors["attn.qkv.weight"].format]
        assert isinstance(layer, QuantLinear) and layer.fmt is fmt
        whole = fmt.unpack(*reader.read("attn.qkv.weight"))
        assert torch.equal(fmt.unpack(*layer.parts), whole[rows])
        assert torch.equal(layer.bias, TENSORS["attn.qkv.bias"][1][rows])
        assert layer.weight.data_ptr() == reader.read("attn.qkv.weight")[0][rows].data_ptr()  # nothing is copied
    assert module.to_out[0].fmt.name == reader.tensors["attn.out.weight"].format and module.to_out[0].bias is None
    assert module.embed.weight.dtype == module.norm.weight.dtype == torch.float32
    assert not any(p.requires_grad or p.is_meta for p in module.parameters())
    assert module.to_out(module.norm(module.to_v(module.embed(torch.arange(3))))).isfinite().all()


def test_tables_stay_packed_on_request(reader):
    ids = torch.tensor([[10, 0], [3, 3]])
    expected = load_quantized_(Attention(), reader, key_map).embed(ids)
    module = load_quantized_(Attention(), reader, key_map, packed=("embed",))
    assert isinstance(module.embed, QuantEmbedding) and not list(module.embed.parameters())
    assert module.embed.fmt.name == reader.tensors["words.weight"].format
    assert torch.equal(module.embed(ids), expected)


def test_what_does_not_fit_is_named_and_nothing_changed(reader):
    module = Attention()
    with pytest.raises(UserError, match=r"tensor to_q.weight \[256, 256\] is missing"):
        load_quantized_(module, reader, lambda name: name if name.startswith("to_q") else key_map(name))
    with pytest.raises(UserError, match=r"attn.qkv.weight gives \[255, 256\], the model needs \[256, 256\]"):
        wrong = ("attn.qkv.weight", slice(0, 255))
        load_quantized_(module, reader, lambda name: wrong if name == "to_v.weight" else key_map(name))
    assert all(type(layer) is nn.Linear for layer in (module.to_q, module.to_k, module.to_v))
