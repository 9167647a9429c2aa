"""Bytes of tensors that live at the worst moment of some code, counted on the meta device, where nothing is stored."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_quant.arch import FluxConfig, running_order
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE
from flux_quant.converters.recipe import build
from flux_quant.kernels import fused
from flux_quant.model import Flux, image_ids, text_ids
from flux_quant.planner.footprint import Tensors, Work

SUFFIXES = {"bf16": ".safetensors", "fp8": ".safetensors"}
FORMATS = ("bf16", "fp8", "q8_0", "q5_k_s", "q4_k_s")


def config(guidance: bool = True, double: int = DOUBLE, single: int = SINGLE) -> FluxConfig:
    return FluxConfig(**dict(DEV, guidance=guidance), double_blocks=double, single_blocks=single)


def tensors_of(flux: FluxConfig, name: str) -> Tensors:
    """Names, shapes and formats of a checkpoint as `convert --format name` would write it."""
    with torch.device("meta"):
        shapes = {key: tuple(t.shape) for key, t in Flux(flux).state_dict().items()}
    recipe = build(name, "FLUX.1", SUFFIXES.get(name, ".gguf"), sorted(shapes, key=running_order))
    return {key: (shape, recipe.choose(key, shape, "bf16", lambda: True)[0]) for key, shape in shapes.items()}


class LiveBytes(TorchDispatchMode):
    """`peak`: most bytes at once of the storages that were made inside; what comes from outside does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count((args, kwargs), 0)
        out = func(*args, **(kwargs or {}))
        self.count(out, 1)
        return out

    def count(self, tree: object, weight: int) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = weight * storage.nbytes()
                    self.now += weight * storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key: int) -> None:
        self.now -= self.known.pop(key)


class Linear(nn.Module):
    """What a packed layer allocates: its output; codes of its input for 8-bit products; what adapters add."""

    def __init__(self, inner: nn.Linear, eight_bit: bool, adapters: int) -> None:
        super().__init__()
        self.inputs, self.outputs = inner.in_features, inner.out_features
        self.in_features = inner.in_features  # modulations ask for it
        self.eight_bit, self.adapters = eight_bit, adapters

    def forward(self, x: Tensor) -> Tensor:
        codes = x.new_empty(x.shape, dtype=torch.int8) if self.eight_bit else None
        out = x.new_empty(*x.shape[:-1], self.outputs)
        del codes
        for _ in range(self.adapters):
            out = out + x.new_empty(*x.shape[:-1], self.outputs)
        return out


class NoKernels:
    """`kernels.pointwise` with launches left out: everything is allocated by those who call them."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    """Flash attention allocates its output, laid out as q, and a sum per row."""
    sums = q.new_empty(q.shape[:3], dtype=torch.float32)
    out = torch.empty_like(q)
    del sums
    return out


@contextmanager
def as_on_a_card(triton: bool) -> Iterator[None]:
    """Attention as on CUDA; with the pointwise kernels, or torch in their place."""
    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        if not triton:
            yield
            return
        kernels = mock.patch.object(fused, "pointwise", NoKernels)
        with kernels, mock.patch.object(fused, "choose", lambda name, in_triton, *rest, **more: in_triton()):
            yield


def peak_of_a_pass(flux: FluxConfig, work: Work, dtype: torch.dtype, triton: bool) -> int:
    """Live bytes of one pass of the engine, its inputs and weights aside."""
    with torch.device("meta"):
        model = Flux(flux).to(dtype)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            inside = "blocks." in path and ".lin" not in path.replace(".linear", "")
            linear = Linear(layer, inside and work.compute != "float", int(inside and work.adapters))
            model.set_submodule(path, linear)
    rows, columns = work.size[1] // 16, work.size[0] // 16
    b, meta = work.batch, dict(device="meta")
    one = torch.ones(b, **meta)
    inputs = (
        torch.empty(b, rows * columns, flux.in_channels, dtype=dtype, **meta),
        torch.empty(b, work.words, flux.context, dtype=dtype, **meta),
        torch.empty(b, flux.pooled, dtype=dtype, **meta),
    )
    ids = image_ids(rows, columns, "meta"), text_ids(work.words, "meta")
    with torch.no_grad(), as_on_a_card(triton), LiveBytes() as live:
        model(*inputs, one, *ids, one)
    return live.peak
