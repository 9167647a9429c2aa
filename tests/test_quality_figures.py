"""Metrics against outside judges and by hand; intervals; captions."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from flux_quant.benchmarks import metrics
from flux_quant.benchmarks.quality import figures
from flux_quant.benchmarks.quality.prompts import NAMES, PLACES, REAL, SHIPPED, Wanted, by_rule
from flux_quant.benchmarks.quality.retrieval import Judge, open_judge
from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld, Scene


def pictures(*shape: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth pictures and noisy ones of them, in 0-1."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(*shape, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(rough, 5, 1, 2)
    return smooth, (smooth + noise * torch.randn(shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (33, 48), (11, 17)])
@pytest.mark.parametrize("noise", [0.003, 0.05, 0.4])
def test_ssim_and_psnr_are_those_of_scikit_image(height: int, width: int, noise: float):
    judge = pytest.importorskip("skimage.metrics")
    a, b = pictures(3, 3, height, width, noise=noise)
    ours = metrics.ssim(a, b), metrics.psnr(a, b)
    for i in range(len(a)):
        x, y = a[i].double().numpy(), b[i].double().numpy()
        options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0, data_range=1.0)
        assert ours[0][i].item() == pytest.approx(judge.structural_similarity(x, y, **options), abs=1e-6)
        assert ours[1][i].item() == pytest.approx(judge.peak_signal_noise_ratio(x, y, data_range=1.0), abs=1e-3)


def test_ssim_by_hand():
    """Two flat pictures: nothing but the term of the means is left."""
    a, b = torch.full((1, 3, 20, 13), 0.25), torch.full((1, 3, 20, 13), 0.5)
    expected = (2 * 0.25 * 0.5 + 1e-4) / (0.25**2 + 0.5**2 + 1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert metrics.ssim(a, a).item() == 1
    with pytest.raises(ValueError, match="larger than 10 pixels, these are 10 x 20"):
        metrics.ssim(a[..., :10], a[..., :10])


def test_lpips_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path):
    if (reason := metrics.lpips_obstacle()) and "weights of its backbone" not in reason:
        pytest.skip(reason)
    from torchvision.models import alexnet

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "weights of its backbone" in metrics.lpips_obstacle()
    file = tmp_path / "checkpoints" / metrics.BACKBONE
    file.parent.mkdir()
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), file)
    assert metrics.lpips_obstacle() == ""
    metrics.lpips_model.cache_clear()
    a, b = pictures(3, 3, 48, 32, noise=0.2)
    found = metrics.lpips(a, torch.cat([a[:1], b[1:]]))
    assert found.shape == (3,) and found[0] == 0 and (found[1:] > 0).all()
    metrics.lpips_model.cache_clear()


def test_lpips_is_left_out_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    assert metrics.lpips_obstacle() == "LPIPS left out: the package lpips is not installed"


def test_errors_and_cosines_by_hand():
    expected = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 0.0]]])  # (2 prompts, 2 tokens, 2 channels)
    found = expected + torch.tensor([[[0.0, 0.5], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    assert figures.relative_errors(found, expected).tolist() == pytest.approx([0.1, 1.0])
    assert figures.cosines(found, expected).tolist() == pytest.approx([25 / (25.25**0.5 * 5), 0.5**0.5])
    assert figures.relative_errors(found[None], expected[None]).shape == (1, 2)


@pytest.mark.parametrize("count", [2, 7, 40])
def test_intervals_are_those_of_scipy(count: int):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(count).lognormal(size=count)
    low, high = figures.bootstrap(values)
    drawn = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    expected, width = drawn.confidence_interval, values.std() / count**0.5
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.1 * width)
    assert (low, high) == figures.bootstrap(values) and low < values.mean() < high


def test_summaries():
    found = figures.summary("psnr_db", [30.0, 50.0, 40.0])
    assert (found["psnr_db"], found["psnr_db_worst"]) == (40, 30)
    assert 30 <= found["psnr_db_low"] < 40 < found["psnr_db_high"] <= 50
    assert figures.summary("velocity_error", [0.5]) == {"velocity_error": 0.5, "velocity_error_worst": 0.5}
    one, other = {"psnr_db": 90.0, "velocity_error": 1e-6}, {"psnr_db": 80.0, "velocity_error": 1e-7, "ssim": 1.0}
    assert figures.worse_of([one, other]) == {"psnr_db_floor": 80.0, "velocity_error_floor": 1e-6}
    assert figures.worse_of([]) == {}


@pytest.fixture(scope="module")
def judge() -> Judge:
    found, reason = open_judge()
    return found or pytest.skip(reason)


def test_captions_follow_their_rule(judge: Judge):
    assert by_rule(judge.world) == NAMES
    for wanted in SHIPPED:
        scene = Scene(judge.world.names.index(wanted.name), wanted.size, wanted.position, wanted.colour, False, 0)
        assert judge.world.caption(scene) == wanted.caption and not judge.world.held_out(scene)
    assert len(set(REAL)) == len(REAL) == 10


def test_judge_counts_what_was_wanted():
    """On drawn stand-ins for emoji: bars at three places, each under the name it is asked for by, then by others."""
    world = EmojiWorld.__new__(EmojiWorld)
    world.names, world.bitmaps = ["left bar", "middle bar", "right bar"], []
    for i in range(3):
        world.bitmaps.append(Image.new("RGBA", (136, 128)))
        ImageDraw.Draw(world.bitmaps[-1]).rectangle((10 + 40 * i, 10, 30 + 40 * i, 100 - 20 * i), fill="navy")
    wanted = [Wanted(name, *place) for name in world.names for place in PLACES]
    scenes = [Scene(i // 2, w.size, w.position, w.colour, False, 0) for i, w in enumerate(wanted)]
    drawn = torch.from_numpy(np.stack([world.render(scene) for scene in scenes])).permute(0, 3, 1, 2)
    judge = Judge(world)
    assert judge.right(drawn, wanted) == [1.0] * 6
    assert judge.right(drawn[[2, 1, 0, 3, 4, 5]], wanted) == [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert len(judge.kept) == 2


def test_judge_without_font_or_fonttools(monkeypatch: pytest.MonkeyPatch):
    for error, reason in ((ImportError(), "fonttools"), (FileNotFoundError(), "NotoColorEmoji")):
        monkeypatch.setattr(EmojiWorld, "__init__", lambda self, error=error: (_ for _ in ()).throw(error))
        found, why = open_judge()
        assert found is None and reason in why
