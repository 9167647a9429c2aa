"""What the linears of a transformer are fed while it draws: mean square of every input column, largest magnitude.

The mean squares are an importance matrix (they weigh the search for scales), the magnitudes give FP8 activations their
scale. Both converge fast: a few pictures of a few steps are thousands of rows for every layer.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from flux_quant.components import Components
from flux_quant.drawing.given import PLAIN, kind_of
from flux_quant.errors import UserError
from flux_quant.generation import Request, denoise_batch, encode
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux

Progress = Callable[[str, int, int], None]


@dataclass
class InputStatistics:
    """By weight name. Sums are kept in float64 on the layer's device."""

    squares: dict[str, Tensor] = field(default_factory=dict)  # (K,)
    rows: Counter[str] = field(default_factory=Counter)
    largest: dict[str, Tensor] = field(default_factory=dict)  # ()
    pictures: int = 0

    def add(self, name: str, x: Tensor) -> None:
        """x (..., K), the input of one call."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        squares, largest = x.square().sum(dim=0, dtype=torch.float64), x.abs().amax()
        if name in self.squares:
            squares, largest = squares + self.squares[name], torch.maximum(largest, self.largest[name])
        self.squares[name], self.largest[name] = squares, largest
        self.rows[name] += len(x)

    def mean_squares(self) -> dict[str, Tensor]:
        return {name: (squares / self.rows[name]).float().cpu() for name, squares in self.squares.items()}

    @property
    def maxima(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.largest.items()}

    def metadata(self) -> dict[str, str]:
        rows = min(self.rows.values(), default=0), max(self.rows.values(), default=0)
        return {"pictures": str(self.pictures), "count": f"{rows[0]} to {rows[1]} rows per layer"}


@contextmanager
def watched(model: nn.Module, statistics: InputStatistics) -> Iterator[None]:
    """Inputs of all its linears are counted inside; afterwards the model is as before."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: statistics.add(f"{name}.weight", inputs[0])

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear | nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    components: Components,
    requests: Sequence[Request],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda phase, done, total: None,
) -> InputStatistics:
    """Denoise every request and watch; nothing is decoded."""
    statistics = InputStatistics()
    model = load_flux(components.transformer)
    if kind_of(model.config) != PLAIN:
        raise UserError(f"{components.transformer} reads pictures (Fill, Depth or Canny); calibration has text alone")
    features = encode(components, requests, guided=model.config.guidance)
    model.to(device)
    with watched(model, statistics):
        for i, request in enumerate(requests):
            progress("watching", i, len(requests))
            denoise_batch(model, features[i : i + 1], [request], device, dtype)
            statistics.pictures += 1
    progress("watching", len(requests), len(requests))
    return statistics


def read_prompts(path: Path) -> list[str]:
    """One per line; empty lines do not count."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file") from None
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return prompts
