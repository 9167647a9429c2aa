"""What LoRAs add to one linear layer, computed beside its weight: exact whatever the weight is stored in.

    y = W x + b      becomes      y + sum over files of strength * (change of W, and of b)

    LoRA   s B (A x): one product with the factors A of all files, one with the factors B for each set of rows that
           files change, which adds to its rows of the output and to nothing else
    LoKr   s (w1 (x) w2) x: x as a matrix (b, q), from both sides
    LoHa   s (a1 b1 * a2 b2) x: as a LoRA of rank r1 r2, or dense where that is cheaper
    DoRA   rows of the output, or columns of the input, take a gain g = m / |W + s dW|: strength acts on g - 1

Everything is relative to W, so the order of files means nothing. A strength is a number that is read at every call:
changing it touches no tensor. Order of work and of rounding for activations in 16 bits: the layer's own output,
rounded; A x summed in float32, rounded; B (A x) summed in float32 on top of the output, rounded. Gains and biases are
float32. Under autocast everything has the dtype of the layer. Factors of another dtype are converted at each call.
Sources: arXiv 2106.09685 (LoRA), 2309.14859 (LoKr, LoHa), 2402.09353 (DoRA).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from flux_quant.formats import QuantFormat
from flux_quant.kernels import dispatch

Linear = Callable[[Tensor], Tensor]
Move = Callable[[Tensor], Tensor]


class Packed(Protocol):
    """What is asked of a layer: `linear.QuantLinear`."""

    in_features: int
    fmt: QuantFormat
    bias: Tensor | None

    @property
    def parts(self) -> Sequence[Tensor]: ...


@dataclass(eq=False)
class Dial:
    """The strength of every file at this moment; layers read it."""

    values: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Piece:
    """Ranks [first, last) of the common first product: those of one file, with its own scale."""

    source: int  # number of the file
    scale: float
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Up:
    """Second factors (n, R) of all files that change these rows, side by side."""

    rows: slice
    weight: Tensor
    pieces: tuple[Piece, ...]

    def add_(self, out: Tensor, hidden: Tensor, strengths: Sequence[float]) -> None:
        """out (M, N) += strength * scale * hidden (M, all ranks) @ weight^T, in its rows."""
        scales = [strengths[piece.source] * piece.scale for piece in self.pieces]
        if not any(scales):
            return
        first, last = self.pieces[0].first, self.pieces[-1].last
        if len(set(scales)) == 1 and last - first == self.weight.shape[1]:
            add_product_(out[:, self.rows], hidden[:, first:last], self.weight, scales[0])
            return
        parts = [hidden[:, p.first : p.last] * scale for p, scale in zip(self.pieces, scales, strict=True)]
        add_product_(out[:, self.rows], torch.cat(parts, dim=1), self.weight, 1.0)


@dataclass(frozen=True, eq=False)
class Other:
    """A change that is no product of two matrices, as its own factors."""

    source: int
    kind: str  # "lokr", "loha" or "diff"
    rows: slice
    columns: int
    scale: float
    factors: Mapping[str, Tensor]
    row_gain: Tensor | None = None  # (n,)
    column_gain: Tensor | None = None  # (K,)

    def add_(self, out: Tensor, x: Tensor, strengths: Sequence[float]) -> None:
        scale = strengths[self.source] * self.scale
        if not scale:
            return
        x = x[:, : self.columns]
        if self.column_gain is not None:
            x = (x * self.column_gain.to(x.device)).to(x.dtype)
        factors = {name: factor.to(x) for name, factor in self.factors.items()}
        rows = out[:, self.rows]
        if self.row_gain is None:
            ADD[self.kind](rows, x, factors, scale)
        else:
            alone = torch.zeros_like(rows)
            ADD[self.kind](alone, x, factors, scale)
            rows.add_(alone * self.row_gain.to(out.device))


@dataclass(frozen=True, eq=False)
class Gain:
    """g - 1 of a DoRA, float32: (n,) for its rows, or (K,) for its columns."""

    source: int
    rows: slice
    excess: Tensor


@dataclass(frozen=True, eq=False)
class BiasChange:
    source: int
    rows: slice
    change: Tensor  # (n,) float32


def add_product_(out: Tensor, x: Tensor, weight: Tensor, scale: float) -> None:
    """out (M, n), its rows may lie apart, += scale * x (M, r) @ weight (n, r)^T, without a temporary on CUDA."""
    out.addmm_(x, weight.to(x).t(), alpha=scale)


def add_lokr_(out: Tensor, x: Tensor, factors: Mapping[str, Tensor], scale: float) -> None:
    """Row i p + j of kron(w1 (a, b), w2 (p, q)) is w1[i] (x) w2[j]."""
    one = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
    two = [factors["w2"]] if "w2" in factors else [factors["w2_b"], factors["w2_a"]]
    (a, b), p, q = one.shape, len(two[-1]), two[0].shape[1]
    x, out = x.unflatten(1, (b, q)), out.unflatten(1, (a, p))
    one = one.expand(len(x), a, b)
    if a * q < b * p:  # the smaller temporary
        x = torch.bmm(one, x)
        *inner, last = two
        for factor in inner:
            x = x @ factor.t()
        out.baddbmm_(x, last.t().expand(len(x), -1, -1), alpha=scale)
        return
    for factor in two:
        x = x @ factor.t()
    out.baddbmm_(one, x, alpha=scale)


def add_loha_(out: Tensor, x: Tensor, factors: Mapping[str, Tensor], scale: float) -> None:
    a1, b1, a2, b2 = (factors[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    n, k, rank = len(a1), b1.shape[1], a1.shape[1] * a2.shape[1]
    if rank * (n + k) < n * k:
        down = (b1[:, None] * b2[None]).flatten(0, 1)
        up = (a1[:, :, None] * a2[:, None]).flatten(1)
        add_product_(out, x @ down.t(), up, scale)
    else:
        add_product_(out, x, (a1 @ b1) * (a2 @ b2), scale)


def add_diff_(out: Tensor, x: Tensor, factors: Mapping[str, Tensor], scale: float) -> None:
    add_product_(out, x, factors["value"], scale)


ADD = {"lokr": add_lokr_, "loha": add_loha_, "diff": add_diff_}


@dataclass(eq=False)
class SidePath:
    """All that is added to one layer: an adapter of `linear.QuantLinear`."""

    dial: Dial
    layer: Packed  # x may have more columns than it has inputs: the others count as zeros of its weight
    down: Tensor | None = None  # (R, K): first factors of all files
    ups: list[Up] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    row_gains: list[Gain] = field(default_factory=list)
    column_gains: list[Gain] = field(default_factory=list)
    biases: list[BiasChange] = field(default_factory=list)

    def __post_init__(self) -> None:
        terms = (*self.others, *self.row_gains, *self.column_gains, *self.biases)
        pieces = (piece for up in self.ups for piece in up.pieces)
        self.sources = tuple(sorted({term.source for term in (*terms, *pieces)}))

    @property
    def version(self) -> tuple[float, ...]:
        """The strengths in force: equal values mean equal results."""
        return tuple(self.dial.values[source] for source in self.sources)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that has to be on the device, always the same objects."""
        return [tensor for tensor in self._tensors() if tensor is not None]

    def _tensors(self) -> Iterator[Tensor | None]:
        yield self.down
        yield from (up.weight for up in self.ups)
        for other in self.others:
            yield from (*other.factors.values(), other.row_gain, other.column_gain)
        yield from (gain.excess for gain in (*self.row_gains, *self.column_gains))
        yield from (bias.change for bias in self.biases)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def move_(self, move: Move) -> None:
        """Every tensor becomes move(tensor), as an object it stays."""
        for tensor in self.tensors:
            tensor.data = move(tensor.data)

    def __call__(self, x: Tensor, linear: Linear) -> Tensor:
        """x (..., K) -> (..., N), with `linear` for the layer without this."""
        own = self.layer.in_features
        narrow = x if x.shape[-1] == own else x[..., :own].contiguous()
        strengths = self.dial.values
        if not any(strengths[source] for source in self.sources):
            return linear(narrow)
        out = self.gained(narrow, linear, strengths) if self.row_gains or self.column_gains else linear(narrow)
        if out.requires_grad:
            out = out.clone()  # autograd lets nobody write into what an operator of ours returned
        flat, rows = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        if self.down is not None:
            hidden = rows[:, : self.down.shape[1]] @ self.down.to(rows).t()
            for up in self.ups:
                up.add_(flat, hidden, strengths)
        for other in self.others:
            other.add_(flat, rows, strengths)
        for bias in self.biases:
            if strengths[bias.source]:
                flat[:, bias.rows].add_(strengths[bias.source] * bias.change.to(flat.device))
        return out

    def gained(self, x: Tensor, linear: Linear, strengths: Sequence[float]) -> Tensor:
        """The layer's own output with the gains of DoRAs, which do not act on its bias."""
        out = linear(x)
        if out.requires_grad:
            out = out.clone()
        flat = out.view(-1, out.shape[-1])
        if self.row_gains:
            gain = torch.zeros(flat.shape[1], dtype=torch.float32, device=x.device)
            for row in self.row_gains:
                gain[row.rows] += strengths[row.source] * row.excess.to(x.device)
            flat.mul_(1 + gain)
            if self.layer.bias is not None:
                flat.sub_(gain * self.layer.bias)
        for column in self.column_gains:
            if strengths[column.source]:
                scaled = (x * (strengths[column.source] * column.excess.to(x.device))).to(x.dtype)
                more = dispatch.linear(scaled, self.layer.fmt, self.layer.parts)
                flat[:, column.rows] += more.view(flat.shape)[:, column.rows]
        return out
