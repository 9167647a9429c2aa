"""Latents become pictures, and pictures latents, in the largest tile that the free memory holds.

At 2 megapixels the decoder is what needs most memory of all phases, and its need grows with the area. If the whole does
not fit, the plane is cut into as few tiles as possible, evenly spread, each overlapping its neighbours by a quarter or
more; over an overlap one tile fades out linearly as the next fades in. What would give tiles away is GroupNorm, whose
statistics are of all it sees: a first pass over all tiles gathers those of the whole plane, a second one uses them. Few
large tiles still differ less than many small ones. A tile that fails for want of memory is tried again smaller.

Letters: B pictures, h x w positions of the latent, H x W pixels, 8 to a position in each direction.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_quant.arch import LATENT_SCALE, LATENT_SHIFT
from flux_quant.errors import UserError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

SMALLEST = 16  # positions of a tile's side: 128 pixels; smaller ones show
MOST_TILES = 64  # in a direction
OVERLAP = 4  # a tile overlaps its neighbour by at least one part in so many
RESERVE = 0.1  # of the free memory is left free: what the driver and fragments take
BASE_WIDTH = 128  # channels of FLUX.1's decoder at full resolution, for which the numbers below are

# Working memory per position of the latent and byte of the dtype. Estimates of ComfyUI and Forge (`comfy/sd.py`: decode
# 2178 * 64 h w, encode 1767 H W), not measured here; tests hold them against what the layers of FLUX.1's VAE allocate.
DECODE, ENCODE = 2178 * 64, 1767 * 64


@dataclass(frozen=True)
class Memory:
    """Bytes that a tile of h x w positions takes beside the weights: fixed + per_position h w."""

    per_position: float
    fixed: float = 0.0

    def nbytes(self, height: int, width: int) -> float:
        return self.fixed + self.per_position * height * width

    @classmethod
    def fitted(cls, measured: list[tuple[int, float]]) -> "Memory":
        """Least squares through (positions, bytes) of at least two sizes."""
        positions, nbytes = torch.tensor(measured, dtype=torch.float64).T
        design = torch.stack([positions, torch.ones_like(positions)], dim=1)
        slope, fixed = torch.linalg.lstsq(design, nbytes[:, None]).solution[:, 0].tolist()
        return cls(slope, max(fixed, 0.0))


@dataclass(frozen=True)
class Tiling:
    """`rows` x `columns` tiles of height x width positions."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def begins(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """Where they begin on a plane of that size: from above, and from the left."""
        return places(height, self.height, self.rows), places(width, self.width, self.columns)

    def __str__(self) -> str:
        return f"{self.count} tiles of {8 * self.width} x {8 * self.height} pixels" if self.count > 1 else "one piece"


def tilings(height: int, width: int) -> Iterator[Tiling]:
    """From the whole in one piece to the smallest tiles: fewest first, and of as many the squarest first."""
    found = {}
    for rows, columns in product(range(1, MOST_TILES + 1), repeat=2):
        tile = Tiling(rows, columns, tile_length(height, rows), tile_length(width, columns))
        found.setdefault((tile.height, tile.width), tile)
    return iter(sorted(found.values(), key=lambda t: (t.count, abs(t.height - t.width), t.height * t.width)))


def tile_length(length: int, count: int) -> int:
    """The shortest tile with which `count` cover the length, overlapping by a quarter of it; at least SMALLEST."""
    return max(ceil(length / (1 + (count - 1) * (1 - 1 / OVERLAP))), min(SMALLEST, length))


def places(length: int, tile: int, count: int) -> list[int]:
    """Where `count` tiles begin, evenly spread from 0 to the end."""
    return [round(i * (length - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def tiles_that_fit(height: int, width: int, free: float, memory: Memory) -> Tiling | None:
    """The fewest tiles of which one fits; None where not even the smallest does."""
    return next((t for t in tilings(height, width) if memory.nbytes(t.height, t.width) <= free), None)


def ramps(begin: int, tile: int, others: list[int], unit: int) -> Tensor:
    """(tile * unit,): the weight of a tile along one direction: 1, and falling to its ends where it has neighbours."""
    x = torch.arange(tile * unit, dtype=torch.float32) + 0.5
    weight = torch.ones(tile * unit)
    for other in others:
        overlap = (tile - abs(other - begin)) * unit
        if other < begin and overlap > 0:
            weight = torch.minimum(weight, x / overlap)
        if other > begin and overlap > 0:
            weight = torch.minimum(weight, (tile * unit - x) / overlap)
    return weight


def run_tiled(
    run: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling, x_unit: int, y_unit: int, channels: int
) -> Tensor:
    """run: (B, c, h x_unit, w x_unit) -> (B, channels, h y_unit, w y_unit), tile by tile -> float32 on the CPU."""
    height, width = (side // x_unit for side in x.shape[-2:])
    tops, lefts = tiling.begins(height, width)
    out = torch.zeros(len(x), channels, height * y_unit, width * y_unit)
    total = torch.zeros(height * y_unit, width * y_unit)
    for top, left in product(tops, lefts):
        down = ramps(top, tiling.height, tops, y_unit)
        weight = down[:, None] * ramps(left, tiling.width, lefts, y_unit)
        piece = cut(x, top, left, tiling, x_unit)
        rows, columns = span(top, tiling.height, y_unit), span(left, tiling.width, y_unit)
        out[..., rows, columns] += run(piece).float().cpu() * weight
        total[rows, columns] += weight
    return out / total


def cut(x: Tensor, top: int, left: int, tiling: Tiling, unit: int) -> Tensor:
    return x[..., span(top, tiling.height, unit), span(left, tiling.width, unit)].contiguous()


def span(begin: int, length: int, unit: int) -> slice:
    return slice(begin * unit, (begin + length) * unit)


class PlaneNorm(nn.Module):
    """A GroupNorm for one picture whose statistics are those of the whole plane, though it sees one tile at a time."""

    def __init__(self, inner: nn.GroupNorm) -> None:
        super().__init__()
        self.inner = inner
        self.sums: Tensor | None = None  # (2, 1, groups): of values and of their squares
        self.count = 0
        self.gathering = True

    def forward(self, x: Tensor) -> Tensor:
        """x (1, C, ...). As the inner one while it gathers; then with what was gathered."""
        if self.gathering:
            groups = x.flatten(2).unflatten(1, (self.inner.num_groups, -1)).flatten(2)
            squares = torch.linalg.vector_norm(groups, dim=-1, dtype=torch.float32).square()
            sums = torch.stack([groups.sum(dim=-1, dtype=torch.float32), squares])
            self.sums = sums if self.sums is None else self.sums + sums
            self.count += groups.shape[-1]
            return self.inner(x)
        mean, square = self.sums[:, 0] / self.count
        each = x.shape[1] // self.inner.num_groups
        statistics = (value.repeat_interleave(each) for value in (mean, square - mean.square()))
        weight, bias = self.inner.weight.float(), self.inner.bias.float()
        return F.batch_norm(x, *statistics, weight, bias, training=False, eps=self.inner.eps)


@contextmanager
def plane_norms(model: nn.Module) -> Iterator[list[PlaneNorm]]:
    """All GroupNorms of a model gather and use the statistics of the whole plane inside; afterwards it is as before."""
    own = {path: module for path, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    norms = {path: PlaneNorm(module) for path, module in own.items()}
    try:
        for path, norm in norms.items():
            model.set_submodule(path, norm)
        yield list(norms.values())
    finally:
        for path, module in own.items():
            model.set_submodule(path, module)


def with_shared_norms(
    model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, tiling: Tiling, units: tuple[int, int], channels: int
) -> Tensor:
    """`run_tiled` after a pass that gathers statistics, if there is more than one tile."""
    if tiling.count == 1:
        return run_tiled(run, x, tiling, *units, channels)
    with plane_norms(model) as norms:
        for top, left in product(*tiling.begins(*(side // units[0] for side in x.shape[-2:]))):
            run(cut(x, top, left, tiling, units[0]))
        for norm in norms:
            norm.gathering = False
        return run_tiled(run, x, tiling, *units, channels)


def in_tiles(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    units: tuple[int, int],
    channels: int,
    memory: Memory,
    free: int | None,
) -> Tensor:
    """`run`, a work of the model, in as few tiles as the memory allows, and in more if it fails: float32 on the CPU.

    x is one picture; units: pixels of x, and of the result, to a position; free: bytes, None for no limit. UserError
    where not even the smallest tile fits.
    """
    height, width = (side // units[0] for side in x.shape[-2:])
    room = float("inf") if free is None else free * (1 - RESERVE)
    tiling = tiles_that_fit(height, width, room, memory) or list(tilings(height, width))[-1]
    while tiling is not None:
        try:
            return with_shared_norms(model, run, x, tiling, units, channels)
        except torch.OutOfMemoryError:
            failed = tiling
        # Here, unlike above, nothing holds on to the tensors of the attempt.
        if x.device.type == "cuda":
            torch.cuda.empty_cache()
        tiling = clearly_smaller(failed, height, width)
        if tiling:
            warnings.warn(f"VAE: no memory for {failed}; trying {tiling}", stacklevel=2)
    raise UserError(f"VAE: no memory for a tile of {8 * failed.width} x {8 * failed.height} pixels, the smallest")


def clearly_smaller(tiling: Tiling, height: int, width: int) -> Tiling | None:
    """The next tiles of at most 70 % of the area."""
    area = 0.7 * tiling.height * tiling.width
    return next((t for t in tilings(height, width) if t.height * t.width <= area), None)


@torch.no_grad()
def decode(vae: "AutoencoderKL", latents: Tensor, free: int | None = None, memory: Memory | None = None) -> Tensor:
    """latents (B, 16, h, w) -> pictures (B, 3, 8 h, 8 w) float32 in 0-1 on the CPU.

    On the device and in the dtype of `vae`, picture by picture. `free` bytes may be taken (None: whatever it takes);
    `memory` is how much a tile takes, by default the estimate for FLUX.1's layers at this VAE's width.
    """
    unit, place = 2 ** (len(vae.config.block_out_channels) - 1), vae.dtype

    def run(z: Tensor) -> Tensor:
        return vae.decode(z).sample

    latents = (latents.float() / LATENT_SCALE + LATENT_SHIFT).to(vae.device, place)
    memory = memory or estimate(vae, DECODE)
    pictures = [in_tiles(vae, run, z, (1, unit), vae.config.out_channels, memory, free) for z in latents.split(1)]
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode(vae: "AutoencoderKL", pictures: Tensor, free: int | None = None, memory: Memory | None = None) -> Tensor:
    """pictures (B, 3, H, W) in 0-1, sides multiples of 8 -> latents (B, 16, H / 8, W / 8) float32 on the CPU.

    The mean of the distribution, so that the same picture gives the same latents; otherwise as `decode`.
    """
    unit = 2 ** (len(vae.config.block_out_channels) - 1)

    def run(x: Tensor) -> Tensor:
        return vae.encode(x).latent_dist.mode()

    pixels = (pictures.float() * 2 - 1).to(vae.device, vae.dtype)
    memory = memory or estimate(vae, ENCODE)
    latents = [in_tiles(vae, run, x, (unit, 1), vae.config.latent_channels, memory, free) for x in pixels.split(1)]
    return (torch.cat(latents) - LATENT_SHIFT) * LATENT_SCALE


def estimate(vae: "AutoencoderKL", per_position: int) -> Memory:
    return Memory(per_position * vae.dtype.itemsize * vae.config.block_out_channels[0] / BASE_WIDTH)


def vae_dtype(device: torch.device | str, dtype: torch.dtype) -> torch.dtype:
    """The dtype for a VAE beside a transformer that computes in `dtype`.

    bfloat16 where the card has it in hardware (sm_80 and newer), else float32: in float16 the values overflow.
    """
    device = torch.device(device)
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if dtype == torch.bfloat16 and native else torch.float32


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that a new tensor may take on the device, what torch holds in reserve included; None where unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserve
    return free_ram() if device.type == "cpu" else None


def free_ram(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Of the machine, or of the container (cgroup v2) that this process runs in."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        return free
