"""How far a model is from its reference: a number per prompt, the mean, and an interval over prompts."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flux_quant.benchmarks.bench.record import Scalar

RESAMPLES, CONFIDENCE = 10_000, 0.95
WORSE: dict[str, Callable[..., float]] = {  # figure -> of two values, which is the worse
    "velocity_error": max,
    "cosine_last": min,
    "psnr_db": min,
    "ssim": min,
    "lpips": max,
    "accuracy": min,
}


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """(..., S, C) of each -> (...) ||found - expected|| / ||expected||, over tokens and channels."""
    found, expected = (x.double().flatten(-2) for x in (found, expected))
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


def cosines(found: Tensor, expected: Tensor) -> Tensor:
    """(..., S, C) of each -> (...)"""
    return torch.cosine_similarity(found.double().flatten(-2), expected.double().flatten(-2), dim=-1)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean by the percentile method (Efron 1979), the same every time; one value has none.

    `scipy.stats.bootstrap(method="percentile")` must agree but for its random draws.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    means = rng.choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def summary(name: str, values: Sequence[float], worst: bool = True) -> dict[str, Scalar]:
    """`name`, `name`_low and _high, and `name`_worst where asked."""
    low, high = bootstrap(values)
    interval = {} if np.isnan(low) else {f"{name}_low": low, f"{name}_high": high}
    last = {f"{name}_worst": float(WORSE[name](values))} if worst else {}
    return {name: float(np.mean(values)), **interval, **last}


def worse_of(runs: Sequence[Mapping[str, Scalar]]) -> dict[str, Scalar]:
    """The worst value that any run has of each figure, by the name of the floor that it is."""
    return {
        f"{name}_floor": worse(run[name] for run in runs)
        for name, worse in WORSE.items()
        if runs and all(name in run for run in runs)
    }
