"""How scales and codes of the GGUF types are chosen for the lowest squared error: the table, and the search in torch.

Per group of 16 or 32 weights a few trial scales are rounded to codes; least squares gives the best scale (and minimum)
for each set of codes in closed form, and the best trial wins. The trials of a type are those that lowered the error
most when they were added one after the other, over Gaussian, Student-t, Laplace, log-normal and trained weights; ggml
(make_qx_quants, make_qkx3_quants) walks a regular grid of 19 or 37. What it rounds once is chosen here by error: the
integer scale of a group with its neighbours, the minimum for that scale, and `d` and `dmin` once more by least squares
over the super-block.

`kernels.cpu_quantize` does the same in loops. Blocks are scaled by a power of two first, so that squares neither
overflow nor vanish.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flux_quant.codecs import iq4
from flux_quant.codecs.choice import Choice
from flux_quant.codecs.legacy import signed_largest

TINY = 1e-12  # a group below it, in a block of magnitude 1 to 4, is zero
SINGULAR = 1e-6  # a determinant below this share of its terms
HALF_MAX = 65504.0
IMPORTANCE_FLOOR = 1e-6  # of the mean: a group whose columns are all unused is still rounded to the nearest


@dataclass(frozen=True)
class Affine:
    """value = scale * code + minimum, codes 0..high.

    A trial (a, b) maps `a` steps above the lowest to `b` steps below the highest value onto the codes.
    """

    high: int
    trials: tuple[tuple[float, float], ...]
    weighted: tuple[tuple[float, float], ...]  # further ones where elements have weights: the extremes may not matter


@dataclass(frozen=True)
class Symmetric:
    """value = scale * code, codes -high - 1..high. A trial is what the value of largest magnitude is mapped to."""

    high: int
    trials: tuple[float, ...]
    weighted: tuple[float, ...]  # further ones where elements have weights


@dataclass(frozen=True)
class Table:
    """value = scale * VALUES[code]. A trial is what the value of largest magnitude is mapped to."""

    trials: tuple[float, ...]
    weighted: tuple[float, ...]  # further ones where elements have weights


@dataclass(frozen=True)
class Search:
    rule: Affine | Symmetric | Table
    group: int
    scales: tuple[int, int] | None  # lowest and highest integer scale; None: a float16 scale per group
    spread: float | None  # ggml's element weight: importance * sqrt(spread * mean square + x^2); None: importance
    by_row: bool = False  # the mean square is that of the row, not of the block
    neighbours: tuple[int, ...] = (0, -1, 1)  # what is tried around the nearest integer scale

    @property
    def offset(self) -> int:
        """What is added to a code before it is stored."""
        return self.rule.high + 1 if isinstance(self.rule, Symmetric) else 0

    def trials(self, weighted: bool) -> tuple:
        return (*self.rule.trials, *self.rule.weighted) if weighted else self.rule.trials


# fmt: off
FOUR = Affine(
    15,
    (
        (0.1, 0.1), (0.5, -0.1), (-0.1, 0.5), (-0.9, 0.1), (0.3, 0.1), (-0.1, 0.3),
        (-1.1, 0.3), (0.3, -1.3), (0.1, 0.3), (0.1, -0.3), (-0.9, -0.9), (-0.3, 0.5),
    ),
    ((1.3, 0.1), (0.1, 1.9), (0.7, 1.3), (0.7, 0.7)),
)
FIVE = Affine(
    31,
    (
        (0, 0), (-0.8, 0.2), (0.2, -0.2), (-0.2, 0.2), (-1, -1), (-2, -1),
        (-1.2, 0), (0.2, -1.2), (0.4, -0.2), (-0.2, 0.4), (0.2, 0.2), (-0.8, -1.2),
    ),
    ((0.6, 1.6), (0.6, -0.4), (1.6, 0.6), (0.6, 0.6)),
)
TWO = Affine(
    3,
    (
        (0.3, 0.3), (0, 0.5), (0.4, 0), (0.1, 0.3), (0.5, -0.2), (0.3, 0.1),
        (-0.2, 0.1), (0.3, 0.6), (0.6, 0.3), (-0.3, 0.3),
    ),
    ((-0.3, 0.9), (0.9, -0.3), (1.5, -0.3), (0.6, 0.9)),
)
# fmt: on
IQ4 = Table((-130, 115, -122, -138, -109, 122, 107, 92), (136, -170, -94, -154))

SEARCHES: dict[str, Search] = {
    "q5_1": Search(FIVE, 32, None, 1.0, by_row=True),
    "q5_0": Search(
        Symmetric(15, (-16.2, -15, -15.8, -14, -16.8, -13), (12.7, -18.3, -17.3, -20)), 32, None, 1.0, by_row=True
    ),
    "q4_1": Search(FOUR, 32, None, 1.0, by_row=True),
    "q4_0": Search(
        Symmetric(7, (-8.2, -7.4, -8.8, -7.8, -7, -8.5), (-10.2, 5.8, 9, -12.2)), 32, None, 1.0, by_row=True
    ),
    "q6_k": Search(
        Symmetric(31, (-32, -31, -30, -29, -27.5, -26.5, -25, -28), (-24, -27, -34, -22)), 16, (-128, 127), None
    ),
    "q5_k": Search(FIVE, 32, (0, 63), 2.0),
    "q4_k": Search(FOUR, 32, (0, 63), 2.0),
    "q3_k": Search(
        Symmetric(3, (-4.2, -3.2, -4.7, -3.8), (-6.6, 5.2, 2.6, -8.8, -4.4, -2.9, -5.3, 3.8)),
        16,
        (-32, 31),
        2.0,
        neighbours=(0,),
    ),
    "q2_k": Search(TWO, 16, (0, 15), 1.0),
    "iq4_xs": Search(IQ4, 32, (-32, 31), 2.0),
    "iq4_nl": Search(IQ4, 32, None, 2.0),
}


def choose(search: Search, blocks: Tensor, weights: Tensor | None = None) -> Choice:
    """blocks (n, B) float32, element weights (n, B) or None for ones -> the codes and scales to store."""
    exponent = blocks.abs().amax(dim=1).clamp(2.0**-100, 2.0**126).log2().floor()
    unit = torch.exp2(exponent).view(-1, 1, 1)
    x = (blocks / unit.view(-1, 1)).view(len(blocks), -1, search.group)
    w = x.new_ones(()).expand_as(x) if weights is None else weights.view_as(x)
    trials = search.trials(weights is not None)
    if isinstance(search.rule, Affine):
        codes, d, m, scales, mins = choose_affine(search, trials, x, w, unit)
        mins = None if mins is None else mins.flatten(1).to(torch.int16)
    else:
        (codes, d, scales), m, mins = choose_centred(search, trials, x, w, unit), None, None
    scales = None if scales is None else scales.flatten(1).to(torch.int16)
    codes = (codes + search.offset).flatten(1).to(torch.uint8)
    restore = [None if part is None else (part * unit).view(-1, 1) for part in (d, m)]
    return Choice(codes, *restore, scales, mins)


def choose_centred(
    search: Search, trials: tuple, x: Tensor, w: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, w (n, G, L) -> codes (n, G, L), d (n, 1, 1), integer scales (n, G, 1)."""
    rule = search.rule
    largest = signed_largest(x.flatten(0, 1)).view(*x.shape[:2], 1)
    best, scale = torch.zeros_like(largest), torch.zeros_like(largest)
    for trial in (*trials, None):  # the last round starts from the best scale so far
        step = largest / trial if trial else scale
        values = levels(rule, nearest(rule, x, step))
        xq, qq = total(w * x * values), total(w * values * values)
        gain, fitted = xq * xq / qq.clamp(min=TINY), xq / qq.clamp(min=TINY)
        better = (gain > best) & (largest.abs() > TINY)
        best, scale = torch.where(better, gain, best), torch.where(better, fitted, scale)
    if search.scales is None:
        d = as_stored(scale, unit)
        return nearest(rule, x, d), d, None
    low, high = search.scales
    d = as_stored(scale.gather(1, scale.abs().argmax(dim=1, keepdim=True)) / low, unit)
    middle = (scale * inverse(d)).round()
    error = torch.full_like(scale, torch.inf)
    scales = torch.zeros_like(scale)
    for neighbour in search.neighbours:
        candidate = (middle + neighbour).clamp(low, high)
        step = d * candidate
        left = total(w * (x - step * levels(rule, nearest(rule, x, step))).square())
        scales, error = torch.where(left < error, candidate, scales), torch.minimum(left, error)
    values = scales * levels(rule, nearest(rule, x, d * scales))
    fitted = (w * x * values).sum((1, 2), True) * inverse((w * values * values).sum((1, 2), True))
    d = as_stored(fitted, unit)
    return nearest(rule, x, d * scales), d, scales


def choose_affine(
    search: Search, trials: tuple, x: Tensor, w: Tensor, unit: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """x, w (n, G, L) -> codes (n, G, L), d and m (n, 1, 1), integer scales and minimums (n, G, 1)."""
    rule = search.rule
    low, high = x.aminmax(dim=2, keepdim=True)
    if search.scales is not None:
        low = low.clamp(max=0)  # minimums are stored as positive numbers that are subtracted
    y, width = x - low, high - low
    sw, sy, syy = total(w), total(w * y), total(w * y * y)
    error = torch.full_like(low, torch.inf)
    scale, shift, count = (torch.zeros_like(low) for _ in range(3))  # count: sum of the codes
    for trial in (*trials, None):  # the last round starts from the best so far
        if trial:
            start, step = trial[0] / rule.high * width, (1 - sum(trial) / rule.high) * width / rule.high
        else:
            start, step = shift, scale
        q = nearest(rule, y - start, torch.where(width > TINY, step, 0))
        sq, sqq, syq = total(w * q), total(w * q * q), total(w * y * q)
        det = sw * sqq - sq * sq
        fit, base = (sw * syq - sy * sq) / det, (sqq * sy - sq * syq) / det
        alone = (det <= SINGULAR * sw * sqq) | (fit <= 0)
        if search.scales is not None:
            alone |= base + low > 0
        fit, base = torch.where(alone, syq * inverse(sqq), fit), torch.where(alone, 0, base)
        left = syy - fit * syq - base * sy
        better = left < error
        error = torch.where(better, left, error)
        scale, shift = torch.where(better, fit, scale), torch.where(better, base, shift)
        count = torch.where(better, sq, count)
    if search.scales is None:
        d = as_stored(scale, unit)
        m = as_stored(low + (sy - d * count) / sw, unit)
        return nearest(rule, x - m, d), d, m, None, None
    return quantize_pairs(search, x, w, unit, scale, -(low + shift), count)


def quantize_pairs(
    search: Search, x: Tensor, w: Tensor, unit: Tensor, scale: Tensor, base: Tensor, sq: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scales, minimums and sums of codes (n, G, 1) of groups -> codes, d, m, integer scales and minimums."""
    rule, top = search.rule, search.scales[1]
    d = as_stored(scale.amax(dim=1, keepdim=True) / top, unit)
    m = as_stored(base.amax(dim=1, keepdim=True) / top, unit)
    sx, sw = total(w * x), total(w)
    middle = (scale * inverse(d)).round()
    error = torch.full_like(scale, torch.inf)
    scales, mins = torch.zeros_like(scale), torch.zeros_like(scale)
    for neighbour in search.neighbours:
        s = (middle + neighbour).clamp(0, top)
        b = ((d * s * sq - sx) * inverse(sw * m)).round().clamp(0, top)
        q = nearest(rule, x + m * b, d * s)
        left = total(w * (d * s * q - m * b - x).square())
        better = left < error
        error = torch.where(better, left, error)
        scales, mins = torch.where(better, s, scales), torch.where(better, b, mins)
    q = nearest(rule, x + m * mins, d * scales)
    before = error.sum(1, True)
    d_new, m_new = refit_pair(scales * q, mins, x, w)
    d_new, m_new = as_stored(d_new, unit), as_stored(m_new.clamp(min=0), unit)
    q_new = nearest(rule, x + m_new * mins, d_new * scales)
    after = (w * (d_new * scales * q_new - m_new * mins - x).square()).sum((1, 2), True)
    better = after < before
    return torch.where(better, q_new, q), torch.where(better, d_new, d), torch.where(better, m_new, m), scales, mins


def refit_pair(a: Tensor, b: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(d, m) of least weighted (d * a - m * b - x)^2 per super-block (n, 1, 1); NaN becomes a d that loses."""
    aa, ab, bb = ((w * left * right).sum((1, 2), True) for left, right in ((a, a), (a, b), (b, b)))
    ax, bx = (w * a * x).sum((1, 2), True), (w * b * x).sum((1, 2), True)
    reciprocal = inverse(aa * bb - ab * ab)
    return (ax * bb - bx * ab) * reciprocal, (ax * ab - aa * bx) * reciprocal


def nearest(rule: Affine | Symmetric | Table, x: Tensor, step: Tensor) -> Tensor:
    """Codes of x in units of `step`, as float32; 0 where the step is 0."""
    scaled = x * inverse(step)
    if isinstance(rule, Table):
        return torch.bucketize(scaled, scaled.new_tensor(iq4.BOUNDS)).float()
    return scaled.round().clamp(0 if isinstance(rule, Affine) else -rule.high - 1, rule.high)


def levels(rule: Symmetric | Table, codes: Tensor) -> Tensor:
    return iq4.values_of(codes) if isinstance(rule, Table) else codes


def total(values: Tensor) -> Tensor:
    return values.sum(dim=2, keepdim=True)


def inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where that is not finite."""
    return torch.where(values.abs() > 1e-37, 1 / values, 0)


def as_stored(scale: Tensor, unit: Tensor) -> Tensor:
    """A scale in units of the block -> what float16 keeps of it, in the same units."""
    half = (scale * unit).clamp(-HALF_MAX, HALF_MAX).to(torch.float16)
    return half.float() / unit


def element_weights(search: Search, weight: Tensor, importance: Tensor, block: int) -> Tensor:
    """weight (..., K) float32, importance (K,) -> (n, block): ggml's weight of an element, up to a factor per block."""
    weights = settled(importance).expand_as(weight)
    if search.spread is not None:
        x = weight.reshape(-1, weight.shape[-1] if search.by_row else block)
        if search.by_row:
            share = (x * row_roots(x).unsqueeze(1)).square()
        else:
            x = x * inverse(x.abs().amax(dim=1, keepdim=True))
            share = x.square() * inverse(search.spread * x.square().mean(dim=1, keepdim=True))
        weights = weights * (1 + share).sqrt().view_as(weight)
    return weights.reshape(-1, block)


def settled(importance: Tensor) -> Tensor:
    """Importance with a mean of 1 and nothing below IMPORTANCE_FLOOR; ones where it says nothing."""
    importance = importance.to(torch.float64)
    mean = importance.mean()
    return torch.where(mean > 0, (importance / mean).clamp(min=IMPORTANCE_FLOOR), 1.0).float()


def row_roots(rows: Tensor) -> Tensor:
    """(N, K) -> (N,) float32: 1 / root mean square of each row, 0 for a row of zeros."""
    squares = torch.stack([row.double().square().mean() for row in rows])
    return torch.where(squares > 0, squares.rsqrt(), 0).clamp(max=1e30).float()
