"""What a suite is: a name and a function that turns what was asked into cases, each with the work that measures it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from flux_quant.benchmarks.bench.record import OURS, Row, Scalar


@dataclass(frozen=True)
class Asked:
    """The options of `flux-quant bench`. A suite ignores those it has no use for; empty means its own choice.

    model:   the user's transformer file; None with `random` for full-size random weights, without for the shipped model
    quick:   small sizes and few cases, to see that everything runs
    repeats: samples of each kind after `warm` discarded ones
    limits:  what the machine can do, as `Run.limits` has it: for bounds
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
    limits: Mapping[str, object] = field(default_factory=dict)
    seconds: float = inf  # that this suite may take


def nothing() -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One row to be measured. `work` returns it without subject, what and rerun, or raises; what it raises is the
    note of a skipped row.

    group:  cases of one group, one after the other in the list, are measured in turns so that they can be compared:
            A B B A A B ..., each until it has `repeats` samples and at least two turns. A call of `work` then returns
            one sample of a kind, or more; all are kept, of `values` those of the last call, of `memory` the most.
            Without a group `work` is called once and takes its own samples. Warming up is `work`'s own affair, in its
            first call.
    close:  called when nothing of the group is called any more, also where a resumed run did not call it at all: what
            `work` had kept is let go
    """

    what: dict[str, Scalar]
    work: Callable[[], Row]
    subject: str = OURS
    needs: float = 0.0  # seconds of a call, roughly: where less is left the case is skipped
    group: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)
    close: Callable[[], None] = nothing


@dataclass(frozen=True)
class Suite:
    name: str
    about: str  # one line for `flux-quant bench --help`
    cases: Callable[[Asked], Iterable[Case]]
    weights: Callable[[Asked], dict[str, Scalar]] | None = None  # `Run.weights`, where it is not what `Asked` says
