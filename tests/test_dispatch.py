"""Which way a linear layer goes and why, what it refuses, and that every way gives the same."""

import json
import threading
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux_quant.formats import FORMATS, IN_MEMORY
from flux_quant.kernels import dispatch, fallback, passes, tables, torch_path
from flux_quant.kernels.packed import row_slices

N, K = 40, 512
EVERY = FORMATS | IN_MEMORY
PACKED = {name: fmt for name, fmt in EVERY.items() if not fmt.is_plain and fmt.compute == "16-bit"}

every = pytest.mark.parametrize("fmt", EVERY.values(), ids=EVERY)
packed = pytest.mark.parametrize("fmt", PACKED.values(), ids=PACKED)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def on_triton(monkeypatch, kernel_device):
    """Everything that CUDA would do, on the device where kernels are tested: in the interpreter, if that is the CPU."""
    from flux_quant.kernels import triton_path

    scratch = torch.empty(9 * K * 4, dtype=torch.uint8, device=kernel_device)  # nine rows: N takes several slices
    monkeypatch.setattr(triton_path, "scratch_for", lambda device, dtype: scratch.view(dtype))
    if kernel_device == "cpu":
        monkeypatch.setattr(dispatch, "unpacker_for", lambda fmt, parts, device=None: (tables.TWO_PASS, ""))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
        monkeypatch.setattr(tables, "found_for", lambda device, name: None)
    return kernel_device


@packed
def test_two_passes_by_our_kernels(fmt, on_triton):
    parts = [part.to(on_triton) for part in fmt.pack(random(N, K))]
    weight = fmt.unpack(*parts).double()
    x, bias = random(520, K).to(on_triton), random(N).to(on_triton)
    assert dispatch.way_for(fmt, 520, (N, K), x.dtype, x.device, parts).path == tables.TWO_PASS
    for b in (bias, None):
        exact = F.linear(x.double(), weight, None if b is None else b.double())
        assert (dispatch.linear(x, fmt, parts, b) - exact).norm() <= 1e-6 * exact.norm()
    up = random(520, N).to(on_triton)
    exact = up.double() @ weight
    assert (dispatch.run_input_gradient(up, fmt, parts) - exact).norm() <= 1e-6 * exact.norm()
    some = dispatch.dequantize(fmt, parts, torch.float16, rows=slice(3, 17))
    assert torch.equal(some, weight[3:17].half())


@pytest.mark.parametrize("name", ["q4_k", "q8_0 planar", "q5_1", "fp8", "fp8_rows"])  # all: see test_matmul
@pytest.mark.parametrize(("rows", "path"), [(1, tables.VECTOR), (2, tables.VECTOR), (17, tables.FUSED)], ids=str)
def test_one_kernel_for_few_rows(name, rows, path, on_triton):
    fmt = EVERY[name]
    parts = [part.to(on_triton) for part in fmt.pack(random(N, K))]
    weight = fmt.unpack(*parts).double()
    x, bias = random(rows, K).to(on_triton).half(), random(N).to(on_triton).half()
    assert dispatch.way_for(fmt, rows, (N, K), x.dtype, x.device, parts).path == path
    for b in (bias, None):
        exact = F.linear(x.double(), weight, None if b is None else b.double())
        assert (dispatch.linear(x, fmt, parts, b) - exact).norm() <= 1e-3 * exact.norm()


@every
@pytest.mark.parametrize("rows", [slice(0, 0), slice(1, 4), slice(39, None), slice(None), ...], ids=str)
def test_row_ranges(fmt, rows):
    parts = fmt.pack(random(N, K))
    expected = fmt.unpack(*parts)[rows]
    assert torch.equal(dispatch.dequantize(fmt, parts, torch.float32, rows=rows), expected)


@pytest.mark.parametrize("name", ["q4_k", "q8_0 planar", "fp8"])
def test_operators_are_well_behaved(name):
    """Fake kernels, gradients, no aliasing: torch's own judge. Its check of the schema cannot compare FP8 tensors."""
    fmt = EVERY[name]
    tests = {
        "test_utils": ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    }
    if name == "fp8":
        tests = {"test_utils": tests["test_utils"][1:]}
    parts = list(fmt.pack(random(N, K)))
    x, bias = random(2, 3, K).requires_grad_(), random(N).requires_grad_()
    for case in ((x, parts, bias, fmt.name), (x, parts, None, fmt.name)):
        torch.library.opcheck(dispatch.linear_op, case, **tests)
    torch.library.opcheck(dispatch.gradient_op, (random(2, 3, N), parts, fmt.name), **tests)


BAD_INPUT = {
    "input's last axis": (
        dict(x=torch.ones(3, 511)),
        ValueError,
        r"512 for a weight \(40, 512\), the input is \(3, 511\)",
    ),
    "no axis": (dict(x=torch.tensor(1.0)), ValueError, "last axis must be 512"),
    "integers": (dict(x=torch.ones(3, K, dtype=torch.int32)), TypeError, "int32; cast it"),
    "double": (dict(x=torch.ones(3, K).double()), TypeError, "float64; cast it"),
    "other device": (dict(x=torch.ones(3, K, device="meta")), ValueError, "on meta, the weight on cpu; move one"),
    "bytes missing": (dict(parts=[torch.zeros(N, 287, dtype=torch.uint8)]), ValueError, "287 bytes.*144 bytes"),
    "dtype": (dict(parts=[torch.zeros(N, 288)]), ValueError, r"torch.uint8 \(40, 288\), got torch.float32"),
    "parts": (dict(parts=[]), ValueError, "stored in 1 tensors, got 0"),
    "axes": (dict(parts=[torch.zeros(2, N, 288, dtype=torch.uint8)]), ValueError, r"is \(N, K\).*\(2, 40, 512\)"),
    "bias": (dict(bias=torch.ones(N + 1)), ValueError, r"bias of 40 outputs on cpu is \(41,\)"),
}


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_refused_with_the_numbers(wrong, error, message):
    fmt = FORMATS["q4_k"]
    good = dict(x=torch.ones(3, K), fmt=fmt, parts=list(fmt.pack(random(N, K))), bias=None)
    dispatch.linear(**good)
    with pytest.raises(error, match=message):
        dispatch.linear(**{**good, **wrong})


def test_dequantize_refuses_what_it_cannot_write():
    fmt = FORMATS["q8_0"]
    parts = fmt.pack(random(N, K))
    with pytest.raises(TypeError, match="not torch.float64"):
        dispatch.dequantize(fmt, parts, torch.float64)
    with pytest.raises(ValueError, match=r"should be \(3, 512\) torch.float32"):
        dispatch.dequantize(fmt, parts, torch.float32, torch.empty(40, 512), slice(0, 3))


def test_slices_cover_every_row_once():
    for rows in (1, 7, 255, 256, 257, 1000):
        for cap in (1, 4000, 300 * 4 * 8, 1 << 20):
            slices = row_slices((rows, 8), cap, 4, 256)
            assert [i for s in slices for i in range(rows)[s]] == list(range(rows))
            assert all((s.stop - s.start) * 32 <= max(cap, 32) for s in slices)
    assert row_slices((300, 8), 270 * 32, 4, 256)[0] == slice(0, 256)


def test_passes_without_rows_or_slices():
    assert passes.multiply(torch.ones(2, 3), iter(()), 0, None).shape == (2, 0)
    assert passes.input_gradient(torch.ones(2, 0), iter(()), 3).shape == (2, 3)


@every
@pytest.mark.parametrize("rows", [1, 16, 4608])
def test_explain_says_which_way_and_why(fmt, rows):
    line = dispatch.explain(fmt, (rows, 9216, 3072), "cpu")
    assert line.startswith(f"{fmt.name} 9216 x 3072, {rows} rows on cpu: ") and "\n" not in line
    assert line.split(": ", 1)[1].split(" ")[0] in ("cpu", "codec", "plain", "int8", "fp8")


def test_the_switch_forces_torch(monkeypatch):
    monkeypatch.setenv(fallback.SWITCH, "1")
    line = dispatch.explain(FORMATS["q4_k"], (4608, 9216, 3072), "cuda")
    assert "codec (FLUX_QUANT_DISABLE_TRITON is set)" in line


CARDS = {  # compute capability -> rows of input up to which a fused kernel takes Q4_K, None where there is none
    (7, 5): None,
    (8, 0): 256,
    (8, 6): 192,
    (8, 7): 192,
    (8, 9): 320,
    (9, 0): 512,
    (12, 0): 320,
    (13, 0): 320,
}


@pytest.mark.parametrize(("capability", "limit"), CARDS.items(), ids=str)
def test_tables_of_cards_nobody_measured(capability, limit):
    steps = tables.derived_steps(capability)
    assert tables.step_for(steps, 4608).path == tables.TWO_PASS
    assert tables.step_for(steps, 2).path == tables.VECTOR
    if limit is None:
        assert [step.path for step in steps] == [tables.VECTOR, tables.TWO_PASS]
        assert tables.step_for(steps, 8).path == tables.VECTOR
    else:
        assert tables.step_for(steps, limit).path == tables.FUSED
        assert tables.step_for(steps, limit + 1).path == tables.TWO_PASS


@pytest.mark.parametrize(("name", "planes"), {"q8_0": 1, "fp8": 1, "q4_k": 2, "q3_k": 4}.items(), ids=str)
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3), (12, 0)], ids=str)
def test_products_that_triton_adds_up_wrongly_are_not_asked_for(capability, name, planes, monkeypatch):
    """Triton 3.6 to 3.8 on sm_10x: a tl.dot per plane, into one sum within a loop (triton-lang/triton#10821)."""
    triton_path = pytest.importorskip("flux_quant.kernels.triton_path")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    place = FORMATS[name], 64, (3072, 3072), torch.bfloat16, torch.device("cuda")
    refusal = triton_path.refusal(tables.FUSED, *place)
    assert (refusal is not None) == (capability[0] == 10 and planes > 1)
    assert triton_path.refusal(tables.VECTOR, place[0], 2, *place[2:]) is None


def test_bytes_count_for_32_bit_offsets_too():
    """Q8_0 has more bytes than weights."""
    triton_path = pytest.importorskip("flux_quant.kernels.triton_path")
    for rows, fits in ((963, True), (964, False), (1023, False), (1024, False)):
        weight = torch.empty(rows, (1 << 21) // 32 * 34, dtype=torch.uint8, device="meta")
        assert (weight.nbytes < 2**31) == fits
        assert (triton_path.obstacle(FORMATS["q8_0"], [weight]) is None) == fits


def test_threads_of_one_stream_take_turns_with_its_scratch(monkeypatch):
    """What a thread has unpacked is multiplied before another one unpacks into the same memory."""
    triton_path = pytest.importorskip("flux_quant.kernels.triton_path")
    scratch, found = torch.empty(N, K), {}

    def pieces(fmt, parts, dtype):
        for rows in (slice(0, 24), slice(24, N)):
            scratch[rows] = parts[0].float()[rows]
            time.sleep(0.02)
            yield rows, scratch[rows]

    def work(number: int) -> None:
        weight = torch.full((N, K), float(number), dtype=torch.float16)
        found[number] = triton_path.run(tables.TWO_PASS, torch.ones(3, K), FORMATS["f16"], [weight], None, None)

    monkeypatch.setattr(triton_path, "pieces", pieces)
    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: out.unique().tolist() for number, out in found.items()} == {n: [n * K] for n in (1, 2, 3)}


def test_a_measured_table_is_kept_and_a_broken_one_ignored(tmp_path, monkeypatch):
    file = tmp_path / "cache" / "card.json"
    monkeypatch.setattr(tables, "table_file", lambda device: file)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    pytest.importorskip("triton")
    tables.forget()
    device = torch.device("cpu")
    assert tables.measured(device) == {}
    table = {"q4_k": (tables.Step(8, tables.VECTOR, 3), tables.Step(None, tables.TWO_PASS))}
    assert tables.store(device, table, {"q4_k": 1}) == file
    assert tables.measured(device) == table
    assert json.loads(file.read_text())["evidence"] == {"q4_k": 1} and len(list(file.parent.iterdir())) == 1
    other = {"q8_0": (tables.Step(None, tables.TWO_PASS),)}
    tables.store(device, other, {"q8_0": 2})
    assert tables.measured(device) == table | other, "what was measured before stays"
    number = '{"table": {"q4_k": [{"rows": null, "path": "vector", "config": 3}]}}'  # as they were kept once
    for broken in ("", "{}", '{"table": {"q4_k": [{"row": 1}]}}', "[]", number):
        file.write_text(broken)
        tables.forget()
        assert tables.measured(device) == {}
    tables.forget()


@pytest.mark.parametrize(
    ("system", "variables", "place"),
    [
        ("linux", {"HOME": "/h"}, "/h/.cache/flux_quant"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/flux_quant"),
        ("linux", {"HOME": "/h", "FLUX_QUANT_CACHE": "/f"}, "/f"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/flux_quant"),
        ("win32", {"HOME": "/h", "LOCALAPPDATA": "/l"}, "/l/flux_quant/cache"),
    ],
)
def test_where_measurements_are_kept(system, variables, place, monkeypatch):
    for name in ("XDG_CACHE_HOME", "FLUX_QUANT_CACHE", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tables.sys, "platform", system)
    assert str(tables.cache_folder()) == place


def test_a_kernel_that_does_not_compile_is_replaced_and_named_once(on_triton, monkeypatch):
    from triton.compiler import CompilationError

    from flux_quant.kernels import dequant

    monkeypatch.setattr(fallback, "FAILED", {})
    calls = []

    def broken(*arguments: object) -> None:
        calls.append(1)
        raise CompilationError(None, None, "no such instruction")

    monkeypatch.setattr(dequant, "blocks_to_dense", broken)
    fmt = FORMATS["q5_k"]
    parts = [part.to(on_triton) for part in fmt.pack(random(N, K))]
    x = random(600, K).to(on_triton)
    exact = F.linear(x.double(), fmt.unpack(*parts).double())
    with pytest.warns(UserWarning, match="unpack q5_k to torch.float32 does not run"):
        out = dispatch.linear(x, fmt, parts)
    assert (out - exact).norm() <= 1e-6 * exact.norm()
    dispatch.linear(x, fmt, parts)
    assert len(calls) == 1


class Block(nn.Module):
    """Two packed layers with other work between them, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        from flux_quant.linear import QuantLinear

        self.first = QuantLinear.from_float(random(N, K), random(N), FORMATS["q4_k"])
        self.second = QuantLinear.from_float(random(K, N * 16), None, FORMATS["q8_0"])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)).repeat(1, 1, 16)) + x


def test_torch_compile_sees_one_graph():
    """Traced, split into forward and backward and run; not through inductor, which needs a C++ compiler."""
    model = Block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (1, 5, 9):
        x, again = (random(2, tokens, K).requires_grad_() for _ in range(2))
        out, expected = compiled(x), model(again)
        assert (out - expected).norm() <= 1e-5 * expected.norm()
        out.square().sum().backward()
        expected.square().sum().backward()
        assert (x.grad - again.grad).norm() <= 1e-5 * again.grad.norm()
    with torch.inference_mode():
        expected = model(random(1, 3, K))
        assert (compiled(random(1, 3, K)) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.gpu
@packed
def test_a_captured_graph_repeats_the_product(fmt):
    parts = [part.cuda() for part in fmt.pack(random(N, K))]
    for rows in (1, 40, 700):
        x = random(rows, K).cuda().bfloat16()
        dispatch.linear(x, fmt, parts)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = dispatch.linear(x, fmt, parts)
        x.copy_(random(rows + 1, K)[1:])
        graph.replay()
        assert torch.equal(out, dispatch.linear(x, fmt, parts))


@pytest.mark.gpu
@packed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 17, 511, 4096])
def test_every_way_on_cuda_is_within_rounding(fmt, dtype, rows):
    bound = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-3}[dtype]  # TF32 may be allowed
    parts = [part.cuda() for part in fmt.pack(random(320, 768))]
    x, bias = random(rows, 768).cuda().to(dtype), random(320).cuda().to(dtype)
    exact = F.linear(x.double(), fmt.unpack(*parts).double(), bias.double())
    assert (dispatch.linear(x, fmt, parts, bias) - exact).norm() <= bound * exact.norm()
    up = random(rows, 320).cuda().to(dtype)
    exact = up.double() @ fmt.unpack(*parts).double()
    assert (dispatch.run_input_gradient(up, fmt, parts) - exact).norm() <= bound * exact.norm()


def test_codec_slices_write_what_the_codec_says(monkeypatch):
    fmt = FORMATS["q6_k"]
    parts = fmt.pack(random(N, K))
    monkeypatch.setattr(torch_path, "SCRATCH_BYTES", 7 * K * 4)
    weight = torch.cat([piece for _, piece in torch_path.pieces(fmt, parts, torch.float32)])
    assert torch.equal(weight, fmt.unpack(*parts))
