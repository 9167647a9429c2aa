"""What comes before and after the transformer, in less memory than the device has: T5-XXL streamed, the VAE in tiles.

T5-XXL is a file of full size with random weights in a temporary folder (4.9 GB), opened, streamed through two slots
and dropped as `generate` does it; once with all its blocks pinned, once through the staging thread from where the file
lies in memory. The VAE has FLUX.1's configuration and random weights. Rows for `streaming`.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import nn

from flux_quant.benchmarks.journal import Journal, Row
from flux_quant.benchmarks.stage import Stage, ram
from flux_quant.benchmarks.text_memory import make
from flux_quant.configs import vae_config
from flux_quant.converters.component import open_component
from flux_quant.drawing import vae
from flux_quant.loading import open_t5
from flux_quant.planner.footprint import TextEncoder
from flux_quant.runtime import Memory
from flux_quant.text.encoders import Placement, t5_states

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BUNDLED_T5 = Path(__file__).parents[1] / "flux_quant/tiny_flux/text_encoders/t5.safetensors"
WORDS, T5_FORMAT, T5_BUDGET = 512, "q8_0", "4GB"
MAKING_T5, ENCODING, DECODING = 60.0, 15.0, 6.0  # seconds that have to be left
STAGED = 0  # bytes to pin: the staging thread's two buffers come on top

PICTURES = ((1024, 1024), (1920, 1072))
VAE_BUDGETS = ("4GB", "6GB", "8GB", "12GB", None)
WIDTHS, SMALL_WIDTHS = (128, 256, 512, 512), (32, 32, 64, 64)


def measure(journal: Journal, stage: Stage, small: bool) -> None:
    measure_vae(journal, stage, small)
    what = {"what": "t5", "format": T5_FORMAT, "words": WORDS, "vram": T5_BUDGET}
    with TemporaryDirectory(prefix="flux-quant-t5-") as folder:
        path = BUNDLED_T5 if small else Path(folder) / f"t5xxl-random-{T5_FORMAT}.gguf"
        if not small and journal.row({"what": "t5 file"}, lambda: {"bytes": make(path, T5_FORMAT)}, MAKING_T5) is None:
            return
        for name, pinned in (("pinned", int(1e15)), ("staged", STAGED)):
            needs = 0.0 if small else ENCODING
            journal.row(what | {"host": name}, lambda pinned=pinned: t5_row(path, stage, pinned), needs)


@dataclass
class Attached:
    """Streams the blocks of an encoder, and takes the times: until they are attached, of the passes, of detaching."""

    memory: Memory
    stage: Stage

    @contextmanager
    def __call__(self, blocks: nn.ModuleList, device: object) -> Iterator[None]:
        start = time.perf_counter()
        with self.memory.streaming(blocks):
            attached = time.perf_counter()
            self.ram = ram()
            yield
            self.stage.link.finish()
            passed = time.perf_counter()
        end = time.perf_counter()
        self.seconds = {"attach": attached - start, "pass": passed - attached, "detach": end - passed}


def t5_row(path: Path, stage: Stage, pinned: int) -> Row:
    """Two encodings of one prompt, each with its own opening, as two pictures of different prompts would have them."""
    memory = replace(stage.memory(T5_BUDGET), ram_budget=pinned)
    model, reader = open_t5(path)
    with reader:
        encoder = TextEncoder.of({name: (info.shape, info.format) for name, info in reader.tensors.items()})
        vocabulary = model.shared.num_embeddings
    del model
    ids = torch.randint(vocabulary, (1, WORDS), generator=torch.Generator().manual_seed(0))
    samples, before = [], ram()
    with stage.capped(memory):
        for _ in range(2):
            attach = Attached(memory, stage)
            placement = Placement(stage.place, "mixed" if stage.is_cuda else "float32", attach=attach)
            start = time.perf_counter()
            states = t5_states(path, ids, placement)
            samples.append({"total": time.perf_counter() - start} | attach.seconds)
            assert states.isfinite().all(), "T5's features are not finite"
        held = stage.held()
    copies = encoder.nbytes / stage.rate(None)
    found = {"bytes": encoder.nbytes, "copies": copies, "seconds": samples[-1], "samples": samples}
    grown = {} if before is None else {"ram_while_attached": attach.ram - before}
    return found | {"pass_over_copies": samples[-1]["pass"] / copies, "budget": memory.budget.nbytes} | grown | held


# --- VAE --------------------------------------------------------------------------------------------------------------


@cache
def random_vae(small: bool) -> "AutoencoderKL":
    """FLUX.1's, or one of a quarter of its width; on the CPU."""
    from diffusers import AutoencoderKL

    config = vae_config_of(SMALL_WIDTHS if small else WIDTHS)
    return AutoencoderKL(**config).eval().requires_grad_(False)


def vae_config_of(widths: tuple[int, ...]) -> dict[str, object]:
    """The bundled VAE's configuration at other widths; FLUX.1's norms have 32 groups."""
    bundled = BUNDLED_T5.parents[1] / "vae/ae.safetensors"
    with open_component(bundled, "VAE") as reader:
        config = vae_config({name: info.shape for name, info in reader.tensors.items()})
    levels = len(widths)
    return config | dict(
        block_out_channels=widths,
        norm_num_groups=widths[0] // 4,
        layers_per_block=2,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )


def measure_vae(journal: Journal, stage: Stage, small: bool) -> None:
    for size in ((128, 128),) if small else PICTURES:
        for vram in VAE_BUDGETS[:1] if small else VAE_BUDGETS:
            what = {"what": "vae", "width": size[0], "height": size[1], "vram": vram}
            journal.row(what, lambda size=size, vram=vram: vae_row(stage, size, vram, small), 0 if small else DECODING)


def vae_row(stage: Stage, size: tuple[int, int], vram: str | None, small: bool) -> Row:
    """Two decodings. `estimate` is what the tiles were chosen by, `maps` what was taken beside the weights."""
    memory, samples = stage.memory(vram), []
    latents = torch.randn(1, 16, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(0))
    with stage.capped(memory), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = nn.Module.to(deepcopy(random_vae(small)), stage.place, vae.vae_dtype(stage.place, stage.dtype))
        weights = sum(parameter.nbytes for parameter in model.parameters())
        needs = vae.estimate(model, vae.DECODE)
        room = memory.free
        for _ in range(2):
            start = time.perf_counter()
            picture = vae.decode(model, latents, room)
            samples.append(time.perf_counter() - start)
        held = stage.held()
        tiles = vae.tiles_that_fit(*latents.shape[-2:], room * (1 - vae.RESERVE), needs)
    assert picture.shape[-2:] == size[::-1]
    maps = {"maps": held["peak_allocated"] - weights} if held else {}
    return {
        "seconds": samples[-1],
        "samples": samples,
        "tiles": str(tiles),
        "estimate": needs.nbytes(tiles.height, tiles.width) if tiles else None,
        "weights": weights,
        "said": [str(warning.message) for warning in said if "VAE" in str(warning.message)],
        "budget": memory.budget.nbytes,
        **maps,
        **held,
    }
