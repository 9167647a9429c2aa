"""Noise levels of the steps: plain lists, from the first level down to 0, so N steps have N + 1 entries.

A model predicts the velocity v = noise - x0 at x = sigma noise + (1 - sigma) x0. What differs between tools is only at
which sigmas it is asked. Big pictures need more steps at high noise, so [dev] shifts the levels by the number of image
tokens; [schnell] was distilled without a shift.

    euler    equal steps, shifted: black-forest-labs/flux `sampling.py`, diffusers' FlowMatchEulerDiscreteScheduler
    simple   ComfyUI `simple_scheduler`: entries of a table of shifted levels at equal distances
    beta     ComfyUI `beta_scheduler`: entries at quantiles of Beta(0.6, 0.6), which crowd at both ends. diffusers'
             `use_beta_sigmas` is another function: quantiles between the ends of the shifted list

ComfyUI's own default is the shift of 4096 tokens at any size; here the shift follows the size, as in its node
ModelSamplingFlux. Both are the same at 1024 x 1024.
"""

from collections.abc import Callable
from math import exp, lgamma, log, log1p

from flux_quant.errors import UserError

BASE_TOKENS, BASE_SHIFT = 256, 0.5
MAX_TOKENS, MAX_SHIFT = 4096, 1.15
TABLE = {True: 10_000, False: 1_000}  # entries of ComfyUI's table: ModelSamplingFlux, and ModelSamplingDiscreteFlow
BETA = 0.6  # both parameters of ComfyUI's beta list
FULL_DENOISE = 0.9999  # ComfyUI takes more for 1


def resolution_shift(tokens: int) -> float:
    """mu for a picture of `tokens` image tokens: a straight line, not bounded at either end."""
    return BASE_SHIFT + (tokens - BASE_TOKENS) * (MAX_SHIFT - BASE_SHIFT) / (MAX_TOKENS - BASE_TOKENS)


def shifted(t: float, mu: float) -> float:
    """The level at time t in 0-1; mu = 0 leaves it as it is."""
    return t if mu == 0 or t == 0 else exp(mu) / (exp(mu) + (1 / t - 1))


def euler(steps: int, mu: float, guided: bool = True) -> list[float]:
    return [shifted(1 - i / steps, mu) for i in range(steps)] + [0.0]


def simple(steps: int, mu: float, guided: bool = True) -> list[float]:
    entries = TABLE[guided]
    return [shifted((entries - int(i * (entries / steps))) / entries, mu) for i in range(steps)] + [0.0]


def beta(steps: int, mu: float, guided: bool = True) -> list[float]:
    """Entries that come twice are left out: with very many steps the list is shorter."""
    entries = TABLE[guided]
    places = [round(beta_quantile(1 - i / steps, BETA, BETA) * (entries - 1)) for i in range(steps)]
    return [shifted((place + 1) / entries, mu) for place in dict.fromkeys(places)] + [0.0]


SCHEDULES: dict[str, Callable[[int, float, bool], list[float]]] = {"euler": euler, "simple": simple, "beta": beta}


def noise_levels(name: str, steps: int, tokens: int, guided: bool) -> list[float]:
    """The list of that name for a picture of `tokens` tokens; guided: [dev] (shifted), else [schnell]."""
    if name not in SCHEDULES:
        raise UserError(f"scheduler {name} is unknown; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](steps, resolution_shift(tokens) if guided else 0.0, guided)


def from_strength(levels: list[float], strength: float) -> list[float]:
    """The part of a list that changes a given picture by `strength` in 0-1: as diffusers' img2img, fewer steps."""
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength}: choose more than 0, up to 1")
    steps = len(levels) - 1
    return levels[min(int(steps - steps * strength), steps - 1) :]


def from_denoise(make: Callable[[int], list[float]], steps: int, denoise: float) -> list[float]:
    """ComfyUI's KSampler: the last `steps` steps of a longer list, so that their number stays.

    make: number of steps -> levels. A denoise of 0.5 begins where a strength of 0.5 does, with twice as many steps.
    """
    if not 0 < denoise <= 1:
        raise UserError(f"denoise {denoise}: choose more than 0, up to 1")
    if denoise > FULL_DENOISE:
        return make(steps)
    return make(int(steps / denoise))[-(steps + 1) :]


def beta_quantile(p: float, a: float, b: float) -> float:
    """x in 0-1 with I_x(a, b) = p, the regularized incomplete beta function: scipy's `betaincinv(a, b, p)`.

    By halving, on the smaller tail, in the logarithm of x: relative error below 1e-12 for a and b of 0.5 to 5.
    """
    if p <= 0 or p >= 1:
        return float(p > 0)
    upper = p > incomplete_beta(0.5, a, b)
    if upper:
        p, a, b = 1 - p, b, a
    low, high = -700.0, log(0.5)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if incomplete_beta(exp(middle), a, b) < p else (low, middle)
    x = exp((low + high) / 2)
    return 1 - x if upper else x


def incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) by its continued fraction (Abramowitz and Stegun 26.5.8), evaluated from the first term on (Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log1p(-x)) / a
    value, c, d = 1.0, 1.0, 0.0
    for i in range(300):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d)
        c = 1 + term / c
        factor = c * d
        value *= factor
        if i and abs(factor - 1) < 1e-16:
            break
    return front * (value - 1)
