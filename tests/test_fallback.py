"""When Triton is not used, and what happens when it fails: with made-up cards and errors, no device needed."""

import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from flux_quant.kernels import fallback

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fallback, "FAILED", {})
    monkeypatch.delenv(fallback.SWITCH, raising=False)
    fallback.obstacle.cache_clear()
    yield
    fallback.obstacle.cache_clear()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch):
    """Pretend that every CUDA device is a card of capability 7.5, with triton installed. -> list of the questions."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(fallback, "find_spec", lambda name: name)
    return asked


def test_a_suitable_card_is_asked_once(card: list):
    assert [fallback.triton_for(CUDA) for _ in range(3)] == [None] * 3
    assert fallback.triton_for(torch.device("cuda")) is None  # the current one, which is known by now
    assert card == [CUDA]


def test_minimum_is_inclusive(card: list):
    assert fallback.triton_for(CUDA, (7, 5)) is None
    assert fallback.triton_for(CUDA, (8, 0)) == "compute capability 7.5, Triton kernels need 8.0"


@pytest.mark.parametrize(("value", "disabled"), {"1": True, "yes": True, "0": False, "": False}.items())
def test_switch_is_read_at_every_call(value: str, disabled: bool, card: list, monkeypatch: pytest.MonkeyPatch):
    assert fallback.triton_for(CUDA) is None
    monkeypatch.setenv(fallback.SWITCH, value)
    assert (fallback.triton_for(CUDA) == "FLUX_QUANT_DISABLE_TRITON is set") is disabled
    monkeypatch.delenv(fallback.SWITCH)
    assert fallback.triton_for(CUDA) is None


@pytest.mark.parametrize("device", ["cpu", "meta", "mps", "xpu:0"])
def test_other_devices(device: str, card: list):
    assert fallback.triton_for(torch.device(device)) == f"no Triton on {torch.device(device).type}"
    assert not card


def test_without_triton(card: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fallback, "find_spec", lambda name: None)
    assert fallback.triton_for(CUDA) == "triton is not installed"


def test_rocm_calls_itself_cuda(card: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in fallback.triton_for(CUDA)


def test_no_card_at_all(card: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fallback.triton_for(torch.device("cuda")) == "no CUDA device"


def raised_in(module: str, error: Exception):
    """A function of a module of that name, which raises `error`."""
    scope = types.ModuleType(module).__dict__ | {"error": error}
    exec("def fail():\n    raise error", scope)
    return scope["fail"]


class PTXASError(Exception):
    __module__ = "triton.runtime.errors"


TRITONS = {  # what compiling and launching was seen to raise
    "its own class, from anywhere": ("somewhere", PTXASError("sm_130 is not known")),
    "driver": ("triton.runtime.jit", RuntimeError("Triton Error [CUDA]: invalid device function")),
    "no C compiler": ("triton.runtime.build", RuntimeError("Failed to find C compiler")),
    "no ptxas": ("triton.backends.nvidia.compiler", FileNotFoundError("ptxas")),
    "LLVM": ("triton.compiler.compiler", IndexError("map::at")),
}


@pytest.mark.parametrize(("module", "error"), TRITONS.values(), ids=TRITONS)
def test_failure_of_triton_is_told_once_and_remembered(module: str, error: Exception):
    tried = []

    def run():
        tried.append(1)
        return raised_in(module, error)()

    with pytest.warns(UserWarning) as caught:
        assert fallback.guarded("layer_norm", CPU, run, lambda: "torch") == "torch"
    (warning,) = caught
    for part in ("layer_norm", "cpu", type(error).__name__, str(error)):
        assert part in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings(action="error"):
        assert fallback.guarded("layer_norm", CPU, run, lambda: "torch") == "torch"
    assert len(tried) == 1
    assert fallback.failures() == {("layer_norm", CPU): f"{type(error).__name__}: {error}"}


def test_other_kernels_and_devices_go_on():
    fail = raised_in("triton.runtime.jit", RuntimeError("no"))
    with pytest.warns(UserWarning):
        fallback.guarded("one", CPU, fail, lambda: None)
    assert fallback.guarded("two", CPU, lambda: "fused", lambda: "torch") == "fused"
    assert fallback.guarded("one", torch.device("meta"), lambda: "fused", lambda: "torch") == "fused"


PASSED_ON = {
    "wrong arguments": ("flux_quant.kernels.pointwise", ValueError("shape")),
    "wrong arguments, seen by triton": ("triton.runtime.jit", ValueError("pointer argument")),
    "bug of ours": ("flux_quant.kernels.pointwise", RuntimeError("mine")),
    "torch out of memory": ("torch", torch.cuda.OutOfMemoryError("CUDA out of memory")),
    "torch out of memory, asked by triton": ("triton.runtime.jit", torch.cuda.OutOfMemoryError("CUDA out of memory")),
    "driver out of memory": ("triton.runtime.jit", RuntimeError("Triton Error [CUDA]: out of memory")),
    "user": ("triton.runtime.jit", KeyboardInterrupt("stop")),
}


@pytest.mark.parametrize(("module", "error"), PASSED_ON.values(), ids=PASSED_ON)
def test_other_errors_are_passed_on(module: str, error: BaseException):
    expected = torch.cuda.OutOfMemoryError if "out of memory" in str(error) else type(error)
    with pytest.raises(expected, match=str(error).split("[")[0]):
        fallback.guarded("layer_norm", CPU, raised_in(module, error), lambda: "torch")
    assert not fallback.failures()


REAL = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flux_quant.kernels.fallback import is_tritons

@triton.jit
def fill(p, N: tl.constexpr, M: tl.constexpr):
    tl.store(p + tl.arange(0, N), tl.arange(0, M))

for capability, sizes in ((90, (4, 8)), (90, (3, 3)), (131, (4, 4))):
    source = ASTSource(fill, {"p": "*i32", "N": "constexpr", "M": "constexpr"}, dict(zip("NM", sizes)))
    try:
        triton.compile(source, target=GPUTarget("cuda", capability, 32))
    except Exception as error:
        print("raised", type(error).__name__, is_tritons(error))
"""


def test_errors_of_real_kernels(tmp_path: Path):
    """Shapes that do not match, a size that is no power of two, a card that no ptxas knows: all Triton's."""
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"
    script.write_text(REAL)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    raised = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("raised")]
    assert raised == [["CompilationError", "True"], ["CompilationError", "True"], ["PTXASError", "True"]], done.stderr


@pytest.mark.parametrize("words", ["CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_INVALID_VALUE"])
def test_a_product_that_cublas_refuses_is_replaced(words: str):
    def run():
        raise RuntimeError(f"CUDA error: {words} when calling cublasLtMatmul with transpose_mat1 1 m 8 n 17 k 16")

    with pytest.warns(UserWarning, match="odd product does not run on cpu"):
        assert fallback.guarded("odd product", CPU, run, lambda: "torch") == "torch"
    assert words in fallback.failures()["odd product", CPU]


@pytest.mark.parametrize("words", ["CUBLAS_STATUS_EXECUTION_FAILED", "an illegal memory access was encountered"])
def test_a_broken_card_is_no_refusal(words: str):
    def run():
        raise RuntimeError(f"CUDA error: {words}")

    with pytest.raises(RuntimeError, match=words):
        fallback.guarded("product", CPU, run, lambda: "torch")
