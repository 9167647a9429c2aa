"""A report as plain values, before anything is rendered: text in order, no markup in it."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Column:
    name: str
    right: bool = True  # holds numbers
    code: bool = False  # holds commands


@dataclass(frozen=True)
class Line:
    """A row of a table. `status` of the row it shows; `anchor`, where others can point at it."""

    cells: tuple[str, ...]
    status: str = ""
    anchor: str = ""
    unstable: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Series:
    """Points of one colour and one way of drawing. kind: a status, or "bound"."""

    name: str
    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    """shape: "lines" or "points" over a numeric x, or "bars", one for every name of `names` and series."""

    slug: str
    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    shape: str = "lines"
    names: tuple[str, ...] = ()
    case: str = ""  # model, machine and what else is not on the axes
    about: str = ""

    @property
    def whole_title(self) -> str:
        return f"{self.title}: {self.case}" if self.case else self.title


@dataclass(frozen=True)
class Picture:
    title: str
    path: Path
    kind: str  # png, jpeg, webp
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Section:
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    pictures: tuple[Picture, ...] = ()
    folded: bool = False  # HTML shows its title alone until it is opened

    @property
    def slug(self) -> str:
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())

    @property
    def empty(self) -> bool:
        return not (self.text or self.tables or self.plots or self.pictures)


@dataclass(frozen=True)
class Report:
    title: str
    claims: tuple[Line, ...]  # one cell each
    summary: str
    sections: tuple[Section, ...]
