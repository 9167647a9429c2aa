"""How well does the bundled model paint in? With the files as they ship, and `pipeline.generate` as users run it.

    python -m flux_quant.benchmarks.tiny_flux.evaluate_inpainting --reference build/tiny/inpainting/net.safetensors

Two tasks: an emoji is exchanged for another (a mask over all of it, a caption of the other), and a part of a picture
is restored (a half, a quarter or a strip, its own caption). Each with the shipped net, with the net and the Turbo LoRA
in 8 steps, and without a net. What is kept is put back after each step, as `flux-quant inpaint` does it, but where it
says "alone". Updates benchmarks/results/tiny_inpainting.json; `--reference` compares the shipped net with its weights
in bfloat16, `--ways` evaluates some ways only.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux_quant.benchmarks.tiny_flux.emoji import OFFSETS, POSITIONS, SIZE, WIDTHS, EmojiWorld, Scene
from flux_quant.benchmarks.tiny_flux.evaluate import exact_device
from flux_quant.benchmarks.tiny_flux.inpainting import masked_psnr
from flux_quant.benchmarks.tiny_flux.judge import Request as Asked
from flux_quant.benchmarks.tiny_flux.judge import nearest
from flux_quant.benchmarks.tiny_flux.masks import bounding_box, box, half, quarter, strip
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing.request import ControlRequest, Request
from flux_quant.generation import generate

NET = BUNDLED / "controlnet" / "inpainting-Q6_K.gguf"
TURBO = BUNDLED / "loras" / "turbo.safetensors"
PARTS = {"half": half, "quarter": quarter, "strip": strip}
SWAPS = (  # what the captions of exchanged emoji ask for
    Asked("large", None, "white"),
    Asked("large", None, "blue"),
    Asked("small", "in the centre", "green"),
    Asked("small", "on the left", "orange"),
)
MARGIN = 4  # pixels around an emoji that is exchanged
SHOWN, HIDDEN = 0.25, 0.15  # of the emoji's pixels, at least, where a part is restored


@dataclass(frozen=True)
class Way:
    """How a picture is painted in."""

    steps: int = 20
    net: Path | None = NET
    lora: Path | None = None
    put_back: bool = True  # after each step; without it a net draws all of the picture
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    before: Scene
    mask: np.ndarray  # (96, 96) bool
    caption: str
    seed: int
    wanted: Scene  # what the caption describes


def uint8(world: EmojiWorld, scene: Scene) -> np.ndarray:
    return (world.render(scene) * 255).round().astype(np.uint8)


def painted(world: EmojiWorld, case: Case, way: Way, folder: Path) -> np.ndarray:
    """(96, 96, 3) uint8."""
    given, mask = folder / "given.png", folder / "mask.png"
    Image.fromarray(uint8(world, case.before)).save(given)
    Image.fromarray(case.mask.astype(np.uint8) * 255).save(mask)
    request = Request(
        case.caption,
        steps=way.steps,
        seed=case.seed,
        size=(SIZE, SIZE),
        image=given,
        mask=mask,
        strength=1.0 if way.put_back else None,
        controls=() if way.net is None else (ControlRequest(way.net),),
        loras=() if way.lora is None else ((way.lora, 1.0),),
    )
    return np.asarray(generate(find_components(BUNDLED), request, way.device).image)


def painted_all(world: EmojiWorld, cases: Sequence[Case], way: Way) -> np.ndarray:
    """(n, 96, 96, 3) uint8."""
    with tempfile.TemporaryDirectory() as folder:
        return np.stack([painted(world, case, way, Path(folder)) for case in cases])


def tensor(pictures: np.ndarray) -> Tensor:
    """(n, 3, 96, 96) in 0-1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def place(size: str, position: str) -> np.ndarray:
    """The square in which emoji of that size lie, and a margin."""
    reach, (dx, dy) = WIDTHS[size] // 2 + MARGIN, OFFSETS[position]
    x, y = SIZE // 2 + dx, SIZE // 2 + dy
    return box(max(0, x - reach), max(0, y - reach), min(SIZE - 1, x + reach), min(SIZE - 1, y + reach))


def swap_cases(world: EmojiWorld, count: int, seed: int) -> list[Case]:
    """`count` for each of SWAPS. The square at an emoji's place is drawn anew; combinations that were trained."""
    rng, cases = np.random.default_rng(seed), []
    for asked in SWAPS:
        position = asked.position or POSITIONS[0]
        scenes = (Scene(int(e), asked.size, position, asked.colour, False, 0) for e in rng.permutation(len(world)))
        allowed = [scene for scene in scenes if not world.held_out(scene)][: 2 * count]
        for old, new in zip(allowed[:count], allowed[count:], strict=True):
            mask = place(asked.size, position) | box(*bounding_box(world, old, MARGIN))
            cases.append(Case(old, mask, world.caption(new), seed + len(cases), new))
    return cases


def part_cases(world: EmojiWorld, count: int, seed: int, named: bool = True) -> list[Case]:
    """`count` of each kind of part; some of the emoji is hidden and some of it shown.

    named: size, place and background stand in the caption beside the emoji, and not only in what is shown.
    """
    rng, cases = np.random.default_rng(seed), []
    for part in PARTS.values():
        wanted = len(cases) + count
        while len(cases) < wanted:
            scene = world.sample(rng)
            mask, inked = part(rng, world, scene), world.coverage(scene)[..., 3] > 0.5
            if HIDDEN <= mask[inked].mean() <= 1 - SHOWN:
                cases.append(Case(scene, mask, world.caption(scene, named, named, named), seed + len(cases), scene))
    return cases


def kept(world: EmojiWorld, cases: Sequence[Case], found: np.ndarray) -> float:
    """The share of pixels outside of the masks that are those of the given pictures, bit for bit."""
    same = [(p == uint8(world, case.before)).all(axis=2)[~case.mask] for case, p in zip(cases, found, strict=True)]
    return float(np.concatenate(same).mean())


def exchanged(world: EmojiWorld, cases: Sequence[Case], found: np.ndarray) -> float:
    """The share of pictures whose nearest emoji is that of the caption."""
    right = 0
    for asked in SWAPS:
        here = [
            i for i, case in enumerate(cases) if (case.wanted.size, case.wanted.colour) == (asked.size, asked.colour)
        ]
        verdict = nearest(world, tensor(found[here]), asked)
        right += int((verdict.emoji == torch.tensor([cases[i].wanted.emoji for i in here])).sum())
    return right / len(cases)


def seam(pictures: np.ndarray, masks: np.ndarray) -> float:
    """Mean absolute step, 0-1, from pixels inside a mask to their neighbours outside."""
    steps = []
    for axis in (1, 2):
        across = np.diff(masks, axis=axis)
        steps.append(np.abs(np.diff(pictures.astype(np.float32) / 255, axis=axis)).mean(axis=3)[across])
    return float(np.concatenate(steps).mean())


def restored(world: EmojiWorld, cases: Sequence[Case], found: np.ndarray) -> dict[str, object]:
    """PSNR in the masks to the given pictures, in all and by kind of part; the steps across the masks' borders."""
    wanted, masks = np.stack([uint8(world, case.before) for case in cases]), np.stack([case.mask for case in cases])
    values = masked_psnr(tensor(found), tensor(wanted), torch.from_numpy(masks)[:, None].float()).numpy()
    each = len(cases) // len(PARTS)
    by_part = {name: float(values[i * each : (i + 1) * each].mean()) for i, name in enumerate(PARTS)}
    return dict(psnr=float(values.mean()), **by_part, seam=seam(found, masks))


def ways(lora: Path | None, reference: Path | None) -> dict[str, Way]:
    """Those of which the files are there."""
    found = {
        "no net, 20 steps": Way(net=None),
        "net, 20 steps": Way(),
        "net, 28 steps": Way(28),
        "net, 8 steps": Way(8),
        "net alone, 20 steps": Way(put_back=False),
    }
    if lora is not None:
        found["net and turbo, 8 steps"] = Way(8, lora=lora)
    if reference is not None:
        found["net in bfloat16, 20 steps"] = Way(net=reference)
    return found


def evaluate(world: EmojiWorld, count: int, way: Way) -> dict[str, object]:
    swaps, parts = swap_cases(world, count // len(SWAPS), 31337), part_cases(world, count // len(PARTS), 271828)
    short = part_cases(world, count // len(PARTS), 161803, named=False)
    changed, found, guessed = (painted_all(world, cases, way) for cases in (swaps, parts, short))
    return dict(
        pictures=len(swaps) + len(parts) + len(short),
        kept=min(kept(world, *pair) for pair in ((swaps, changed), (parts, found), (short, guessed))),
        exchanged=exchanged(world, swaps, changed),
        restored=restored(world, parts, found),
        restored_emoji_named_only=restored(world, short, guessed),
    )


def shipped_to_reference(world: EmojiWorld, count: int, reference: Path, device: torch.device) -> dict[str, float]:
    """PSNR between what the shipped net and its weights in bfloat16 paint, in the masks."""
    cases = part_cases(world, count // len(PARTS), 271828)
    masks = torch.from_numpy(np.stack([case.mask for case in cases]))[:, None].float()
    pair = (tensor(painted_all(world, cases, way)) for way in (Way(device=device), Way(net=reference, device=device)))
    values = masked_psnr(*pair, masks)
    return dict(pictures=len(cases), psnr=float(values.mean()), worst=float(values.min()))


def table(figures: dict) -> str:
    """For docs/controlnet.md."""
    rows = [
        "| way | right emoji | part restored | half | quarter | strip | emoji named only | seam |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, way in figures["ways"].items():
        full, short = way["restored"], way["restored_emoji_named_only"]
        psnrs = (f"{value:.1f} dB" for value in (*(full[k] for k in ("psnr", *PARTS)), short["psnr"]))
        rows.append("| " + " | ".join([name, f"{way['exchanged']:.0%}", *psnrs, f"{full['seam']:.3f}"]) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=24, help="pictures per task and way")
    parser.add_argument("--ways", nargs="*", help="names of some; the figures of others stay as they are")
    parser.add_argument("--lora", type=Path, default=TURBO, help="left out if there is no such file")
    parser.add_argument("--reference", type=Path, help="the net's weights in bfloat16")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    lora = args.lora if args.lora.is_file() else None
    world, path = EmojiWorld(), args.out / "tiny_inpainting.json"
    device = exact_device(args.device)
    asked = {name: replace(way, device=device) for name, way in ways(lora, args.reference).items()}
    found: dict[str, object] = {}
    for name in args.ways or asked:
        found[name] = evaluate(world, args.count, asked[name])
        print(name, found[name], flush=True)
    parts = part_cases(world, args.count // len(PARTS), 271828)
    originals = np.stack([uint8(world, case.before) for case in parts]), np.stack([case.mask for case in parts])
    figures = json.loads(path.read_text()) if path.is_file() else dict(guidance=3.5, ways={})
    figures["ways"] = {name: (figures["ways"] | found)[name] for name in asked if name in figures["ways"] | found}
    figures["net"] = dict(file=NET.name, bytes=NET.stat().st_size)
    figures["seam_of_the_originals"] = seam(*originals)
    if args.reference:
        figures["shipped_to_bfloat16"] = shipped_to_reference(world, args.count, args.reference, device)
    figures["versions"] = dict(torch=torch.__version__, python=platform.python_version(), device=device.type)
    path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
