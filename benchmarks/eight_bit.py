"""What 8-bit activations cost in exactness: an outlier by hand, the bundled model layer by layer, its pictures.

    python -I -m flux_quant.benchmarks.eight_bit [--steps 20] [--save]

Weights and activations are both taken to 8 bits, by the torch twins of the kernels, so that any machine gives these
numbers. Errors are relative Frobenius errors of a linear's output in percent, without bias. Pictures are compared with
those of the same weights in float32, from the same noise; the model in bfloat16 and float16 is the yardstick.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flux_quant.benchmarks.demo import GUIDANCE, PROMPTS, SIZE
from flux_quant.benchmarks.machine import write_result
from flux_quant.benchmarks.metrics import psnr
from flux_quant.codecs.int8 import quantize_rows
from flux_quant.codecs.rotation import group_for
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.drawing.vae import decode
from flux_quant.formats import FORMATS
from flux_quant.generation import Request, denoise_batch, encode
from flux_quant.kernels import fp8, int8_torch
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux, load_vae
from flux_quant.model import Flux
from flux_quant.text.encode import TextFeatures

CALM, CHANNELS, COLUMNS, ROWS = 1.0, 3072, 512, 256  # of the outlier by hand
SIZES = (CALM, 10.0, 60.0, 300.0)  # of one channel against the others
EVERY_NTH = 3  # row of real activations is kept

MODULATION = ("*_mod.lin", "*.modulation.lin")
EMBEDDERS = ("img_in", "txt_in", "time_in.*", "vector_in.*", "guidance_in.*")
LAST = ("final_layer.*",)
USUAL = (*MODULATION, *EMBEDDERS, *LAST)
KEPT = {"nothing": (), "modulation": MODULATION, "embedders": EMBEDDERS, "last": LAST, "usual": USUAL}
KEPT |= {"usual and ends": USUAL}  # and the first and the last block, whose names depend on the model

Multiply = Callable[[Tensor], Tensor]  # x (M, K) -> (M, N) float32
Way = Callable[[Tensor, Tensor], Multiply]  # weight (N, K) float32, largest magnitude of each input (K,) -> product


def int8_by(group: int) -> Way:
    def prepare(weight: Tensor, largest: Tensor) -> Multiply:
        fits = group_for(weight.shape[1], group)
        w = int8_torch.weight_rows(FORMATS["f32"], (weight,), fits)
        return lambda x: int8_torch.int_mm(*quantize_rows(x, fits), *w, None, torch.float32)

    return prepare


def smoothed(weight: Tensor, largest: Tensor) -> Multiply:
    """Channels divided by sqrt(largest activation / largest weight) before, the weight multiplied with it: SmoothQuant
    with strength 1/2 (arXiv 2211.10438), its statistics from the very activations that are multiplied."""
    ratio = (largest.clamp(min=1e-5) / weight.abs().amax(dim=0).clamp(min=1e-5)).sqrt()
    multiply = int8_by(1)(weight * ratio, largest)
    return lambda x: multiply(x / ratio)


def fp8_by(way: str) -> Way:
    def prepare(weight: Tensor, largest: Tensor) -> Multiply:
        w = fp8.fp8_rows(FORMATS["f32"], (weight,), way)
        return lambda x: fp8.emulate(*fp8.quantize(x, way), *w, None, torch.float32)

    return prepare


def bf16(weight: Tensor, largest: Tensor) -> Multiply:
    w = weight.bfloat16().t()
    return lambda x: (x.bfloat16() @ w).float()


WAYS: dict[str, Way] = {f"int8, groups of {group}": int8_by(group) for group in (1, 16, 64, 256)}
WAYS |= {"int8, smoothed": smoothed, "fp8 per row": fp8_by("row"), "fp8 per tensor": fp8_by("tensor"), "bf16": bf16}
BEST = ("int8, groups of 256", "fp8 per row")  # tried with every set of layers that are kept


def errors(x: Tensor, weight: Tensor, expected: Tensor) -> dict[str, float]:
    largest = x.abs().amax(dim=0)
    return {name: percent(way(weight, largest)(x), expected) for name, way in WAYS.items()}


def percent(found: Tensor, expected: Tensor) -> float:
    return 100 * ((found - expected).norm() / expected.norm()).item()


def outliers() -> list[dict[str, object]]:
    """One channel many times the others, and its weights zero: what the others lose is all the error there is."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, CHANNELS, generator=generator) for n in (ROWS, COLUMNS))
    weight[:, 1000] = 0
    expected, out = x @ weight.t(), []
    for size in SIZES:
        rough = x.clone()
        rough[:, 1000] *= size
        out.append({"outlier": size} | errors(rough, weight, expected))
    return out


def linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear))


def weight_of(module: QuantLinear) -> Tensor:
    return module.fmt.unpack(*module.parts).float()


@dataclass(frozen=True)
class Scene:
    """The bundled model and what it draws from."""

    components: Components
    requests: Sequence[Request]
    features: TextFeatures

    def latents(self, model: Flux, dtype: torch.dtype = torch.float32) -> Tensor:
        return denoise_batch(model, self.features, self.requests, dtype=dtype)


def scene(steps: int) -> Scene:
    components = find_components(BUNDLED)
    requests = [Request(p, steps=steps, guidance=GUIDANCE, seed=i, size=SIZE) for i, p in enumerate(PROMPTS)]
    return Scene(components, requests, encode(components, requests, guided=True))


def activations(scene: Scene) -> dict[str, Tensor]:
    """Inputs (M, K) of every linear while the model draws."""
    model, inputs = load_flux(scene.components.transformer), {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.setdefault(name, []).append(args[0].flatten(0, -2)[::EVERY_NTH].clone())

    for name, module in linears(model):
        module.register_forward_pre_hook(keep(name))
    scene.latents(model)
    return {name: torch.cat(pieces) for name, pieces in inputs.items()}


def layers(scene: Scene, inputs: dict[str, Tensor]) -> list[dict[str, object]]:
    """Mean error of each kind of layer over its blocks."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, module in linears(load_flux(scene.components.transformer)):
        x, weight = inputs[name], weight_of(module)
        crest = (x.abs().amax(dim=1) / x.square().mean(dim=1).sqrt()).nanmean().item()
        row = {"largest over rms": crest} | errors(x, weight, x @ weight.t())
        kinds.setdefault(re.sub(r"\d+", "*", name, count=1), []).append(row)
    return [{"layer": kind} | {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]} for kind, rows in kinds.items()]


class EightBit(nn.Module):
    """A linear whose products are made in one of the ways."""

    def __init__(self, inner: QuantLinear, way: Way, largest: Tensor) -> None:
        super().__init__()
        self.out_features, self.bias = inner.out_features, inner.bias
        self.multiply = way(weight_of(inner), largest)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def ends(model: Flux) -> tuple[str, ...]:
    """Patterns of the first and the last block."""
    return ("double_blocks.0.*", f"single_blocks.{len(model.single_blocks) - 1}.*")


def pictures(scene: Scene, inputs: dict[str, Tensor]) -> Iterator[dict[str, object]]:
    """PSNR of all pictures per way and per set of layers that stay as they are."""
    transformer, vae = scene.components.transformer, load_vae(scene.components.vae)
    reference = decode(vae, scene.latents(load_flux(transformer)))

    def compared(model: Flux, dtype: torch.dtype = torch.float32) -> dict[str, float]:
        distance = psnr(decode(vae, scene.latents(model, dtype)), reference)
        return {"psnr_mean": distance.mean().item(), "psnr_worst": distance.min().item()}

    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield {"way": name, "kept": "", "layers": 0} | compared(load_flux(transformer), dtype)
    runs = [(way, kept) for way in BEST for kept in KEPT]
    runs += [(way, "usual") for way in WAYS if way not in (*BEST, "bf16")]
    for way, kept in runs:
        model = load_flux(transformer)
        patterns = KEPT[kept] if kept != "usual and ends" else (*USUAL, *ends(model))
        changed = [(n, m) for n, m in linears(model) if not any(fnmatch(n, pattern) for pattern in patterns)]
        for name, module in changed:
            model.set_submodule(name, EightBit(module, WAYS[way], inputs[name].abs().amax(dim=0)))
        yield {"way": way, "kept": kept, "layers": len(changed)} | compared(model)


def table_of(rows: list[dict[str, object]], title: str) -> Table:
    table = Table(title=title)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="right" if any(isinstance(row.get(name), float) for row in rows) else "left")
    for row in rows:
        values = (row.get(name, "") for name in names)
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    args = parser.parse_args()
    drawn = scene(args.steps)
    inputs = activations(drawn)
    result = {"outliers": outliers(), "layers": layers(drawn, inputs), "pictures": list(pictures(drawn, inputs))}
    for name, rows in result.items():
        Console(width=180).print(table_of(rows, name))
    if args.save:
        print(f"wrote {write_result('eight_bit', {'steps': args.steps, **result})}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
