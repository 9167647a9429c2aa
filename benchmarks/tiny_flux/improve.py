"""Train what is shipped of the tiny model further, on a GPU and unattended; the shipped files stay as they are.

    python -I -m flux_quant.benchmarks.tiny_flux.improve --minutes 8 --out build/improved [--only model,turbo]

In that time, all told: the autoencoder's decoder, the model, its Turbo LoRA and its ControlNet for inpainting go on
from the shipped files. Each candidate is compared with what is shipped on captions of its own, never those of the
committed evaluation, and what comes after it works with the better one. OUT gets

    candidate/         a model folder as it ships, of what was trained, better or not
    net.safetensors    the ControlNet in bfloat16
    training.json      the machine, steps, losses, figures before and after, verdicts
    pieces/            all this as parts of one tar below 16 MiB: cat candidate.tar.* | tar x

and is complete after each part, whenever the run ends. README.md says how a candidate is taken over.
"""

import argparse
import json
import os
import sys
import tarfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

# Processes that help with drawing import this module: what is heavy is imported below.

PARTS = {"decoder": 0.15, "model": 0.4, "turbo": 0.2, "inpainting": 0.25}  # in this order; shares of the time
ENCODING = 0.12  # of the time, at most: latents of all scenes
LAST = 4.0  # seconds for writing
GRACE = 10.0  # seconds after its time, after which a run that hangs is ended
GRACE_SMALL = 400.0  # of --small, which takes its few steps on any processor, a busy one too
PIECE = 15 << 20  # bytes
SMALL_SECONDS = 20.0  # of --small, where every part takes some steps whatever the clock says
SEED = 20261122


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--seconds", type=float, help="the same in seconds")
    parser.add_argument("--out", type=Path, default=Path("build/improved"))
    parser.add_argument("--only", help=f"some of {', '.join(PARTS)}, with commas between them")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf; also by FLUX_QUANT_EMOJI_FONT")
    parser.add_argument("--workers", type=int, help="processes that draw; by default as many as cores, at most 16")
    parser.add_argument("--small", action="store_true", help="a few steps of a few emoji, about a minute")
    parser.add_argument("--save", action="store_true", help="keep the figures in benchmarks/results, too")
    args = parser.parse_args(arguments)
    args.parts = [name for name in args.only.split(",") if name] if args.only else list(PARTS)
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]}; choose from {', '.join(PARTS)}")
    args.seconds = args.seconds or (SMALL_SECONDS if args.small else 60 * args.minutes)
    return args


def run(args: argparse.Namespace, begin: float) -> dict[str, object]:
    """All parts, each reported when it is done -> the figures. begin: of the time, by `time.monotonic`."""
    import torch

    from flux_quant.benchmarks.machine import fingerprint, write_result
    from flux_quant.benchmarks.tiny_flux.improving.decoder import improve_decoder
    from flux_quant.benchmarks.tiny_flux.improving.inpainting import improve_inpainting
    from flux_quant.benchmarks.tiny_flux.improving.model import improve_model
    from flux_quant.benchmarks.tiny_flux.improving.steps import Deadline
    from flux_quant.benchmarks.tiny_flux.improving.turbo import improve_turbo
    from flux_quant.benchmarks.tiny_flux.improving.workshop import CPU, GPU, SMALL, encode_latents, open_workshop
    from flux_quant.generation import choose_device

    works = dict(decoder=improve_decoder, model=improve_model, turbo=improve_turbo, inpainting=improve_inpainting)
    deadline = Deadline(args.seconds - (time.monotonic() - begin))
    device, _ = choose_device(args.device)
    if args.small:
        torch.set_num_threads(1)  # more wait for each other where somebody else works
    torch.manual_seed(SEED)
    torch.set_flush_denormal(True)
    args.out.mkdir(parents=True, exist_ok=True)
    sizes = SMALL if args.small else GPU if device.type == "cuda" else CPU
    machine = fingerprint()
    figures: dict[str, object] = dict(device=device.type, sizes=vars(sizes), seconds={}, parts={})

    def report() -> None:
        figures["seconds"]["all"] = round(time.monotonic() - begin, 1)
        (args.out / "training.json").write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")
        write_pieces(args.out)
        if args.save:
            write_result("training", figures, machine=machine)

    figures["seconds"]["imports"] = round(time.monotonic() - begin, 1)
    shop = open_workshop(args.font, args.out, device, sizes, args.workers)
    figures["seconds"]["sprites and captions"] = round(deadline.spent, 1)
    encode_latents(shop, deadline.within(ENCODING * deadline.left))
    figures["seconds"]["until latents"] = round(deadline.spent, 1)
    figures["scenes"] = len(shop.catalogue)
    chosen = [name for name in PARTS if name in args.parts]
    for i, name in enumerate(chosen):
        share = PARTS[name] / sum(PARTS[later] for later in chosen[i:])
        here = deadline.within(share * (deadline.left - LAST))
        print(f"--- {name}, {max(here.seconds, 0):.0f} s", file=sys.stderr, flush=True)
        figures["parts"][name] = attempted(lambda name=name, here=here: works[name](shop, here))
        figures["parts"][name]["seconds_in_all"] = round(here.spent, 1)
        print(f"--- {name}: {figures['parts'][name]['verdict']}", file=sys.stderr, flush=True)
        report()
    return figures


def attempted(work: Callable[[], dict[str, object]]) -> dict[str, object]:
    """A part that fails must not take the others with it."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        return dict(verdict="failed", error=f"{type(error).__name__}: {error}"[:1000])


def write_pieces(out: Path) -> list[Path]:
    """Everything that is to be kept of OUT, as one tar in parts."""
    folder, whole = out / "pieces", BytesIO()
    folder.mkdir(exist_ok=True)
    for old in folder.glob("candidate.tar.*"):
        old.unlink()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for name in ("training.json", "net.safetensors", "candidate"):
            if (out / name).exists():
                tar.add(out / name, name)
    data, paths = whole.getvalue(), []
    for i, start in enumerate(range(0, len(data), PIECE)):
        paths.append(folder / f"candidate.tar.{i:02d}")
        paths[-1].write_bytes(data[start : start + PIECE])
    return paths


def watch(seconds: float) -> None:
    """Ends this process after so many seconds, whatever it is doing: what is in OUT was complete after each part."""

    def end() -> None:
        print(f"ended after {seconds:.0f} s: a part takes longer than it may", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def main(arguments: Sequence[str] | None = None) -> int:
    begin, args = time.monotonic(), parsed(arguments)
    args.workers = args.workers or (1 if args.small else min(16, os.cpu_count() or 1))
    watch(args.seconds + (GRACE_SMALL if args.small else GRACE))
    from flux_quant.benchmarks.tiny_flux.emoji import font_file
    from flux_quant.components import BUNDLED
    from flux_quant.errors import UserError

    try:
        if args.out.resolve().is_relative_to(BUNDLED.resolve()):
            raise UserError(f"{args.out} belongs to the shipped files; give another folder")
        font = args.font or font_file()
        if not font.is_file() and args.small and args.font is None:
            print(f"training is not tried: {font} is missing (Debian: fonts-noto-color-emoji)", file=sys.stderr)
            return 0
        if not font.is_file():
            raise UserError(f"{font} is missing (Debian: fonts-noto-color-emoji); give its place with --font")
        figures = run(args, begin)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"{error}: training needs fonttools, and Python 3.11 or newer", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=1))
    return 1 if any(part["verdict"] == "failed" for part in figures["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
