"""The pointwise kernels of a block at FLUX.1's shapes beside torch's chains, and the bytes they must move.

Part of `kernels`: rows of `pointwise` in its JSON.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flux_quant.benchmarks.timing import Call, compare
from flux_quant.kernels import fallback, fused

TOKENS, WIDTH, CHANNELS = 4608, 3072, 128  # 1024 x 1024 pixels and 512 words
COPIES = 4  # of the inputs, so that no cache holds them


def calls(
    tokens: int, width: int, channels: int, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[Call, int]]:
    """Name -> (call, values read and written)."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, y, wide = (
        random(COPIES, 1, tokens, width),
        random(COPIES, 1, tokens, width),
        random(COPIES, 1, tokens, 4 * width),
    )
    qkv = random(COPIES, 1, tokens, 3 * width)
    shift, scale, gate = random(3, 1, 1, width) / 10
    q_scale, k_scale = torch.ones(2, channels, device=device, dtype=dtype)
    cos, sin = torch.rand(2, tokens, channels // 2, device=device)
    one = tokens * width
    return {
        "modulated norm": (lambda i: fused.modulated_norm(x[i % COPIES], shift, scale), 2 * one),
        "gated sum": (lambda i: fused.gated_sum(x[i % COPIES], gate, y[i % COPIES]), 3 * one),
        "GELU": (lambda i: fused.gelu_(wide[i % COPIES]), 8 * one),
        "heads": (lambda i: fused.heads([(qkv[i % COPIES], q_scale, k_scale)], cos, sin), 4 * one),
    }


@contextmanager
def without_triton() -> Iterator[None]:
    before = os.environ.get(fallback.SWITCH)
    os.environ[fallback.SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[fallback.SWITCH]
        else:
            os.environ[fallback.SWITCH] = before


def in_torch(call: Call) -> Call:
    def run(i: int) -> object:
        with without_triton():
            return call(i)

    return run


def measure(
    device: torch.device, dtype: torch.dtype, ceiling: float, tiny: bool = False
) -> Iterator[dict[str, object]]:
    """`ceiling`: bytes per second of a copy."""
    sizes = (64, 256, 64) if tiny else (TOKENS, WIDTH, CHANNELS)
    for name, (call, values) in calls(*sizes, device, dtype).items():
        times = compare({"ours": call, "torch": in_torch(call)}, COPIES, device)
        rate = values * dtype.itemsize / times["ours"].median
        row = {who: timing.row() for who, timing in times.items()}
        yield {"what": name, **row, "gb_per_s": rate / 1e9, "of_copy": rate / ceiling}
