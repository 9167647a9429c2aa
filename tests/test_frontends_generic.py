"""Models we know nothing about, packed and streamed: SD3, Qwen-Image, Wan, FLUX, T5, Llama."""

from collections.abc import Callable

import pytest
import torch
from stream_backends import Late, ThreadDevice
from torch import Tensor, nn

import flux_quant
from flux_quant.errors import UserError
from flux_quant.formats import FORMATS
from flux_quant.frontends.blocks import block_lists, block_names
from flux_quant.linear import QuantLinear
from flux_quant.streaming import block_bytes

Call = Callable[[nn.Module], Tensor]
G = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G)


def sd3() -> tuple[nn.Module, Call]:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=4,
        caption_projection_dim=64, joint_attention_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    image, words, pooled = random(1, 4, 8, 8), random(1, 5, 32), random(1, 64)
    return model, lambda m: m(image, words, pooled, torch.tensor([7]), return_dict=False)[0]


def qwen_image() -> tuple[nn.Module, Call]:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    image, words, mask = random(1, 16, 16), random(1, 7, 32), torch.ones(1, 7, dtype=torch.long)
    given = dict(timestep=torch.tensor([0.5]), img_shapes=[(1, 4, 4)], return_dict=False)
    return model, lambda m: m(image, words, encoder_hidden_states_mask=mask, **given)[0]


def wan() -> tuple[nn.Module, Call]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=32, ffn_dim=64, num_layers=3, rope_max_seq_len=32,
    )  # fmt: skip
    video, words = random(1, 4, 2, 8, 8), random(1, 6, 32)
    return model, lambda m: m(video, torch.tensor([3]), words, return_dict=False)[0]


def flux() -> tuple[nn.Module, Call]:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        num_layers=3, num_single_layers=5, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
        pooled_projection_dim=32, in_channels=16, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    image, words, pooled = random(1, 12, 16), random(1, 5, 64), random(1, 32)
    ids = dict(img_ids=torch.zeros(12, 3), txt_ids=torch.zeros(5, 3), timestep=torch.tensor([0.5]))
    return model, lambda m: m(image, words, pooled, return_dict=False, **ids)[0]


def t5() -> tuple[nn.Module, Call]:
    from transformers import T5Config, T5EncoderModel

    sizes = dict(vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=4, num_heads=4)
    words = torch.arange(12)[None]
    return T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")), lambda m: m(words).last_hidden_state


def llama() -> tuple[nn.Module, Call]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    words = torch.arange(9)[None]
    return model, lambda m: m(input_ids=words, use_cache=False).logits


MODELS = {  # its lists of blocks
    sd3: ["transformer_blocks"],
    qwen_image: ["transformer_blocks"],
    wan: ["blocks"],
    flux: ["transformer_blocks", "single_transformer_blocks"],
    t5: ["encoder.block"],
    llama: ["model.layers"],
}
models = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def made(make: Callable) -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    model, call = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # nothing is exactly zero, as some are made
    return model.eval(), call


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@models
@torch.no_grad()
def test_blocks_are_found_and_stream(make: Callable):
    model, call = made(make)
    assert block_lists(model) == MODELS[make]
    expected, before = call(model), {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    sizes, rest = block_bytes(model, block_names(model))
    room, device = sum(sizes) * 3 // 4, ThreadDevice("in turns")
    with flux_quant.stream_(model, f"{rest + room + 1}B", activations="1B", device=device) as handle:
        assert handle.plan.streamed and handle.plan.device_bytes <= room
        with Late(device):
            found = [call(model) for _ in range(2)]
        device.finish()
        assert handle.metrics().total_bytes > 0
    assert all(torch.equal(one, expected) for one in found)
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == number and torch.equal(after[name], t) for name, (number, t) in before.items())
    assert not model._forward_hooks and not model._forward_pre_hooks


@models
@pytest.mark.parametrize(("name", "bound"), [("q8_0", 0.02), ("q4_0", 0.25), ("fp8", 0.12)])
@torch.no_grad()
def test_packed_within_the_error_of_the_format(make: Callable, name: str, bound: float):
    model, call = made(make)
    expected = call(model)
    linears = {path: layer.weight.clone() for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    replaced = flux_quant.quantize_(model, name, keep=["*_mod*", "*.norm*"])
    assert replaced and all(path.startswith(tuple(MODELS[make])) for path in replaced)
    for path, kind in replaced.items():
        layer = model.get_submodule(path)
        layer = getattr(layer, "inner", layer)
        assert isinstance(layer, QuantLinear) and layer.fmt.name == kind
        assert error(FORMATS[kind].unpack(*layer.parts), linears[path]) < bound
    assert 0 < error(call(model), expected) < 3 * bound


@torch.no_grad()
def test_packed_blocks_stream_as_well():
    model, call = made(llama)
    flux_quant.quantize_(model, "q8_0")
    expected = call(model)
    device = ThreadDevice(compute_is_host=True, lazy=False)
    nbytes = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    with flux_quant.stream_(model, f"{nbytes - 10_000}B", activations="1B", device=device) as handle:
        assert torch.equal(call(model), expected) and handle.plan.streamed
    assert torch.equal(call(model), expected)


def test_k_quants_take_the_next_format_where_rows_do_not_fit():
    model, _ = made(llama)
    assert set(flux_quant.quantize_(model, "q4_k").values()) == {"q5_0"}
    model, _ = made(wan)
    assert "q8_0" in flux_quant.quantize_(model, "q8_0").values()
    assert any(isinstance(layer, nn.Linear) for layer in model.blocks.modules()), "48 inputs are no multiple of 32"


def test_what_cannot_be_is_one_line():
    model, _ = made(llama)
    with pytest.raises(UserError, match="format q9 is unknown"):
        flux_quant.quantize_(model, "q9")
    with pytest.raises(UserError, match="no linear layer to pack"):
        flux_quant.quantize_(nn.ReLU())
    with pytest.raises(UserError, match="no list of blocks"):
        flux_quant.stream_(nn.Linear(4, 4), "1GB", device=ThreadDevice())
    with pytest.raises(UserError, match="a larger budget"):
        flux_quant.stream_(model, "50KB", activations="1B", device=ThreadDevice())
    if not torch.cuda.is_available():
        with pytest.warns(UserWarning, match="nothing streams"), flux_quant.stream_(model, "1GB") as handle:
            assert handle.plan is None and handle.metrics() is None


def test_inputs_come_and_results_go_where_they_were():
    """The hooks of `stream_`, with the device that a CPU has beside itself."""
    model, _ = made(llama)
    device = ThreadDevice(compute_is_host=True, lazy=False)
    with flux_quant.stream_(model, "1GB", activations="1B", device=device) as handle:
        handle.streamer.device.device = torch.device("meta")
        args, kwargs = handle.bring(model, (torch.zeros(2),), {"mask": torch.zeros(1), "flag": True})
        assert args[0].is_meta and kwargs["mask"].is_meta and kwargs["flag"] is True
        assert handle.home == torch.device("cpu")
        assert handle.give(model, (), {"out": torch.ones(1)})["out"].device.type == "cpu"
        handle.streamer.device.device = torch.device("cpu")
