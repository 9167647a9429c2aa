"""What nvidia-smi says of a card: power, clocks, temperature, why it is throttled, its link; asked while it works.

What the driver does not know or the card does not tell is None.
"""

import re
import subprocess
from collections.abc import Callable, Sequence

Value = str | int | float | bool | None
TIMEOUT = 20


def number(text: str) -> float | None:
    """ "350.00 W" -> 350.0; None for "[N/A]"."""
    found = re.match(r"-?\d+(\.\d+)?", text)
    return float(found[0]) if found else None


def whole(text: str) -> int | None:
    found = number(text)
    return None if found is None else int(found)


def switched(text: str) -> bool | None:
    return {"enabled": True, "active": True, "yes": True, "disabled": False, "not active": False, "no": False}.get(
        text.lower()
    )


def mask(text: str) -> str | None:
    """Names of the reasons in nvmlClocksEventReasons' bits, with commas between them."""
    try:
        bits = int(text, 16)
    except ValueError:
        return None
    names = [name for bit, name in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return ", ".join([*names, *([hex(rest)] if rest else [])]) or "none"


REASONS = {  # NVML, nvmlClocksEventReasons
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
FIELDS: dict[str, tuple[str, Callable[[str], Value]]] = {  # of --query-gpu -> our name, how it is read
    "driver_version": ("driver", str),
    "pci.bus_id": ("pci", str),
    "memory.used": ("vram_used_mib", whole),
    "power.limit": ("power_limit_w", number),
    "power.draw": ("power_w", number),
    "clocks.sm": ("clock_mhz", whole),
    "clocks.max.sm": ("clock_max_mhz", whole),
    "clocks.mem": ("memory_clock_mhz", whole),
    "temperature.gpu": ("temperature_c", whole),
    "clocks_throttle_reasons.active": ("throttled_by", mask),
    "pcie.link.gen.current": ("pcie_generation", whole),
    "pcie.link.gen.max": ("pcie_generation_max", whole),
    "pcie.link.width.current": ("pcie_width", whole),
    "pcie.link.width.max": ("pcie_width_max", whole),
    "display_active": ("display", switched),
}


def query(run: Callable[[Sequence[str]], tuple[int, str]] | None = None) -> dict[str, Value]:
    """Of the first card; all None without nvidia-smi. `run`: arguments -> exit status, what was printed."""
    ask, fields = run or nvidia_smi, list(FIELDS)
    nothing = dict.fromkeys([*(name for name, _ in FIELDS.values()), "resizable_bar"])
    while fields:
        status, said = ask([f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
        if status == 0:
            return nothing | parse(said, fields) | {"resizable_bar": resizable_bar(ask(["-q", "-d", "MEMORY"])[1])}
        unknown = re.search(r'Field "(.+?)" is not a valid field', said)
        if not unknown or unknown[1] not in fields:
            break
        fields.remove(unknown[1])
    return nothing


def nvidia_smi(arguments: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(["nvidia-smi", "-i", "0", *arguments], capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired):
        return 127, ""
    return done.returncode, done.stdout + done.stderr


def parse(said: str, fields: Sequence[str]) -> dict[str, Value]:
    """The first line of csv."""
    cells = [cell.strip() for cell in said.splitlines()[0].split(",")] if said.strip() else []
    if len(cells) != len(fields):
        return {}
    rows = ((FIELDS[field], cell) for field, cell in zip(fields, cells, strict=True))
    return {name: None if cell.startswith("[") else read(cell) for (name, read), cell in rows}


def resizable_bar(said: str) -> bool | None:
    """Whether the processor sees all of the card's memory, from `nvidia-smi -q -d MEMORY`."""
    totals = {kind: re.search(rf"{kind} Memory Usage\s+Total\s+: (\d+) MiB", said) for kind in ("FB", "BAR1")}
    if not all(totals.values()):
        return None
    return int(totals["BAR1"][1]) >= int(totals["FB"][1])
