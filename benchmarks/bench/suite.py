"""What a suite is: a name and a function that turns what was asked into cases, each with the work that measures it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flux_quant.benchmarks.bench.record import OURS, Row, Scalar


@dataclass(frozen=True)
class Asked:
    """The options of `flux-quant bench`. A suite ignores those it has no use for; empty means its own choice.

    model:   the user's transformer file; None with `random` for full-size random weights, without for the shipped model
    quick:   small sizes and few cases, to see that everything runs
    repeats: samples of each kind after `warm` discarded ones
    """

    model: Path | None = None
    random: bool = False
    formats: tuple[str, ...] = ()
    vram: tuple[int, ...] = ()  # bytes
    sizes: tuple[tuple[int, int], ...] = ()  # width, height in pixels
    steps: tuple[int, ...] = ()
    device: str = "cpu"
    quick: bool = False
    repeats: int = 5
    warm: int = 1


@dataclass(frozen=True)
class Case:
    """One row to be measured. `work` returns it without subject, what and rerun, or raises; what it raises is the
    note of a skipped row. Cases of one `group` are measured in turns, so that they can be compared (A B B A)."""

    what: dict[str, Scalar]
    work: Callable[[], Row]
    subject: str = OURS
    needs: float = 0.0  # seconds, roughly: where less is left the case is skipped
    group: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Suite:
    name: str
    about: str  # one line for `flux-quant bench --help`
    cases: Callable[[Asked], Iterable[Case]]
