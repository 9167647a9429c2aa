"""A run of the suite as tables, those of docs/quality.md.

python -I -m flux_quant.benchmarks.quality.table RESULTS.json
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from flux_quant.benchmarks.bench.record import MEASURED, Row, Run, Scalar, read_run
from flux_quant.errors import UserError

NONE = "-"


def tables(run: Run) -> dict[str, list[str]]:
    """Lines of Markdown: formats with their floor, velocity error by step, sensitivity by block if it is known."""
    found: dict[str, list[Row]] = {"format": [], "floor": [], "block": []}
    for row in run.rows:
        if row.status == MEASURED:
            found[str(row.what["part"])].append(row)
    formats, blocks = found["format"], found["block"]
    made = {"formats": of_formats(formats), "steps": of_steps(formats)}
    return made | ({"blocks": of_blocks(blocks)} if blocks else {})


def of_formats(rows: Sequence[Row]) -> list[str]:
    heads = "format | bits/weight | weight SNR (worst tensor) | velocity error | cosine | PSNR (worst) | SSIM | right"
    lines = [f"| {heads} |", "|---" + "|---:" * heads.count("|") + "|"]
    for row in rows:
        v = row.values
        cells = [
            named(row),
            number(v.get("bits_per_weight"), 2),
            pair(v, "weight_snr_db", 1, " dB"),
            percent(v, "velocity_error"),
            number(v.get("cosine_last"), 5),
            pair(v, "psnr_db", 1, " dB"),
            number(v.get("ssim"), 4),
            share(v.get("accuracy"), row.what["prompts"]),
        ]
        lines.append(line(cells))
    v, prompts = rows[0].values, rows[0].what["prompts"]
    floor = [
        "floor",
        NONE,
        NONE,
        tiny(v["velocity_error_floor"]),
        number(v.get("cosine_last_floor"), 5),
        number(v.get("psnr_db_floor"), 1, " dB"),
        number(v.get("ssim_floor"), 4),
        share(v.get("accuracy_floor"), prompts),
    ]
    return [*lines, line(floor)]


def of_steps(rows: Sequence[Row]) -> list[str]:
    """Velocity error at the beginning of the steps that were looked at."""
    begin, ends = "velocity_error_step_", ("_low", "_high")
    steps = [name for name in rows[0].values if name.startswith(begin) and not name.endswith(ends)]
    heads = ["format", *(f"step {name.removeprefix(begin)} of {rows[0].what['steps']}" for name in steps)]
    lines = [line(heads), "|---" + "|---:" * len(steps) + "|"]
    return lines + [line([named(row), *(percent(row.values, name, False) for name in steps)]) for row in rows]


def of_blocks(rows: Sequence[Row]) -> list[str]:
    lines = ["| block | format | parameters | velocity error | PSNR (worst) |", "|---|---|---:|---:|---:|"]
    for row in rows:
        v = row.values
        count = f"{v['parameters'] / 1e6:.2f} M"
        cells = [f"`{row.what['block']}`", str(row.what["format"]), count, percent(v, "velocity_error")]
        lines.append(line([*cells, pair(v, "psnr_db", 1, " dB")]))
    return lines


def named(row: Row) -> str:
    what = row.what
    extra = [str(what["compute"])] if what["compute"] != "16-bit" else []
    extra += [f"activations {what['activations']}"] if what["activations"] != "float32" else []
    return ", ".join([str(what["format"]), *extra])


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: Scalar, digits: int, unit: str = "") -> str:
    return NONE if value is None else f"{value:.{digits}f}{unit}"


def pair(values: dict[str, Scalar], name: str, digits: int, unit: str) -> str:
    """The mean, and the worst in brackets."""
    if values.get(name) is None:
        return NONE
    return f"{number(values[name], digits, unit)} ({number(values.get(f'{name}_worst'), digits)})"


def percent(values: dict[str, Scalar], name: str, interval: bool = True) -> str:
    """With its interval; errors below a ten thousandth are told by their power of ten."""
    value, low, high = values[name], values.get(f"{name}_low"), values.get(f"{name}_high")
    if value < 1e-4:
        return tiny(value)
    ends = f" ({100 * low:.2f} to {100 * high:.2f})" if interval and low is not None else ""
    return f"{100 * value:.2f} %{ends}"


def tiny(value: float) -> str:
    return "0" if not value else f"{value:.0e}"


def share(value: Scalar, count: Scalar) -> str:
    return NONE if value is None else f"{round(value * count)} of {count}"


def main() -> int:
    try:
        made = tables(read_run(Path(sys.argv[1] if len(sys.argv) > 1 else "")))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for lines in made.values():
        print(*lines, "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
