"""What is launched through Triton's true launch path, see `stub_driver`: all that the dispatch layer calls on a card,
at sizes and in places where Triton compiles different code, or where a card refuses.

Triton compiles an integer argument of 1 as a constant and multiples of 16 as such, and takes addresses that are
multiples of 16 for granted in code that was compiled for one. So sizes are 1, odd, and multiples of 16, and tensors
start in odd places. Importing this file imports no triton.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from stub_driver import CurrentDevice, OnCard, OnFirst, OnSecond, empty
from torch import Tensor, nn

from flux_quant.arch import FluxConfig
from flux_quant.formats import FORMATS, IN_MEMORY, INT8_ROWS, QuantFormat
from flux_quant.linear import QuantLinear
from flux_quant.model import Flux
from kernel_cases import MAPPED, PACKED

BF16, F16, F32, I8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
COUNTS = (1, 2, 3, 15, 16, 17, 77, 512, 4608)  # rows of input
TINY = FluxConfig(64, 64, 128, 32, 512, 96, 64, 1, 1, True)
CONFIGS_OF = 3072, 3072  # the layer whose every configuration is launched


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[], object]
    kernels: frozenset[str]  # that must have been launched
    slow: bool = False
    by_hand: bool = False  # half a minute each: no test


def case(name: str, run: Callable[[], object], *kernels: str, slow: bool = False) -> Case:
    return Case(name, run, frozenset(kernels), slow)


def weight(fmt: QuantFormat, shape: tuple[int, ...], offset: int = 0, cls: type[OnCard] = OnFirst) -> list[Tensor]:
    """Its parts, the first of them `offset` bytes after the start of its memory."""
    parts = [empty(*part.shape(shape), dtype=part.dtype, cls=cls) for part in fmt.parts]
    if offset:
        part = fmt.parts[0]
        parts[0] = empty(*part.shape(shape), dtype=part.dtype, offset=offset // part.dtype.itemsize, cls=cls)
    return parts


def linear(fmt: QuantFormat, m: int, shape: tuple[int, int], dtype: torch.dtype = BF16, bias: bool = True) -> None:
    from flux_quant.kernels import dispatch

    x = empty(m, shape[1], dtype=dtype)
    out = dispatch.run_linear(x, fmt, weight(fmt, shape), empty(shape[0], dtype=dtype) if bias else None)
    assert out.shape == (m, shape[0]) and out.dtype == dtype and out.device == x.device


def columns(fmt: QuantFormat) -> int:
    """As few and odd blocks as there can be."""
    return 3 * max(fmt.block, 32)


def linear_cases() -> Iterator[Case]:
    """Every format in every order and on every way, N odd and K of an odd number of blocks."""
    for fmt in PACKED + MAPPED:
        quick = fmt.name in ("q8_0 planar", "q4_k", "fp8_rows")
        for m, kernel in ((1, "vector_kernel"), (17, "fused_kernel"), (4608, "dequantize_")):
            run = partial(linear, fmt, m, (77, columns(fmt)))
            yield case(f"linear {fmt.name} M{m}", run, kernel, slow=not quick)
    for m in COUNTS:
        yield case(f"linear rows {m}", partial(linear, FORMATS["q4_k"], m, (3072, 3072)))
    for dtype in (F32, F16):
        for m in (1, 17):
            yield case(f"linear {dtype} M{m}", partial(linear, FORMATS["q4_k"], m, (77, 768), dtype, False))
    for n in (1, 16, 17):
        for m in (1, 2, 40, 600):
            yield case(f"linear N{n} M{m}", partial(linear, IN_MEMORY["q8_0 planar"], m, (n, 96)), slow=m in (2, 40))
    kernels = "vector_kernel", "fused_kernel", "dequantize_blocks"
    yield case("linear in odd places", odd_places, *kernels)
    yield case("linear of a mapped file", unaligned_weight, *kernels, slow=True)
    yield case("linear beyond int32", beyond_int32, "fused_kernel", "vector_kernel", slow=True)
    yield case("every number of rows", every_count, slow=True)


def odd_places() -> None:
    """x and bias at odd elements of a longer tensor, rows of x an odd number of elements apart; a row that is repeated.

    First where they are aligned: the code compiled for that must not be taken again.
    """
    from flux_quant.kernels import dispatch

    fmt = FORMATS["q4_k"]
    for m in (1, 2, 5, 600):
        for offset, gap in ((0, 0), (8, 16), (3, 1), (1, 0)):
            x, bias = empty(m, 768, dtype=BF16, gap=gap, offset=offset), empty(77, dtype=BF16, offset=offset)
            dispatch.run_linear(x, fmt, weight(fmt, (77, 768)), bias)
    repeated = empty(1, 768, dtype=BF16).expand(5, 768)
    dispatch.run_linear(repeated, fmt, weight(fmt, (77, 768)), None)
    dispatch.run_linear(empty(768, 40, dtype=BF16).t(), fmt, weight(fmt, (77, 768)), None)  # columns apart


def unaligned_weight() -> None:
    """Blocks that start anywhere: at a multiple of 4 or 2 bytes the kernels read them, else the codec does."""
    from flux_quant.kernels import dispatch

    for name, offset in (("q4_k", 4), ("q8_0", 2), ("q6_k", 2), ("fp8", 1), ("q8_0 planar", 4)):
        fmt = IN_MEMORY.get(name) or FORMATS[name]
        for m in (1, 40, 600):
            dispatch.run_linear(empty(m, 768, dtype=BF16), fmt, weight(fmt, (77, 768), offset), None)


def beyond_int32() -> None:
    """More than 2**31 bytes of x and of output in one call, and rows further apart than that."""
    from flux_quant.kernels import matmul, vector
    from flux_quant.kernels.planes import Rows

    data, rows = weight(FORMATS["q8_0"], (21504, 3072))[0], Rows("q8_0", 3072)
    matmul.linear(empty(1 << 17, 3072, dtype=BF16), data, rows)
    vector.linear(empty(2, 3072, dtype=BF16, gap=1 << 31), data, rows)
    matmul.linear(empty(600, 3072, dtype=BF16, gap=1 << 31), data, rows, split=2)


def every_count() -> None:
    """No number of rows meets a limit of the grid or of 32 bits."""
    for m in (*range(1, 130, 8), 4096, 65535, 65536, 70000, 1 << 20):
        linear(FORMATS["q4_0"], m, (64, 3072))


def configs(fmt: QuantFormat) -> None:
    """Whatever the tuner would try on this card."""
    from flux_quant.kernels import tuning

    parts = [tuple(weight(fmt, CONFIGS_OF))]
    measure = tuning.measure_int8 if fmt is INT8_ROWS else partial(tuning.measure, fmt)
    failed: list[str] = []

    def once(call: Callable[[int], object], copies: int) -> float:
        try:
            call(0)
        except Exception as error:
            failed.append(f"{call.args[0]}: {type(error).__name__}: {error}")
        return 1.0

    measure(CONFIGS_OF, parts, BF16, once)
    assert not failed, "\n".join(dict.fromkeys(failed))


def config_cases() -> Iterator[Case]:
    for fmt in (*PACKED, INT8_ROWS):
        kernels = ("matmul_kernel", "persistent_kernel") if fmt is INT8_ROWS else ("fused_kernel", "vector_kernel")
        by_hand = fmt.name not in ("q4_k", "q8_0 planar", "int8_rows")
        yield Case(f"tuner {fmt.name}", partial(configs, fmt), frozenset(kernels), True, by_hand)


def dequantize(fmt: QuantFormat) -> None:
    from flux_quant.kernels import dispatch

    width = columns(fmt)
    for shape, rows in (
        ((1, width), ...),
        ((5, width), slice(1, 5)),
        ((32, width), slice(16, 17)),
        ((2, 3, width), ...),
    ):
        for dtype in (F32, BF16) if fmt.name == "q4_k" else (BF16,):
            dispatch.dequantize(fmt, weight(fmt, shape), dtype, rows=rows)
    out = empty(5, width, dtype=BF16, offset=3)
    dispatch.dequantize(fmt, weight(fmt, (5, width)), BF16, out)


def in_slices() -> None:
    """Weights wider than the scratch, and a row that is wider than it; the input's gradient of both."""
    from flux_quant.kernels import dispatch, triton_path

    with mock.patch.object(triton_path, "scratch_bytes", lambda device: 1 << 20):
        for name in ("q8_0 planar", "q4_k", "fp8_rows"):
            fmt = IN_MEMORY.get(name) or FORMATS[name]
            for shape in ((1001, 768), (3, 1 << 20)):
                linear(fmt, 4096, shape)
                dispatch.run_input_gradient(empty(33, shape[0], dtype=BF16), fmt, weight(fmt, shape))


def dequantize_cases() -> Iterator[Case]:
    for fmt in PACKED + MAPPED:
        quick = fmt.name in ("q4_k", "fp8_rows", "q8_0 planar")
        yield case(f"dequantize {fmt.name}", partial(dequantize, fmt), "dequantize_", slow=not quick)
    yield case("dequantize in slices", in_slices, "dequantize_blocks", "dequantize_fp8")


def eight_bit(name: str, m: int, shape: tuple[int, int], dtype: torch.dtype = BF16) -> None:
    linear(FORMATS.get(name) or IN_MEMORY[name], m, shape, dtype)


def int8_ways(m: int, shape: tuple[int, int]) -> None:
    """Each way in its first configuration, with activations at an odd place and rows of odd length."""
    from flux_quant.kernels import eight_bit, rows8

    (n, k), device = shape, OnFirst.device
    for way, reason in eight_bit.int8_obstacles(m, shape, device).items():
        if reason is None:
            for offset in (0, 3):
                x = empty(m, k, dtype=BF16, gap=offset, offset=offset)
                rows8.quantize_rows(x, 256 if k % 256 == 0 else 0)
                parts = empty(n, k, dtype=I8, offset=offset), empty(n, dtype=F32)
                eight_bit.linear(x, INT8_ROWS, parts, empty(n, dtype=BF16), eight_bit.Product(way, ""))


def eight_bit_cases() -> Iterator[Case]:
    for m in COUNTS:
        kernel = "persistent_kernel" if m >= 65 else "matmul_kernel"
        run = partial(eight_bit, "int8_rows", m, (3072, 3072))
        yield case(f"int8 M{m}", run, "quantize_kernel", kernel, slow=m in (2, 3, 15, 16))
        yield case(
            f"fp8 M{m}",
            partial(eight_bit, "fp8_rows as fp8", m, (3072, 3072)),
            "quantize_kernel",
            slow=m not in (1, 77),
        )
    for m, shape in ((1, (80, 768)), (77, (80, 768)), (600, (80, 1536)), (77, (77, 784)), (66, (1, 16))):
        slow = shape != (80, 768) or m == 1
        yield case(f"int8 ways M{m} {shape[0]}x{shape[1]}", partial(int8_ways, m, shape), "matmul_kernel", slow=slow)
    for fmt in IN_MEMORY.values():
        if fmt.compute == "int8" and fmt.base:
            quick = fmt.base in ("q4_k", "q6_k planar")
            run = partial(eight_bit, fmt.name, 77, (80, 768))
            yield case(f"int8 of {fmt.name}", run, "expand_kernel", "quantize_kernel", slow=not quick)
    for name in ("fp8 as fp8", "fp8_scaled as fp8", "fp8_rows as fp8"):
        if name in IN_MEMORY:
            for dtype in (BF16, F16, F32):
                run = partial(eight_bit, name, 77, (80, 768), dtype)
                yield case(f"{name} {dtype}", run, "quantize_kernel", slow=dtype is not BF16)
    yield case("rows of many lengths", row_lengths, "quantize_kernel", slow=True)


def row_lengths() -> None:
    from flux_quant.codecs.rotation import group_for
    from flux_quant.kernels import rows8

    for k in (16, 64, 80, 256, 784, 3072, 9216, 12288, 15360, 21504, 1 << 16):
        for m in (1, 4608):
            rows8.quantize_rows(empty(m, k, dtype=BF16), group_for(k))
            for way in ("row", "tensor"):
                rows8.quantize_fp8(empty(m, k, dtype=BF16), way)


@contextmanager
def capturing() -> Iterator[None]:
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        yield


def in_a_graph() -> None:
    """As while a CUDA graph is captured: the scratch is the graph's own."""
    from flux_quant.kernels import triton_path

    triton_path.free_scratch()
    with capturing():
        linear(FORMATS["q4_k"], 4608, (3072, 3072))
        eight_bit("q4_k as int8", 77, (80, 768))
    assert not triton_path._scratch


def on_the_second_card() -> None:
    """While the first is the current one, by every entrance."""
    from flux_quant.kernels import dispatch, fused

    assert CurrentDevice.index == 0
    for name in ("q4_k", "q4_k as int8", "fp8_rows as fp8", "int8_rows"):
        fmt = FORMATS.get(name) or IN_MEMORY[name]
        for m in (1, 77, 4608):
            parts = weight(fmt, (80, 768), cls=OnSecond)
            out = dispatch.run_linear(empty(m, 768, dtype=BF16, cls=OnSecond), fmt, parts, None)
            assert out.device == OnSecond.device
    fmt = FORMATS["q4_k"]
    parts = weight(fmt, (80, 768), cls=OnSecond)
    dispatch.dequantize(fmt, parts, BF16)
    dispatch.run_input_gradient(empty(5, 80, dtype=BF16, cls=OnSecond), fmt, parts)
    fused.gelu_(empty(1, 5, 768, dtype=BF16, cls=OnSecond))
    assert CurrentDevice.index == 0


def tuned_on_the_second_card() -> None:
    """A tuner measures the card it was given, whichever is current."""
    from flux_quant.kernels import tuning

    fmt = FORMATS["q8_0"]
    with mock.patch.object(tuning, "ROWS", (1, 16)):
        copies = [tuple(weight(fmt, (80, 96), cls=OnSecond))]
        times = tuning.measure(fmt, (80, 96), copies, BF16, lambda call, copies: call(0) is None or 1.0)
    assert len(times[1]) > 3 and len(times[16]) == (1 if torch.cuda.get_device_capability() < (8, 0) else 3), times


def place_cases() -> Iterator[Case]:
    yield case("in a graph", in_a_graph, "dequantize_blocks", "expand_kernel")
    yield case("on the second card", on_the_second_card, "vector_kernel", "expand_kernel", "gelu_kernel")
    yield case("tuned on the second card", tuned_on_the_second_card, "vector_kernel", "fused_kernel")


def blocks(config: FluxConfig, batch: int, words: int, side: int, name: str, dtype: torch.dtype = BF16) -> None:
    """A step of a model with random shapes: everything that its forward pass launches."""
    with torch.device("meta"):
        model = Flux(config)
    on_card(model, name, dtype)
    out = model(
        img=(img := empty(batch, side * side, config.in_channels, dtype=dtype)),
        txt=empty(batch, words, config.context, dtype=dtype),
        pooled=empty(batch, config.pooled, dtype=dtype),
        timestep=empty(batch, dtype=F32),
        img_ids=empty(side * side, 3, dtype=F32),
        txt_ids=empty(words, 3, dtype=F32),
        guidance=empty(batch, dtype=F32),
    )
    assert out.shape == img.shape


def on_card(model: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
    """Its parameters on the first card; the linear layers of its blocks in a format."""
    for path, layer in list(model.named_modules()):
        if name and isinstance(layer, nn.Linear) and "_blocks." in path:
            parent, _, last = path.rpartition(".")
            plain = "mod" in path or layer.in_features % 256  # modulations stay in 16 bits
            fmt = FORMATS["bf16"] if plain else FORMATS.get(name) or IN_MEMORY[name]
            packed = QuantLinear(layer.in_features, layer.out_features, fmt, device="meta")
            setattr(model.get_submodule(parent), last, packed)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, value in table.items():
                if value is not None:
                    same = value.dtype if key != "bias" and isinstance(module, QuantLinear) else dtype
                    table[key] = empty(*value.shape, dtype=same)
    return model.eval()


def model_cases() -> Iterator[Case]:
    pointwise = ("modulated_norm_kernel", "heads_kernel", "gelu_kernel", "beside_gelu_kernel", "gated_sum_kernel")
    for dtype in (BF16, F16, F32):
        run = partial(blocks, TINY, 2, 3, 5, "q8_0", dtype)
        yield case(f"a small model in {dtype}", run, *pointwise, slow=dtype is F16)
    full = FluxConfig(64, 64, 3072, 128, 12288, 4096, 768, 1, 1, True)
    for name in ("", "q8_0 planar", "q4_k", "int8_rows", "q4_k as int8", "fp8_rows as fp8"):
        for batch, words, side in ((1, 512, 64), (2, 511, 45)):
            run = partial(blocks, full, batch, words, side, name)
            label = f"FLUX {name or 'bf16'} {batch} x {side * side} + {words}"
            yield case(label, run, *pointwise, slow=(name, batch) != ("q4_k", 1))


FAMILIES = (linear_cases, dequantize_cases, eight_bit_cases, place_cases, model_cases, config_cases)
CASES = {one.name: one for family in FAMILIES for one in family()}


def gelu(grid: tuple[int, ...], x: Tensor, out: Tensor) -> object:
    from flux_quant.kernels import pointwise

    return pointwise.gelu_kernel[grid](x, out, 768, 768, 768, 768, 768, BLOCK=1024)


def with_code_for_aligned_tensors() -> None:
    x = empty(5, 768, dtype=BF16)
    compiled = gelu((5, 1, 1), x, x)
    compiled[5, 1, 1](empty(5, 768, dtype=BF16, offset=1), x, 768, 768, 768, 768, 768, 1024)


def with_shared_memory_of_two_programs() -> None:
    from flux_quant.kernels import matmul
    from flux_quant.kernels.planes import Rows

    config, data = matmul.Config(128, 64, 256, 8, 4), weight(FORMATS["fp8"], (3072, 3072))[0]
    matmul.linear(empty(600, 3072, dtype=BF16), data, Rows("fp8", 3072), None, config)


def fault_cases() -> Iterator[tuple[Case, str]]:
    """What a card would refuse or take wrongly, and a word of what is to be said about it."""
    x = empty(5, 768, dtype=BF16)
    yield case("no program", lambda: gelu((0, 1, 1), x, x)), "passed over"
    yield case("a wide grid", lambda: gelu((1, 65536, 1), x, x)), "a grid beyond"
    yield case("a tensor on the CPU", lambda: gelu((5, 1, 1), torch.empty(5, 768, dtype=BF16), x)), "cpu tensor?"
    yield case("another card", lambda: gelu((5, 1, 1), empty(5, 768, dtype=BF16, cls=OnSecond), x)), "is on cuda:1"
    yield case("an odd place", with_code_for_aligned_tensors), "no multiple of 16"
    yield case("too much shared memory", with_shared_memory_of_two_programs), "shared memory"


FAULTS = {one.name: (one, words) for one, words in fault_cases()}
