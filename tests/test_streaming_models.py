"""Streaming of real architectures: our engine, diffusers' transformer and ControlNet, T5; compiled; on CUDA."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stream_backends import Late, ThreadDevice
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.linear import QuantLinear, quantize_module_
from flux_quant.model import Flux, image_ids, text_ids
from flux_quant.streaming import BlockStreamer, StreamPlan, block_bytes, rings_for, spread_evenly

CONFIG = FluxConfig(16, 16, 64, 32, 128, 24, 20, 3, 5, True)
Call = Callable[[int], Tensor]  # number of a pass, which has a size of its own -> output


def randomise(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model.eval()


def tokens(number: int, device: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(number)
    rows, columns, words = 2 + number % 2, 3, 5 + number
    values = dict(
        img=torch.randn(2, rows * columns, CONFIG.in_channels, generator=g),
        txt=torch.randn(2, words, CONFIG.context, generator=g),
        pooled=torch.randn(2, CONFIG.pooled, generator=g),
        timestep=torch.rand(2, generator=g),
        img_ids=image_ids(rows, columns),
        txt_ids=text_ids(words),
        guidance=torch.tensor([1.0, 3.5]),
    )
    return {name: value.to(device) for name, value in values.items()}


def diffusers_tokens(number: int, device: str) -> dict[str, Tensor]:
    names = dict(img="hidden_states", txt="encoder_hidden_states", pooled="pooled_projections")
    return {names.get(name, name): value for name, value in tokens(number, device).items()}


def engine(device: str = "cpu") -> tuple[nn.Module, Call]:
    model = randomise(Flux(CONFIG))
    return model, lambda number: model(**tokens(number, device))


def packed_engine(device: str = "cpu") -> tuple[nn.Module, Call]:
    model, call = engine(device)
    quantize_module_(model, [("*_blocks.*", "q8_0")])
    assert any(isinstance(layer, QuantLinear) for layer in model.modules())
    return model, call


def diffusers_transformer(device: str = "cpu") -> tuple[nn.Module, Call]:
    from diffusers import FluxTransformer2DModel

    model = randomise(FluxTransformer2DModel(**CONFIG.diffusers()))
    return model, lambda number: model(**diffusers_tokens(number, device)).sample


def control_net(device: str = "cpu") -> tuple[nn.Module, Call]:
    from diffusers import FluxControlNetModel

    config = {**CONFIG.diffusers(), "in_channels": 16}
    config.pop("out_channels", None)
    model = randomise(FluxControlNetModel(**config))

    def call(number: int) -> Tensor:
        given = diffusers_tokens(number, device)
        out = model(controlnet_cond=given["hidden_states"].flip(1), **given)
        return torch.cat([x.flatten() for x in (*out.controlnet_block_samples, *out.controlnet_single_block_samples)])

    return model, call


def t5(device: str = "cpu") -> tuple[nn.Module, Call]:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=5, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = randomise(T5EncoderModel(config))

    def call(number: int) -> Tensor:
        words = torch.arange(12 + 3 * number, device=device).reshape(3, -1) * 7 % 50
        return model(input_ids=words, attention_mask=(words > 5).long()).last_hidden_state

    return model, call


MODELS = dict(
    engine=(engine, ("double_blocks", "single_blocks")),
    packed=(packed_engine, ("double_blocks", "single_blocks")),
    diffusers=(diffusers_transformer, ("transformer_blocks", "single_transformer_blocks")),
    controlnet=(control_net, ("transformer_blocks", "single_transformer_blocks")),
    t5=(t5, ("encoder.block",)),
)


def half_plan(model: nn.Module, lists: tuple[str, ...], slots: int = 2) -> StreamPlan:
    """Every third block stays."""
    names = [f"{path}.{i}" for path in lists for i in range(len(model.get_submodule(path)))]
    sizes, _ = block_bytes(model, names)
    resident = spread_evenly(len(names) // 3, len(names))
    return StreamPlan(names, sizes, resident, rings_for([s for i, s in enumerate(sizes) if i not in resident], slots))


def storages(model: nn.Module) -> dict[str, tuple[int, torch.device, Tensor]]:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: (id(tensor), tensor.device, tensor.detach().clone()) for name, tensor in tensors}


def assert_same_module(before: dict, after: dict) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert before[name][:2] == after[name][:2], name
        assert torch.equal(before[name][2], after[name][2]), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slots", [1, 2, 3])
@torch.no_grad()
def test_same_output(name: str, slots: int):
    make, lists = MODELS[name]
    model, call = make()
    before, expected = storages(model), [call(i) for i in range(3)]
    for policy, budget in (("copies first", None), ("compute first", 0), ("in turns", 200_000)):
        device = ThreadDevice(policy, compute_is_host=name == "packed")
        with BlockStreamer(model, half_plan(model, lists, slots), device, budget) as streamer:
            with nullcontext() if device.compute_is_host else Late(device):
                found = [call(i) for i in range(3)]
            device.finish()
            assert streamer.metrics().misses == 0
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert_same_module(before, storages(model))


@torch.inference_mode()
def test_under_inference_mode():
    model, call = engine()
    expected = [call(i) for i in range(2)]
    device = ThreadDevice()
    with BlockStreamer(model, half_plan(model, MODELS["engine"][1]), device), Late(device):
        found = [call(i) for i in range(2)]
        device.finish()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("pinned", [0, 1_500_000])
@torch.no_grad()
def test_mapped_file_is_streamed_from_where_it_lies(tmp_path: Path, pinned: int):
    model, call = engine()
    expected = [call(i) for i in range(2)]
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)  # noqa: SIM118
    addresses = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    plan = half_plan(model, MODELS["engine"][1])
    streamed = sum(plan.sizes[i] for i in plan.streamed)
    device = ThreadDevice("compute first")
    with BlockStreamer(model, plan, device, pinned) as streamer:
        with Late(device):
            found = [call(i) for i in range(2)]
        device.finish()
        metrics = streamer.metrics()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert metrics.mapped_bytes > 0 and metrics.pageable_bytes == 0
    assert metrics.pinned_bytes <= max(pinned, 2 * max(plan.sizes))
    if not pinned:
        assert 0.9 * streamed < metrics.mapped_bytes <= streamed
        assert addresses == {name: tensor.data_ptr() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("whole", [False, True], ids=["block.compile()", "torch.compile(block)"])
@torch.no_grad()
def test_compiled_blocks(whole: bool):
    """Driven from outside of the compiled region: one graph for all blocks of a list, whichever slot they are in."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, call = engine()
    expected = call(0)
    counter = CompileCounter()
    for i, block in enumerate(model.single_blocks):
        if whole:
            model.single_blocks[i] = torch.compile(block, backend=counter, fullgraph=True)
        else:
            block.compile(backend=counter, fullgraph=True)
    with BlockStreamer(
        model, half_plan(model, MODELS["engine"][1]), ThreadDevice("copies first", compute_is_host=True)
    ):
        for _ in range(3):
            found = call(0)
    assert counter.frame_count == 1
    assert found.shape == expected.shape
    assert torch.equal(call(0), expected)
