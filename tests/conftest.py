"""Small models of the real architectures, made from the key map's shapes."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux_quant.arch import BLOCK, KEY_MAP

CARD = torch.cuda.is_available()
if not CARD:  # Triton's kernels run in its interpreter, on CPU tensors; read when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

HIDDEN, HEAD, MLP, PATCH, CONTEXT, POOLED, TIME = 256, 128, 1024, 64, 96, 64, 256
WEIGHTS = {  # shape of a weight by the end of its BFL module name
    "img_in": (HIDDEN, PATCH),
    "txt_in": (HIDDEN, CONTEXT),
    "time_in.in_layer": (HIDDEN, TIME),
    "vector_in.in_layer": (HIDDEN, POOLED),
    "guidance_in.in_layer": (HIDDEN, TIME),
    "out_layer": (HIDDEN, HIDDEN),
    "_mod.lin": (6 * HIDDEN, HIDDEN),
    "modulation.lin": (3 * HIDDEN, HIDDEN),
    "qkv": (3 * HIDDEN, HIDDEN),
    "proj": (HIDDEN, HIDDEN),
    "mlp.0": (MLP, HIDDEN),
    "mlp.2": (HIDDEN, MLP),
    "linear1": (3 * HIDDEN + MLP, HIDDEN),
    "linear2": (HIDDEN, HIDDEN + MLP),
    "final_layer.linear": (PATCH, HIDDEN),
    "adaLN_modulation.1": (2 * HIDDEN, HIDDEN),
}


def flux_shapes(double: int = 2, single: int = 3) -> dict[str, tuple[int, ...]]:
    """BFL names and shapes of a small FLUX.1 [dev]."""
    shapes = {}
    for module in KEY_MAP:
        count = {"double_blocks": double, "single_blocks": single}.get(module.split(".")[0], 1)
        for i in range(count):
            name = module.format(i)
            if name.endswith("_norm"):
                shapes[f"{name}.scale"] = (HEAD,)
            else:
                weight = next(shape for end, shape in WEIGHTS.items() if name.endswith(end))
                shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]
    return shapes


def random_flux(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the size that training gives: activations neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return (1 + noise / 10 if name.endswith("scale") else noise / shape[-1] ** 0.5).to(dtype)

    return {name: values(name, shape) for name, shape in flux_shapes().items()}


def in_file_order(tensors: dict[str, Tensor]) -> list[str]:
    """Blocks first, then the rest: not the order in which they run, as in files of the wild."""
    return sorted(tensors, key=lambda name: (not BLOCK.match(name), name))


UNTIL = "FLUX_QUANT_TESTS_UNTIL"  # seconds since 1970: no test begins after it; for runs on a lent GPU
FIRST = ("test_on_a_device.py", "test_streaming_cuda.py", "test_runtime.py", "test_text.py", "test_vae.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped without a CUDA device; those that launch kernels are marked `kernel`.

    Where time is limited those come first that tell most, whole parts of the program in few tests; the others in an
    order that depends on their names only, so that some of each file are run.
    """
    if UNTIL in os.environ:
        items.sort(key=telling)
    for item in items:
        if "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker("kernel")
        if item.get_closest_marker("gpu") and not CARD:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def telling(item: pytest.Item) -> tuple[int, bytes]:
    name = item.path.name
    return FIRST.index(name) if name in FIRST else len(FIRST), hashlib.sha256(item.nodeid.encode()).digest()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get(UNTIL, "inf")):
        pytest.skip("no time left")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes what flux_quant keeps on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLUX_QUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a card, tests that are not about it see none: what they expect is what a processor does."""
    about_it = any(request.node.get_closest_marker(name) for name in ("gpu", "kernel"))
    if CARD and not about_it:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the programs that they start


@pytest.fixture(scope="session")
def kernel_device() -> Iterator[str]:
    """Where tests launch Triton's kernels: "cuda", or "cpu" in the interpreter, where what they read and write is held
    to the tensors that they are given. Skips without triton."""
    pytest.importorskip("triton")
    if CARD:
        yield "cuda"
        return
    from memory_check import checked

    with checked():
        yield "cpu"


@pytest.fixture(scope="session")
def tiny_flux() -> dict[str, Tensor]:
    """A FLUX.1 [dev] of 2 double and 3 single blocks, hidden size 256, BF16, BFL names."""
    return random_flux()


@pytest.fixture(scope="session")
def tiny_flux_file(tiny_flux: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a safetensors file. Read it, never write it."""
    path = tmp_path_factory.mktemp("model") / "flux1-tiny.safetensors"
    save_file(tiny_flux, path, {"format": "pt", "modelspec.title": "tiny"})
    return path


@pytest.fixture
def start():
    """Start Python in a process of its own, with one thread, its output as text; it is gone after the test."""
    started = []

    def start(*arguments: str, **options: object) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **pipes, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
