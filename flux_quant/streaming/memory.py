"""How much RAM there is, and how much of it may be pinned."""

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

GIB = 1 << 30
SHARE = 0.4  # of RAM: where Windows' driver stops is about half
RESERVE = 4 * GIB  # left to the system and to other programs on Linux


class Memory(NamedTuple):
    limit: int  # bytes this process may ever have
    available: int  # bytes it can get now without swapping


def pin_budget(system: str = sys.platform, root: Path = Path("/")) -> int:
    """Bytes of RAM to pin if nobody says otherwise.

    On Linux all but 4 GiB or a tenth, at least 40 %, of what the machine or the container has, and no more than is
    available now; elsewhere 40 % of RAM.
    """
    if not system.startswith("linux"):
        return int(SHARE * total_ram())
    memory = linux_memory(root)
    most = max(int(SHARE * memory.limit), min(int(0.9 * memory.limit), memory.limit - RESERVE))
    return max(0, min(most, memory.available))


def total_ram() -> int:
    if sys.platform != "win32":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    status = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: two 32-bit fields, then seven 64-bit ones
    ctypes.cast(status, ctypes.POINTER(ctypes.c_ulong))[0] = ctypes.sizeof(status)
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(status):
        raise OSError("Windows does not say how much RAM there is")
    return int(status[1])


def linux_memory(root: Path = Path("/")) -> Memory:
    """From /proc/meminfo and the limits of the control groups around this process, versions 1 and 2."""
    info = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
    total, available = (int(info[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    for group in control_groups(root):
        limit = first_number(group, "memory.max", "memory.limit_in_bytes")
        used = first_number(group, "memory.current", "memory.usage_in_bytes")
        if limit is None or limit >= total:
            continue
        total = min(total, limit)
        if used is not None:
            available = min(available, limit - used + reclaimable(group))
    return Memory(total, max(0, min(total, available)))


def control_groups(root: Path) -> list[Path]:
    """Folders with the limits of this process, from its own group to the root of the hierarchy."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        own = top / path.lstrip("/")
        found += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return found


def first_number(group: Path, *names: str) -> int | None:
    for name in names:
        try:
            return int((group / name).read_text())
        except (OSError, ValueError):  # not there, or "max": no limit
            continue
    return None


def reclaimable(group: Path) -> int:
    """Bytes of files in memory that give way when RAM is wanted: the page cache of a mapped model counts as free."""
    try:
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    names = ("inactive_file", "active_file")
    return sum(int(rows.get(f"total_{name}", rows.get(name, 0))) for name in names)


def file_mappings(root: Path = Path("/")) -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from files, where the system tells (Linux)."""
    ranges = []
    try:
        lines = (root / "proc/self/maps").read_text().splitlines()
    except OSError:
        return ranges
    for line in lines:
        addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            start, end = addresses.split("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges
