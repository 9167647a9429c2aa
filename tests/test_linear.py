"""QuantLinear and dispatch against a dense linear over the unpacked weight."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux_quant.formats import FORMATS, IN_MEMORY
from flux_quant.kernels import dispatch, torch_path
from flux_quant.kernels.packed import row_slices, weight_shape
from flux_quant.linear import QuantLinear, quantize_module_, repack_

N, K = 48, 256
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[None, 7], ids=["whole", "sliced"])
def scratch(request, monkeypatch) -> None:
    """Every weight at once, and seven rows at a time, which does not divide N."""
    if request.param:
        monkeypatch.setattr(torch_path, "SCRATCH_BYTES", request.param * K * 4)
        assert len(row_slices((N, K), torch_path.SCRATCH_BYTES, 4)) == 7


@formats
@dtypes
@pytest.mark.usefixtures("scratch")
def test_dequantize_is_the_codec(fmt, dtype):
    parts = fmt.pack(random(N, K))
    expected = fmt.unpack(*parts).to(dtype)
    assert torch.equal(dispatch.dequantize(fmt, parts, dtype), expected)
    out = torch.full((N, K), torch.nan, dtype=dtype)
    assert dispatch.dequantize(fmt, parts, dtype, out=out) is out and torch.equal(out, expected)


def test_dequantize_other_ranks_and_wrong_output():
    fmt = FORMATS["bf16"]
    for shape in ((), (5,), (2, 3, 4), (8, 4, 3, 3)):
        weight = torch.ones(shape)
        assert torch.equal(dispatch.dequantize(fmt, fmt.pack(weight), torch.float32), weight)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        dispatch.dequantize(fmt, fmt.pack(torch.ones(2, 3)), torch.float32, out=torch.empty(3, 2))


@formats
@dtypes
@pytest.mark.parametrize("leading", [(1,), (17,), (2, 5), (0,)], ids=str)
@pytest.mark.usefixtures("scratch")
def test_linear_is_the_dense_linear(fmt, dtype, leading):
    """Within the rounding of one product: of the weights to the input's dtype, and of the result."""
    layer = QuantLinear.from_float(random(N, K), random(N), fmt)
    x = random(*leading, K).to(dtype)
    exact = F.linear(x.double(), fmt.unpack(*layer.parts).double(), layer.bias.double())
    out = layer(x)
    assert out.dtype == dtype and out.shape == exact.shape
    assert (out - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


@formats
@dtypes
@pytest.mark.usefixtures("scratch")
def test_gradients_are_those_of_the_dense_linear(fmt, dtype):
    parts = fmt.pack(random(N, K))
    weight = fmt.unpack(*parts)
    x, bias, up = random(2, 5, K).to(dtype), random(N).to(dtype), random(2, 5, N).to(dtype)
    ours = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
    dispatch.linear(ours[0], fmt, parts, ours[1]).backward(up)
    dense = [x.float().requires_grad_(), bias.float().requires_grad_()]
    F.linear(dense[0], weight.to(dtype).float(), dense[1]).backward(up.float())
    for mine, other in zip(ours, dense, strict=True):
        assert mine.grad.dtype == dtype
        error = (mine.grad.float() - other.grad).norm() / other.grad.norm()
        assert error < 4 * torch.finfo(dtype).eps


@formats
def test_backward_keeps_no_unpacked_weight(fmt):
    """What is saved for the backward pass is the stored parts themselves."""
    layer, saved = QuantLinear.from_float(random(N, K), None, fmt), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(random(3, K).to(layer.weight.dtype if fmt.is_plain else torch.float32).requires_grad_())
    assert {t.data_ptr() for t in saved} <= {part.data_ptr() for part in layer.parts}


def test_weight_without_bias_and_frozen_input():
    layer = QuantLinear.from_float(random(N, K), None, FORMATS["q8_0"])
    assert layer.bias is None and not layer(random(3, K)).requires_grad
    with torch.inference_mode():
        assert layer(random(3, K)).shape == (3, N)


@formats
def test_scratch_is_bounded_for_the_widest_layer(fmt):
    slices = row_slices((21504, 3072), torch_path.SCRATCH_BYTES, 4)
    assert all((s.stop - s.start) * 3072 * 4 <= torch_path.SCRATCH_BYTES for s in slices)
    assert [s.start for s in slices[1:]] == [s.stop for s in slices[:-1]]
    assert slices[0].start == 0 and slices[-1].stop == 21504
    stored = [torch.empty(part.shape((21504, 3072)), dtype=part.dtype, device="meta") for part in fmt.parts]
    assert weight_shape(fmt, stored) == (21504, 3072)


@formats
def test_explain_is_one_line(fmt):
    line = dispatch.explain(fmt, (4608, 9216, 3072), "cpu")
    assert fmt.name in line and "4608" in line and "cpu" in line and "\n" not in line


def test_adapters_wrap_the_layer():
    layer = QuantLinear.from_float(random(N, K), random(N), FORMATS["q4_0"])
    x = random(4, K)
    plain = layer(x)
    down, up = random(2, K), random(N, 2)
    layer.adapters.append(lambda x, linear: linear(x) + x @ down.T @ up.T)
    layer.adapters.append(lambda x, linear: 2 * linear(x))
    torch.testing.assert_close(layer(x), 2 * (plain + x @ down.T @ up.T))
    assert "adapters=2" in repr(layer)
    layer.adapters.clear()
    assert torch.equal(layer(x), plain)


@formats
@pytest.mark.parametrize(
    "cast",
    [nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double, lambda m: m.to("cpu", torch.bfloat16)],
    ids=["half", "bfloat16", "float", "double", "to"],
)
def test_casts_leave_the_parts_alone(fmt, cast):
    layer = QuantLinear.from_float(random(N, K), random(N), fmt)
    before = [part.clone() for part in layer.parts]
    cast(nn.Sequential(layer, nn.Linear(N, 2)))
    for part, old in zip(layer.parts, before, strict=True):
        assert part.dtype == old.dtype and torch.equal(part.float(), old.float())
    assert layer.bias.dtype == cast(nn.Linear(1, 1)).bias.dtype
    assert layer(random(3, K)).dtype == torch.float32


@formats
def test_moves_reach_the_parts(fmt):
    layer = QuantLinear.from_float(random(N, K), random(N), fmt)
    layer.to("meta", torch.bfloat16)
    assert {part.device.type for part in layer.parts} == {"meta"} and layer.bias.dtype == torch.bfloat16
    assert layer(torch.empty(2, K, device="meta")).shape == (2, N)
    layer.to_empty(device="cpu")
    assert [(p.device.type, p.dtype) for p in layer.parts] == [("cpu", p.dtype) for p in fmt.parts]


@formats
def test_built_on_meta_and_loaded(fmt):
    source = QuantLinear.from_float(random(N, K), random(N), fmt)
    state = source.state_dict()
    assert set(state) == {part.suffix for part in fmt.parts} | {"bias"}
    with torch.device("meta"):
        layer = QuantLinear(K, N, fmt)
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    layer.load_state_dict(state, assign=True)
    assert layer.weight.data_ptr() == source.weight.data_ptr()
    x = random(3, K)
    assert torch.equal(layer(x), source(x))
    assert not any(p.requires_grad for p in layer.parameters())


@formats
def test_copied_and_saved(fmt):
    layer = QuantLinear.from_float(random(N, K), random(N), fmt)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = random(3, K)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert other.fmt is fmt and torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()


def test_wrong_parts_are_refused():
    q8_0, fp8 = FORMATS["q8_0"], FORMATS["fp8"]
    with pytest.raises(ValueError, match="in_features 40 is not a multiple of 32"):
        QuantLinear(40, 8, q8_0)
    data, scale = fp8.pack(random(N, K))
    with pytest.raises(ValueError, match="weight_scale"):
        QuantLinear.from_parts(fp8, (data, scale.expand(3)))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        QuantLinear.from_parts(FORMATS["bf16"], (random(N, K),))
    with pytest.raises(ValueError, match="bias"):
        QuantLinear.from_float(random(N, K), random(N + 1), q8_0)
    with pytest.raises(ValueError, match="stored in 2 tensors, got 1"):
        QuantLinear.from_parts(fp8, (data,))


@formats
def test_repacked_for_a_gpu_it_is_still_the_same_file(fmt):
    """Planar rows in memory; state dicts, in both directions, hold the bytes of the file."""
    layer = QuantLinear.from_float(random(N, K), random(N), fmt)
    x, state = random(3, K), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = layer(x)
    assert repack_(nn.Sequential(layer))[0] is layer
    assert layer.fmt is IN_MEMORY.get(f"{fmt.name} planar", fmt)
    assert (layer(x) - expected).norm() <= 1e-6 * expected.norm()
    saved = layer.state_dict()
    assert all(torch.equal(saved[name].float(), tensor.float()) for name, tensor in state.items())
    other = QuantLinear.from_float(random(N, K) * 2, random(N), fmt).repack_()
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x)) and other.fmt is layer.fmt
    assert layer.repack_().fmt is other.fmt


def test_inputs_of_any_shape_and_layout():
    layer = QuantLinear.from_float(random(N, K), random(N), FORMATS["q5_k"])
    x = random(4, 3, K)
    expected = layer(x)
    for same in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], dim=2)[..., :K],
        x.repeat_interleave(2, dim=2)[..., ::2],
        torch.cat([x, x])[:4],
    ):
        assert (layer(same) - expected).norm() <= 1e-6 * expected.norm()
    assert (layer(x[2, 1]) - expected[2, 1]).norm() <= 1e-6 * expected[2, 1].norm()
    assert layer(x[:0]).shape == (0, 3, N) and layer(random(2, 0, K)).shape == (2, 0, N)


def test_autocast_chooses_the_dtype_as_for_torchs_linear():
    layer, dense = QuantLinear.from_float(random(N, K), random(N), FORMATS["q8_0"]), nn.Linear(K, N)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(random(3, K)).dtype == dense(random(3, K)).dtype == torch.bfloat16


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)) for _ in range(2)
        )
        self.odd = nn.Linear(256, 40)
        self.head = nn.Linear(40, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.odd(x))


def test_linears_of_any_module_are_packed_by_a_recipe():
    model = Small()
    x = random(3, 256)
    before = model(x)
    recipe = [("blocks.1.2", None), ("blocks.*", "q8_0"), ("*", "q6_k")]
    assert quantize_module_(model, recipe) == {"blocks.0.0": "q8_0", "blocks.0.2": "q8_0", "blocks.1.0": "q8_0"} | {
        "odd": "q6_k"
    }  # and `head`, whose inputs are no multiple of 256, stays
    assert isinstance(model.blocks[1][2], nn.Linear) and isinstance(model.head, nn.Linear)
    assert 1e-5 < (model(x) - before).norm() / before.norm() < 5e-2
    with pytest.raises(ValueError, match="unknown format q9_0; choose one of f32"):
        quantize_module_(model, [("*", "q9_0")])


@pytest.mark.gpu
@formats
@dtypes
def test_cuda_agrees_with_cpu(fmt, dtype):
    layer = QuantLinear.from_float(random(N, K), random(N), fmt)
    x = random(17, K).to(dtype)
    expected = layer(x).float()
    moved = layer.to("cuda", dtype)
    assert {part.device.type for part in moved.parts} == {"cuda"}
    error = (moved(x.cuda()).float().cpu() - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype != torch.float32 else 1e-3)
