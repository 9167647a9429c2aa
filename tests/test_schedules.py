"""Noise levels against published numbers, against diffusers' scheduler, and the beta quantile against scipy."""

import numpy as np
import pytest

from flux_quant.drawing import schedules
from flux_quant.drawing.sampling import make_scheduler
from flux_quant.drawing.schedules import beta_quantile, from_denoise, from_strength, incomplete_beta, noise_levels
from flux_quant.errors import UserError

SIZES = {  # width, height -> tokens, mu
    (256, 256): (256, 0.5000),
    (512, 512): (1024, 0.6300),
    (768, 768): (2304, 0.8467),
    (1024, 1024): (4096, 1.1500),
    (1280, 720): (3600, 1.0660),
    (1360, 768): (4080, 1.1473),
    (1920, 1072): (8040, 1.8176),
    (1920, 1088): (8160, 1.8379),
}
PUBLISHED = {  # name, steps -> levels at mu 1.15, four digits
    ("euler", 8): (1, 0.9567, 0.9045, 0.8403, 0.7595, 0.6546, 0.5128, 0.3109, 0),
    ("beta", 8): (1, 0.9812, 0.9368, 0.8655, 0.7596, 0.6080, 0.4025, 0.1610, 0),
    ("beta", 20): (
        1, 0.9960, 0.9871, 0.9743, 0.9575, 0.9368, 0.9118, 0.8822, 0.8473, 0.8067, 0.7596,
        0.7051, 0.6426, 0.5714, 0.4912, 0.4025, 0.3070, 0.2088, 0.1155, 0.0390, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("size", "expected"), SIZES.items(), ids=str)
def test_shift_is_a_straight_line_without_ends(size: tuple[int, int], expected: tuple[int, float]):
    tokens = -(-size[0] // 16) * -(-size[1] // 16)
    assert tokens == expected[0]
    assert schedules.resolution_shift(tokens) == pytest.approx(expected[1], abs=5e-5)


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items(), ids=str)
def test_published_lists(name: tuple[str, int], expected: tuple[float, ...]):
    assert noise_levels(*name, 4096, guided=True) == pytest.approx(expected, abs=5.01e-5)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 28, 50])
def test_every_list_falls_from_one_to_zero(name: str, guided: bool, steps: int):
    levels = noise_levels(name, steps, 36, guided)
    assert levels[0] == 1 and levels[-1] == 0 and len(levels) == steps + 1
    assert all(a > b for a, b in zip(levels, levels[1:], strict=False))


@pytest.mark.parametrize("tokens", [24, 256, 1020, 4096, 8160])
@pytest.mark.parametrize("steps", [1, 3, 20, 50])
@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_euler_is_the_list_of_diffusers(tokens: int, steps: int, guided: bool):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    judge = make_scheduler(guided)
    c = judge.config
    mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    judge.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    np.testing.assert_allclose(noise_levels("euler", steps, tokens, guided), judge.sigmas, rtol=3e-7)


def test_schnell_is_linear():
    assert noise_levels("euler", 4, 4096, guided=False) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert noise_levels("simple", 4, 4096, guided=False) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("steps", [3, 20, 30])
def test_simple_takes_entries_of_the_table(steps: int):
    mu = schedules.resolution_shift(8160)
    t = np.arange(1, 10_001) / 10_000
    table = np.exp(mu) / (np.exp(mu) + (1 / t - 1))
    expected = [table[-(1 + int(i * (10_000 / steps)))] for i in range(steps)] + [0]
    np.testing.assert_allclose(noise_levels("simple", steps, 8160, guided=True), expected, rtol=1e-12)


def test_beta_drops_what_comes_twice():
    levels = noise_levels("beta", 2000, 4096, guided=False)  # 1000 entries cannot give 2000 different ones
    assert 500 < len(levels) <= 1001 and len(set(levels)) == len(levels)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 0.5), (5, 1), (2, 3), (0.6, 5)], ids=str)
def test_beta_quantile_is_that_of_scipy(a: float, b: float):
    special = pytest.importorskip("scipy.special")
    points = [*np.logspace(-12, -2, 11), *np.linspace(0.01, 0.99, 25), *(1 - np.logspace(-9, -2, 8))]
    np.testing.assert_allclose([incomplete_beta(x, a, b) for x in points], special.betainc(a, b, points), rtol=5e-12)
    found = [beta_quantile(p, a, b) for p in points]
    np.testing.assert_allclose(found, special.betaincinv(a, b, points), rtol=1e-12)
    np.testing.assert_allclose([incomplete_beta(x, a, b) for x in found], points, rtol=1e-9)


def test_beta_quantile_where_it_is_known():
    """Beta(1/2, 1/2) is the arcsine law, Beta(a, 1) a power."""
    for p in (1e-9, 0.1, 0.25, 0.5, 0.9, 1 - 1e-9):
        assert beta_quantile(p, 0.5, 0.5) == pytest.approx(np.sin(np.pi * p / 2) ** 2, rel=1e-10)
        assert beta_quantile(p, 3, 1) == pytest.approx(p ** (1 / 3), rel=1e-12)
    assert (beta_quantile(0, 0.6, 0.6), beta_quantile(1, 0.6, 0.6)) == (0, 1)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("strength", [0.05, 0.3, 0.6, 0.99, 1.0])
def test_strength_begins_where_diffusers_does(steps: int, strength: float):
    levels = noise_levels("euler", steps, 1024, guided=True)
    first = int(max(steps - min(steps * strength, steps), 0))  # FluxImg2ImgPipeline.get_timesteps
    assert from_strength(levels, strength) == levels[first:]


def test_denoise_keeps_the_number_of_steps():
    def make(steps: int) -> list[float]:
        return noise_levels("simple", steps, 1024, guided=True)

    assert from_denoise(make, 20, 0.5) == make(40)[-21:]
    assert from_denoise(make, 7, 0.3) == make(23)[-8:]
    assert from_denoise(make, 20, 1.0) == make(20)


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("nan")])
def test_impossible_strength(strength: float):
    levels = noise_levels("euler", 10, 64, guided=True)
    with pytest.raises(UserError, match="strength"):
        from_strength(levels, strength)
    with pytest.raises(UserError, match="denoise"):
        from_denoise(lambda steps: levels, 10, strength)


def test_unknown_scheduler():
    with pytest.raises(UserError, match="scheduler karras is unknown; choose one of euler, simple, beta"):
        noise_levels("karras", 10, 64, guided=True)
