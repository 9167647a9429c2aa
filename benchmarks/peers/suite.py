"""The suite `peers`: other programs on the same work, in the same run, in turns with ours.

What is not installed is a skipped row that says how to install it; see `environments`. With everything of the present
environment alone (diffusers, gguf, libgguf) it takes less than four minutes. Cases come in the order of their weight,
for runs that have less time than all of them take; on a GPU that is layers, steps, offloaders, and conversions last.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from flux_quant.benchmarks.bench.record import Row
from flux_quant.benchmarks.bench.suite import Asked, Case, Suite
from flux_quant.benchmarks.peers import conversions, linears, steps
from flux_quant.benchmarks.peers.catalogue import PEERS
from flux_quant.benchmarks.peers.contest import Contest, subject_of

OFFLOADERS = {  # of `benchmarks.offloaders`: its name of a way -> the peer
    "diffusers group offloading, leaf": "diffusers group offload",
    "diffusers group offloading, block": "diffusers group offload",
    "accelerate cpu_offload": "accelerate",
    "mmgp profile": "mmgp",
}
WAY_SECONDS = 100.0
TYPES = {recipe: name for name, recipe in conversions.FORMATS.items()}


def cases(asked: Asked) -> Iterator[Case]:
    """asked.model or --random: FLUX.1's width for conversions too. Formats choose among steps and conversions."""
    wide = asked.random or asked.model is not None
    formats = tuple(TYPES.get(name, name) for name in asked.formats)
    layers = linears.contests(asked.device, asked.quick)
    for contest in in_order(layers, steps.contests(asked.device, asked.quick, formats), asked.device):
        yield from (case for case in contest.cases() if wanted(case, formats))
    files = (case for contest in conversions.contests(asked.quick, wide) for case in contest.cases())
    converted = [case for case in files if wanted(case, formats)]
    streamed = [offload(way, name, asked) for way, name in OFFLOADERS.items()]
    yield from (*streamed, *converted) if asked.device == "cuda" else (*converted, *streamed)


def offload(way: str, name: str, asked: Asked) -> Case:
    what = {"work": "offload", "way": way}
    return Case(what, partial(offloaded, way, asked), subject_of(PEERS[name]), needs=WAY_SECONDS)


def in_order(layers: list[Contest], whole: list[Contest], device: str) -> Iterator[Contest]:
    """On a GPU steps come before further sizes of layers."""
    first = len(linears.BITS) if device == "cuda" else len(layers)
    yield from (*layers[:first], *whole, *layers[first:])


def wanted(case: Case, formats: tuple[str, ...]) -> bool:
    return not formats or case.what.get("format", formats[0]) in formats


def offloaded(way: str, asked: Asked) -> Row:
    """The row of the smallest cap that a way runs under, by `benchmarks.offloaders` in a process of its own."""
    if asked.device != "cuda":
        raise RuntimeError(PEERS[OFFLOADERS[way]].refusal)
    small = ["--small"] if asked.quick else []
    command = [sys.executable, "-I", "-m", "flux_quant.benchmarks.offloaders", "--way", way, *small]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAY_SECONDS)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ran = next((row for row in rows if "seconds" in row), None)
    if ran is None:
        reasons = [row["why"] for row in rows if "why" in row] or done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(reasons[-1] if reasons else "ended without a word")
    values = {name: ran[name] for name in ("size", "vram", "attach_seconds")} | {"ram_bytes": ran["ram"]}
    return Row(samples={"seconds": ran["samples"]}, values=values)


SUITE = Suite("peers", "other programs on the same work, side by side with ours", cases)
