"""Packed weights on the CPU: unpacked bit for bit as the codecs and gguf do, multiplied as in float64."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest
import torch
from torch import Tensor

from flux_quant.codecs import fp8 as fp8_codec
from flux_quant.formats import FORMATS, IN_MEMORY, QuantFormat
from flux_quant.kernels import cpu_dequant, cpu_threads

HALVES = {  # where the float16 of a block are
    "q8_0": (0,),
    "q5_1": (0, 2),
    "q5_0": (0,),
    "q4_1": (0, 2),
    "q4_0": (0,),
    "q6_k": (208,),
    "q5_k": (0, 2),
    "q4_k": (0, 2),
    "q3_k": (108,),
    "q2_k": (80, 82),
    "iq4_xs": (0,),
    "iq4_nl": (0,),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8 = (FORMATS["fp8"], FORMATS["fp8_plain"], IN_MEMORY["fp8_rows"])
EXTREMES = (0.0, -0.0, 6e-8, -6e-8, 3e-5, 65504.0, -65504.0, float("inf"), -float("inf"), float("nan"))
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}

blocks = pytest.mark.parametrize("name", HALVES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(number << 8 * i for i, number in enumerate(numbers)))


def random_blocks(name: str, rows: int, blocks: int, scale: float = 0.02) -> Tensor:
    """Bytes (rows, bytes per row) with any codes and integer scales, float16 scales finite and of both signs."""
    nbytes = FORMATS[name].nbytes((1, FORMATS[name].block))
    generator = seeded(rows, blocks)
    data = torch.randint(0, 256, (rows * blocks, nbytes), generator=generator, dtype=torch.uint8)
    for place in HALVES[name]:
        halves = torch.randn(rows * blocks, 1, generator=generator).mul(scale).half()
        data[:, place : place + 2] = halves.view(torch.uint8)
    return data.view(rows, blocks * nbytes)


def bits(values: Tensor) -> Tensor:
    """The bits of each value, all NaN alike."""
    kind = torch.int32 if values.dtype == torch.float32 else torch.int16
    return torch.where(values.isnan(), torch.full((), -1, dtype=kind), values.view(kind))


def unpacked(fmt: QuantFormat, parts: tuple[Tensor, ...], dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """By the loops, into the middle of poisoned memory that must stay as it is on both sides."""
    shape = cpu_dequant.weight_shape(fmt, (parts[0][rows],))
    count = torch.Size(shape).numel()
    memory = torch.full((count + 67,), float("nan"), dtype=dtype)
    memory[:33], memory[33 + count :] = 7, 9
    cpu_dequant.dequantize(fmt, parts, memory[33 : 33 + count].view(shape), rows)
    assert (memory[:33] == 7).all() and (memory[33 + count :] == 9).all(), "written outside of out"
    return memory[33 : 33 + count].view(shape)


def misaligned(data: Tensor) -> Tensor:
    """The same bytes at an odd address."""
    memory = torch.empty(data.numel() + 1, dtype=torch.uint8)
    memory[1:] = data.view(-1).view(torch.uint8)
    return memory[1:].view(data.dtype).view(data.shape)


def relative(values: Tensor, reference: Tensor) -> float:
    return ((values.double() - reference).norm() / reference.norm()).item()


def test_every_packed_format_has_a_loop():
    assert {name for name, fmt in FORMATS.items() if cpu_dequant.supports(fmt)} == {*HALVES, "fp8", "fp8_plain"}
    assert cpu_dequant.supports(IN_MEMORY["fp8_rows"]) and not any(fmt.block > 1 for fmt in FP8)
    for name, fmt in (FORMATS | IN_MEMORY).items():
        for rows in (1, 2, 3, 512):
            line = cpu_dequant.describe(fmt, rows)
            assert line.startswith(f"{name}, {rows} rows: ") and "\n" not in line
            assert ("no loop" in line) != cpu_dequant.supports(fmt)


@blocks
@dtypes
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (20, 10)])
def test_blocks_are_unpacked_as_by_the_codec(name, dtype, rows, blocks):
    fmt, data = FORMATS[name], random_blocks(name, rows, blocks)
    expected = fmt.unpack(data).to(dtype)
    assert expected.abs().max() > 0 and expected.isfinite().all()
    for part in (data, misaligned(data), data.repeat(1, 2)[:, : data.shape[1]]):  # the last one is not contiguous
        assert torch.equal(bits(unpacked(fmt, (part,), dtype)), bits(expected))
    for start, stop in ((0, 1), (1, rows), (rows // 2, rows // 2 + 1), (rows - 1, rows), (2, 2)):
        found = unpacked(fmt, (data,), dtype, slice(start, stop))
        assert torch.equal(bits(found), bits(expected[start:stop])), (start, stop)


@blocks
@dtypes
def test_extreme_blocks(name, dtype):
    """Every pair of extreme scales over codes and integer scales that are all zeros, all ones and anything."""
    fmt, places = FORMATS[name], HALVES[name]
    pairs = torch.cartesian_prod(*[torch.tensor(EXTREMES).half()] * len(places)).view(-1, len(places))
    random = random_blocks(name, len(pairs), 1)
    for data in (torch.zeros_like(random), torch.full_like(random, 255), random):
        for place, halves in zip(places, pairs.T, strict=True):
            data[:, place : place + 2] = halves.contiguous().view(-1, 1).view(torch.uint8)
        expected = fmt.unpack(data).to(dtype)
        assert expected.isnan().any() and (expected == 0).any()
        assert torch.equal(bits(unpacked(fmt, (data,), dtype)), bits(expected))


def test_every_half_is_read():
    """All 65536 float16 as the scale of a Q8_0 block of ones: the scale comes out."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    data = torch.cat([halves.view(-1, 1).view(torch.uint8), torch.ones(1 << 16, 32, dtype=torch.uint8)], dim=1)
    for dtype in DTYPES:
        found = unpacked(FORMATS["q8_0"], (data,), dtype)
        assert torch.equal(bits(found), bits(halves.float().to(dtype).view(-1, 1).expand(-1, 32).contiguous()))


@blocks
def test_gguf_reads_the_same(name):
    data = random_blocks(name, 13, 5)
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(bits(unpacked(FORMATS[name], (data,), torch.float32)), bits(torch.from_numpy(theirs)))


@dtypes
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 256, 1003])
def test_fp8_is_unpacked_as_by_the_codec(dtype, columns):
    """All 256 codes, every row's scale and one for all, in each shape that a scale may have."""
    rows = 256 // columns + 3
    codes = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns).to(torch.uint8)
    data = misaligned(codes.view(torch.float8_e4m3fn))
    scales = torch.tensor([0.37, -3e-5, 1e-40, 1e36, 0.0, float("inf"), float("nan")])
    assert torch.equal(
        bits(unpacked(FORMATS["fp8_plain"], (data,), dtype)), bits(FORMATS["fp8_plain"].unpack(data).to(dtype))
    )
    for scale in scales:
        expected = fp8_codec.unpack_scaled(data, scale).to(dtype)
        for shape in ((), (1,), (1, 1)):
            assert torch.equal(bits(unpacked(FP8[0], (data, scale.view(shape)), dtype)), bits(expected))
    by_row = scales.repeat(rows)[:rows]
    expected = fp8_codec.unpack_scaled(data, by_row.view(-1, 1)).to(dtype)
    for shape in ((rows,), (rows, 1)):
        for part in (slice(None), slice(1, rows - 1), slice(2, 3)):
            found = unpacked(FP8[2], (data, by_row.view(shape)), dtype, part)
            assert torch.equal(bits(found), bits(expected[part]))


def test_any_number_of_axes():
    data = random_blocks("q4_0", 12, 2).view(4, 3, -1)
    assert torch.equal(unpacked(FORMATS["q4_0"], (data,), torch.float32), FORMATS["q4_0"].unpack(data))
    assert torch.equal(unpacked(FORMATS["q4_0"], (data[0, 0],), torch.float32), FORMATS["q4_0"].unpack(data[0, 0]))
    codes = torch.arange(84).view(2, 3, 14).to(torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.tensor([2.0, -3.0]).view(2, 1, 1)
    assert torch.equal(unpacked(FP8[2], (codes, scale), torch.float32), fp8_codec.unpack_scaled(codes, scale))


@pytest.mark.parametrize("name", [*HALVES, "fp8", "fp8_plain", "fp8_rows"])
@dtypes
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 70])
def test_linear_is_that_of_float64(name, dtype, rows):
    """Each of the three ways of `linear`, with and without a bias, against the unpacked weight."""
    fmt = (FORMATS | IN_MEMORY)[name]
    generator = seeded(rows)
    parts = (random_blocks(name, 45, 2),) if name in HALVES else fmt.pack(torch.randn(45, 75, generator=generator))
    weight = fmt.unpack(*parts).double()
    x = torch.randn(rows, weight.shape[1], generator=generator).to(dtype)
    bias = torch.randn(45, generator=generator).to(dtype) * weight.norm(dim=1).mean().to(dtype)
    expected = x.double() @ weight.T
    for added in (None, bias, bias.float()):
        found = cpu_dequant.linear(x, fmt, parts, added)
        assert found.dtype == dtype and found.shape == (rows, 45) and found.is_contiguous()
        assert relative(found, expected + (0 if added is None else added.double())) < ROUNDING[dtype]
    coarse = cpu_dequant.linear(x, fmt, parts, bias, dtype=torch.bfloat16)
    assert coarse.dtype == dtype and relative(coarse, expected + bias.double()) < 8e-3


@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 0), (2, 1), (2, 3, 4)], ids=str)
def test_linear_of_any_shape(lead):
    fmt, data, bias = FORMATS["q4_k"], random_blocks("q4_k", 19, 1), torch.arange(19.0)
    x = torch.randn(*lead, 512, generator=seeded(5))[..., ::2]
    found = cpu_dequant.linear(x, fmt, (data,), bias)
    assert found.shape == (*lead, 19)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, fmt.unpack(data), bias), rtol=1e-4, atol=1e-3)
    assert cpu_dequant.linear(x, fmt, (data[:0],), bias[:0]).shape == (*lead, 0)
    assert torch.equal(cpu_dequant.linear(x[..., :0], fmt, (data[:, :0],), bias), bias.expand(*lead, 19))


@pytest.mark.parametrize("rows", [2, 9, 80])
def test_linear_whatever_the_caller_does(rows):
    """Inference mode, autocast, inputs that want gradients: the same bits, and no graph."""
    fmt, data = FORMATS["q5_0"], random_blocks("q5_0", 40, 4)
    x, bias = torch.randn(rows, 128, generator=seeded(6)), torch.randn(40, generator=seeded(7))
    expected = cpu_dequant.linear(x, fmt, (data,), bias)
    found = cpu_dequant.linear(x.clone().requires_grad_(), fmt, (data,), bias.clone().requires_grad_())
    assert torch.equal(found, expected) and not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(cpu_dequant.linear(x.clone(), fmt, (data.clone(),), bias), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cpu_dequant.linear(x, fmt, (data,), bias), expected)


@pytest.fixture
def three_threads(monkeypatch):
    """Three threads that small weights are worth."""
    own = torch.get_num_threads()
    monkeypatch.setattr(cpu_dequant, "SHARE", 1 << 10)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(own)


@pytest.mark.parametrize("rows", [1, 5, 33, 70])
def test_threads_change_nothing(three_threads, rows):
    """Each value comes from one thread, and callers at the same time keep out of each other's way."""
    fmt, data = FORMATS["q4_k"], random_blocks("q4_k", 333, 3)
    x, bias = torch.randn(rows, 768, generator=seeded(rows)), torch.randn(333, generator=seeded(1))
    weight = fmt.unpack(data)
    expected = x.double() @ weight.double().T + bias.double()
    first = cpu_dequant.linear(x, fmt, (data,), bias)
    assert relative(first, expected) < ROUNDING[torch.float32]
    with torch.inference_mode():
        assert torch.equal(cpu_dequant.linear(x.clone(), fmt, (data,), bias), first)
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda _: cpu_dequant.linear(x, fmt, (data,), bias), range(12)))
        assert all(torch.equal(one, first) or relative(one, expected) < ROUNDING[torch.float32] for one in found)
        found = list(callers.map(lambda _: unpacked(fmt, (data,), torch.bfloat16), range(12)))
        assert all(torch.equal(one, weight.bfloat16()) for one in found)
    assert torch.get_num_threads() == 3


def test_an_error_in_a_thread_is_raised_and_leaves_the_threads_as_they_were(three_threads):
    def fail(task: int) -> int:
        if task == 2:
            raise ValueError(f"task {task}")
        return task

    with pytest.raises(ValueError, match="task 2"), cpu_threads.threads_for(9, 3) as spread:
        assert torch.get_num_threads() == 1
        spread(fail, range(40))
    assert torch.get_num_threads() == 3
    with cpu_threads.threads_for(9, 3) as spread:
        assert spread(lambda task: task * task, range(40)) == [task * task for task in range(40)]


@pytest.mark.parametrize("threads", [1, 2, 8, 64])
@pytest.mark.parametrize(("count", "columns"), [(1, 256), (17, 32), (3072, 3072), (4096, 10240), (10, 1 << 23)])
def test_slices_of_rows_are_small_and_as_many_for_every_thread(threads, count, columns):
    for rows in (3, 20, 512):
        step = cpu_dequant.rows_at_a_time(rows, count, columns, threads)
        assert 1 <= step <= min(count, 256 if rows >= cpu_dequant.FEW else 128)
        assert step % cpu_dequant.LANES == 0 or step == count
        assert step * columns <= cpu_dequant.SCRATCH or step <= cpu_dequant.LANES
        if count >= threads * 256:
            assert -(-count // step) % threads == 0


def test_what_is_computed_in(monkeypatch):
    """bfloat16 where the processor has it and x or the user allows it, else float32."""
    wide = torch.get_float32_matmul_precision()
    try:
        for native in (False, True):
            monkeypatch.setattr(cpu_dequant, "has_bfloat16", lambda native=native: native)
            fast = torch.bfloat16 if native else torch.float32
            for precision, single in (("highest", torch.float32), ("high", torch.float32), ("medium", fast)):
                torch.set_float32_matmul_precision(precision)
                found = [cpu_dequant.compute_dtype(dtype) for dtype in DTYPES]
                assert found == [single, fast, torch.float32]
            assert str(fast)[6:] in cpu_dequant.describe(FORMATS["q8_0"], 512)
    finally:
        torch.set_float32_matmul_precision(wide)
    assert cpu_dequant.compute_dtype(torch.float32) == torch.float32


def test_refusals():
    fmt, data = FORMATS["q8_0"], random_blocks("q8_0", 4, 3)
    for out in (torch.empty(4, 95), torch.empty(3, 96), torch.empty(96, 4).T, torch.empty(8, 96)[::2]):
        with pytest.raises(ValueError, match="should be"):
            cpu_dequant.dequantize(fmt, (data,), out)
    with pytest.raises(TypeError, match="float64"):
        cpu_dequant.dequantize(fmt, (data,), torch.empty(4, 96, dtype=torch.float64))
    with pytest.raises(ValueError, match="should be 96"):
        cpu_dequant.linear(torch.empty(2, 192), fmt, (data,))
    codes = torch.zeros(4, 32).to(torch.float8_e4m3fn)
    for scales in (2, 3, 5):
        with pytest.raises(ValueError, match="scales"):
            cpu_dequant.dequantize(FORMATS["fp8"], (codes, torch.ones(scales)), torch.empty(4, 32))
