"""Layers that multiply in 8 bits: what they are held in, how far off they are, and the way back."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux_quant.arch import FluxConfig
from flux_quant.formats import FORMATS, IN_MEMORY
from flux_quant.kernels import dispatch, eight_bit, fallback, fp8, tables
from flux_quant.linear import KEEP_16_BIT, QuantLinear, set_compute_
from flux_quant.model import Flux

N, K = 48, 512
SOURCES = ("bf16", "fp8", "q8_0", "q6_k", "q4_k", "q4_0")
EXPANDED = {name: fmt for name, fmt in IN_MEMORY.items() if name.endswith("as int8")}
ERRORS = {"int8": 0.02, "fp8": 0.06}  # of an output, relative to the same weight in 16 bits


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def off_by(out: Tensor, exact: Tensor) -> float:
    return ((out - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("compute", ERRORS)
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("rows", [(1,), (3, 7), (0,), (40,)], ids=str)
def test_any_format_computes_in_eight_bits(compute, name, rows):
    layer = QuantLinear.from_float(random(N, K), random(N), FORMATS[name])
    x = random(*rows, K)
    exact = layer(x)
    assert layer.set_compute_(compute) and layer.fmt.compute == compute
    assert not layer.set_compute_(compute)
    out = layer(x)
    assert out.shape == exact.shape and out.dtype == exact.dtype
    if out.numel():
        assert 1e-5 < off_by(out, exact) < ERRORS[compute]


@pytest.mark.parametrize("name", SOURCES)
def test_gradients_are_those_of_the_weight_that_is_used(name):
    layer = QuantLinear.from_float(random(N, K), None, FORMATS[name])
    layer.set_compute_("int8")
    x, up = random(5, K).requires_grad_(), random(5, N)
    layer(x).backward(up)
    assert off_by(x.grad, up @ layer.fmt.unpack(*layer.parts)) < 1e-5


@pytest.mark.parametrize("fmt", EXPANDED.values(), ids=EXPANDED)
def test_packed_weights_are_expanded_to_the_same_codes(fmt, monkeypatch, kernel_device):
    """By the kernel and by torch; the product then is the one of stored int8 rows."""
    weight = random(N, K)
    parts = [part.to(kernel_device) for part in fmt.pack(weight)]
    x = random(33, K).to(kernel_device)
    stored = eight_bit.int8_torch.weight_rows(fmt, parts, 256)
    assert torch.equal(stored[1], parts[-1])
    by_torch = dispatch.linear(x, fmt, parts)
    assert off_by(by_torch, dispatch.linear(x, IN_MEMORY["int8_rows"], stored)) < 1e-6
    from flux_quant.kernels import triton_path

    scratch = torch.empty(20 * K, dtype=torch.uint8, device=kernel_device)  # 20 of the 48 rows
    monkeypatch.setattr(triton_path, "scratch_for", lambda device, dtype: scratch.view(dtype))
    monkeypatch.setattr(fallback, "triton_for", lambda device, minimum=(7, 0): None)
    pieces = []
    for rows, codes, scale in eight_bit.weights(fmt, parts):
        assert torch.equal(scale, parts[-1][rows])
        pieces.append(codes.clone())
    assert len(pieces) == 3
    codes = torch.cat(pieces)
    assert (codes.int() - stored[0].int()).abs().max() <= 1 and (codes != stored[0]).float().mean() < 1e-3


def test_the_way_back():
    layer = QuantLinear.from_float(random(N, K), None, FORMATS["fp8"])
    x = random(3, K)
    exact, parts = layer(x), layer.parts
    layer.set_compute_("fp8")
    assert layer.fmt.name == "fp8 as fp8" and layer.set_compute_("16-bit")
    assert layer.fmt is FORMATS["fp8"] and torch.equal(layer(x), exact)
    assert all(a is b for a, b in zip(layer.parts, parts, strict=True))
    layer.set_compute_("int8")
    with pytest.raises(ValueError, match="requantized to int8_rows; load it again for 16-bit"):
        layer.set_compute_("16-bit")


def test_state_of_a_packed_layer_stays_that_of_its_file():
    layer = QuantLinear.from_float(random(N, K), random(N), FORMATS["q4_0"]).repack_()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    fmt = IN_MEMORY["q4_0 planar as int8"]
    layer.replace_parts(fmt, (*layer.parts, eight_bit.int8_torch.weight_rows(layer.fmt, layer.parts, 256)[1]))
    saved = layer.state_dict()
    assert set(saved) == set(state) and all(torch.equal(saved[name], state[name]) for name in state)
    with pytest.raises(RuntimeError, match="computes in int8: load weights first"):
        layer.load_state_dict(state)


def test_what_eight_bits_cannot_do_stays():
    odd = QuantLinear.from_float(random(40, K), None, FORMATS["q8_0"])
    assert not odd.set_compute_("int8") and odd.fmt is FORMATS["q8_0"]
    with pytest.raises(ValueError, match="compute int4; choose one of 16-bit, int8, fp8"):
        set_compute_(odd, "int4")


def test_sensitive_layers_of_the_engine_stay(monkeypatch):
    config = FluxConfig(64, 64, 256, 64, 1024, 96, 64, 1, 2, True)
    model = Flux(config)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            model.set_submodule(path, QuantLinear.from_float(layer.weight, layer.bias, FORMATS["bf16"]))
    changed = set_compute_(model, "int8")
    streams = [f"double_blocks.0.{stream}_{part}" for stream in ("img", "txt") for part in ("attn.qkv", "attn.proj")]
    streams += [f"double_blocks.0.{stream}_mlp.{i}" for stream in ("img", "txt") for i in (0, 2)]
    single = [f"single_blocks.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert set(changed) == {*streams, *single} and set(changed.values()) == {"int8_rows"}
    everything = set_compute_(model, "int8", keep=())
    assert {"img_in", "final_layer.linear", "single_blocks.0.modulation.lin"} <= set(everything)


def test_the_list_of_sensitive_layers_means_diffusers_names_too():
    diffusers = pytest.importorskip("diffusers")
    config = FluxConfig(64, 64, 256, 64, 1024, 96, 64, 1, 1, True)
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**config.diffusers())
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    from fnmatch import fnmatchcase

    kept = {name for name in names if any(fnmatchcase(name, pattern) for pattern in KEEP_16_BIT)}
    blocks = {name for name in names if "transformer_blocks" in name}
    assert set(names) - blocks <= kept
    assert kept & blocks == {
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
    }


REASONS = {
    "int8 on a GTX 10": ("int8_rows", (6, 1), "int8 tensor cores begin with compute capability 7.5"),
    "fp8 on an RTX 30": ("fp8 as fp8", (8, 6), "no FP8 product by tensor or row"),
}


@pytest.mark.parametrize(("name", "capability", "reason"), REASONS.values(), ids=REASONS)
def test_cards_that_cannot_take_sixteen_bits_and_say_why(name, capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(fp8, "fp8_ways", lambda device, dtype: ())
    monkeypatch.setenv(fallback.SWITCH, "1")
    way = dispatch.way_for(IN_MEMORY[name], 4608, (3072, 3072), torch.float16, torch.device("cuda"))
    assert way.path == dispatch.CODEC and reason in way.why


CARDS = {(7, 5): "int_mm", (8, 0): "triton", (8, 6): "triton", (8, 9): "triton", (9, 0): "tma", (12, 0): "triton"}


@pytest.mark.parametrize(("capability", "way"), CARDS.items(), ids=str)
def test_ways_of_int8_by_card(capability, way, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(fallback, "triton_for", lambda device, minimum=(7, 0): None)
    cuda = torch.device("cuda")
    monkeypatch.setattr(tables, "found_for", lambda device, name: None)
    assert eight_bit.int8_product(4608, (3072, 3072), cuda).way == way
    few = eight_bit.int8_product(16, (3072, 3072), cuda).way
    assert few == ("int_mm" if capability == (7, 5) else "triton")


def test_a_measured_table_decides_where_it_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(fallback, "triton_for", lambda device, minimum=(7, 0): None)
    steps = (tables.Step(64, eight_bit.INT_MM), tables.Step(None, eight_bit.TRITON, 2))
    monkeypatch.setattr(tables, "found_for", lambda device, name: {"int8": (steps, "measured")}[name])
    cuda = torch.device("cuda")
    chosen = eight_bit.int8_product(4608, (3072, 3072), cuda)
    assert (chosen.way, chosen.config) == ("triton", 2) and "measured" in chosen.why
    assert eight_bit.int8_product(64, (3072, 3072), cuda).way == "int_mm"
    assert eight_bit.int8_product(64, (3076, 3072), cuda).way == "triton"  # int_mm takes multiples of 8


@pytest.mark.gpu
@pytest.mark.parametrize("compute", ERRORS)
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("rows", [1, 17, 512, 4608])
def test_eight_bits_on_cuda(compute, name, rows):
    layer = QuantLinear.from_float(random(320, 768), random(320), FORMATS[name]).repack_().cuda()
    x = random(rows, 768).cuda().bfloat16()
    exact = F.linear(x.double(), layer.fmt.unpack(*layer.parts).double(), layer.bias.double())
    layer.set_compute_(compute)
    way = dispatch.way_for(layer.fmt, rows, (320, 768), x.dtype, x.device, layer.parts)
    if way.path == tables.TWO_PASS:
        pytest.skip(way.why)
    assert off_by(layer(x), exact) < ERRORS[compute]
