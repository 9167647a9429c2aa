"""The engine on the fused kernels against the engine on plain torch, and when which of the two runs.

Without a CUDA device the kernels run in Triton's interpreter, in float32.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from flux_quant.arch import FluxConfig
from flux_quant.formats import FORMATS
from flux_quant.kernels import fallback, fused
from flux_quant.linear import QuantLinear
from flux_quant.model import DoubleBlock, Flux, SingleBlock, image_ids, rotary_angles, text_ids

CONFIG = FluxConfig(64, 64, 128, 32, 512, 96, 64, 1, 2, True)
BATCH, TEXT, IMAGE = 2, 3, 6
SAME = {"cpu": 1e-5, "cuda": 1e-4}  # relative error in float32; products of matrices on tensor cores are less exact
KERNELS = {"modulated_norm", "heads", "gelu", "beside_gelu", "gated_sum"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, kernel_device: str) -> list[str]:
    """Names of the kernels that ran. Triton is let in on the CPU, which means its interpreter."""
    names = []

    def guarded(name, device, run, otherwise):
        names.append(name)
        return fallback.guarded(name, device, run, otherwise)

    if kernel_device == "cpu":
        monkeypatch.setattr(fused, "triton_for", lambda device: None)
    monkeypatch.setattr(fused, "guarded", guarded)
    monkeypatch.setattr(fallback, "FAILED", {})
    return names


def small_flux(device: str) -> Flux:
    model = Flux(CONFIG).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.06, generator=generator)
    return model.to(device)


def inputs(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    return dict(
        img=torch.randn(BATCH, IMAGE, CONFIG.in_channels, generator=g).to(device, dtype),
        txt=torch.randn(BATCH, TEXT, CONFIG.context, generator=g).to(device, dtype),
        pooled=torch.randn(BATCH, CONFIG.pooled, generator=g).to(device, dtype),
        timestep=torch.tensor([0.9, 0.2], device=device),
        img_ids=image_ids(2, 3, device),
        txt_ids=text_ids(TEXT, device),
        guidance=torch.tensor([1.0, 3.5], device=device),
    )


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def packed(model: Flux) -> Flux:
    """Every linear of the blocks as Q8_0."""
    for parent in [module for name, module in model.named_modules() if "_blocks." in name]:
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                setattr(parent, name, QuantLinear.from_float(module.weight, module.bias, FORMATS["q8_0"]))
    return model


@pytest.mark.parametrize("weights", [lambda model: model, packed], ids=["dense", "packed"])
@torch.no_grad()
def test_engine(weights, launched: list[str], kernel_device: str, monkeypatch: pytest.MonkeyPatch):
    model, x = weights(small_flux(kernel_device)), inputs(kernel_device)
    got = model(**x)
    assert {name: launched.count(name) for name in KERNELS} == {
        "modulated_norm": 4 * CONFIG.double_blocks + CONFIG.single_blocks + 1,
        "heads": CONFIG.double_blocks + CONFIG.single_blocks,
        "gelu": 2 * CONFIG.double_blocks,
        "beside_gelu": CONFIG.single_blocks,
        "gated_sum": 4 * CONFIG.double_blocks + CONFIG.single_blocks,
    }
    launched.clear()
    monkeypatch.setattr(fused, "triton_for", lambda device: "not now")
    assert relative_error(got, model(**x)) < SAME[kernel_device]
    assert not launched


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_engine_in_16_bits_is_no_worse_than_torch(dtype: torch.dtype, launched: list[str], monkeypatch):
    model, x = small_flux("cuda").double(), inputs("cuda", torch.float64)
    expected = model(**x)
    assert not launched  # float64 is none of the kernels' dtypes
    model, x = model.to(dtype), inputs("cuda", dtype)
    got = model(**x)
    assert set(launched) == KERNELS
    monkeypatch.setenv(fallback.SWITCH, "1")
    assert relative_error(got, expected) < 1.1 * relative_error(model(**x), expected)


def block_inputs(device: str) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(6)
    img, txt, vec = (torch.randn(*shape, 128, generator=g) for shape in [(BATCH, IMAGE), (BATCH, TEXT), (BATCH,)])
    ids = torch.cat([text_ids(TEXT), image_ids(2, 3)])
    return tuple(x.to(device) for x in (img, txt, vec, *rotary_angles(ids, CONFIG.rope_axes)))


class Seen(TorchDispatchMode):
    """Names of all operators that run inside."""

    def __enter__(self) -> "Seen":
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [DoubleBlock, SingleBlock], ids=lambda kind: kind.__name__)
@torch.no_grad()
def test_block_joins_nothing_and_leaves_its_inputs_alone(kind: type[nn.Module], launched, kernel_device: str):
    model, (img, txt, vec, cos, sin) = small_flux(kernel_device), block_inputs(kernel_device)
    img, txt, vec = img[:1], txt[:1], vec[:1]  # rows of one sample's image lie together, torch adds the bias at once
    x = (img, txt) if kind is DoubleBlock else (torch.cat([txt, img], dim=1),)
    block = next(module for module in model.modules() if isinstance(module, kind))
    before, fed = [t.clone() for t in x], []
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: fed.append((args[0], args[0].clone())))
    with Seen() as seen:
        block(*x, vec, cos, sin)
    assert set(launched) == KERNELS - {"beside_gelu" if kind is DoubleBlock else "gelu"}
    assert not {"cat", "stack", "native_layer_norm", "gelu", "mul", "add"} & seen.names
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))
    assert fed and all(torch.equal(now, then) for now, then in fed)  # who keeps what a linear was given may read it


@torch.no_grad()
def test_attention_and_mlp_lie_side_by_side_in_what_linear1_returned(launched, kernel_device: str):
    y = torch.randn(BATCH, 4, TEXT, 32, device=kernel_device)
    wide = torch.randn(BATCH, TEXT, 3 * 128 + 512, device=kernel_device)
    before = wide.clone()
    got = fused.beside_gelu(y, wide)
    assert got.untyped_storage().data_ptr() == wide.untyped_storage().data_ptr()
    assert got.flatten(0, 1)._is_view()  # one matrix for linear2, without a copy
    assert torch.equal(wide[..., :256], before[..., :256])
    assert torch.equal(got[..., :128], y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(got[..., 128:], F.gelu(before[..., 384:], approximate="tanh"))


@torch.no_grad()
def test_attention_gives_tokens_without_a_copy(launched, kernel_device: str):
    _, _, _, cos, sin = block_inputs(kernel_device)
    scale = torch.ones(32, device=kernel_device)
    streams = [(torch.randn(BATCH, length, 384, device=kernel_device), scale, scale) for length in (TEXT, IMAGE)]
    q, k, v = fused.heads(streams, cos, sin)
    assert q.shape == k.shape == v.shape == (BATCH, 4, TEXT + IMAGE, 32)
    assert all(t.transpose(1, 2).flatten(2)._is_view() for t in (q, k, v))
    _, _, v = fused.heads(streams[:1], cos[:TEXT], sin[:TEXT])
    assert v.untyped_storage().data_ptr() == streams[0][0].untyped_storage().data_ptr()


def test_gradients_come_from_torch(launched: list[str], kernel_device: str):
    """Of the inputs, with frozen weights, as in training an adapter; and of the weights."""
    model, x = small_flux(kernel_device).requires_grad_(False), inputs(kernel_device)
    x["img"].requires_grad_()
    model(**x).square().sum().backward()
    assert x["img"].grad.norm() > 0
    assert launched == ["modulated_norm"]  # of the text before it has seen the image
    model.requires_grad_(True)
    launched.clear()
    model(**inputs(kernel_device)).square().sum().backward()
    assert not launched and all(p.grad is not None for p in model.parameters())


def test_without_gradients_for_once(launched: list[str], kernel_device: str):
    """Parameters ask for gradients, the caller does not."""
    model, x = small_flux(kernel_device), inputs(kernel_device)
    expected = model(**x)
    assert not launched
    with torch.inference_mode():
        got = model(**x)
    assert set(launched) == KERNELS and relative_error(got, expected) < SAME[kernel_device]


@torch.no_grad()
def test_compiled_engine_is_one_graph_of_plain_torch(launched: list[str], kernel_device: str):
    """Whatever follows (inductor) fuses it; a kernel of ours would be a hole in the graph."""
    model, x = small_flux(kernel_device), inputs(kernel_device)
    got = torch.compile(model, backend="eager", fullgraph=True)(**x)
    assert not launched
    assert relative_error(got, model(**x)) < SAME[kernel_device]
    assert launched


NOT_FUSABLE = {
    "dtypes differ": lambda x, m: (x, m.half(), m),
    "float64": lambda x, m: (x.double(), m.double(), m.double()),
    "gaps in rows": lambda x, m: (x.transpose(1, 2).contiguous().transpose(1, 2), m, m),
    "another device": lambda x, m: (x.to("meta"), m.to("meta"), m.to("meta")),
    "gradient": lambda x, m: (x, m.requires_grad_(), m),
}


@pytest.mark.parametrize("name", NOT_FUSABLE)
def test_other_inputs_take_the_torch_path(name: str, launched: list[str], monkeypatch, kernel_device: str):
    if name == "another device":
        monkeypatch.setattr(fused, "triton_for", fallback.triton_for)
    x, shift, scale = NOT_FUSABLE[name](*(torch.randn(1, n, 8, device=kernel_device) for n in (3, 1)))
    assert fused.modulated_norm(x, shift, scale).shape == (1, 3, 8)
    assert not launched


@torch.no_grad()
def test_cpu_and_switch_take_the_torch_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "pointwise", None)
    model, x = small_flux("cpu"), inputs("cpu")
    expected = model(**x)
    if torch.cuda.is_available():
        monkeypatch.setenv(fallback.SWITCH, "1")
        moved = {name: value.cuda() for name, value in x.items()}
        assert relative_error(model.cuda()(**moved).cpu(), expected) < 1e-3  # matrix products may use TF32


@torch.no_grad()
def test_kernels_that_fail_are_replaced_by_torch(launched: list[str], kernel_device: str, monkeypatch):
    class OutOfResources(Exception):
        __module__ = "triton.runtime.errors"

    def fail(*args, **options):
        raise OutOfResources("shared memory")

    model, x = small_flux(kernel_device), inputs(kernel_device)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "triton_for", lambda device: "not now")
        expected = model(**x)
    monkeypatch.setattr(fused, "pointwise", lambda: SimpleNamespace(**dict.fromkeys(KERNELS, fail)))
    with pytest.warns(UserWarning, match="shared memory") as caught:
        assert torch.equal(model(**x), expected)
    assert len(caught) == len(KERNELS)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(model(**x), expected)
