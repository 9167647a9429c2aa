"""Amounts of memory as people write them, and the budget of GPU memory that a plan has to keep."""

import re
from dataclasses import dataclass

from flux_quant.errors import UserError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
RESERVE = 500_000_000  # bytes left free for the desktop, and for what the driver takes as it goes


@dataclass(frozen=True)
class Budget:
    """The most that may be taken on the device by everything together, CUDA's own part included."""

    nbytes: int
    why: str  # where it comes from
    reserve: int = 0  # bytes of the device that are to stay free besides

    @classmethod
    def of(cls, text: str | None, free: int, source: str, reserve: int = RESERVE) -> "Budget":
        """`text` as the user wrote it, or `free` (`source` says of what) less a reserve. UserError if nothing is left.

        A budget above what is free is lowered to it.
        """
        if text is None:
            if free <= reserve:
                raise UserError(f"{source} is {amount(free)}, less than the {amount(reserve)} that is left alone")
            why = f"{source}, {amount(free)}, less {amount(reserve)}" if reserve else source
            return cls(free - reserve, why, reserve)
        wanted = parse_amount(text, "budget")
        if wanted > free:
            return cls(free, f"{source}; {text} is more than there is")
        return cls(wanted, f"--vram {text}", min(reserve, free - wanted))


def parse_amount(text: str, what: str = "amount") -> int:
    """ "8GB", "7.5 GiB", "900MB" -> bytes. UserError with the form that is expected."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*((?:[kmgt]i?)?b)\s*", text.lower())
    if not found:
        raise UserError(f"{what} {text!r}: write it as a number with its unit, for example 8GB, 7.5GiB or 900MB")
    nbytes = int(float(found[1]) * UNITS[found[2].upper()])
    if nbytes < 1:
        raise UserError(f"{what} {text}: should be more than nothing")
    return nbytes


def amount(nbytes: float) -> str:
    """1234567890 -> 1.23 GB."""
    unit = next((unit for unit in ("GB", "MB", "KB") if nbytes >= UNITS[unit]), "B")
    return f"{nbytes / UNITS[unit]:.2f} {unit}" if unit == "GB" else f"{nbytes / UNITS[unit]:.0f} {unit}"
