"""What other offloaders take for the same transformer under the same cap: seconds of a step, memory, RAM.

    python -I -m flux_quant.benchmarks.offloaders [--ways "accelerate cpu_offload"] [--seconds 170] [--small] [--save]

diffusers' FluxTransformer2DModel in BF16 with random weights, under accelerate's `cpu_offload` and diffusers' group
offloading with streams, block by block and layer by layer; and diffusers' GGUF against our engine on one file, which
has fewer blocks so that it is written quickly (rows say how many). None of these plans for a budget: each runs under
the smallest cap that it does not fail under. Ways are processes of their own, so that none inherits pinned memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import nn

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.journal import FAILURES, Journal, Row
from flux_quant.benchmarks.links import CudaLink, HostLink
from flux_quant.benchmarks.machine import package_version
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE, random_parts, write_random
from flux_quant.benchmarks.stage import STAND_IN, NoReadings, Stage, memory_in_use
from flux_quant.benchmarks.step import SMALL, inputs
from flux_quant.benchmarks.streaming import Marks
from flux_quant.formats import FORMATS
from flux_quant.loading import load_flux
from flux_quant.modulation import Call, HoistedModulation
from flux_quant.planner.gpus import GPUS
from flux_quant.runtime import CudaReadings, Whole, prepare
from flux_quant.streaming.memory import linux_memory

CAPS = ("4GB", "6GB", "8GB", "12GB", "16GB", None)
SIZES = (1024, 512)
WORDS = 512
REDUCED = (4, 8)  # blocks of the GGUF file
GGUF_FORMAT = "q8_0"
WARM, FEWEST, MOST, ENOUGH = 2, 2, 5, 4.0  # steps, and seconds of timed ones
STARTING, LONGEST = 20.0, 75.0  # seconds that have to be left for a way, and that one may take

Step = Callable[[tuple], object]  # of the arguments of `step.inputs`


@dataclass(frozen=True)
class Way:
    make: Callable[["Stage", bool, Path], Step]  # (stage, small, folder)
    caps: tuple[str | None, ...] = CAPS
    gguf: bool = False


def config_of(sizes: Row, blocks: tuple[int, int]) -> FluxConfig:
    return FluxConfig(**sizes, double_blocks=blocks[0], single_blocks=blocks[1])


def diffusers_config(config: FluxConfig) -> Row:
    return dict(
        in_channels=config.in_channels,
        num_layers=config.double_blocks,
        num_single_layers=config.single_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context,
        pooled_projection_dim=config.pooled,
        guidance_embeds=config.guidance,
        axes_dims_rope=tuple(config.rope_axes),
    )


def dense(small: bool) -> nn.Module:
    """diffusers' transformer on the CPU, in BF16."""
    from diffusers import FluxTransformer2DModel

    config = config_of(SMALL, (1, 2)) if small else config_of(DEV, (DOUBLE, SINGLE))
    with torch.device("meta"):
        model = FluxTransformer2DModel(**diffusers_config(config)).eval().requires_grad_(False)
    for seed, (path, layer) in enumerate(list(model.named_modules())):
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if parameter.ndim == 2:
                (value,) = random_parts(FORMATS["bf16"], tuple(parameter.shape), torch.device("cpu"), seed)
            else:
                value = torch.ones(parameter.shape, dtype=torch.bfloat16)
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
        assert not any(True for _ in layer.named_buffers(recurse=False)), f"{path} has buffers"
    return model


def call_of(model: nn.Module) -> Step:
    def step(arguments: tuple) -> object:
        img, txt, pooled, timestep, image_places, text_places, guidance = arguments
        return model(
            hidden_states=img,
            encoder_hidden_states=txt,
            pooled_projections=pooled,
            timestep=timestep,
            img_ids=image_places,
            txt_ids=text_places,
            guidance=guidance,
            return_dict=False,
        )[0]

    return step


def resident(stage: Stage, small: bool, folder: Path) -> Step:
    return call_of(dense(small).to(stage.place))


def sequential(stage: Stage, small: bool, folder: Path) -> Step:
    from accelerate import cpu_offload

    model = dense(small)
    cpu_offload(model, execution_device=stage.place)
    return call_of(model)


def groups(kind: str) -> Callable[[Stage, bool, Path], Step]:
    def make(stage: Stage, small: bool, folder: Path) -> Step:
        return call_of(in_groups(dense(small), stage, kind))

    return make


def in_groups(model: nn.Module, stage: Stage, kind: str) -> nn.Module:
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        onload_device=stage.place,
        offload_device=torch.device("cpu"),
        offload_type=kind,
        use_stream=stage.is_cuda,
        **blocks,
    )
    return model


def write_gguf(path: Path, small: bool) -> FluxConfig:
    """The engine's tensors with random values, names as in BFL's files; diffusers takes FLUX.1's width alone."""
    config = config_of(DEV, (1, 1) if small else REDUCED)
    write_random(path, config, GGUF_FORMAT)
    return config


def theirs_from_gguf(stage: Stage, small: bool, folder: Path) -> nn.Module:
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    path = folder / "flux-random.gguf"
    config = write_gguf(path, small)
    with torch.device("meta"):
        FluxTransformer2DModel(**diffusers_config(config)).save_config(folder)
    return FluxTransformer2DModel.from_single_file(
        str(path),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=stage.dtype),
        torch_dtype=stage.dtype,
    )


def gguf_resident(stage: Stage, small: bool, folder: Path) -> Step:
    return call_of(theirs_from_gguf(stage, small, folder).to(stage.place))


def gguf_in_groups(stage: Stage, small: bool, folder: Path) -> Step:
    return call_of(in_groups(theirs_from_gguf(stage, small, folder), stage, "leaf_level"))


def ours_resident(stage: Stage, small: bool, folder: Path) -> Step:
    """Our engine on the same file, its modulation evaluated before."""
    path = folder / "flux-random.gguf"
    write_gguf(path, small)
    model = load_flux(path)
    prepare(model, stage.place, "16-bit")
    whole = Whole(model, stage.place).__enter__()
    modulation, rows = HoistedModulation(whole.model), []

    def step(arguments: tuple) -> object:
        img, txt, pooled, timestep, image_places, text_places, guidance = arguments
        if not rows:
            rows.extend(modulation.rows([Call(timestep, pooled, guidance)], stage.place, stage.dtype))
        return model(img, txt, None, None, image_places, text_places, steering=rows[0])

    return step


WAYS = {
    "diffusers group offloading, leaf": Way(groups("leaf_level")),
    "diffusers group offloading, block": Way(groups("block_level")),
    "diffusers resident": Way(resident, (None,)),
    "accelerate cpu_offload": Way(sequential),
    "diffusers GGUF resident": Way(gguf_resident, gguf=True),
    "flux_quant GGUF resident": Way(ours_resident, gguf=True),
    "diffusers GGUF in groups, leaf": Way(gguf_in_groups, gguf=True),
}


# --- In a process of its own ------------------------------------------------------------------------------------------


def bare_stage() -> Stage:
    """Nothing is measured: others do not plan."""
    machine = GPUS[STAND_IN].machine()
    if not torch.cuda.is_available():
        return Stage(HostLink(), machine, NoReadings(), 0)
    others, link = memory_in_use(), CudaLink()
    free, total = torch.cuda.mem_get_info(link.device)
    return Stage(link, replace(machine, total=total, usable=free), CudaReadings(link.device), others)


def ram_left() -> int:
    return linux_memory().available if sys.platform.startswith("linux") else 0


@torch.no_grad()
def rows_of(way: Way, small: bool, folder: Path) -> Iterator[Row]:
    stage, start, left = bare_stage(), time.perf_counter(), ram_left()
    step = way.make(stage, small, folder)
    seconds = time.perf_counter() - start
    blocks = {"reduced_to": REDUCED} if way.gguf and not small else {}
    common = {"attach_seconds": round(seconds, 2)} | blocks
    config = config_of(SMALL if small and not way.gguf else DEV, REDUCED)
    dtype = stage.dtype if way.gguf else torch.bfloat16
    for size in (64,) if small else SIZES:
        arguments = inputs(config, size, 16 if small else WORDS, stage.place, dtype)
        for vram in way.caps:
            what = {"size": size, "vram": vram} | common
            try:
                yield what | timed(step, arguments, stage, vram) | {"ram": left - ram_left()}
                break
            except torch.OutOfMemoryError:
                yield what | {"why": "out of GPU memory"}
            except FAILURES as error:
                yield what | {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
                break


def timed(step: Step, arguments: tuple, stage: Stage, vram: str | None) -> Row:
    memory = stage.memory(vram)
    with stage.capped(memory) if vram else nullcontext():
        for _ in range(WARM):
            marks = Marks(stage)
            step(arguments)
            marks.add()
            (last,) = marks.seconds()
        marks = Marks(stage)
        for _ in range(max(FEWEST, min(MOST, int(ENOUGH / max(last, 1e-3))))):
            step(arguments)
            marks.add()
        samples = marks.seconds()
        held = stage.held()
    return {"seconds": median(samples), "samples": samples} | held


# --- All of them ------------------------------------------------------------------------------------------------------


def run_way(name: str, journal: Journal, small: bool) -> None:
    arguments = ["--way", name, *(["--small"] if small else [])]
    command = [sys.executable, "-I", "-m", "flux_quant.benchmarks.offloaders", *arguments]
    seconds = max(1.0, min(LONGEST, journal.left))
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds)
        said, problem = done.stdout, last_line(done.stderr) if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        said, problem = error.stdout or b"", f"stopped after {seconds:.0f} s"
    for line in (said or b"").decode(errors="replace").splitlines():
        if line.startswith("{"):
            row = {"way": name} | json.loads(line)
            if "why" in row:
                journal.skip({key: row[key] for key in ("way", "size", "vram")}, row["why"])
            else:
                journal.row(row, dict)
                print(f"{name}, {row['size']} px, {row['vram'] or 'no limit'}: {row['seconds']:.3f} s", flush=True)
    if problem:
        journal.skip({"way": name}, problem)


def last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "ended without a word"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", default=";".join(WAYS), help="names with semicolons between them")
    parser.add_argument("--seconds", type=float, default=170, help="no way is begun that may end later")
    parser.add_argument("--small", action="store_true", help="a small model, on a CPU too: to see that it runs")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        with TemporaryDirectory(prefix="flux-quant-gguf-") as folder:
            for row in rows_of(WAYS[args.way], args.small, Path(folder)):
                print(json.dumps(row), flush=True)
        return 0
    if not torch.cuda.is_available() and not args.small:
        print("offloaders are measured on a CUDA device; --small walks through without one", file=sys.stderr)
        return 1
    versions = {name: package_version(name) for name in ("diffusers", "accelerate", "transformers")}
    journal = Journal("offloaders", args.seconds, args.save, facts={"versions": versions})
    for name in args.ways.split(";"):
        missing = [library for library in ("diffusers", "accelerate") if versions[library] is None]
        if missing and not name.startswith("flux_quant"):
            journal.skip({"way": name}, f"{missing[0]} is not installed")
        elif journal.left < STARTING and not args.small:
            journal.skip({"way": name}, f"{journal.left:.0f} s were left, it needs {STARTING:.0f} s")
        else:
            run_way(name, journal, args.small)
    print(f"{len(journal.rows)} rows, {len(journal.skipped)} left out")
    journal.write()
    if args.save:
        print(f"wrote {journal.path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
