"""Rows of a long measurement: each is written as soon as it is known, and what fails or finds no time left is named."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flux_quant.benchmarks.machine import RESULTS, fingerprint, result_path, write_result
from flux_quant.errors import UserError

Row = dict[str, object]
FAILURES = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, OSError, ImportError, UserError)


@dataclass
class Journal:
    """`<machine>/<date>-suite.json` with `rows`; those that could not be had, and why, in `skipped`."""

    suite: str
    seconds: float  # that all rows may take together
    save: bool = False
    folder: Path = RESULTS
    facts: Row = field(default_factory=dict)  # of the whole suite
    rows: list[Row] = field(default_factory=list)
    skipped: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.machine = fingerprint()

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def path(self) -> Path:
        return result_path(self.suite, self.folder, str(self.machine["date"])[:10])

    def row(self, what: Row, work: Callable[[], Row], needs: float = 0.0) -> Row | None:
        """what | work(), written and returned. None for one that fails, or `needs` more seconds than are left."""
        return self.into(self.rows, what, lambda: what | work(), needs)

    def into(self, rows: list[Row], what: Row, work: Callable[[], Row], needs: float = 0.0) -> Row | None:
        """The same for a list of the suite's `facts`, where `what` only names the row if there is none."""
        if self.left < needs:
            return self.skip(what, f"{max(0.0, self.left):.0f} s were left, it needs {needs:.0f} s")
        start = time.monotonic()
        try:
            row = work()
        except FAILURES as error:
            return self.skip(what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        row["took"] = round(time.monotonic() - start, 2)
        rows.append(row)
        self.write()
        return row

    def skip(self, what: Row, why: str) -> None:
        self.skipped.append(what | {"why": why})
        print(f"skipped {', '.join(f'{value}' for value in what.values())}: {why}", flush=True)
        self.write()

    def write(self) -> None:
        if self.save:
            result = {**self.facts, "rows": self.rows, "skipped": self.skipped}
            write_result(self.suite, result, self.folder, self.machine)
