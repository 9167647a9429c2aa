"""Trains a LoRA on packed weights, on a CPU in minutes: the bundled model learns to draw cyanotypes.

    python examples/train_lora.py --format q8_0 --out build/cyanotype
    flux-quant generate -m flux_quant/tiny_flux -p "large owl" -o owl.png \\
        --lora build/cyanotype/cyanotype-q8_0-kohya.safetensors

The model is converted to the format and stays packed; gradients pass through it to the factors, nothing else is
trained. The pictures to learn from are the model's own, recoloured: one scale from deep blue to white. Prompts of the
test are not among those of the training. Writes the LoRA in kohya's and in diffusers' form, a sheet of pictures
(without, with, wanted), and prints how far from the wanted pictures those without and with it are; `--save` keeps that
in benchmarks/results/, beside what other formats had on the same day. With `--device cuda` everything but the text
encoders runs there; random numbers stay those of the CPU.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux_quant.benchmarks.bench import models, places
from flux_quant.benchmarks.bench.record import Row, Run, read_run, write_run
from flux_quant.benchmarks.bench.runner import put
from flux_quant.benchmarks.bench.suite import Asked
from flux_quant.benchmarks.machine import RESULTS, fingerprint, now, result_path
from flux_quant.components import BUNDLED, Components, find_components
from flux_quant.converters.conversion import Conversion
from flux_quant.converters.convert import run
from flux_quant.converters.lora_io import read_lora
from flux_quant.converters.lora_names import TRANSFORMER
from flux_quant.converters.lora_records import Lora, Record
from flux_quant.converters.lora_write import Factors, kohya, peft, write_lora
from flux_quant.converters.plan import make_plan
from flux_quant.drawing import vae
from flux_quant.drawing.pictures import to_images
from flux_quant.drawing.request import Request
from flux_quant.drawing.sampling import denoise
from flux_quant.generation import choose_device, encode, make_drawing, placed_vae
from flux_quant.linear import QuantLinear
from flux_quant.loading import load_flux
from flux_quant.lora import Applied, apply_, remove_, shapes_in
from flux_quant.model import Flux, image_ids, pack_latents, text_ids, unpack_latents

NAMES = (
    *("owl", "rocket", "banana", "guitar", "bicycle", "mushroom", "teapot", "violin", "tractor", "tiger face"),
    *("snail", "pizza", "umbrella", "camel", "strawberry", "whale", "lion face", "sunflower", "crab", "hamburger"),
)
TESTED = ("fox face", "watermelon", "octopus", "penguin")
COLOURS = ("white", "yellow", "red", "green")
PLACES = ("in the centre", "on the left", "at the top")
SIZE, GRID, GUIDANCE = (96, 96), (6, 6), 3.5
DARK, LIGHT = (0.05, 0.17, 0.42), (0.88, 0.94, 1.0)


@dataclass
class Data:
    """Everything that a step needs, for each picture."""

    latents: Tensor  # (n, tokens, channels), recoloured
    txt: Tensor
    pooled: Tensor


def cyanotype(pictures: Tensor) -> Tensor:
    """(n, 3, h, w) in 0-1, as tones from deep blue to white."""
    weights, low, high = (
        torch.tensor(colour, device=pictures.device).view(3, 1, 1) for colour in ((0.3, 0.59, 0.11), DARK, LIGHT)
    )
    light = (pictures * weights).sum(1, keepdim=True)
    return low + light * (high - low)


def requests_for(names: tuple[str, ...], count: int, steps: int) -> list[Request]:
    words = [
        f"large {name} on a {COLOURS[(i + turn) % len(COLOURS)]} background"
        if turn % 2
        else f"small {name} {PLACES[(i + turn) % len(PLACES)]}"
        for turn in range(-(-count // len(names)))
        for i, name in enumerate(names)
    ]
    return [Request(text, steps=steps, seed=i, size=SIZE) for i, text in enumerate(words[:count])]


@torch.no_grad()
def draw(model: Flux, components: Components, requests: list[Request]) -> tuple[Tensor, Tensor]:
    """(latents, pictures)"""
    device = model.img_in.bias.device
    drawing = make_drawing(requests, model.config, encode(components, requests, model.config.guidance), device)
    latents = unpack_latents(denoise(model, drawing), *GRID)
    return latents, vae.decode(placed_vae(components.vae, device, torch.float32), latents)


def make_data(model: Flux, components: Components, requests: list[Request]) -> Data:
    features = encode(components, requests, model.config.guidance)
    _, pictures = draw(model, components, requests)
    device = model.img_in.bias.device
    latents = vae.encode(placed_vae(components.vae, device, torch.float32), cyanotype(pictures))
    return Data(*(tensor.to(device) for tensor in (pack_latents(latents), features.txt, features.pooled)))


def fresh(model: Flux, rank: int) -> Lora:
    """A LoRA that changes nothing yet, on every linear of the blocks."""
    generator, records = torch.Generator().manual_seed(0), []
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear) and "_blocks" in name:
            down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            factors = {"down": down, "up": torch.zeros(layer.out_features, rank)}
            rows = layer.out_features
            records.append(Record(TRANSFORMER, name, "lora", 0, rows, factors, 1.0, None, None, (name,)))
    return Lora(Path("new"), tuple(records), [], {}, {})


def factors_of(applied: Applied) -> dict[str, Factors]:
    return {name: Factors(path.down.cpu(), path.ups[0].weight.cpu()) for name, (_, path) in applied.paths.items()}


def train(
    model: Flux, data: Data, steps: int, rank: int, batch: int, rate: float = 5e-4
) -> tuple[Applied, list[float]]:
    """Rectified flow on the factors alone -> what is on the model now, and the loss of every step."""
    torch.manual_seed(0)
    applied = apply_(model, [(fresh(model, rank), 1.0)])
    parameters = [tensor.requires_grad_() for _, path in applied.paths.values() for tensor in path.tensors]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    device = data.latents.device
    ids = dict(img_ids=image_ids(*GRID, device=device), txt_ids=text_ids(data.txt.shape[1], device))
    guidance = torch.full((batch,), GUIDANCE, device=device)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(data.latents), (batch,))
        clean, noise = data.latents[chosen], torch.randn(batch, *data.latents.shape[1:]).to(device)
        t = torch.sigmoid(torch.randn(batch) + 0.8).to(device)
        noisy = torch.lerp(clean, noise, t[:, None, None])
        given = (noisy, data.txt[chosen].float(), data.pooled[chosen], t)
        loss = (model(*given, **ids, guidance=guidance) - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    for tensor in parameters:
        tensor.requires_grad_(False)
    return applied, losses


def save(applied: Applied, hidden: int, out: Path, stem: str) -> dict[str, Path]:
    """Files by their form."""
    factors = factors_of(applied)
    forms = {"kohya": kohya(factors, {}), "diffusers": peft(factors, hidden)}
    paths = {name: out / f"{stem}-{name}.safetensors" for name in forms}
    for name, tensors in forms.items():
        write_lora(paths[name], tensors, "bf16", {"flux_quant.example": "train_lora"}, force=True)
    return paths


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference of pictures in 0-1."""
    return float((a - b).square().mean().sqrt())


def sheet(rows: list[Tensor], path: Path) -> None:
    wide = torch.cat([torch.cat([*row], dim=2) for row in rows], dim=1)
    to_images(wide[None])[0].save(path)


def keep(row: Row, folder: Path = RESULTS) -> Path:
    """The row in the day's file of this machine, in the place of one of the same case."""
    machine = fingerprint()
    path = result_path("train_lora", folder, str(machine["date"])[:10])
    row.rerun = places.command(sys.argv[1:], ("python", "examples/train_lora.py"))
    run = Run("train_lora", row.rerun, now(), models.weights_of(Asked()), machine)
    if path.exists():
        run.rows = read_run(path).rows
    put(run.rows, row)
    write_run(run, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="q8_0")
    parser.add_argument("--out", type=Path, default=Path("build/cyanotype"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=84)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    device, _ = choose_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    components, begin = find_components(BUNDLED), time.perf_counter()
    packed = options.out / f"base-{options.format}.gguf"
    run(make_plan(Conversion(components.transformer, packed, options.format, force=True)))
    model = load_flux(packed).to(device)
    data = make_data(model, components, requests_for(NAMES, options.pictures, 12))
    tests = requests_for(TESTED, 2 * len(TESTED), 12)
    plain = draw(model, components, tests)[1]
    drawn = time.perf_counter() - begin
    print(f"{len(data.latents)} pictures drawn and recoloured after {drawn:.0f} s")
    applied, losses = train(model, data, options.steps, options.rank, options.batch)
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    trained = time.perf_counter() - begin
    print(f"loss {first:.3f} -> {last:.3f} after {trained:.0f} s")
    paths = save(applied, model.config.hidden, options.out, f"cyanotype-{options.format}")
    wanted = cyanotype(plain)
    values = {"loss_first": first, "loss_last": last, "tested": len(tests), "rms_without": distance(plain, wanted)}
    for form, path in paths.items():
        remove_(model)
        apply_(model, [(read_lora(path, shapes_in(model)), 1.0)])
        learned = draw(model, components, tests)[1]
        values[f"rms_with_{form}"] = distance(learned, wanted)
        print(f"{path}: {values[f'rms_with_{form}']:.3f} from what is wanted, without it {values['rms_without']:.3f}")
    sheet([plain, learned, wanted], options.out / f"cyanotype-{options.format}.png")
    if options.save:
        what = {name: getattr(options, name) for name in ("format", "rank", "steps", "pictures", "batch")}
        what |= {} if device.type == "cpu" else {"device": str(device)}
        samples = {
            "seconds": [time.perf_counter() - begin],
            "drawing_seconds": [drawn],
            "training_seconds": [trained - drawn],
        }
        print(f"wrote {keep(Row(what, samples=samples, values=values))}")


if __name__ == "__main__":
    main()
