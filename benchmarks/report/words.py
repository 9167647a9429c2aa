"""How names and numbers of results are written: the unit is the end of a name, and every figure shows what it rests on.

    measured 1.25 s     emulated (1.25 s)     predicted ≈1.25 s     reported by others “1.25 s”     bound ≥1.25 s

An emulated row comes from a larger card under a cap. Its times are in brackets and claim nothing; what it says of
memory and of pictures holds. These marks are part of the text, so that no rendering can lose them.
"""

import re
from collections.abc import Callable, Sequence
from math import isinf, isnan
from statistics import median, quantiles

from flux_quant.benchmarks.bench.record import EMULATED, PREDICTED, REPORTED, Row, Scalar

NONE = "-"
BOUND = "bound"  # no status of a row: what physics permits
UPPER = {"snr", "psnr", "ssim", "lpips", "vram", "ram", "rss", "gpu", "cpu", "gemm", "vae", "t5", "bf16", "fp8", "pcie"}
UPPER |= {"sm", "clip", "rope", "pci", "iqr"}
NAMES = {
    "seconds": "time",
    "predicted_seconds": "predicted",
    "bound_seconds": "bound",
    "bits_per_weight": "bits/weight",
    "nbytes": "size",
    "bytes": "size",
    "joules": "energy",
    "gb_per_s": "speed",
    "bytes_per_s": "speed",
}
NEARLY_ONE = ("cosine", "ssim")  # beginnings of names whose digits count behind the nines
SIZES = {"vram", "ram", "budget"}  # names without a unit that hold bytes
USUAL = ("16-bit", "float32")  # ways of computing that need no mention
MUTE = ("yes", "no", "none", "all")  # words that say nothing without their name
TIERS = ("tier", "vram")  # names of `what` that say how much memory: bytes, or as after --vram
HIGHER_IS_BETTER = ("_per_s", "_per_second", "_db", "cosine", "accuracy", "ssim", "psnr", "snr", "throughput", "hidden")


def number(value: float) -> str:
    """Three digits that count; all of a whole number, thousands apart."""
    if isnan(value):
        return NONE
    if isinf(value):
        return "∞" if value > 0 else "-∞"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    if abs(value) < 1:
        return f"{value:.3g}"
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    """In the first unit, of the falling ones given, that makes it at least one."""
    if isnan(value) or isinf(value):
        return number(value)
    name, scale = next(((name, scale) for name, scale in units if abs(value) >= scale), units[-1 if value else 0])
    return f"{number(value / scale)} {name}"


def duration(seconds: float) -> str:
    """0.00125 -> 1.25 ms; minutes and hours from two upwards."""
    long = (("h", 3600.0),) if abs(seconds) >= 7200 else (("min", 60.0),)
    return scaled(seconds, long if abs(seconds) >= 120 else (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def size(nbytes: float) -> str:
    """12_500_000_000 -> 12.5 GB."""
    return scaled(nbytes, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def decibels(value: float) -> str:
    return f"{value:.1f} dB" if abs(value) < 1e9 else number(value)


def after(text: str) -> Callable[[float], str]:
    return lambda value: f"{number(value)} {text}"


# end of a name -> how its numbers are written; the first that fits
UNITS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("gb_per_s", after("GB/s")),
    ("gbit_per_s", after("Gbit/s")),
    ("tflop_per_s", after("TFLOP/s")),
    ("tflops", after("TFLOP/s")),
    ("mweights_per_s", after("Mweights/s")),
    ("_per_s", after("/s")),
    ("_ms", after("ms")),
    ("seconds", duration),
    ("bytes", size),
    ("_db", decibels),
    ("joules", after("J")),
    ("watts", after("W")),
    ("_gb", after("GB")),
    ("_mhz", after("MHz")),
    ("percent", lambda value: f"{value:.2f} %"),
    ("share", lambda value: f"{value:.0%}"),
)
TIMES = ("seconds", "_per_s", "_ms", "joules", "watts", "tflops")  # what a cap on memory does not carry over


NO_CARD = ("cpu", "cpu only", "none")
BYTES = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20}
QUALIFIERS = (
    "at_least",
    "worst",
    "floor",
    "low",
    "high",
    "most",
    "mean",
    "median",
    "min",
    "max",
    "p95",
)  # behind the unit


def unqualified(name: str) -> str:
    """psnr_db_worst -> psnr_db"""
    return next((name.removesuffix(f"_{word}") for word in QUALIFIERS if name.endswith(f"_{word}")), name)


def ends(name: str, end: str) -> bool:
    return name == end.lstrip("_") or name.endswith(end if end.startswith("_") else f"_{end}")


def has_unit(name: str) -> bool:
    return any(ends(unqualified(name), end) for end, _ in UNITS)


def is_time(name: str) -> bool:
    """Whether it is of speed or energy, as also a ratio of times is."""
    return name.startswith("times_") or any(ends(unqualified(name), end) for end in TIMES)


def budget(value: object) -> float | None:
    """Bytes of 8000000000, "8GB", "7.5 GiB"; 0 for a processor alone; None for anything else."""
    if isinstance(value, str):
        if value.strip().lower() in NO_CARD:
            return 0.0
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", value.strip())
        return float(found[1]) * BYTES[found[2]] if found else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None


def higher_is_better(name: str) -> bool:
    return any(ends(unqualified(name), end) for end in HIGHER_IS_BETTER)


def label(name: str) -> str:
    """The heading of a column: weight_snr_db -> weight SNR."""
    if name in NAMES or name.isupper():
        return NAMES.get(name, name)
    base = unqualified(name)
    unit = next((end for end, _ in UNITS if ends(base, end)), "")
    words = [*(base.removesuffix(unit) or base).split("_"), *name.removeprefix(base).split("_")]
    return " ".join(word.upper() if word in UPPER else word for word in words if word)


def show(name: str, value: object) -> str:
    """One value in the unit of its name."""
    if value is None or value == "":
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if isnan(value):
        return NONE
    base = unqualified(name)
    if name in SIZES and value >= 1e6 or base.startswith("bytes_") and not base.endswith("_per_s"):
        return size(value)
    if base.startswith(NEARLY_ONE):
        return f"{value:.5f}"
    return next((write for end, write in UNITS if ends(base, end)), number)(value)


def marked(text: str, status: str, time: bool = True) -> str:
    """A figure that shows its status. `time`: of speed or energy, which an emulated row does not claim."""
    if text == NONE or status == EMULATED and not time:
        return text
    return {EMULATED: f"({text})", PREDICTED: f"≈{text}", REPORTED: f"“{text}”", BOUND: f"≥{text}"}.get(status, text)


def sampled(row: Row) -> list[str]:
    """Kinds of samples to show: what is sampled by prompt has its mean among the values, what is by step is no set."""
    return [name for name in row.samples if name not in row.values and not name.endswith("_by_step")]


def spread(samples: Sequence[float]) -> str:
    """Half of the middle half over the median; nothing for fewer than three samples."""
    middle = median(samples)
    if len(samples) < 3 or not middle:
        return ""
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return f" ±{(high - low) / 2 / abs(middle):.1%}"


def show_samples(name: str, samples: Sequence[float]) -> str:
    """Median and spread: 1.25 s ±0.4%."""
    return show(name, median(samples)) + spread(samples) if samples else NONE


def between(name: str, low: object, high: object, word: str = " to ") -> str:
    """26 to 35 s: the unit once where both have the same."""
    texts = show(name, low), show(name, high)
    number, _, unit = texts[0].rpartition(" ")
    return f"{number if number and texts[1].endswith(f' {unit}') else texts[0]}{word}{texts[1]}"


def listed(parts: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1]))) if parts else ""


def show_what(what: dict[str, Scalar]) -> str:
    """A case in a few words: q4_k_s, 512x512, 4 steps."""
    return ", ".join(
        text if isinstance(value, str) and text not in MUTE else f"{label(name)} {text}"
        for name, value in what.items()
        if (text := show(name, value)) != NONE
    )
