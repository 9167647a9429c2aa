"""Tiles of the VAE: they cover, fade into each other, fit the memory, shrink after a failure, and change little."""

import json
import math
import warnings
import weakref
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_quant.arch import LATENT_SCALE, LATENT_SHIFT
from flux_quant.benchmarks import vae_tiles
from flux_quant.benchmarks.machine import newest_result
from flux_quant.components import BUNDLED, find_components
from flux_quant.drawing import vae
from flux_quant.drawing.vae import (
    Memory,
    PlaneNorm,
    Tiling,
    decode,
    encode,
    places,
    ramps,
    run_tiled,
    tiles_that_fit,
    tilings,
)
from flux_quant.errors import UserError
from flux_quant.loading import load_vae

GRIDS = [(12, 12), (16, 17), (40, 23), (64, 64), (90, 160), (128, 128), (134, 240), (16, 300)]


@pytest.fixture(scope="module")
def bundled():
    return load_vae(find_components(BUNDLED).vae)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """(1, 3, 256, 384)."""
    return vae_tiles.discs()


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_tiles_cover_and_overlap(grid: tuple[int, int]):
    found = list(tilings(*grid))
    assert found[0] == Tiling(1, 1, *grid)
    assert [t.count for t in found] == sorted(t.count for t in found)
    for tiling in found:
        for length, tile, count in zip(grid, (tiling.height, tiling.width), (tiling.rows, tiling.columns), strict=True):
            begins = places(length, tile, count)
            assert tile >= min(vae.SMALLEST, length) and len(begins) == count
            assert begins[0] == 0 and begins[-1] + tile == length
            for a, b in pairwise(begins):
                assert a + tile - b >= math.floor(tile / vae.OVERLAP), "neighbours overlap by a quarter"


def test_more_memory_never_means_smaller_tiles():
    memory = Memory(1000.0, fixed=5e5)
    for grid in GRIDS:
        found = [tiles_that_fit(*grid, free, memory) for free in (0, 6e5, 1e6, 2e6, 5e6, 1e7, 1e8)]
        assert found[0] is None and found[-1] == Tiling(1, 1, *grid)
        counts = [tiling.count for tiling in found if tiling]
        assert counts == sorted(counts, reverse=True)
        for tiling, free in zip(found, (0, 6e5, 1e6, 2e6, 5e6, 1e7, 1e8), strict=True):
            assert tiling is None or memory.nbytes(tiling.height, tiling.width) <= free


def test_one_tile_fades_out_as_the_next_fades_in():
    begins = places(40, 16, 3)
    total = torch.zeros(40 * 8)
    for begin in begins:
        weight = ramps(begin, 16, begins, 8)
        assert weight.min() > 0 and weight.max() == 1
        slopes = weight.diff().abs()
        assert slopes.max() <= 1 / (4 * 8) + 1e-6, "a line over the whole overlap"
        total[begin * 8 : (begin + 16) * 8] += weight
    torch.testing.assert_close(total, torch.ones(320))


@pytest.mark.parametrize("units", [(1, 8), (8, 1)], ids=["decode", "encode"])
@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
def test_work_that_looks_at_one_position_does_not_change(grid: tuple[int, int], units: tuple[int, int]):
    def run(x: Tensor) -> Tensor:
        if units[0] == 1:
            return F.interpolate(x[:, :3], scale_factor=8)
        return F.avg_pool2d(x, 8)[:, :3]

    x = torch.randn(2, 4, grid[0] * units[0], grid[1] * units[0], generator=torch.Generator().manual_seed(1))
    for tiling in list(tilings(*grid))[:12]:
        torch.testing.assert_close(run_tiled(run, x, tiling, *units, 3), run(x), rtol=1e-5, atol=1e-6)


MEASURED = {  # tiles -> dB to one piece of decoding 256 x 384, and encoding; measured: a little more
    2: (50, 34),
    3: (49, 32),
    4: (45, 29),
    6: (45, 29),
    12: (41, 26),
}


@pytest.mark.parametrize(("count", "least"), MEASURED.items(), ids=str)
def test_tiles_of_the_bundled_model(count: int, least: tuple[int, int], bundled, picture: Tensor):
    """Attention sees each tile alone, so more and smaller tiles differ more."""
    whole = encode(bundled, picture)
    tiling = next(t for t in tilings(32, 48) if t.count == count)
    memory, free = Memory(1.0), tiling.height * tiling.width / (1 - vae.RESERVE) + 1
    assert tiles_that_fit(32, 48, free * (1 - vae.RESERVE), memory) == tiling
    pixels = psnr(decode(bundled, whole, free, memory), decode(bundled, whole))
    latents = psnr(encode(bundled, picture, free, memory), whole)
    assert least[0] <= pixels < 60 and least[1] <= latents < 60


def test_fading_hides_the_seams(bundled, picture: Tensor, monkeypatch: pytest.MonkeyPatch):
    """Where one tile would end and the next begin, the difference to the whole makes no jump."""
    z = encode(bundled, picture)
    whole, tiling = decode(bundled, z), tiles_that_fit(32, 48, 450, Memory(1.0))
    begins = places(48, tiling.width, tiling.columns)
    seams = [8 * (a + tiling.width + b) // 2 for a, b in pairwise(begins)]

    def jump() -> float:
        difference = decode(bundled, z, 500, Memory(1.0)) - whole
        return max((difference[..., x] - difference[..., x - 1]).square().mean().sqrt().item() for x in seams)

    faded = jump()

    def cut(begin: int, tile: int, others: list[int], unit: int) -> Tensor:
        return (ramps(begin, tile, others, unit) > 0.5).float() + 1e-9

    monkeypatch.setattr(vae, "ramps", cut)
    cutting = jump()
    assert cutting > 1.25 * faded, (cutting, faded)  # measured: 1.4 times


def test_norms_of_the_whole_plane(bundled, picture: Tensor, monkeypatch: pytest.MonkeyPatch):
    """Tiles with shared statistics are nearer to the whole than tiles with their own; the model stays as it was."""
    z = encode(bundled, picture)
    whole, modules = decode(bundled, z), list(bundled.modules())
    shared = psnr(decode(bundled, z, 500, Memory(1.0)), whole)
    assert all(a is b for a, b in zip(bundled.modules(), modules, strict=True))
    monkeypatch.setattr(vae, "with_shared_norms", lambda model, *work: run_tiled(*work[:3], *work[3], work[4]))
    assert shared > psnr(decode(bundled, z, 500, Memory(1.0)), whole) + 4


@pytest.mark.parametrize("shape", [(1, 32, 6, 10), (1, 32, 60)], ids=["plane", "attention"])
@torch.no_grad()
def test_gathered_statistics_are_those_of_group_norm(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(4)
    inner = nn.GroupNorm(8, 32, eps=1e-6)
    for parameter in inner.parameters():
        parameter.normal_(generator=generator)
    x = torch.randn(shape, generator=generator) * 3 + 1
    norm = PlaneNorm(inner)
    half = shape[-1] // 2
    for part in (x[..., :half], x[..., half:]):
        assert torch.equal(norm(part), inner(part))
    norm.gathering = False
    found = torch.cat([norm(x[..., :half]), norm(x[..., half:])], dim=-1)
    torch.testing.assert_close(found, inner(x), rtol=1e-5, atol=1e-5)
    rounded = norm(x.bfloat16())
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - inner(x)).abs().max() < 0.1


def test_a_failure_puts_the_norms_back(bundled):
    modules = list(bundled.modules())
    with pytest.raises(RuntimeError, match="stop"), vae.plane_norms(bundled) as norms:
        assert len(norms) == sum(isinstance(module, nn.GroupNorm) for module in modules) > 10
        raise RuntimeError("stop")
    assert all(a is b for a, b in zip(bundled.modules(), modules, strict=True))


def test_whole_is_what_diffusers_gives(bundled, picture: Tensor):
    x = picture[..., :128, :160]
    with torch.no_grad():
        z = (bundled.encode(x * 2 - 1).latent_dist.mean - LATENT_SHIFT) * LATENT_SCALE
        y = (bundled.decode(z / LATENT_SCALE + LATENT_SHIFT).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(encode(bundled, x), z)
    torch.testing.assert_close(decode(bundled, z), y)
    assert psnr(y, x) > 20


class Fake(nn.Module):
    """An AutoencoderKL that upsamples, and fails above an area as a full card does."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(block_out_channels=(128, 1, 1, 1), out_channels=3, latent_channels=16)

    def __init__(self, area: int) -> None:
        super().__init__()
        self.area, self.seen, self.garbage = area, [], []

    def decode(self, z: Tensor) -> SimpleNamespace:
        assert len(z) == 1, "one picture at a time"
        assert not any(ref() is not None for ref in self.garbage), "the failed attempt still holds its tensors"
        self.seen.append(tuple(z.shape[-2:]))
        work = torch.zeros(9)
        if z.shape[-2] * z.shape[-1] > self.area:
            self.garbage.append(weakref.ref(work))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return SimpleNamespace(sample=F.interpolate(z[:, :3], scale_factor=8))


def test_smaller_tiles_after_a_failure():
    z = torch.randn(2, 16, 64, 96, generator=torch.Generator().manual_seed(2))
    fake = Fake(area=1500)
    with pytest.warns(UserWarning, match=r"VAE: no memory for .*; trying \d+ tiles of \d+ x \d+ pixels") as caught:
        found = decode(fake, z)
    torch.testing.assert_close(found, decode(Fake(area=10**9), z), rtol=1e-5, atol=1e-6)
    areas = [height * width for height, width in dict.fromkeys(fake.seen)]
    assert areas[0] == 64 * 96 and areas == sorted(areas, reverse=True) and areas[-1] <= 1500
    assert all(b <= 0.7 * a for a, b in pairwise(areas)) and len(areas) <= 6
    assert len(caught) == 2 * (len(areas) - 1)


def test_no_memory_even_for_the_smallest_tile():
    fake = Fake(area=16 * 16 - 1)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no memory for a tile of 128 x 128 pixels"):
        decode(fake, torch.zeros(1, 16, 40, 40))


def test_other_errors_pass():
    class Broken(Fake):
        def decode(self, z: Tensor) -> SimpleNamespace:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        decode(Broken(0), torch.zeros(1, 16, 4, 4))


def test_the_estimate_chooses_the_first_tiles():
    per_position = 2178 * 64 * 4  # ComfyUI's estimate for FLUX.1's decoder in float32
    for positions, expected in ((96 * 64, (64, 96)), (96 * 64 - 1, None), (16 * 16 - 1, (16, 16))):
        fake = Fake(area=10**9)
        with warnings.catch_warnings(record=True):
            decode(fake, torch.zeros(1, 16, 64, 96), int(per_position * positions / (1 - vae.RESERVE)) + 9)
        height, width = fake.seen[0]
        assert height * width <= max(positions, 256) and (expected is None or (height, width) == expected)
        assert len(set(fake.seen)) == 1


def test_memory_line_is_fitted():
    line = Memory(1234.5, 6.5e6)
    measured = [(h * w, line.nbytes(h, w)) for h, w in ((16, 16), (64, 64), (90, 160))]
    fitted = Memory.fitted(measured)
    assert (fitted.per_position, fitted.fixed) == pytest.approx((1234.5, 6.5e6))


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 0), torch.bfloat16, torch.bfloat16),
        ((12, 0), torch.bfloat16, torch.bfloat16),
        ((7, 5), torch.bfloat16, torch.float32),
        ((6, 1), torch.bfloat16, torch.float32),
        ((8, 9), torch.float16, torch.float32),
        ((8, 9), torch.float32, torch.float32),
    ],
)
def test_float32_where_bfloat16_is_missing(monkeypatch: pytest.MonkeyPatch, capability, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert vae.vae_dtype("cuda", dtype) == expected
    assert vae.vae_dtype("cpu", dtype) == torch.float32


def test_free_ram_knows_containers(tmp_path: Path):
    machine = vae.free_ram(tmp_path)  # no such files: the machine alone
    assert machine > 1e8
    (tmp_path / "memory.current").write_text("300000000\n")
    for limit, most in (("max", machine * 1.5), ("500000000", 200_000_000), ("100", 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert vae.free_ram(tmp_path) <= most
    (tmp_path / "memory.max").write_text("500000000")
    assert vae.free_ram(tmp_path) == 200_000_000
    assert vae.free_memory("cpu") > 0 and vae.free_memory("meta") is None


@pytest.mark.gpu
def test_decoding_keeps_to_the_memory_that_is_left(bundled):
    """The bundled VAE under a cap that holds a quarter of the plane: smaller tiles, no error, nearly the same."""
    torch.cuda.empty_cache()
    model, z = bundled.to("cuda"), torch.randn(1, 16, 128, 128, generator=torch.Generator().manual_seed(0))
    torch.cuda.reset_peak_memory_stats()
    whole = decode(model, z)
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    cap = before + (peak - torch.cuda.memory_allocated()) // 2
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.warns(UserWarning, match="VAE: no memory for one piece"):
            capped = decode(model, z)  # as if all memory were free: it fails, and shrinks
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        bundled.to("cpu")
    assert psnr(capped, whole) > 25


def test_the_document_says_what_was_measured():
    path = newest_result("vae_tiles", machine="cpu")
    text = (Path(__file__).parents[1] / "docs" / "generating.md").read_text()
    assert vae_tiles.sentence(json.loads(path.read_text())["rows"]) in " ".join(text.split())
