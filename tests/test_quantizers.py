"""How codes are chosen: against ggml's own code (libgguf), the loops against the codecs, threads, importance, edges."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flux_quant.benchmarks.quantizers import TYPES, families, relative_error
from flux_quant.codecs.search import SEARCHES
from flux_quant.converters import quantize as conversion
from flux_quant.converters.quantize import requantize
from flux_quant.formats import FORMATS
from flux_quant.kernels import cpu_quantize

ROWS, K = 33, 1536
FAMILIES = families(ROWS, K)
LEGACY = tuple(name for name, fmt in FORMATS.items() if fmt.search is not fmt.pack and fmt.search)
SUPPORTED = tuple(name for name in FORMATS if cpu_quantize.supports(name))

types = pytest.mark.parametrize("name", TYPES)
searched = pytest.mark.parametrize("name", SEARCHES)
supported = pytest.mark.parametrize("name", SUPPORTED)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.03


def unequal(columns: int = K) -> Tensor:
    """Mean squares of inputs as they are in models: over a few orders of magnitude, some columns unused."""
    values = torch.randn(columns, generator=torch.Generator().manual_seed(7)).mul(1.5).exp()
    values[::13] = 0
    return values


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


def weighted_error(weight: Tensor, values: Tensor, importance: Tensor) -> float:
    return (importance * (weight.double() - values).square()).sum().item()


def test_everything_that_has_blocks_is_supported():
    assert set(SUPPORTED) == {*TYPES, "fp8", "fp8_plain"} and set(LEGACY) == {"q4_0", "q4_1", "q5_0", "q5_1"}
    assert not any(cpu_quantize.supports(name) for name in ("f32", "f16", "bf16", "q9_9"))


@types
@pytest.mark.parametrize("family", FAMILIES)
def test_error_is_below_ggmls(name, family):
    """At or below its weighted search with weights of one, unpacked by ggml; below it wherever there is a search."""
    libgguf = pytest.importorskip("libgguf")
    kind, weight = libgguf.GGMLQuantizationType[name.upper()], FAMILIES[family]
    theirs = libgguf.quantize_rows(weight.float().numpy(), kind, np.ones(K, np.float32))
    (ours,), signal, noise = cpu_quantize.quantize(name, weight)
    error, bar = (
        relative_error(weight, torch.from_numpy(libgguf.dequantize_rows(data, kind))) for data in (ours.numpy(), theirs)
    )
    assert error <= bar * (1 if name == "q8_0" else 0.996)
    assert math.sqrt(noise / signal) == pytest.approx(error, rel=1e-5)


@searched
def test_weighted_error_is_below_ggmls(name):
    libgguf = pytest.importorskip("libgguf")
    kind, weight, importance = libgguf.GGMLQuantizationType[name.upper()], FAMILIES["Student-t"], unequal()
    theirs = libgguf.quantize_rows(weight.float().numpy(), kind, importance.numpy())
    (ours,), *_ = cpu_quantize.quantize(name, weight, importance)
    error, bar = (
        weighted_error(weight, torch.from_numpy(libgguf.dequantize_rows(data, kind)), importance)
        for data in (ours.numpy(), theirs)
    )
    assert error < 0.98 * bar


@searched
@pytest.mark.parametrize("searcher", ["loops", "codec"])
def test_importance_lowers_the_weighted_error(name, searcher):
    def values(importance: Tensor | None) -> Tensor:
        if searcher == "loops":
            return fmt.unpack(*cpu_quantize.quantize(name, weight, importance)[0])
        return fmt.unpack(*fmt.search(weight, importance))

    fmt, weight, importance = FORMATS[name], FAMILIES["Laplace"][:8], unequal()
    with_it, without = (weighted_error(weight, values(given), importance) for given in (importance, None))
    assert with_it < 0.97 * without
    assert weighted_error(weight, values(None), torch.ones(K)) < weighted_error(
        weight, values(importance), torch.ones(K)
    )


@searched
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "importance"])
def test_loops_search_as_the_codec_does(name, weighted):
    """Sums are added in another order, so a trial may win here and another there; the error hardly moves."""
    fmt, weight = FORMATS[name], FAMILIES["Student-t"]
    importance = unequal() if weighted else None
    loops, *_ = cpu_quantize.quantize(name, weight, importance)
    codec = fmt.search(weight, importance)
    measure = torch.ones(K) if importance is None else importance
    errors = [weighted_error(weight, fmt.unpack(*parts), measure) for parts in (loops, codec)]
    assert errors[0] == pytest.approx(errors[1], rel=0.005 if weighted else 0.0005)
    assert (loops[0] != codec[0]).float().mean() < 0.1


@pytest.mark.parametrize("name", [*LEGACY, "q8_0", "fp8", "fp8_plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_without_search_bytes_are_the_codecs(name, dtype):
    ties = (torch.arange(512) % 33 - 16).mul(0.5).expand(3, 512)
    lone = torch.zeros(1, 512).index_fill(1, torch.tensor([77]), -3.0)
    for weight in (normal(700, 512), ties, -ties, lone, normal(5, 512) * 1e-6, normal(2, 512) * 1e-35):
        weight = weight.to(dtype) + 0  # negative zeros become zeros: their order decides the sign of a scale of zero
        parts, signal, noise = cpu_quantize.quantize(name, weight, search=False)
        assert same(parts, FORMATS[name].pack(weight))
        left = weight.double() - FORMATS[name].unpack(*parts)
        assert signal == pytest.approx(weight.double().square().sum().item(), rel=1e-6)
        assert noise == pytest.approx(left.square().sum().item(), rel=1e-5, abs=1e-12 * signal)


@supported
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_taken_as_they_are(name, dtype):
    weight = normal(200, 1536).to(dtype)
    weight[3, :40] *= 2**-12  # subnormal in float16
    direct, *sums = cpu_quantize.quantize(name, weight)
    single, *expected = cpu_quantize.quantize(name, weight.float())
    assert same(direct, single) and sums == pytest.approx(expected, rel=1e-6)


@supported
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "importance"])
def test_threads_change_nothing(name, weighted, monkeypatch):
    monkeypatch.setattr(cpu_quantize, "TASK", 4096)
    monkeypatch.setattr(cpu_quantize, "SLICE", 8192)
    weight, before = normal(41, 768), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu_quantize.quantize(name, weight, unequal(768) if weighted else None))
    finally:
        torch.set_num_threads(before)
    for parts, *sums in found[1:]:
        assert same(parts, found[0][0]) and tuple(sums) == found[0][1:]


@supported
@pytest.mark.parametrize("search", [True, False], ids=["search", "plain"])
@pytest.mark.parametrize("source", ["bf16", "f32", "q8_0", "q4_k", "fp8"])
def test_requantize_does_not_depend_on_slices(name, search, source, monkeypatch):
    fmt, target, shape = FORMATS[source], FORMATS[name], (21, 1536)
    parts, importance = fmt.pack(normal(*shape)), unequal()
    whole, deviation = requantize(fmt, parts, shape, target, search, importance)
    monkeypatch.setattr(conversion, "SLICE", 5 * 1536)
    sliced, again = requantize(fmt, parts, shape, target, search, importance)
    assert same(whole, sliced)
    assert (deviation.signal, deviation.noise) == pytest.approx((again.signal, again.noise))
    weight = fmt.unpack(*parts).double()
    assert deviation.signal == pytest.approx(weight.square().sum().item(), rel=1e-6)
    noise = (weight - target.unpack(*whole)).square().sum().item()
    assert deviation.noise == pytest.approx(noise, rel=1e-4, abs=1e-12 * deviation.signal)


@supported
def test_requantize_to_the_same_changes_nothing(name):
    parts = FORMATS[name].pack(normal(5, 512))
    again, deviation = requantize(FORMATS[name], parts, (5, 512), FORMATS[name])
    assert same(parts, again) and deviation.noise == 0 < deviation.signal


@supported
def test_requantize_by_the_codec(name, monkeypatch):
    """What a device without loops of its own runs."""
    fmt, weight, importance = FORMATS[name], FAMILIES["trained"], unequal()
    monkeypatch.setattr(cpu_quantize, "supports", lambda name: False)
    parts, deviation = requantize(FORMATS["bf16"], (weight,), tuple(weight.shape), fmt, True, importance)
    assert same(parts, fmt.search(weight, importance) if fmt.search else fmt.pack(weight))
    assert deviation.noise == pytest.approx(weighted_error(weight, fmt.unpack(*parts), torch.ones(K)), rel=1e-6)


@pytest.mark.gpu
@types
def test_requantize_on_cuda(name):
    weight = FAMILIES["trained"]
    shape = tuple(weight.shape)
    _, here = requantize(FORMATS["bf16"], (weight,), shape, FORMATS[name])
    parts, there = requantize(FORMATS["bf16"], (weight,), shape, FORMATS[name], device="cuda")
    assert parts[0].device.type == "cpu" and there.noise == pytest.approx(here.noise, rel=0.001)


EDGES = {
    "zeros": torch.zeros(3, 512),
    "negative zeros": -torch.zeros(1, 512),
    "constant": torch.full((2, 512), 0.37),
    "negative constant": torch.full((2, 512), -0.37),
    "far from zero": 1000 + normal(3, 512),
    "one outlier": torch.cat([torch.full((3, 1), 50.0), normal(3, 511)], dim=1),
    "one value": torch.zeros(1, 512).index_fill(1, torch.tensor([300]), 0.7),
    "subnormal": normal(3, 512) * 1e-39,
    "below float16": normal(3, 512) * 1e-20,
    "subnormal scales": normal(3, 512) * 1e-4,
    "beyond float16": normal(3, 512) * 1e8,
    "1e30": normal(5, 512) * 1e32,
    "largest floats": (normal(1, 512) * 1e40).clamp(-3.4e38, 3.4e38),
    "all magnitudes": normal(1, 512) * torch.logspace(-20, 20, 512),
    "one block": normal(1, 256),
}
OVERFLOW = ("beyond float16", "1e30", "largest floats", "all magnitudes")


@searched
@pytest.mark.parametrize("case", EDGES)
@pytest.mark.parametrize("weighted", [False, True], ids=["ones", "importance"])
def test_edges(name, case, weighted):
    """Always finite, never worse than zeros (in what is minimised, nearly), and both searches alike."""
    fmt, weight = FORMATS[name], EDGES[case]
    importance = unequal(weight.shape[1]) if weighted else None
    measure, most = (importance, 1.1) if weighted else (torch.ones(weight.shape[1]), 1.0001)
    parts, signal, noise = cpu_quantize.quantize(name, weight, importance)
    for packed in (parts, fmt.search(weight, importance)):
        values = fmt.unpack(*packed)
        assert torch.isfinite(values).all()
        assert weighted_error(weight, values, measure) <= most * weighted_error(weight, torch.zeros(()), measure)
        if case in ("zeros", "negative zeros"):
            assert not values.any()
    assert signal == pytest.approx(weight.double().square().sum().item(), rel=1e-5)
    left = (weight.double() - fmt.unpack(*parts)).square().sum().item()
    assert noise == pytest.approx(left, rel=1e-2, abs=1e-10 * signal)


@pytest.mark.parametrize("name", ["q8_0", *LEGACY])
@pytest.mark.parametrize("case", OVERFLOW)
def test_plain_overflow_is_reported(name, case):
    """ggml's plain quantizers write infinite scales: the error says so."""
    *_, noise = cpu_quantize.quantize(name, EDGES[case], search=False)
    assert noise == math.inf


@supported
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_damaged_weights_are_noticed(name, value):
    for dtype in (torch.float32, torch.bfloat16):
        weight = normal(200, 1536).to(dtype)
        weight[0, 700] = value
        assert not math.isfinite(cpu_quantize.quantize(name, weight)[1])


@searched
@pytest.mark.parametrize("importance", ["zeros", "one column", "huge", "tiny"])
def test_any_importance(name, importance):
    values = {
        "zeros": torch.zeros(512),
        "one column": torch.zeros(512).index_fill(0, torch.tensor([40]), 2.0),
        "huge": torch.linspace(0, 1e38, 512),
        "tiny": torch.linspace(0, 1e-38, 512),
    }[importance]
    fmt, weight = FORMATS[name], normal(9, 512)
    zero = weight.double().square().sum().item()
    for parts in (cpu_quantize.quantize(name, weight, values)[0], fmt.search(weight, values)):
        assert weighted_error(weight, fmt.unpack(*parts), torch.ones(512)) < 0.5 * zero
    if importance == "zeros":
        ones = cpu_quantize.quantize(name, weight, torch.ones(512))[0]
        assert same(cpu_quantize.quantize(name, weight, values)[0], ones)
