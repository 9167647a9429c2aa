"""The transformer under other offloaders, and under ours: what `offloaders` measures, each in a process of its own."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flux_quant.arch import FluxConfig
from flux_quant.benchmarks.journal import Row
from flux_quant.benchmarks.random_weights import DEV, DOUBLE, SINGLE, random_parts, write_random
from flux_quant.benchmarks.stage import Stage
from flux_quant.benchmarks.step import SMALL
from flux_quant.formats import FORMATS
from flux_quant.loading import load_flux
from flux_quant.model import Flux
from flux_quant.modulation import Call, HoistedModulation
from flux_quant.runtime import Whole, prepare

CAPS = ("4GB", "6GB", "8GB", "12GB", "16GB", None)
SIZES = (1024, 512)
FULL, REDUCED = (DOUBLE, SINGLE), (4, 8)  # blocks; the latter of the GGUF file
FEWER = ((10, 19), (5, 10))  # of dense transformers, where all blocks take too long
SMALLEST = (1, 2)
ATTACHING = 35.0  # seconds that making and pinning the weights may take
SAMPLE, PIECES = (1024, 16384), 16  # a weight that is made and pinned so many times to see how long all of them take
PINNED = 2  # bytes that are pinned for one of a weight, at most: sizes of pinned memory are powers of two
GGUF_FORMAT = "q8_0"

Step = Callable[[tuple], object]  # of the arguments of `step.inputs`


@dataclass(frozen=True)
class Way:
    """make: (stage, which transformer, folder for files) -> a step of it"""

    make: Callable[[Stage, "Dense", Path], Step]
    caps: tuple[str | None, ...] = CAPS
    gguf: bool = False
    sizes: tuple[int, ...] = SIZES
    library: str = "diffusers"  # on top of diffusers and accelerate


@dataclass(frozen=True)
class Dense:
    """Which transformer is made, where it is not read from a file."""

    small: bool
    blocks: tuple[int, int]

    @property
    def config(self) -> FluxConfig:
        return config_of(SMALL if self.small else DEV, self.blocks)


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


def dense(asked: Dense) -> nn.Module:
    """diffusers' transformer on the CPU, in BF16. Every thread touches its own pages: new ones are what takes time."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**diffusers_config(asked.config)).eval().requires_grad_(False)
    assert not any(True for _ in model.buffers()), "its buffers have no values"

    def fill(layer: nn.Module, name: str, seed: int) -> None:
        shape = tuple(getattr(layer, name).shape)
        value = matrix(shape, seed) if len(shape) == 2 else torch.ones(shape, dtype=torch.bfloat16)
        setattr(layer, name, nn.Parameter(value, requires_grad=False))

    layers = [(layer, name) for layer in model.modules() for name, _ in layer.named_parameters(recurse=False)]
    with one_thread_each(), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: fill(*job[1], job[0]), enumerate(layers)))
    return model


def matrix(shape: tuple[int, int], seed: int) -> torch.Tensor:
    (value,) = random_parts(FORMATS["bf16"], shape, torch.device("cpu"), seed)
    return value


@contextmanager
def one_thread_each() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def affordable(stage: Stage, small: bool) -> Dense:
    """All blocks, or as many as are made and pinned in ATTACHING seconds at the rate of a sample."""
    if small or not stage.is_cuda:
        return Dense(small, SMALLEST if small else FULL)
    with one_thread_each(), ThreadPoolExecutor(os.cpu_count()) as pool:
        matrix(SAMPLE, 0)  # makes the rows that all repeat
        start = time.perf_counter()
        sample = list(pool.map(lambda seed: matrix(SAMPLE, seed), range(PIECES)))
    made = time.perf_counter() - start
    start = time.perf_counter()
    for piece in sample:
        piece.pin_memory()
    each = (made + PINNED * (time.perf_counter() - start)) / sum(piece.nbytes for piece in sample)
    for blocks in (FULL, *FEWER):
        asked = Dense(small, blocks)
        if each * nbytes_of(asked.config) <= ATTACHING:
            break
    print(f"{1 / each / 1e9:.2f} GB/s to make and pin weights: {blocks[0]} + {blocks[1]} blocks", flush=True)
    return asked


def nbytes_of(config: FluxConfig) -> int:
    """In BF16."""
    with torch.device("meta"):
        return 2 * sum(parameter.numel() for parameter in Flux(config).parameters())


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


def resident(stage: Stage, asked: Dense, folder: Path) -> Step:
    return call_of(dense(asked).to(stage.place))


def sequential(stage: Stage, asked: Dense, folder: Path) -> Step:
    from accelerate import cpu_offload

    model = dense(asked)
    cpu_offload(model, execution_device=stage.place)
    return call_of(model)


def groups(kind: str) -> Callable[[Stage, Dense, Path], Step]:
    def make(stage: Stage, asked: Dense, folder: Path) -> Step:
        return call_of(in_groups(dense(asked), stage, kind))

    return make


def profiled(stage: Stage, asked: Dense, folder: Path) -> Step:
    """mmgp's second profile, much RAM and little VRAM: all weights pinned, 1.2 GB of them on the device at a time."""
    from mmgp import offload

    kind = offload.profile_type.HighRAM_LowVRAM
    model = dense(asked)
    offload.profile({"transformer": model}, profile_no=kind, quantizeTransformer=False, verboseLevel=0)
    torch.set_default_device("cpu")  # it leaves CUDA there
    return call_of(model)


def in_groups(model: nn.Module, stage: Stage, kind: str) -> nn.Module:
    """With a stream, and without the host waiting for each group: `record_stream`."""
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        onload_device=stage.place,
        offload_device=torch.device("cpu"),
        offload_type=kind,
        use_stream=stage.is_cuda,
        record_stream=stage.is_cuda,
        **blocks,
    )
    return model


def write_gguf(path: Path, small: bool) -> FluxConfig:
    """The engine's tensors with random values, names as in BFL's files; diffusers takes FLUX.1's width alone.

    The first way that needs it writes it, the others find it.
    """
    config = config_of(DEV, (1, 1) if small else REDUCED)
    if not path.exists():
        write_random(path, config, GGUF_FORMAT)
    return config


def theirs_from_gguf(stage: Stage, asked: Dense, folder: Path) -> nn.Module:
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    path = folder / "flux-random.gguf"
    config = write_gguf(path, asked.small)
    with torch.device("meta"):
        FluxTransformer2DModel(**diffusers_config(config)).save_config(folder)
    return FluxTransformer2DModel.from_single_file(
        str(path),
        config=str(folder),
        quantization_config=GGUFQuantizationConfig(compute_dtype=stage.dtype),
        torch_dtype=stage.dtype,
    )


def gguf_resident(stage: Stage, asked: Dense, folder: Path) -> Step:
    return call_of(theirs_from_gguf(stage, asked, folder).to(stage.place))


def gguf_in_groups(stage: Stage, asked: Dense, folder: Path) -> Step:
    return call_of(in_groups(theirs_from_gguf(stage, asked, folder), stage, "leaf_level"))


def ours_resident(stage: Stage, asked: Dense, folder: Path) -> Step:
    """Our engine on the same file, its modulation evaluated before."""
    path = folder / "flux-random.gguf"
    write_gguf(path, asked.small)
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


WAYS = {  # the more telling ones first
    "diffusers group offloading, leaf": Way(groups("leaf_level")),
    "diffusers group offloading, block": Way(groups("block_level")),
    "diffusers GGUF resident": Way(gguf_resident, gguf=True, library="gguf"),
    "flux_quant GGUF resident": Way(ours_resident, gguf=True, library=""),
    "mmgp profile": Way(profiled, library="mmgp"),
    "accelerate cpu_offload": Way(sequential, sizes=SIZES[:1]),  # waits for every copy: as long whatever the size
    "diffusers resident": Way(resident, (None,)),
    "diffusers GGUF in groups, leaf": Way(gguf_in_groups, gguf=True, library="gguf"),
}
